"""The core evaluation as a job: labelled text, documents, resuming, tables, plots, the command."""

import json
import re
import shutil
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax import cli
from gemma_scope_jax.coders.coder import weights_identity
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.release.files import load_coder, save_coder
from gemma_scope_jax.coders.sparse_coder import CoderInfo, SparseCoder
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.data.text import LABELS
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation import core_run
from gemma_scope_jax.evaluation.core import core_config
from gemma_scope_jax.evaluation.core_run import evaluate_core
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure
from gemma_scope_jax.evaluation.report import core_doubts, core_tables, frontier
from gemma_scope_jax.evaluation.results import (
    ENVELOPE,
    coder_id,
    plain,
    read_result,
    result_path,
    write_result,
)
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.tokenizer import Chat, Span
from gemma_scope_jax.progress import console
from letters import Letters
from tiny import tiny_model
from tiny_command import give_tiny

D, F = 32, 48
CORE_NAMES = {  # what SAEBench's core schema requires
    "model_behavior_preservation": ["kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"],
    "model_performance_preservation": [
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ],
    "reconstruction_quality": ["explained_variance", "explained_variance_legacy", "mse", "cossim"],
    "shrinkage": ["l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"],
    "sparsity": ["l0", "l1"],
    "token_stats": ["total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"],
    "misc_metrics": [
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ],
}
DETAIL_NAMES = {
    "index",
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
}


class ChattyLetters(Letters):
    """Chats as <turn role text end>: 4 and 5 open and close a turn."""

    def chat(self, messages, add_generation_prompt=True):
        ids, spans = [2], [Span(0, 1, "turn")]
        for message in messages:
            said = self.encode(message["content"], bos=False).tolist()
            at = len(ids)
            ids += [4, *said, 5]
            spans += [Span(at, at + 1, "turn"), Span(at + 1, at + 1 + len(said), message["role"])]
            spans.append(Span(len(ids) - 1, len(ids), "turn"))
        return Chat(np.array(ids, np.int32), tuple(spans))


@pytest.fixture(scope="module", autouse=True)
def runs_at_once():
    """Few, so that two coders and both together take several steps a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma_scope_jax.evaluation.evaluate.RUNS_AT_ONCE", 3)
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model(PRESETS["gemma-3-270m"], layers=3)


def coder(seed=0, **place):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / D**0.5, jnp.float32)
    return SparseCoder(
        normal(D, F),
        normal(F),
        jnp.abs(normal(F)),
        normal(F, D),
        normal(D),
        **{"layer": 1, **place},
        info=CoderInfo(l0=10.0),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("coders")
    for i in range(2):
        save_coder(coder(i), root / f"sae_{i}", config_extra={"model_name": "acme/tiny"})
    return root


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two files of documents of several lengths."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["plum", "pear", "fig", "quince", "damson", "medlar", "sloe"]
    for name in ("a.txt", "b.txt"):
        documents = [" ".join(rng.choice(words, rng.integers(2, 20))) for _ in range(12)]
        (folder / name).write_text("\n\f\n".join(documents), encoding="utf-8")
    return folder


def setup(model, text, loss_tokens=150):
    data = EvaluationText(
        TextData(files=(f"{text}/*.txt",)), Letters(), tokens=400, rows=2, length=32
    )
    plan = EvaluationPlan(
        loss_tokens=loss_tokens, ablations=("zero", "mean"), positions=True, groups=data.groups
    )
    return data, plan, core_config(data, plan, model, "fruit", True)


# -------------------------------------------------------------------------------------------------
# Text


def test_every_token_is_there_once_with_its_source(text):
    data = EvaluationText(TextData(files=(f"{text}/*.txt",)), Letters(), rows=2, length=32)
    names = data.groups["source"]
    read = {name: [] for name in names}
    for batch in data:
        positions = np.zeros_like(batch.segments)
        for t in range(1, 32):
            same = (batch.segments[:, t] == batch.segments[:, t - 1]) & (batch.segments[:, t] > 0)
            positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
        starts = (batch.segments > 0) & (positions == 0)
        assert (batch.tokens[starts] == 2).all()
        np.testing.assert_array_equal(batch.counts, (batch.segments > 0) & ~starts)
        for i, name in enumerate(names):
            read[name] += batch.tokens[batch.counts & (batch.labels["source"] == i)].tolist()
    for name, ids in read.items():
        documents = (text / name).read_text(encoding="utf-8").split("\n\f\n")
        assert sorted(ids) == sorted(Letters().encode("".join(documents), bos=False).tolist())


def test_the_same_text_is_the_same_batches_and_another_has_another_fingerprint(text):
    data = EvaluationText(TextData(files=(f"{text}/a.txt",)), Letters(), rows=2, length=32)
    for one, two in zip(data, data):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    other = EvaluationText(TextData(files=(f"{text}/b.txt",)), Letters(), rows=2, length=32)
    longer = EvaluationText(data.data, Letters(), rows=2, length=32, tokens=10)
    assert len({data.fingerprint(), other.fingerprint(), longer.fingerprint()}) == 3
    assert len(list(longer)) == 1 and data.groups == {}


def test_roles_of_chats(tmp_path):
    chats = [[{"role": "user", "content": "plums?"}, {"role": "model", "content": "yes, two"}]]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"m": chats[0]}) + "\n")
    data = TextData(files=(str(path),), messages="m", roles=("model",))
    some = EvaluationText(data, ChattyLetters(), rows=1, length=24)
    (batch,) = some
    said = lambda mask: "".join(Letters().decode_tokens(batch.tokens[mask]))
    role = lambda name: batch.labels["role"] == LABELS.index(name)
    assert some.groups == {"role": LABELS}
    assert said(role("user")) == "plums?" and said(role("model")) == "yes, two"
    assert said(batch.counts) == "yes, two"


def test_figures_by_role(model, tmp_path):
    """What is said counts, the template around it does not; roles that say nothing have no row."""
    chat = [{"role": "user", "content": "plums?"}, {"role": "model", "content": "yes, two"}] * 2
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"m": chat}) + "\n")
    data = TextData(files=(str(path),), messages="m", roles=("user", "model"))
    some = EvaluationText(data, ChattyLetters(), rows=2, length=32)
    plan = EvaluationPlan(loss_tokens=0, groups=some.groups)
    found = measure(model, [coder()], some, plan).tallies[0].metrics()
    rows = {row["name"]: row["tokens"] for row in found.groups["role"]}
    assert rows == {"user": 2 * len("plums?"), "model": 2 * len("yes, two")}
    assert found.all.tokens == sum(rows.values())


def test_only_the_beginning_of_a_document():
    data = EvaluationText(["abcdefghij" * 3, "xyz"], Letters(), document=12, rows=1, length=64)
    (batch,) = data
    assert batch.counts.sum() == 12 + 3


# -------------------------------------------------------------------------------------------------
# Documents


@pytest.fixture(scope="module")
def measured(model, folders, text, tmp_path_factory):
    """Two coders and the replacement model of one of them with a transcoder, in a folder."""
    data, plan, config = setup(model, text)
    coders = [load_coder(folders / "sae_0"), coder(5, layer=0, reads="mlp_in", writes="mlp_out")]
    out = str(tmp_path_factory.mktemp("out"))
    return out, coders, evaluate_core(model, coders, data, plan, config, out, replacement=True)


def written(out, results):
    """The documents as they are in the folder."""
    names = [(r["eval_type_id"], r["sae_lens_release_id"], r["sae_lens_id"]) for r in results]
    return [read_result(result_path(out, *name)) for name in names]


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
    measured, model, folders, text, monkeypatch, capsys
):
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
    assert "measured before" in capsys.readouterr().err
    monkeypatch.chdir(text)  # a text is known by its content, not by how its path is spelled
    near, near_plan, spelled = setup(model, "../" + text.name)
    spelled["dataset"] = "./" + text.name
    assert evaluate_core(model, coders, near, near_plan, spelled, out) == results[:2]
    assert seen == [1]
    with pytest.raises(InputError, match="another loss_tokens .*150, now 40.*another --out"):
        evaluate_core(model, coders, *setup(model, text, 40), out)


class Killed(Exception):
    pass


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


def kill_after(monkeypatch, at):
    """The stages of the steps that are run; the process ends after `at` of them."""
    real, steps = core_run._After.__call__, []

    def step(self, sums, stage, tokens):
        real(self, sums, stage, tokens)
        steps.append(stage)
        if len(steps) == at:
            raise Killed

    monkeypatch.setattr(core_run._After, "__call__", step)
    return steps


def goes_on(measured, model, text, folder):
    """Run twice, the first being killed: the result is that of a run that was not."""
    whole, coders, results = measured
    data, plan, config = setup(model, text)
    out = str(folder)
    with pytest.raises(Killed):
        evaluate_core(model, coders, data, plan, config, out, replacement=True)
    assert len(list(folder.glob("partial-*.npz"))) == 1
    again = evaluate_core(model, coders, data, plan, config, out, replacement=True)
    assert not list(folder.glob("partial-*"))
    for one, two in zip(written(whole, results), written(out, again), strict=True):
        for name in ("eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
            assert one[name] == two[name]


def test_all_of_the_text(model, text, capsys):
    """Without a number of tokens: the text's own, which nobody knows before."""
    data = EvaluationText(TextData(files=(f"{text}/a.txt",)), Letters(), rows=2, length=32)
    config = core_config(data, EvaluationPlan(), model, "fruit", False)
    (result,) = evaluate_core(model, [coder()], data, EvaluationPlan(), config)
    stats = result["eval_result_metrics"]["token_stats"]
    counted = sum(int(batch.counts.sum()) for batch in data)
    assert stats["total_tokens_eval_sparsity_variance"] == counted
    assert "how they fit, all of the text" in capsys.readouterr().err


def test_batches_that_can_be_read_again_are_not_kept(model, text):
    data = EvaluationText(TextData(files=(f"{text}/a.txt",)), Letters(), rows=1, length=32)
    alive = []

    class Batches:
        def __iter__(self):
            for batch in data:
                alive.append(weakref.ref(batch.counts))
                assert sum(ref() is not None for ref in alive) < 4
                yield batch

    plan = EvaluationPlan(ablations=("zero",))
    found = measure(model, [coder()], Batches(), plan).tallies[0].metrics()
    kept = measure(model, [coder()], iter(list(data)), plan).tallies[0].metrics()
    assert len(alive) == 2 * len(list(data)) > 8
    assert found.losses == kept.losses and found.all == kept.all


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
    assert weights_identity(load_coder(tmp_path / "copy")) == weights_identity(coder(0)) == one
    moved = coder(0).replace(b_enc=jnp.roll(coder(0).b_enc, 1))
    retrained = coder(0).replace(w_dec=coder(0).w_dec * 1.001)
    assert len({one, other, weights_identity(moved), weights_identity(retrained)}) == 4


def test_another_model_of_the_same_name_is_not_taken_for_this(measured, model, text):
    """As PT and IT are, or a model and what was trained from it with its norms left alone."""
    out, coders, _ = measured
    blocks = model.params.blocks
    tuned = model.replace(params=model.params.replace(blocks=blocks.replace(w_o=blocks.w_o * 1.01)))
    with pytest.raises(InputError, match="measured with another model_weights"):
        evaluate_core(tuned, coders, *setup(tuned, text), out)


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
    bad = coder(0)
    bad = bad.replace(w_dec=bad.w_dec * np.float32(factor))
    if threshold is not None:
        bad = bad.replace(threshold=jnp.full(F, threshold, jnp.float32))
    data, plan, config = setup(model, text, 60)
    (result,) = evaluate_core(model, [bad], data, plan, config, str(tmp_path))
    for found in (result, read_result(next(tmp_path.glob("core/*.json")))):
        assert any(re.match(message, w) for w in found["eval_result_unstructured"]["warnings"])
    (said,) = core_doubts([result])
    assert re.match(f"sae-resid_post-layer-1: .*{message}", said)


def test_frontier():
    points = [(10, 0.5), (20, 0.3), (15, 0.6), (20, 0.4), (40, 0.3), (50, 0.1)]
    assert frontier(points, higher=False) == [(10, 0.5), (20, 0.3), (50, 0.1)]
    assert frontier([(1, 0.2), (2, 0.1), (3, 0.9)], higher=True) == [(1, 0.2), (3, 0.9)]


def test_names_of_results(tmp_path):
    named = lambda path: coder(0).replace(info=CoderInfo(path=path))
    assert coder_id(named("gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium")) == (
        "gemma-scope-2-270m-pt",
        "resid_post/layer_12_width_16k_l0_medium",
    )
    release, name = coder_id(named("/runs/a/sae"))
    assert name == "sae" and re.fullmatch("folder-[0-9a-f]{8}", release)
    assert coder_id(named("/runs/b/sae")) not in ((release, name), coder_id(named("/runs/a/sae")))
    assert coder_id(named("packaged")) == ("gemma_scope_jax", "packaged")
    assert coder_id(coder(0))[1] == "sae-resid_post-layer-1"
    result = {"eval_type_id": "core", "sae_lens_release_id": "acme/a", "sae_lens_id": "sae"}
    assert write_result(tmp_path, result).name == "acme_a_sae_eval_results.json"
    assert plain({"a": (np.float32(np.nan), np.arange(2))}, -1) == {"a": [-1, [0, 1]]}
    with pytest.raises(TypeError):
        plain({"a": object()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not usable as JSON"),
        ("[]", "has no 'eval_type_id'"),
        ('{"eval_type_id": "core"}', "has no 'eval_config'"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_result(tmp_path / "x.json")


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


# -------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def tiny(monkeypatch, model):
    give_tiny(monkeypatch, model, names=("tiny", "google/tiny", "gemma-3-270m"))


def test_the_command(tiny, folders, text, capsys):
    options = [
        "--model",
        "tiny",
        "--length",
        "32",
        "--rows",
        "2",
        "--tokens",
        "200",
        "--loss-tokens",
        "60",
    ]
    arguments = ["evaluate", f"{folders}/sae_*", *options, "--text", f"{text}/*.txt"]
    assert cli.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert [r["sae_lens_id"] for r in results] == ["sae_0", "sae_1"]
    for result in results:
        found = result["eval_result_metrics"]["model_performance_preservation"]
        with_bos, without = found["ce_loss_with_ablation_saelens"], found["ce_loss_with_ablation"]
        assert with_bos > 0 and without > 0 and with_bos != without
    assert (
        results[0]["eval_config"]["tokens"] == 200 and "compiled; how they fit, 200 tokens" in err
    )
    assert cli.main([*arguments, "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "sae_1" in out and "CE score, SAELens" in " ".join(out.split())


def test_results_say_nothing_of_where_things_are_on_this_machine(
    tiny, folders, text, capsys, tmp_path
):
    """Neither their names nor what they hold: coders, text, sources, members of all together."""
    other = tmp_path / "sae_0"  # another coder of the same name
    save_coder(coder(5, layer=2), other, config_extra={"model_name": "acme/tiny"})
    out = tmp_path / "out"
    arguments = ["evaluate", f"{folders}/sae_0", str(other), "--model", "tiny", "--length", "32",
                 "--rows", "2", "--tokens", "100", "--loss-tokens", "60", "--replacement",
                 "--text", f"{text}/*.txt", "--out", str(out), "--skip-geometry"]  # fmt: skip
    assert cli.main(arguments) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".json"]) == 3
    for path in files:
        said = path.name + (path.read_text() if path.suffix == ".json" else "")
        for folder in (*folders.parents, *tmp_path.parents, *text.parents)[:-1]:
            assert len(folder.name) < 5 or folder.name not in said, (folder, path)
    assert capsys.readouterr().err.count("measured before") == 0
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.count("measured before") == 3


def test_records_that_cannot_be_used(tiny, folders, tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(['{"text": "plums and pears, figs and sloes"}', '{"no": 1}'] * 9))
    arguments = ["evaluate", f"{folders}/sae_0", "--model", "tiny", "--length", "32", "--rows", "2",
                 "--tokens", "60", "--loss-tokens", "0", "--text", str(path)]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "set skip_bad" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad"]) == 0


def test_without_losses_or_text(tiny, folders, capsys):
    """On the bundled sample, with a warning; no number stands where nothing was measured."""
    options = ["--model", "tiny", "--length", "32", "--rows", "2", "--tokens", "100"]
    assert cli.main(["evaluate", f"{folders}/sae_0", *options, "--loss-tokens", "0"]) == 0
    out, err = capsys.readouterr()
    assert "warning: no --text" in err and "too short" in err
    assert "FVU" in out and "delta loss" not in out and "-1.0000" not in out


BAD = {
    "no_coder": ([], "name at least one CODER"),
    "no_text": (["--text", "/nowhere/*.txt"], "no text files match /nowhere"),
    "no_tokens": (["--tokens", "0"], "too few"),
    "no_losses": (["--replacement", "--loss-tokens", "0"], "--replacement measures losses"),
    "too_long": (["--length", "65"], "more than the model's context of 64"),
    "no_rows": (["--rows", "0"], "rows must hold"),
    "two_texts": (["--text", "TEXT", "--tfds", "news"], "either files or tfds"),
    "chats": (["--messages", "m"], "--messages needs --text"),
    "chats_in_text": (["--messages", "m", "--text", "TEXT"], "plain text holds no chats"),
    "role": (["--messages", "m", "--text", "TEXT", "--roles", "cook"], "no such role"),
    "twice": (["FOLDER"], "is named twice"),
    "two_at_one_place": (["OTHER", "--replacement"], "two coders write resid_post of layer 1"),
    "bucket": (["--out", "ftp://x/y"], "ftp:// is not known"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tiny, folders, text, capsys, case):
    more, message = BAD[case]
    named = {"FOLDER": f"{folders}/sae_0", "OTHER": f"{folders}/sae_1", "TEXT": f"{text}/a.txt"}
    more = [named.get(a, a) for a in more]
    coders = [] if case == "no_coder" else [f"{folders}/sae_0"]
    code = cli.main(["evaluate", *coders, *more, "--model", "tiny",
                     *(["--length", "32"] if "--length" not in more else [])])  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and message in lines[-1] and lines[-1].startswith("error: ")
    if case in ("no_text", "two_texts", "role"):  # before anything is loaded
        assert not any("loading" in line for line in lines)
