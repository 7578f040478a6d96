"""What a run saves is what it trained, and its figures are those of the files it leaves."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training_runs
from gemma_scope_jax.coders.coder import as_jump_relu
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.data.activations.store import write_activations
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.training import buffer, ends, feeds, init, measure
from gemma_scope_jax.training import train as training
from gemma_scope_jax.training.held_out import BLOCK, SplitBatches, held_out, is_held_out
from gemma_scope_jax.training.recipe import OptimizerConfig
from gemma_scope_jax.training.weights import CoderGroup, fold, unfold
from letters import Letters
from tiny import tiny_model

K = 8


def coder(layers=1, **options):
    return training_runs.coder(layers, **dict(target_l0=K, activation="topk") | options)


def recipe(*coders, **options):
    return training_runs.recipe(*coders, **dict(tokens=128 * 16, held_out=0.25) | options)


def documents(count=80):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdef "), rng.integers(9, 200))) for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    """Its letter "f" has an embedding of many times the others' norm."""
    model = tiny_model(PRESETS["gemma-3-270m"], layers=3)
    [large] = Letters().encode("f", bos=False)
    embed = model.params.embed.at[large].multiply(100.0)
    return dataclasses.replace(model, params=dataclasses.replace(model.params, embed=embed))


def spied(patch):
    """What `measure` is given, by the call."""
    seen, real = [], measure.measure

    def spy(coder, sites, layers):
        seen.append((coder, sites, layers))
        return real(coder, sites, layers)

    patch.setattr(measure, "measure", spy)
    return seen


CODERS = (
    coder(),
    coder(as_jump_relu=True, name="jump"),
    coder(activation="batch_topk"),
    coder((1, 2), width=32),
)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """(folder, coders by name, what was measured) of one run of every kind that is not JumpReLU."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        seen = spied(patch)
        training.train(recipe(*CODERS), folder, model, documents())
    return folder, [load_coder(folder / "coders" / c.folder, decoder=True) for c in CODERS], seen


def last(folder):
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])


def figures(coder, sites, layers):
    """Mean and largest L0, and FVU, by their definitions in float64 numpy."""
    own = getattr(coder, "layers", None) or (coder.layer,)
    at = [layers[coder.reads].index(layer) for layer in own]
    x = np.asarray(sites[coder.reads])[at].astype(np.float32)
    y = np.asarray(coder.reconstruct(x if len(own) > 1 else x[0])).reshape(x.shape)
    f = np.asarray(coder.encode(x if len(own) > 1 else x[0])).reshape(len(own), x.shape[1], -1)
    active = (f > 0).sum((0, 2))
    x, y = x.astype(np.float64), y.astype(np.float64)
    fvu = [((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum() for a, b in zip(x, y)]
    return active.mean(), active.max(), np.mean(fvu)


def test_the_log_and_the_card_say_what_the_saved_files_do(run):
    folder, coders, seen = run
    saved = last(folder)["saved"]
    assert list(saved) == [c.folder for c in CODERS]
    for config, loaded, (_, sites, layers) in zip(CODERS, coders, seen, strict=True):
        said = saved[config.folder]
        l0, most, fvu = figures(loaded, sites, layers)
        assert said["l0"] == pytest.approx(l0, rel=1e-4) and said["l0_largest"] == most
        assert said["fvu"] == pytest.approx(fvu, rel=1e-4)
        assert said["held_out"] and said["tokens"] > 100
        card = (folder / "coders" / config.folder / "README.md").read_text()
        assert f"{said['tokens']:,} tokens that were not trained on" in card
        assert f"{said['fvu']:.4g}" in card


def test_a_token_of_enormous_norm_has_its_k_features(run):
    """A JumpReLU has far more: one threshold for all would light most of the dictionary."""
    folder, (topk, jump, batch, several), seen = run
    saved = last(folder)["saved"]
    _, sites, layers = seen[0]
    norms = np.linalg.norm(np.asarray(sites["resid_post"][0], np.float32), axis=-1)
    assert norms.max() > 10 * np.median(norms)
    assert (topk.k, several.k, jump.k, batch.k) == (K, K, None, None)
    assert saved[CODERS[0].folder]["l0_largest"] == K == saved[CODERS[3].folder]["l0_largest"]
    assert saved["jump"]["l0_largest"] > K
    config = json.loads((folder / "coders" / CODERS[0].folder / "config.json").read_text())
    assert (config["architecture"], config["k"]) == ("topk", K)
    cards = [(folder / "coders" / c.folder / "README.md").read_text() for c in CODERS]
    assert f"keeps the {K} largest features of each token (`k`" in cards[0]
    assert "over all layers together" in cards[3]
    assert "trained as topk and saved as a JumpReLU" in cards[1]
    for converted in (jump, batch):
        assert np.asarray(converted.threshold).min() >= 0


def test_thresholds_have_the_target_l0_on_tokens_that_were_not_trained_on(run):
    folder, _, _ = run
    for config in CODERS[1:3]:  # set on the other half of what is held out
        assert last(folder)["saved"][config.folder]["l0"] == pytest.approx(K, rel=0.12)


def test_what_is_held_out_is_never_trained_on():
    """In any epoch, whatever rows a block falls into, and after an interruption."""
    texts, side = documents(40), {}
    batches = SplitBatches(texts, Letters(), 4, 32, share=0.25, seed=1)
    blocks = [
        Letters().encode(t, bos=False)[a : a + BLOCK]
        for t in texts
        for a in range(0, len(t), BLOCK)
    ]
    held = {b.tobytes(): bool(held_out(b, 0.25).all()) for b in blocks}
    assert 0.1 < np.mean(list(held.values())) < 0.4
    position = None
    for _ in range(250):
        batch = next(batches)
        if batches.position["epoch"] == 2 and position is None:
            position = batches.position
            batches = SplitBatches(texts, Letters(), 4, 32, share=0.25, seed=1, position=position)
            continue
        for tokens, segments, apart in zip(batch.tokens, batch.segments, is_held_out(batch)):
            for n in range(1, segments.max() + 1):
                ids, marks = tokens[segments == n][1:], apart[segments == n][1:]
                for start in range(len(ids) - 12):  # 12 letters in a row tell where they are
                    key = ids[start : start + 12].tobytes()
                    side.setdefault(key, set()).add(bool(marks[start]))
    assert position and all(len(marks) == 1 for marks in side.values())
    assert {True} in side.values()
    with pytest.raises(StopIteration):  # a stream comes once, and is split all the same
        stream = SplitBatches(iter(texts), Letters(), 4, 32, share=0.25)
        seen = [next(stream)]
        while True:
            seen.append(next(stream))
    held = sum((batch.mask & is_held_out(batch)).sum() for batch in seen)
    assert 0.1 < held / sum(batch.mask.sum() for batch in seen) < 0.4


def test_a_pass_with_more_than_the_ring_holds_keeps_its_last_in_every_site():
    """No slot is written twice, where devices may choose another of the two for each site."""
    x = {site: jnp.arange(20.0)[None, :, None] + n for n, site in enumerate("ab")}
    mask = jnp.arange(20) % 4 != 1  # 15 of 20
    ring = {site: jnp.full((1, 6, 1), -1.0) for site in x}
    ring, slot, filled = buffer._write(ring, jnp.int32(4), jnp.int32(4), x, mask)
    last = np.flatnonzero(mask)[-6:]
    assert sorted(np.asarray(ring["a"]).ravel()) == last.tolist()
    np.testing.assert_array_equal(ring["b"], ring["a"] + 1)
    assert int(slot) == (4 + 15) % 6 and int(filled) == 6
    assert float(ring["a"][0, int(slot) - 1, 0]) == last[-1]


def test_a_store_holds_out_its_last_rows(model, tmp_path, monkeypatch):
    write_activations(
        model,
        TokenBatches(documents(), Letters(), 4, 32),
        {"resid_post": (1,)},
        tmp_path / "store",
        1000,
    )
    drawn, seen = [], spied(monkeypatch)
    shuffled = feeds.ActivationStore.batch_rows
    monkeypatch.setattr(
        feeds.ActivationStore, "batch_rows", lambda *a: drawn.append(found := shuffled(*a)) or found
    )
    training.train(
        recipe(coder(activation="batch_topk"), store=str(tmp_path / "store"), tokens=128 * 3 * 4),
        tmp_path / "run",
        model,
    )
    assert max(d.max() for d in drawn) == 749
    store = feeds.ActivationStore(tmp_path / "store")
    want = store.read(np.arange(750, 1000))["resid_post"][:, 1::2]
    np.testing.assert_array_equal(np.asarray(seen[0][1]["resid_post"]), want)
    assert last(tmp_path / "run")["saved"][coder(activation="batch_topk").folder]["held_out"]


def test_a_coder_that_went_wrong_is_not_saved_without_a_word(run, model, tmp_path, caplog):
    """Wild weights are said in the log, the card and on standard error, NaN is not saved."""
    with pytest.raises(InputError, match="learning_rate must be above 0 and at most 1"):
        OptimizerConfig(1e8)
    names, real = [c.folder for c in CODERS], ends.coders
    shutil.copytree(run[0], tmp_path / "run")  # finished: its coders are only written again
    shutil.rmtree(tmp_path / "run" / "coders")

    def broken(*args):
        found = real(*args)
        wild, nan = found[names[0]], found[names[1]]
        found[names[0]] = wild.replace(w_dec=1e20 * wild.w_dec)
        found[names[1]] = nan.replace(b_dec=nan.b_dec.at[0].set(jnp.nan))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ends, "coders", broken)
        with pytest.raises(InputError, match="not saved after .*b_dec holds NaN") as refused:
            training.train(recipe(*CODERS), tmp_path / "run", model, documents())
    assert "\n" not in str(refused.value) and "lower learning rate" in str(refused.value)
    said = [x.getMessage() for x in caplog.records if x.levelname == "WARNING"]
    assert (
        len(said) == 1
        and said[0].startswith(names[0])
        and "no better than the mean activation (FVU" in said[0]
    )
    card = (tmp_path / "run" / "coders" / names[0] / "README.md").read_text()
    assert "**Warning: its rec" in card
    assert not (tmp_path / "run" / "coders" / names[1]).exists()
    assert (tmp_path / "run" / "coders" / names[2]).exists()
    assert last(tmp_path / "run")["saved"][names[0]]["fvu"] > 1e30


def test_figures_that_are_not_finite_are_null_in_the_log_and_doubted(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"tokens": 1, "coders": {}}\n{"tokens": 2, "coders": {}}\n')
    bad = {"tokens": 9, "l0": 3.0, "l0_largest": 5.0, "fvu": np.inf, "fvu_typical": np.nan}
    measure.log_saved(log, 2, {"a": bad})
    rows = [json.loads(x, parse_constant=pytest.fail) for x in log.read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [1, 2] and rows[1]["saved"]["a"]["fvu"] is None
    assert "FVU inf" in measure.doubt(rows[1]["saved"]["a"]) and "FVU inf" in measure.doubt(bad)
    assert not measure.doubt(bad | {"fvu": 0.2})
    assert "no feature" in measure.doubt(bad | {"fvu": 0.2, "l0": 0.0})


# -------------------------------------------------------------------------------------------------
# To and from training


@pytest.mark.parametrize("layers", [1, (0, 2)])
def test_folding_keeps_which_features_are_the_largest(layers):
    """Of several layers, too, whose activations have other norms; and unfolding undoes it."""
    config = coder(layers, width=16, target_l0=5)
    X = len(config.layer_tuple)
    w = init.random_weights(CoderGroup((config,)), 6, 6, 0)
    scale = jnp.asarray([3.0, 400.0][:X])
    folded = fold(w, 0, config, {"in": scale, "out": scale}, 1)
    assert folded.k == 5
    x = np.random.default_rng(0).standard_normal((X, 50, 6)).astype(np.float32)
    z = np.einsum("xnd,xfd->nxf", x, np.asarray(w.w_enc[0])).reshape(50, -1)
    want = np.argsort(-np.maximum(z, 0), 1, kind="stable")[:, :5]
    raw = x * np.asarray(scale)[:, None, None]
    f = np.asarray(folded.encode(raw if config.is_multi_layer else raw[0])).reshape(X, 50, 16)
    f = np.moveaxis(f, 0, 1).reshape(50, -1)
    for row, chosen, values in zip(f, want, z):
        assert set(np.flatnonzero(row)) == {c for c in chosen if values[c] > 0}
    back = unfold(folded, config, {"in": scale, "out": scale})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        back,
        dataclasses.replace(w, threshold=0 * w.threshold),
    )


def test_a_topk_coder_is_not_taken_for_another_to_train_on():
    config = coder(width=16, target_l0=5)
    w = init.random_weights(CoderGroup((config,)), 6, 6, 0)
    scales = {"in": jnp.ones(1), "out": jnp.ones(1)}
    folded = fold(w, 0, config, scales)
    for activation in ("jumprelu", "batch_topk"):
        with pytest.raises(InputError, match=f"is not {activation}.*as_jump_relu"):
            unfold(folded, dataclasses.replace(config, activation=activation), scales)
    uneven = folded.replace(w_dec=folded.w_dec.at[3].multiply(2.0))
    with pytest.raises(InputError, match="decoder rows of norms 1 to 2"):
        unfold(uneven, config, scales)
    x = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    made = as_jump_relu(folded, x)
    assert unfold(made, dataclasses.replace(config, activation="jumprelu"), scales)
    with pytest.raises(InputError, match="as_jump_relu is for topk"):
        coder(activation="batch_topk", as_jump_relu=True)
