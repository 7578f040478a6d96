"""Whole runs: what they learn, save, continue and say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from assertions import one_line, same
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.data.activations.store import write_activations
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.kernels import active, cpu, xla
from gemma_scope_jax.training import buffer, ends
from gemma_scope_jax.training import log as progress
from gemma_scope_jax.training import train as training
from gemma_scope_jax.training.recipe import OptimizerConfig
from gemma_scope_jax.training.state import init_state, make_plan
from letters import Letters
from training_runs import (
    EVERY_KIND,
    LOSS,
    NAMES,
    TRANSCODER,
    Finished,
    coder,
    documents,
    recipe,
    reconstruction,
)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One run of a coder of every kind."""
    names, folder = [], tmp_path_factory.mktemp("run")
    listen = lambda name, _, **k: names.append(str(k)) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    config = recipe(*EVERY_KIND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "EVERY", 0.0)
        found = training.train(config, folder, model, documents())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return Finished(config, folder, found, log, list(names))


@pytest.fixture(scope="module")
def activations(model):
    """{(site, layer): [B, D]} of a few sequences, bfloat16 rounded as the buffer does."""
    want = {c: i for c in EVERY_KIND for i in c.layer_tuple}
    plan = make_plan(recipe(*want), model.config)
    batch = next(TokenBatches(documents(), Letters(), 16, 32, seed=9))
    x, mask = jax.jit(lambda batch: buffer.model_activations(model, batch, plan))(batch)
    keep = np.asarray(mask)
    return {(s, i): np.asarray(x[s][n])[keep] for s, ls in plan.sites for n, i in enumerate(ls)}


# -------------------------------------------------------------------------------------------------
# Runs


def test_a_coder_of_every_kind_learns_and_loads_back(finished, activations):
    assert list(finished.coders) == list(NAMES)
    rows = [row["coders"] for row in finished.log if row["coders"]]
    assert len(finished.log) == 30 and finished.log[-1]["tokens"] == 128 * 30
    assert finished.log[-1]["update"] == 3 * len(rows) and 20 <= len(rows) <= 26
    for (name, kind), config in zip(NAMES.items(), EVERY_KIND):
        assert config.folder == name
        own = finished.coders[name]
        loaded = load_coder(finished.folder / "coders" / name, decoder=True)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(loaded), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (loaded.kind, loaded.reads, loaded.writes) == (kind, config.reads, config.target)
        assert loaded.info.l0 == 8 and loaded.first == 1
        layers = loaded.layers if config.is_multi_layer else (loaded.layer,)
        assert layers == config.layer_tuple
        curve = [row[name]["fvu"] for row in rows]
        start = curve[0]
        if config.skip:  # which starts as fitted, with features that help: what they add to it
            start, _ = reconstruction(loaded.replace(w_dec=0 * loaded.w_dec), config, activations)
            assert curve[-1] < 0.8 * curve[0], name
        assert curve[-1] < 0.7 * start, name
        fvu, l0 = reconstruction(loaded, config, activations)
        assert fvu == pytest.approx(curve[-1], rel=0.25), name
        assert l0 == pytest.approx(rows[-1][name]["l0"], rel=0.25, abs=1.5), name
        if "topk" in config.activation:
            assert l0 == pytest.approx(8, rel=0.15)
        card = finished.folder / "coders" / name / "README.md"
        assert card.read_text().startswith(f"# {name}\n")
        saved = json.loads((card.parent / "train_config.json").read_text())
        assert saved["coders"][0]["target_l0"] == 8


def test_the_step_compiles_once(finished):
    for program in ("train_step", "fill_step"):
        assert sum(program in name for name in finished.compiled) == 1, program


def test_a_finished_run_is_only_written_again_and_no_other_continued(finished, model):
    """The last checkpoint is of the last pass, so no step runs."""
    again = training.train(finished.config, finished.folder, model, documents())
    for a, b in zip(jax.tree.leaves(finished.coders), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="holds a run of another config"):
        training.train(dataclasses.replace(finished.config, seed=1), finished.folder, model)


def test_finetuning_starts_at_the_finished_coder_or_coders(finished, model, activations):
    tuned = [
        dataclasses.replace(c, init_from=str(finished.folder / "coders" / name))
        for name, c in zip(NAMES, EVERY_KIND)
        if c.activation == "jumprelu"
    ]
    singles = tuple(str(finished.folder / "coders" / name) for name in list(NAMES)[:2])
    both = coder((3, 4), width=16, init_layers=singles, name="from two")
    plan = make_plan(recipe(*tuned, both), model.config)
    sample = {s: jnp.stack([activations[s, i] for i in ls]) for s, ls in plan.sites}
    state = ends.start(plan, init_state(plan, model.config), sample, ends.load_starts(plan.config))
    found = ends.coders(plan, state, sample)
    for c in tuned:
        before, after = finished.coders[c.folder], found[c.folder]
        assert reconstruction(after, c, activations) == pytest.approx(
            reconstruction(before, c, activations), rel=1e-4
        )
        if not c.is_multi_layer:  # there the norm of a decoder depends on all layers' scales
            same(after, before)
    # The crosscoder's first layer is the first features of the first SAE, and its target L0 starts
    # where it is.
    x = np.stack([activations["resid_post", 3], activations["resid_post", 4]])
    on = np.asarray(found["from two"].encode(x)) > 0
    first = finished.coders[list(NAMES)[0]].encode(x[0])[:, :16] > 0
    np.testing.assert_array_equal(on[0], first)
    [start] = [
        g.l0_start
        for g, group in zip(state.groups, plan.groups)
        if group.template.name == both.name
    ]
    assert start == pytest.approx(max(8, on.sum((0, 2)).mean()), rel=1e-4)


def test_the_sparse_step_is_taken_where_it_is_faster(model, monkeypatch):
    """With gathers that XLA writes to memory a coder has to be much wider than with kernels."""

    def capacity(width, kernels):
        monkeypatch.setattr(active, "backend", lambda: kernels)
        plan = make_plan(recipe(coder(3, width=width), sparse=2.0), model.config)
        return plan.capacity(plan.groups[0])

    assert [capacity(w, cpu) for w in (32, 33, 8192)] == [0, 16, 128]
    assert [capacity(w, xla) for w in (8192, 8193)] == [0, 16]


def test_several_coders_train_as_each_would_alone(model, tmp_path, monkeypatch):
    """In the sparse step, with a threshold near which many pre-activations lie."""
    monkeypatch.setattr(xla, "FEATURES_A_SLOT", 2)  # without a compiler, too
    loss = dataclasses.replace(LOSS, bandwidth=0.1)
    last = coder(4, loss=dataclasses.replace(loss, l0_weight=0.5), target_l0=6.0, seed=1)
    config = recipe(
        coder(3, loss=loss), coder(3, target_l0=5.0, loss=loss), last, tokens=128 * 8, sparse=2.0
    )
    plan = make_plan(config, model.config)
    assert len(plan.groups) == 1 and plan.capacity(plan.groups[0]) == 16
    together = training.train(config, tmp_path / "all", model, documents())
    config = dataclasses.replace(config, coders=(last,))
    alone = training.train(config, tmp_path / "alone", model, documents())
    same(together[last.folder], alone[last.folder])


def test_a_run_on_stored_activations_learns(model, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    batches = TokenBatches(documents(), Letters(), 8, 32)
    write_activations(model, batches, {"resid_post": (2, 3)}, tmp_path / "store", 2000)
    store = str(tmp_path / "store")
    config = recipe(coder(3), store=store, tokens=128 * 3 * 26)
    found = training.train(config, tmp_path / "run", model)[coder(3).folder]
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    curve = [row["coders"][coder(3).folder]["fvu"] for row in log]
    assert len(curve) == 26 and curve[-1] < 0.7 * curve[0] and log[-1]["update"] == 78
    assert found.layer == 3
    with pytest.raises(InputError, match="no layer 4 of resid_post"):
        training.train(recipe(coder(4), store=store), tmp_path / "a", model)
    with pytest.raises(InputError, match="no site 'mlp_in'"):
        training.train(recipe(coder(3, **TRANSCODER), store=store), tmp_path / "b", model)


def test_a_store_is_checked_for_what_it_holds_and_that_it_stays_the_same(model, tmp_path):
    write = lambda tokens, **options: write_activations(
        model,
        TokenBatches(documents(), Letters(), 8, 32),
        {"resid_post": (3,)},
        tmp_path / "store",
        tokens,
        shard_rows=512,
        **options,
    )
    write(2000)
    config = recipe(coder(3), store=str(tmp_path / "store"), tokens=128 * 3 * 4)
    training.train(config, tmp_path / "run", model)
    with pytest.raises(InputError, match="leaves out positions before 1.*set first=1") as refused:
        training.train(dataclasses.replace(config, first=4), tmp_path / "a", model)
    one_line(refused)
    renamed = dataclasses.replace(model, config=dataclasses.replace(model.config, name="other"))
    with pytest.raises(InputError, match="holds activations of .*, not of tiny"):
        training.train(config, tmp_path / "b", renamed)
    write(2500)  # which extends it
    with pytest.raises(InputError, match="has grown or changed since this run began") as refused:
        training.train(config, tmp_path / "run", model)
    one_line(refused)


def test_bad_stores_are_refused_before_a_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "model_config", lambda name: model.config)
    monkeypatch.setattr(training, "load_model", None)
    for layer, options, message in (
        (3, {"dtype": "float16"}, "as bfloat16 or int8, not 'float16'"),
        (3, {"tokens": 0}, "tokens 0: must be at least 1"),
        (99, {}, "layer 99: the model has 0"),
        (3, {"folder": "gs://bucket/store"}, "copy them to a local disk"),
    ):
        options = {"folder": tmp_path / "store", **options}
        with pytest.raises(InputError, match=message):
            training.store_activations(recipe(coder(layer)), **options)


def test_a_run_on_a_store_needs_no_weights_and_says_what_is_read_again(
    model, tmp_path, monkeypatch, caplog
):
    batches = TokenBatches(documents(6), Letters(), 8, 32)  # of 820 tokens
    write_activations(model, batches, {"resid_post": (3,)}, tmp_path / "store", 1000)
    assert "the text has been read 2 times: the store" in caplog.text
    monkeypatch.setattr(training, "model_config", lambda name: model.config)
    monkeypatch.setattr(training, "load_model", None)
    config = recipe(coder(3), store=str(tmp_path / "store"), tokens=128 * 3 * 6)
    assert training.train(config, tmp_path / "run")
    assert caplog.text.count("store has been read once, at 768 tokens") == 1
    card = (tmp_path / "run" / "coders" / coder(3).folder / "README.md").read_text()
    assert "store, read 3 times over (the store holds its text 2 times over); the" in card


def test_text_that_ends_early_is_said_and_carded(model, tmp_path, caplog):
    config = recipe(coder(3), optimizer=OptimizerConfig(3e-3, 10, decay=0.25))
    text = " ".join(documents(60))  # as an iterator: it comes once
    training.train(config, tmp_path, model, iter([text[i : i + 99] for i in range(0, 2200, 99)]))
    [said] = [x for x in caplog.messages if "the text ended" in x]
    read = int(said.split(" at ")[1].split()[0].replace(",", ""))
    assert 512 < read < config.tokens and "the learning rate had not come down" in said
    card = (tmp_path / "coders" / coder(3).folder / "README.md").read_text()
    assert f"Trained with gemma_scope_jax on {read:,} tokens" in card


def test_a_run_is_continued_by_a_version_that_has_more_options(finished, model):
    file = finished.folder / "config.json"
    text = file.read_text()
    older = json.loads(text)
    del older["precision"], older["optimizer"]["epsilon"]
    del older["coders"][0]["loss"]["kl_weight"]
    try:
        file.write_text(json.dumps(older))
        assert training.train(finished.config, finished.folder, model, documents())
        older["optimizer"]["b2"] = 0.5
        file.write_text(json.dumps(older))
        with pytest.raises(InputError, match=r"another config \(optimizer differ\)"):
            training.train(finished.config, finished.folder, model, documents())
    finally:
        file.write_text(text)


def test_reports_are_dense_at_first_and_rare_later(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.TrainLog(recipe(coder(3)), epath.Path(tmp_path), 0)
    gaps = []
    for _ in range(4000):
        now[0] += 0.5
        if shown.due():
            gaps.append(now[0] - shown.logged)
            shown.logged = now[0]
    assert gaps[1] == 2.5 and gaps[-1] == 10.5 and gaps[1:] == sorted(gaps[1:])
