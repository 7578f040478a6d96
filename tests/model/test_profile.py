"""A profile reads like the model: the steps' names in the program, and the trace itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.model import profile
from gemma_scope_jax.model.profile import StepTrace
from tiny import tiny_model

STEPS = {
    "embed",
    "attention/norm",
    "attention/qkv",
    "attention/rope",
    "attention/scores",
    "attention/out",
    "attention/post_norm",
    "mlp/norm",
    "mlp/gate",
    "mlp/up",
    "mlp/act",
    "mlp/down",
    "mlp/post_norm",
    "unembed",
    "write_resid_post/encode",
    "write_resid_post/decode",
}


def test_every_step_has_its_name_in_the_lowered_program():
    model = tiny_model(gs.PRESETS["gemma-3-1b"], layers=2)
    shapes = (32, 50), (50,), (50,), (50, 32), (32,)
    sae = gs.SparseCoder(*(jnp.ones(s) for s in shapes), layer=1)
    lowered = jax.jit(gs.forward).lower(model, np.ones((1, 5), np.int32), [gs.splice(sae)])
    names = re.findall(r'loc\("(jit\(forward\)[^"]*)"', lowered.as_text(debug_info=True))
    assert {s for s in STEPS if any(f"/{s}/" in name for name in names)} == STEPS


def steps(trace, count):
    with trace:
        for n in range(count):
            trace.done(jnp.ones(3) * n)


def test_a_few_steps_are_traced_and_it_is_said_where(tmp_path, caplog):
    folder = tmp_path / "new" / "profile"
    steps(StepTrace(folder), profile.WARM_UP + profile.STEPS + 2)
    [trace] = folder.rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    [record] = caplog.records
    assert f"{folder}: the profile of {profile.STEPS} steps" in record.getMessage()


def test_a_run_too_short_for_a_profile_says_so(tmp_path, caplog):
    steps(StepTrace(tmp_path), 2)
    assert "no profile: the run had 2 steps" in caplog.text
    assert not list(tmp_path.rglob("*.pb"))


def test_without_a_folder_nothing_is_traced(caplog):
    steps(StepTrace(None), 20)
    assert not caplog.records


def test_folders_that_cannot_hold_a_profile_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(gs.InputError, match=f"{tmp_path}: not empty; give a new folder"):
        StepTrace(tmp_path)
    with pytest.raises(gs.InputError, match="file: cannot hold a profile"):
        StepTrace(tmp_path / "file")
