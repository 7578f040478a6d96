"""The core evaluation as a job: documents, resuming, tables, plots."""

import shutil
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from core_runs import (
    CORE_NAMES,
    DETAIL_NAMES,
    D,
    F,
    Killed,
    coder,
    goes_on,
    kill_after,
    setup,
    written,
)
from gemma_scope_jax.coders.coder import weights_identity
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation import core_run
from gemma_scope_jax.evaluation.core import core_config
from gemma_scope_jax.evaluation.core_run import evaluate_core
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure
from gemma_scope_jax.evaluation.report import core_tables
from gemma_scope_jax.evaluation.results import ENVELOPE
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.progress import console
from letters import Letters

pytestmark = pytest.mark.usefixtures("runs_at_once")


# -------------------------------------------------------------------------------------------------
# Documents


def test_documents_have_saebenchs_schema(measured):
    out, _, results = measured
    assert [r["eval_type_id"] for r in results] == ["core", "core", "replacement"]
    for result in results:
        assert set(result) == set(ENVELOPE)
        assert result["eval_result_details"] == []  # they are in the files
    for result in written(out, results)[:2]:
        for group, names in CORE_NAMES.items():
            numbers = result["eval_result_metrics"][group]
            assert all(isinstance(numbers[name], int | float) for name in names)
        assert len(result["eval_result_details"]) == F
        assert set(result["eval_result_details"][7]) >= DETAIL_NAMES
        assert result["eval_result_metrics"]["misc_metrics"]["features"] == F
    quality = results[0]["eval_result_metrics"]["reconstruction_quality"]
    assert quality["explained_variance"] == pytest.approx(1 - quality["fvu"])
    both = results[2]["eval_result_metrics"]["model_performance_preservation"]
    one = results[0]["eval_result_metrics"]["model_performance_preservation"]
    assert both["ce_loss_without_sae"] == pytest.approx(one["ce_loss_without_sae"])
    assert both["ce_loss_with_sae"] != pytest.approx(one["ce_loss_with_sae"], rel=1e-3)


def test_finished_coders_are_read_and_new_ones_measured(
    measured, model, folders, text, monkeypatch, caplog
):
    caplog.set_level("INFO")
    out, coders, results = measured
    data, plan, config = setup(model, text)
    seen = []
    real = core_run.measure
    monkeypatch.setattr(
        core_run, "measure", lambda *a, **k: seen.append(len(a[1])) or real(*a, **k)
    )
    again = evaluate_core(model, coders, data, plan, config, out, replacement=True)
    assert seen == [] and again == results
    more = evaluate_core(model, [coders[0], load_coder(folders / "sae_1")], data, plan, config, out)
    assert seen == [1] and more[0] == results[0]
    assert "measured before" in caplog.text
    monkeypatch.chdir(text)  # a text is known by its content, not by how its path is spelled
    near, near_plan, spelled = setup(model, "../" + text.name)
    spelled["dataset"] = "./" + text.name
    assert evaluate_core(model, coders, near, near_plan, spelled, out) == results[:2]
    assert seen == [1]
    with pytest.raises(InputError, match="another loss_tokens .*150, now 40.*another folder"):
        evaluate_core(model, coders, *setup(model, text, 40), out)


@pytest.mark.parametrize("at", [1, 9])
def test_a_killed_run_goes_on(measured, model, text, tmp_path, monkeypatch, at):
    """Killed in the first or the second pass: the same figures, nothing run twice."""
    steps = kill_after(monkeypatch, at)
    monkeypatch.setattr(core_run, "SAVED_EVERY", -1.0)
    goes_on(measured, model, text, tmp_path)
    assert steps == ["fit"] * steps.count("fit") + ["loss"] * steps.count("loss")
    assert {"fit", "loss"} == set(steps)


@pytest.mark.parametrize("at", [1, 2])
def test_killed_while_documents_are_written(measured, model, text, tmp_path, monkeypatch, at):
    """What has been measured is not measured again, whichever of the documents are there."""
    steps, made = kill_after(monkeypatch, 10**6), []
    real = core_run.core_result

    def result(*arguments):
        made.append(arguments)
        if len(made) == at:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(core_run, "core_result", result)
    goes_on(measured, model, text, tmp_path)
    assert len(made) == 3  # two, and the one it was killed in
    batches = len(list(setup(model, text)[0]))
    assert steps.count("fit") == batches


def test_killed_when_all_is_written(measured, model, text, tmp_path, monkeypatch):
    _, coders, _ = measured
    kill = lambda self: (_ for _ in ()).throw(Killed)
    with monkeypatch.context() as patch:
        patch.setattr(core_run._Saved, "remove", kill)
        with pytest.raises(Killed):
            evaluate_core(model, coders, *setup(model, text), str(tmp_path), replacement=True)
    steps = kill_after(monkeypatch, 1)
    evaluate_core(model, coders, *setup(model, text), str(tmp_path), replacement=True)
    assert not steps and not list(tmp_path.glob("partial-*"))


def test_all_of_the_text(model, text, caplog):
    """Without a number of tokens: the text's own, which nobody knows before."""
    caplog.set_level("INFO")
    data = EvaluationText(
        TextData(files=(f"{text}/a.txt",)), Letters(), batch_size=2, context_size=32
    )
    config = core_config(data, EvaluationPlan(), model, "fruit", False)
    (result,) = evaluate_core(model, [coder()], data, EvaluationPlan(), config)
    stats = result["eval_result_metrics"]["token_stats"]
    counted = sum(int(batch.mask.sum()) for batch in data)
    assert stats["total_tokens_eval_sparsity_variance"] == counted
    assert "how they fit, all of the text" in caplog.text


def test_batches_that_can_be_read_again_are_not_kept(model, text):
    data = EvaluationText(
        TextData(files=(f"{text}/a.txt",)), Letters(), batch_size=1, context_size=32
    )
    alive = []

    class Batches:
        def __iter__(self):
            for batch in data:
                alive.append(weakref.ref(batch.mask))
                assert sum(ref() is not None for ref in alive) < 4
                yield batch

    plan = EvaluationPlan(ablations=("zero",))
    found = measure(model, [coder()], Batches(), plan).tallies[0].metrics()
    kept = measure(model, [coder()], iter(list(data)), plan).tallies[0].metrics()
    assert len(alive) == 2 * len(list(data)) > 8
    assert found.losses == kept.losses and found.all == kept.all


def printed(results, capsys):
    for part in core_tables(results, 300):
        console(width=300).print(part)
    return capsys.readouterr().out


def test_tables_and_plots(measured, capsys):
    out, _, results = measured
    one = printed(results[:1], capsys)
    assert "FVU of typical tokens" in one and "by position" in one and "by source" in one
    several = printed(results, capsys)
    assert "sae_0" in several and "all 2 in place at once" in several
    pngs = sorted(p.name for p in Path(out).rglob("*.png"))
    assert len(pngs) >= 3 and "pareto.png" in pngs


def test_weights_are_told_apart_but_copies_are_not(folders, tmp_path):
    one, other = (weights_identity(load_coder(folders / f"sae_{i}")) for i in range(2))
    shutil.copytree(folders / "sae_0", tmp_path / "copy", copy_function=shutil.copyfile)
    assert weights_identity(load_coder(tmp_path / "copy")) == weights_identity(coder(seed=0)) == one
    moved = coder(seed=0).replace(b_enc=jnp.roll(coder(seed=0).b_enc, 1))
    retrained = coder(seed=0).replace(w_dec=coder(seed=0).w_dec * 1.001)
    assert len({one, other, weights_identity(moved), weights_identity(retrained)}) == 4


def test_another_model_of_the_same_name_is_not_taken_for_this(measured, model, text):
    """As PT and IT are, or a model and what was trained from it with its norms left alone."""
    out, coders, _ = measured
    blocks = model.params.blocks
    tuned = model.replace(params=model.params.replace(blocks=blocks.replace(w_o=blocks.w_o * 1.01)))
    with pytest.raises(InputError, match="measured with another model_weights"):
        evaluate_core(tuned, coders, *setup(tuned, text), out)


def test_a_crosscoder_has_figures_by_layer(model, text, capsys):
    rng = np.random.default_rng(9)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / D**0.5, jnp.float32)
    c = MultiLayerCoder(
        normal(2, D, F),
        normal(2, F),
        jnp.abs(normal(2, F)),
        normal(3, F, D),
        normal(2, D),
        layers=(0, 2),
    )
    data, plan, config = setup(model, text, 60)
    (result,) = evaluate_core(model, [c], data, plan, config)
    rows = result["eval_result_unstructured"]["layers"]
    mean = result["eval_result_metrics"]["reconstruction_quality"]["fvu"]
    assert [row["layer"] for row in rows] == [0, 2]
    assert np.mean([row["fvu"] for row in rows]) == pytest.approx(mean)
    assert len(result["eval_result_details"]) == 2 * F
    assert result["eval_result_details"][F]["layer"] == 2
    norms = np.array(result["eval_result_unstructured"]["mean_decoder_norms"])
    assert norms[1, 0] == 0 and (norms[[0, 0, 1], [0, 1, 1]] > 0).all()
    assert "layer 2" in printed([result], capsys)
