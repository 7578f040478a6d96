"""Results: how they are named, and what is damaged or cannot be evaluated is one line."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from core_runs import F, coder, setup
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation import core_run
from gemma_scope_jax.evaluation.core_run import evaluate_core
from gemma_scope_jax.evaluation.report import core_doubts, frontier
from gemma_scope_jax.evaluation.results import (
    coder_id,
    plain,
    read_result,
    result_path,
    write_result,
)

pytestmark = pytest.mark.usefixtures("runs_at_once")


def test_a_damaged_saving_is_one_line(measured, model, text, tmp_path, monkeypatch):
    _, coders, _ = measured
    data, plan, config = setup(model, text)
    monkeypatch.setattr(core_run, "SAVED_EVERY", -1.0)
    monkeypatch.setattr(core_run._Saved, "remove", lambda self: None)
    evaluate_core(model, coders[:1], data, plan, config, str(tmp_path))
    (saved,) = tmp_path.glob("partial-*.npz")
    for document in tmp_path.glob("core/*.json"):
        document.unlink()
    whole = dict(np.load(saved))
    rows = whole["0/columns"]
    for change in (
        {"0/columns": rows[:, :, :3]},
        {"0/columns": rows.astype(np.float32)},
        {"0/run spliced": np.zeros(3)},
        {"0/fired": whole["0/fired"][0]},
        {"fitted": np.zeros(2)},
        {"work/coders": np.array([7])},
        {"work/coders": np.array(["a"])},
        {"fitted": None},
    ):
        arrays = {k: v for k, v in (whole | change).items() if v is not None}
        np.savez(saved, **arrays)
        with pytest.raises(InputError, match=r"partial-.*damaged .*delete it"):
            evaluate_core(model, coders[:1], data, plan, config, str(tmp_path))
    saved.write_bytes(saved.read_bytes()[:100])
    with pytest.raises(InputError, match=r"partial-.*damaged .* delete it"):
        evaluate_core(model, coders[:1], data, plan, config, str(tmp_path))


def test_a_damaged_document_is_one_line(measured, model, text, tmp_path):
    """Whatever JSON allows, where a finished document is read in place of a measurement."""
    out, coders, results = measured
    shutil.copytree(out, tmp_path / "out")
    path = Path(result_path(tmp_path / "out", "core", *coder_id(coders[0])))
    whole = json.loads(path.read_text())

    def refused(change, text_of=json.dumps):
        broken = json.loads(json.dumps(whole))
        change(broken)
        path.write_text(text_of(broken))
        with pytest.raises(InputError, match=path.name) as error:
            evaluate_core(model, coders[:1], *setup(model, text), str(tmp_path / "out"))
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    metrics, more = "eval_result_metrics", "eval_result_unstructured"
    for part in (metrics, more, "eval_config", "eval_type_id"):
        refused(lambda r, part=part: r.update({part: [3]}))
    for value in ([], {}, "x", True):
        refused(lambda r, value=value: r[metrics]["sparsity"].update(l0=value))
        refused(lambda r, value=value: r[more]["groups"]["position"][1].update(fvu=value))
    for number in ("NaN", "Infinity", "1e400", "9" * 400):
        refused(
            lambda r: r[metrics]["sparsity"].update(l0=-7.125),
            lambda r, number=number: json.dumps(r).replace("-7.125", number),
        )
    refused(lambda r: r[metrics]["token_stats"].clear())
    refused(lambda r: r[more].update(groups={"position": 3}))
    refused(lambda r: r[more]["density_histogram"]["counts"].pop())
    refused(lambda r: r[more].pop("density_histogram"))
    refused(lambda r: r.update(sae_lens_id="\ud800"))
    refused(lambda r: None, lambda r: "[" * 100_000)


@pytest.mark.parametrize(
    ("factor", "threshold", "message"),
    [
        (1e12, None, r"FVU \d\.\d+e\+2\d: reconstructions are worse than the mean"),
        (1e30, None, "reconstructions are not finite numbers"),
        (1, np.inf, "no feature was ever active"),
    ],
)
def test_what_cannot_be_a_coder_is_said(model, text, tmp_path, capsys, factor, threshold, message):
    """On stderr and in the document, which would only have -1 for what overflowed."""
    bad = coder(seed=0)
    bad = bad.replace(w_dec=bad.w_dec * np.float32(factor))
    if threshold is not None:
        bad = bad.replace(threshold=jnp.full(F, threshold, jnp.float32))
    data, plan, config = setup(model, text, 60)
    (result,) = evaluate_core(model, [bad], data, plan, config, str(tmp_path))
    for found in (result, read_result(next(tmp_path.glob("core/*.json")))):
        assert any(re.match(message, w) for w in found["eval_result_unstructured"]["warnings"])
    said = core_doubts([result])
    assert any(re.match(f"sae-resid_post-layer-1: .*{message}", line) for line in said)


def test_frontier():
    points = [(10, 0.5), (20, 0.3), (15, 0.6), (20, 0.4), (40, 0.3), (50, 0.1)]
    assert frontier(points, higher=False) == [(10, 0.5), (20, 0.3), (50, 0.1)]
    assert frontier([(1, 0.2), (2, 0.1), (3, 0.9)], higher=True) == [(1, 0.2), (3, 0.9)]


def test_names_of_results(tmp_path):
    named = lambda path: coder(seed=0).replace(info=CoderInfo(path=path))
    assert coder_id(named("gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium")) == (
        "gemma-scope-2-270m-pt",
        "resid_post/layer_12_width_16k_l0_medium",
    )
    release, name = coder_id(named("/runs/a/sae"))
    assert name == "sae" and re.fullmatch("folder-[0-9a-f]{8}", release)
    assert coder_id(named("/runs/b/sae")) not in ((release, name), coder_id(named("/runs/a/sae")))
    assert coder_id(named("packaged")) == ("gemma_scope_jax", "packaged")
    assert coder_id(coder(seed=0))[1] == "sae-resid_post-layer-1"
    result = {"eval_type_id": "core", "sae_lens_release_id": "acme/a", "sae_lens_id": "sae"}
    assert write_result(tmp_path, result).name == "acme_a_sae_eval_results.json"
    assert plain({"a": (np.float32(np.nan), np.arange(2))}, -1) == {"a": [-1, [0, 1]]}
    with pytest.raises(TypeError):
        plain({"a": object()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not usable as JSON"),
        ("[]", "not the result of an evaluation"),
        ('{"eval_type_id": "core"}', "lacks .*eval_config"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_result(tmp_path / "x.json")
