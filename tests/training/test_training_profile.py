"""`profile` traces a few passes of a run that trains."""

import gzip

import pytest

import gemma_scope_jax as gs
import training_runner


def test_a_run_leaves_a_trace_with_the_names_of_its_steps(tmp_path):
    training_runner.run(tmp_path / "run", profile=tmp_path / "profile", checkpoint_every=1e9)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    [events] = (tmp_path / "profile").rglob("*.trace.json.gz")
    assert gzip.decompress(events.read_bytes()).count(b"jit") > 1
    with pytest.raises(gs.InputError, match="not empty; give a new folder"):
        training_runner.run(tmp_path / "other", profile=tmp_path / "profile")
