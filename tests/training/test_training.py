"""The trainer: weights and their folding, grouping, initialisation, the buffer, and whole runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gemma_scope_jax.coders.release.files import load_coder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.activations.store import write_activations
from gemma_scope_jax.data.text import TextData, TokenBatches
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.training import feeds, init
from gemma_scope_jax.training import log as progress
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training import train as training
from gemma_scope_jax.training.config_file import load_config
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig, TrainConfig
from gemma_scope_jax.training.weights import CoderGroup, Weights, fold, groups, unfold, unit_decoder
from letters import Letters
from tiny import tiny_model

MODEL = PRESETS["gemma-3-270m"]
LOSS = LossConfig(l0_warmup=20, per_token=False, dead_after=3, dead_below=0.5)
TRANSCODER = dict(reads="mlp_in", writes="mlp_out")


WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def documents(count=80):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(count)]


def coder(layers=3, **options):
    """A coder that a few dozen updates can train."""
    return CoderConfig(layers, **dict(width=64, target_l0=8, threshold=None, loss=LOSS) | options)


def recipe(*coders, **options):
    """A run of 30 passes: those that fill the buffer, then some with three updates each."""
    common = dict(
        coders=coders,
        tokens=128 * 30,
        rows=4,
        length=32,
        buffer=512,
        batch=128,
        updates=3,
        optimizer=OptimizerConfig(3e-3, 10),
        checkpoint_every=1e9,
        model="tiny",
        sparse=0.0,
    )
    return TrainConfig(**common | options)


@pytest.fixture(scope="module")
def model():
    return tiny_model(MODEL)


@pytest.fixture(scope="module", autouse=True)
def letters():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "load_tokenizer", lambda source: Letters())
        yield


def same(a, b, rtol=1e-5):
    """Two arrays or trees, equal within a share of each leaf's largest entry."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves[0]) == len(leaves[1])
    for one, other in zip(*leaves):
        assert one.shape == other.shape
        atol = rtol * np.abs(other).max() if other.size else 0
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------------------------
# Weights: fold and unfold

KINDS = {
    "sae": CoderConfig(3, width=8, target_l0=2),
    "sae without input bias": CoderConfig(3, width=8, target_l0=2, input_bias=False),
    "transcoder": CoderConfig(3, width=8, target_l0=2, **TRANSCODER),
    "skip transcoder": CoderConfig(3, width=8, target_l0=2, skip=True, **TRANSCODER),
    "crosscoder": CoderConfig((1, 3, 4), width=8, target_l0=2),
    "clt": CoderConfig((0, 2), width=8, target_l0=2, skip=True, **TRANSCODER),
}


def random_weights(config, seed=0):
    """Two coders of unit decoder norm, D = 6, E = 6 or, of one layer, 5; and their scales."""
    rng, X, F = np.random.default_rng(seed), len(config.layer_tuple), config.width
    D, E = 6, 6 if config.target == config.reads or config.several else 5
    draw = lambda *s: jnp.asarray(rng.standard_normal((2, *s)), jnp.float32)
    w = Weights(
        draw(X, F, D),
        draw(X, F),
        jnp.abs(draw(X, F)),
        unit_decoder(tuple(draw(j + 1, F, E) for j in range(X))),
        draw(X, E),
        draw(X, D, E) if config.skip else None,
    )
    c_in = jnp.asarray(rng.uniform(2, 900, X), jnp.float32)
    c_out = c_in if config.target == config.reads else c_in[::-1] / 7
    return w, {"in": c_in, "out": c_out}


def run_by_hand(w, n, config, x):
    """Features [X, B, F] and reconstructions [X, B, E] of x in training units, float64."""
    a = jax.tree.map(lambda v: np.asarray(v, np.float64)[n], w)
    f, y = [], []
    for i in range(len(x)):
        rows = x[i] - a.b_dec[i] if config.centred else x[i]
        z = rows @ a.w_enc[i].T + a.b_enc[i]
        f.append(z * (z > a.threshold[i]))
        y.append(sum(f[k] @ a.w_dec[i][k] for k in range(i + 1)) + a.b_dec[i])
        if a.w_skip is not None:
            y[i] = y[i] + x[i] @ a.w_skip[i]
    return np.stack(f), np.stack(y)


@pytest.mark.parametrize("config", KINDS.values(), ids=list(KINDS))
def test_folding_is_exact_and_unfolding_undoes_it(config):
    w, scales = random_weights(config)
    x = np.random.default_rng(1).standard_normal((len(config.layer_tuple), 20, 6))
    folded = fold(w, 1, config, scales, first=4)
    scale = {k: np.asarray(v, np.float64)[:, None, None] for k, v in scales.items()}
    f, y = run_by_hand(w, 1, config, x)
    raw = jnp.asarray(x * scale["in"], jnp.float32)
    raw = raw if config.several else raw[0]
    both = (f * scale["out"], y * scale["out"])
    assert np.any(f > 0)
    same(
        (folded.encode(raw), folded.reconstruct(raw)),
        both if config.several else (both[0][0], both[1][0]),
    )
    assert (folded.reads, folded.writes, folded.first) == (config.reads, config.target, 4)
    back = unfold(folded, config, scales)
    same(back, jax.tree.map(lambda v: v[1:], w))


@pytest.mark.parametrize("name", ["skip transcoder", "crosscoder"])
def test_unfolding_a_coder_whose_decoders_are_not_of_unit_norm_keeps_its_function(name):
    config = KINDS[name]
    w, scales = random_weights(config)
    folded = fold(w, 0, config, scales)
    norm = jnp.asarray(np.random.default_rng(5).uniform(0.3, 3, folded.w_dec.shape[:-1]))
    odd = folded.replace(w_dec=folded.w_dec * norm.astype(jnp.float32)[..., None])
    unfolded = unfold(odd, config, scales)
    squares = sum(jnp.sum(b[0, 0] ** 2, -1) for b in unfolded.w_dec)
    np.testing.assert_allclose(squares, 1.0, rtol=1e-5)
    x = 300 * np.random.default_rng(1).standard_normal((len(config.layer_tuple), 20, 6))
    x = jnp.asarray(x if config.several else x[0], jnp.float32)
    same(fold(unfolded, 0, config, scales).reconstruct(x), odd.reconstruct(x))


def test_unfold_refuses_what_does_not_fit():
    config = KINDS["transcoder"]
    w, scales = random_weights(config)
    folded = fold(w, 0, config, scales)
    for change, message in (
        ({"layers": 4}, r"layers \(3,\), the config \(4,\)"),
        ({"writes": "resid_post"}, "writes mlp_out, the config resid_post"),
        ({"reads": "resid_mid"}, "reads mlp_in, the config resid_mid"),
        ({"width": 9}, "width 8, the config 9"),
        ({"skip": True}, "skip False, the config True"),
    ):
        with pytest.raises(InputError, match=message):
            unfold(folded, dataclasses.replace(config, **change), scales)


# -------------------------------------------------------------------------------------------------
# Groups


def test_coders_that_differ_in_data_only_share_a_group():
    other = dataclasses.replace(LOSS, l0_weight=0.5)
    nested = dataclasses.replace(LOSS, frequency_weight=0.1)
    config = recipe(
        coder(3),
        coder(4),
        coder(3, target_l0=5.5),
        coder(3, seed=1),
        coder(4, loss=other, name="a"),
        coder(3, width=32),
        coder(3, prefixes=(8,), name="b"),
        coder(3, activation="topk"),
        coder(4, activation="topk", target_l0=5),
        coder((3,)),
        coder(3, skip=True),
        coder(3, loss=nested, name="c"),
        coder(3, threshold=0.5, name="d"),
    )
    members = [group.members for group in groups(config)]
    assert members[0] == (0, 1, 2, 3, 4)
    assert members[1:] == [(i,) for i in range(5, 13)]


# -------------------------------------------------------------------------------------------------
# How coders start


def test_random_coders_are_of_unit_norm_and_differ_by_seed_alone():
    pair = CoderGroup((0, 1), (coder((1, 2)), coder((4, 5), seed=1)))
    w = init.random_weights(pair, 6, 6, seed=3)
    squares = np.stack([np.sum(np.square(w.w_dec[0][:, 0]), -1), 0 * w.b_enc[:, 0]], 1)
    squares += np.stack([np.sum(np.square(w.w_dec[1][:, i]), -1) for i in range(2)], 1)
    np.testing.assert_allclose(squares, 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w.w_enc, axis=-1), 1.0, rtol=1e-5)
    assert not np.any(w.b_enc) and not np.any(w.b_dec)
    for n, c in enumerate(pair.coders):
        alone = init.random_weights(
            CoderGroup((0,), (dataclasses.replace(c, layers=(0, 7)),)), 6, 6, 3
        )
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(w)):
            np.testing.assert_array_equal(a[0], b[n])
    assert not np.array_equal(w.w_enc[0], w.w_enc[1])


def test_coders_started_from_data_are_at_their_target_l0():
    pair = CoderGroup(
        (0, 1),
        (
            coder((1, 2), **TRANSCODER, skip=True),
            coder((4, 5), target_l0=20, **TRANSCODER, skip=True),
        ),
    )
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    x = draw(2, 2, 400, 6) + 3.0
    true = draw(2, 2, 6, 6)
    y = jnp.einsum("nxbd,nxde->nxbe", x, true) + 0.01 * draw(2, 2, 400, 6) + 5.0
    w = init.from_data(init.random_weights(pair, 6, 6, 0), pair, x, y)
    for n, c in enumerate(pair.coders):
        f, _ = run_by_hand(w, n, c, np.asarray(x[n]))
        l0 = np.sum(f > 0, (0, 2)).mean()
        assert l0 == pytest.approx(c.target_l0, rel=0.1)
        assert init.expected_l0(w, pair, n, x[n]) == pytest.approx(l0, rel=1e-5)
    assert np.all(w.threshold >= 0.001)
    np.testing.assert_allclose(w.w_skip, true, atol=0.02)  # ridge, so nearly
    off = np.asarray(y - jnp.einsum("nxbd,nxde->nxbe", x, w.w_skip)).mean(2)
    np.testing.assert_allclose(w.b_dec, off, atol=1e-3)


def planted(later_width=16):
    """Two SAEs on layers 1 and 2; of the later one, features 1, 3 .. 15 nearly copy the earlier's
    0 .. 7 in reverse, and the others are of its own."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0]
    early = q[:16]
    later = np.empty((16, 32))
    later[1::2], later[::2] = q[7::-1] + 0.3 * q[24:], q[16:24]
    later /= np.linalg.norm(later, axis=1, keepdims=True)
    made = []
    for layer, rows in ((1, early), (2, later[:later_width])):
        rows = jnp.asarray(rows, jnp.float32)
        zeros = jnp.zeros(len(rows))
        made.append(
            SparseCoder(rows.T, zeros, zeros + 0.5, rows, jnp.ones(32) * layer, layer=layer)
        )
    return made, later


def test_coders_of_several_layers_take_each_feature_once():
    config = coder((1, 2), width=8, target_l0=2, init_layers=("a", "b"))
    scales = {"in": jnp.array([2.0, 5.0]), "out": jnp.array([2.0, 5.0])}
    singles, later = planted()
    w, taken = init.from_coders(singles, config, scales)
    assert taken[0].tolist() == list(range(8)) and taken[1].tolist() == list(range(0, 16, 2))
    copies = later[1::2][::-1]  # of the early features 0 .. 7
    early = np.asarray(singles[0].w_dec[:8])
    strength = np.sum(early * copies, 1, keepdims=True)
    norm = np.sqrt(1 + strength**2)
    np.testing.assert_allclose(w.w_dec[0][0, 0], early / norm, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(w.w_dec[1][0, 0], strength * copies / norm, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(w.w_dec[1][0, 1], later[::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(w.b_dec[0, 1], 2 / 5 * np.ones(32), rtol=1e-5)
    # The same feature fires where it did: unit_rows scales z and threshold alike.
    np.testing.assert_allclose(w.threshold[0, 0], 0.25 * norm[:, 0], rtol=1e-5)
    np.testing.assert_allclose(w.w_enc[0, 0], early * norm, rtol=1e-4, atol=1e-5)
    # Of 12, six are marked as copies; what the two early ones without a copy mark is rounding.
    with pytest.raises(InputError, match="b: [456] features are left .* 8 are needed"):
        init.from_coders(planted(later_width=12)[0], config, scales)


# -------------------------------------------------------------------------------------------------
# The buffer and the update


def test_buffer_takes_only_tokens_that_count_and_forgets_the_oldest():
    config = recipe(CoderConfig(0, width=8, target_l0=2), rows=1, length=4, buffer=8, batch=8)
    plan = steps.make_plan(config, dataclasses.replace(MODEL, d_model=3))
    state = steps.init_state(plan, dataclasses.replace(MODEL, d_model=3))
    x = jnp.arange(1.0, 7.0)[None, :, None] * jnp.ones((1, 6, 3))
    counts = jnp.array([True, False, True, True, True, False])
    for scale in (1, 10, 100):
        state = steps.fill(state, {"resid_post": scale * x}, counts)
    got = sorted(np.asarray(state.buffer["resid_post"][0, :, 0], np.float32))
    assert got == [10, 30, 40, 50, 100, 300, 400, 500]


def test_every_activation_is_drawn_once_in_a_sweep():
    config = recipe(CoderConfig(0, width=8, target_l0=2), rows=1, length=4, buffer=12, batch=4)
    small = dataclasses.replace(MODEL, d_model=3)
    plan = steps.make_plan(config, small)
    state = steps.init_state(plan, small)
    x = jnp.arange(12.0)[None, :, None] * jnp.ones((1, 12, 3))
    state = steps.fill(state, {"resid_post": x}, jnp.ones(12, bool))
    sweeps = []
    for _ in range(2):
        seen = []
        for _ in range(3):
            state, batch = steps.draw(state, plan)
            seen += np.asarray(batch["resid_post"][0, :, 0], np.float32).tolist()
        assert sorted(seen) == list(range(12))
        sweeps.append(seen)
    assert sweeps[0] != sweeps[1] != list(range(12))


def test_model_activations_leave_out_bos_of_every_piece_padding_and_what_the_data_says(model):
    plan = steps.make_plan(recipe(coder(2), coder(2, reads="z")), model.config)
    segments, counts = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.ones((1, 6), bool).at[0, 2].set(False)
    x, kept = steps.model_activations(
        model, jnp.array([[2, 5, 6, 2, 7, 0]]), segments, counts, plan
    )
    assert kept.tolist() == [False, True, False, False, True, False]
    assert x["resid_post"].shape == (1, 6, 32) and x["z"].shape == (1, 6, 64)


def test_update_keeps_decoders_at_unit_norm_and_thresholds_positive():
    config = recipe(
        coder((1, 2), width=16, target_l0=4), optimizer=OptimizerConfig(0.1, 0), batch=64
    )
    small = dataclasses.replace(MODEL, d_model=6)
    plan = steps.make_plan(config, small)
    x = {"resid_post": 30 * jax.random.normal(jax.random.key(1), (2, 64, 6))}
    state = training.start(plan, steps.init_state(plan, small), x, {})
    norms = jnp.sqrt(jnp.mean(jnp.sum(x["resid_post"] ** 2, -1), 1))
    np.testing.assert_allclose(state.scale["resid_post"], norms, rtol=0.2)
    update = jax.jit(lambda s: steps.update(s, x, plan)[0])
    for _ in range(5):
        state = update(state)
    for group in state.groups:
        d = group.weights.w_dec
        for i in range(len(d)):
            squares = sum(jnp.sum(d[j][:, i] ** 2, -1) for j in range(i, len(d)))
            np.testing.assert_allclose(squares, 1.0, rtol=1e-5)
        assert float(group.weights.threshold.min()) >= 0


def test_products_have_the_precision_asked_for():
    plan = steps.make_plan(recipe(coder(2, width=16)), dataclasses.replace(MODEL, d_model=6))
    state = jax.eval_shape(lambda: steps.init_state(plan, dataclasses.replace(MODEL, d_model=6)))
    x = {"resid_post": jax.ShapeDtypeStruct((1, 128, 6), jnp.float32)}

    def products(precision):
        config = dataclasses.replace(plan.config, precision=precision)
        step = jax.make_jaxpr(
            lambda s, x: steps.update(s, x, dataclasses.replace(plan, config=config))
        )
        return [line for line in str(step(state, x)).splitlines() if "precision=" in line]

    assert len(products("float32")) > 3 and all("None" in line for line in products("default"))
    assert all("HIGHEST" in line for line in products("float32"))
    assert all("HIGH" in line and "HIGHEST" not in line for line in products("tensorfloat32"))


def test_a_gradient_of_unusual_norm_is_cut_for_its_kind_of_weight_and_coder_alone():
    config = recipe(*(coder(2, seed=n, width=16) for n in range(2)))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(b2=0.9, clip=1.5))
    plan = steps.make_plan(config, dataclasses.replace(MODEL, d_model=6))
    [group] = steps.init_state(plan, dataclasses.replace(MODEL, d_model=6)).groups
    rng, moments, squares = np.random.default_rng(0), group.optimizer, []
    optimizer = steps.optimizer(config)
    normal = lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    for _ in range(4):
        grads = jax.tree.map(normal, group.weights)
        assert jax.tree.all(
            jax.tree.map(
                jnp.array_equal,
                grads,
                steps.clipped(grads, moments, dataclasses.replace(config.optimizer, clip=0.0)),
            )
        )
        if not squares:  # nothing is usual yet
            first = steps.clipped(grads, moments, config.optimizer)
            assert jax.tree.all(jax.tree.map(jnp.array_equal, grads, first))
        squares.append(np.sum(np.asarray(grads.w_enc) ** 2, (1, 2, 3)))
        with jax.numpy_dtype_promotion("standard"):
            _, moments = optimizer.update(grads, moments)
    grads = jax.tree.map(normal, group.weights)
    wild = dataclasses.replace(grads, w_enc=grads.w_enc.at[1].multiply(1000.0))
    cut = steps.clipped(wild, moments, config.optimizer)
    shares = 0.1 * 0.9 ** np.arange(3, -1, -1)
    usual = np.sqrt(shares @ np.array(squares) / shares.sum())
    np.testing.assert_allclose(np.linalg.norm(cut.w_enc[1]), 1.5 * usual[1], rtol=1e-5)
    np.testing.assert_allclose(
        cut.w_enc[1] / np.linalg.norm(cut.w_enc[1]),
        grads.w_enc[1] / np.linalg.norm(grads.w_enc[1]),
        rtol=1e-4,
    )
    usually = steps.clipped(grads, moments, config.optimizer)
    assert jnp.array_equal(cut.w_enc[0], usually.w_enc[0])
    assert jnp.array_equal(cut.b_dec, usually.b_dec)
    wild = dataclasses.replace(grads, threshold=1000.0 * grads.threshold)
    cut = steps.clipped(wild, moments, config.optimizer)
    assert jnp.array_equal(cut.threshold, wild.threshold)


def test_a_feature_active_again_after_long_moves_no_more_than_the_limit():
    config = recipe(coder(2, width=16))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(1e-2, 0, step_limit=2e-2))
    plan = steps.make_plan(config, dataclasses.replace(MODEL, d_model=6))
    state = steps.init_state(plan, dataclasses.replace(MODEL, d_model=6))
    [group] = state.groups
    moments = steps.optimizer(config).init(group.weights)
    optimizer, rng = steps.optimizer(config), np.random.default_rng(0)
    normal = lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    seldom = lambda g: dataclasses.replace(
        g, w_enc=g.w_enc.at[:, :, 3].set(0.0), b_enc=g.b_enc.at[:, :, 3].set(0.0)
    )
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2000):
            _, moments = optimizer.update(seldom(jax.tree.map(normal, group.weights)), moments)
        changes, _ = optimizer.update(jax.tree.map(normal, group.weights), moments)
    cut = steps.limited(changes, config.optimizer)
    size = lambda a: np.sqrt(np.mean(np.asarray(a[0, 0, 3]) ** 2))
    assert size(changes.w_enc) > 20 and abs(changes.b_enc[0, 0, 3]) > 2
    np.testing.assert_allclose(size(cut.w_enc), 2.0, rtol=1e-5)  # 2e-2 over the rate of 1e-2
    np.testing.assert_allclose(abs(cut.b_enc[0, 0, 3]), 2.0, rtol=1e-5)
    others = np.delete(np.arange(16), 3)
    assert jnp.array_equal(cut.w_enc[:, :, others], changes.w_enc[:, :, others])
    assert jnp.array_equal(cut.threshold, changes.threshold)
    off = steps.limited(changes, OptimizerConfig(step_limit=0.0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, off, changes))


def test_features_are_dead_by_how_seldom_they_are_active():
    """Silent, once in a while, half the limit, four times the limit; all were frequent before."""
    loss = LossConfig(dead_after=50, dead_below=0.02, l0_warmup=0)
    of_two_layers = steps.make_plan(recipe(coder((3, 4), loss=loss)), MODEL)
    assert float(steps.dead_limit(of_two_layers.groups[0])[0, 0, 0]) == pytest.approx(0.02 * 4 / 64)
    config = recipe(coder(3, loss=loss), coder(4, loss=loss, target_l0=16.0))
    plan = steps.make_plan(config, MODEL)
    [group], [state] = plan.groups, steps.init_state(plan, MODEL).groups
    limit = np.array([0.02 * 8 / 64, 0.02 * 16 / 64])[:, None, None]
    dead = lambda f: steps.dials(dataclasses.replace(state, activity=f), group, jnp.array(0))[2]
    assert not dead(state.activity).any()  # nobody knows yet
    f = steps.activities(state.activity, jnp.full((2, 1, 64), 0.3), group)
    when = np.zeros((2, 1, 64))
    for i in range(400):
        share = np.full((2, 1, 64), 4.0) * limit
        share[..., 0], share[..., 1], share[..., 2] = 0.0, 5 * limit[..., 0] * (i % 50 == 0), 0.5
        share[..., 2] *= limit[..., 0]
        f = steps.activities(f, jnp.asarray(share, jnp.float32), group)
        when = np.where((when == 0) & (np.asarray(dead(f)) > 0), i + 1, when)
    got = np.asarray(dead(f))
    assert (got[..., 3:] == 0).all() and ((when[..., 0] >= 50) & (when[..., 0] <= 52)).all()
    np.testing.assert_allclose(got[..., 2], 0.5, atol=0.01)
    assert (got[..., 0] > 0.99).all() and ((got[..., 1] > 0.8) & (got[..., 1] < 1)).all()


def test_a_coder_that_starts_silent_learns():
    """Its first gradients are 0, and so is their usual norm: that is no reason to cut the next."""
    config = recipe(coder(2, width=16, threshold=0.5, loss=LossConfig(l0_warmup=0, dead_after=0)))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(3e-2, 0))
    plan = steps.make_plan(config, dataclasses.replace(MODEL, d_model=6))
    state = steps.init_state(plan, dataclasses.replace(MODEL, d_model=6))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128, 6)), jnp.float32)
    x = {"resid_post": 0.1 * x / jnp.linalg.norm(x, axis=-1, keepdims=True)}
    state = dataclasses.replace(state, scale={"resid_post": jnp.ones(1)})
    before, update = (
        state.groups[0].weights.w_dec[0],
        jax.jit(lambda state: steps.update(state, x, plan)),
    )
    l0 = []
    for _ in range(60):
        state, [parts] = update(state)
        l0.append(float(parts["l0"][0]))
    assert l0[0] == 0 < l0[-1]
    assert np.abs(state.groups[0].weights.w_dec[0] - before).max() > 0.01


def test_silent_features_become_features_that_are_used():
    """Tokens are sums of 3 of 128 directions; half of 128 features start out of their reach."""
    D, F, few = 64, 128, dataclasses.replace(MODEL, d_model=64)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((128, D)) / D**0.5

    def batch():
        on = np.argsort(rng.random((512, 128)), 1)[:, :3]
        x = np.sum(rng.uniform(0.5, 1.5, (512, 3, 1)) * directions[on], 1)
        return {"resid_post": jnp.asarray(x[None] / np.sqrt(np.mean(np.sum(x**2, 1))), jnp.float32)}

    def trained(dead_weight, threshold=0.3, b_enc=0.0):
        """Whether each feature is used after 600 updates, and the FVU then."""
        loss = LossConfig(
            l0_warmup=0,
            per_token=False,
            bandwidth=0.05,
            dead_after=20,
            dead_below=0.1,
            dead_weight=dead_weight,
        )
        config = recipe(coder(2, width=F, target_l0=4, threshold=0.3, loss=loss))
        plan = steps.make_plan(config, few)
        state = dataclasses.replace(steps.init_state(plan, few), scale={"resid_post": jnp.ones(1)})
        [group] = state.groups
        weights = dataclasses.replace(
            group.weights,
            threshold=group.weights.threshold.at[..., F // 2 :].set(threshold),
            b_enc=group.weights.b_enc.at[..., F // 2 :].set(b_enc),
        )
        state = dataclasses.replace(state, groups=(dataclasses.replace(group, weights=weights),))
        update = jax.jit(lambda state, x: steps.update(state, x, plan))
        for _ in range(600):
            state, [parts] = update(state, batch())
        w = jax.tree.map(lambda a: np.asarray(a)[0, 0], state.groups[0].weights)
        z = (np.asarray(batch()["resid_post"][0]) - w.b_dec) @ w.w_enc.T + w.b_enc
        return (z > w.threshold).mean(0) > 0.1 * 4 / F, float(parts["fvu"][0])

    (off, without), (on, fvu) = trained(0.0, 1.0), trained(0.01, 1.0)
    assert off[: F // 2].all() and not off[F // 2 :].any()
    assert on[F // 2 :].mean() > 0.95 and fvu < 0.3 * without
    on, fvu = trained(0.01, b_enc=-0.8)
    assert on[F // 2 :].mean() > 0.95 and fvu < 0.3 * without


# -------------------------------------------------------------------------------------------------
# Runs

EVERY_KIND = (
    coder(3),
    coder(4),
    coder(2, skip=True, **TRANSCODER),
    coder((3, 4), activation="batch_topk", prefixes=(8, 32), name="nested"),
    coder((0, 1), skip=True, **TRANSCODER),
    coder(3, reads="z", activation="topk"),
)
NAMES = {
    "resid_post/layer_3_width_64_l0_8": "sae",
    "resid_post/layer_4_width_64_l0_8": "sae",
    "transcoder/layer_2_width_64_l0_8_affine": "skip_transcoder",
    "nested": "crosscoder",
    "clt/layer_0_1_width_64_l0_8_affine": "clt",
    "attn_out/layer_3_width_64_l0_8_topk": "sae",
}


@dataclasses.dataclass
class Finished:
    config: TrainConfig
    folder: object
    coders: dict
    log: list
    compiled: list  # names of the programs


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
    plan = steps.make_plan(recipe(*want), model.config)
    batch = next(TokenBatches(documents(), Letters(), 16, 32, seed=9))
    run = jax.jit(lambda *a: steps.model_activations(model, *a, plan))
    x, counts = run(batch.tokens, batch.segments, batch.counts)
    keep = np.asarray(counts)
    return {(s, i): np.asarray(x[s][n])[keep] for s, ls in plan.sites for n, i in enumerate(ls)}


def reconstruction(coder, config, activations):
    """(FVU, mean L0) over all layers, each layer's activations at unit mean squared norm."""

    def rows(site):
        return np.stack([activations[site, i] for i in config.layer_tuple])

    x, y = rows(config.reads), rows(config.target)
    out = coder.reconstruct(x if config.several else x[0])
    f = np.asarray(coder.encode(x if config.several else x[0]))
    l0 = (f > 0).sum((0, 2)).mean() if config.several else (f > 0).sum(-1).mean()
    scale = np.sum(y**2, -1).mean(-1)
    error = (np.sum((y - np.asarray(out).reshape(y.shape)) ** 2, -1).mean(-1) / scale).sum()
    variance = (np.sum((y - y.mean(1, keepdims=True)) ** 2, -1).mean(-1) / scale).sum()
    return error / variance, l0


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
        layers = loaded.layers if config.several else (loaded.layer,)
        assert layers == config.layer_tuple
        curve = [row[name]["fvu"] for row in rows]
        assert curve[-1] < 0.7 * curve[0], name
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
    plan = steps.make_plan(recipe(*tuned, both), model.config)
    sample = {s: jnp.stack([activations[s, i] for i in ls]) for s, ls in plan.sites}
    state = training.start(
        plan, steps.init_state(plan, model.config), sample, training.load_starts(plan.config)
    )
    found = training.coders(plan, state, sample)
    for c in tuned:
        before, after = finished.coders[c.folder], found[c.folder]
        assert reconstruction(after, c, activations) == pytest.approx(
            reconstruction(before, c, activations), rel=1e-4
        )
        if not c.several:  # there the norm of a decoder depends on all layers' scales
            same(after, before)
    # The crosscoder's first layer is the first features of the first SAE, and its target L0 starts
    # where it is.
    x = np.stack([activations["resid_post", 3], activations["resid_post", 4]])
    on = np.asarray(found["from two"].encode(x)) > 0
    first = finished.coders[list(NAMES)[0]].encode(x[0])[:, :16] > 0
    np.testing.assert_array_equal(on[0], first)
    [start] = [g.l0_start for g, like in zip(state.groups, plan.groups) if like.like is both]
    assert start == pytest.approx(max(8, on.sum((0, 2)).mean()), rel=1e-4)


def test_the_sparse_step_is_taken_where_it_is_faster(model, monkeypatch):
    """With gathers that XLA writes to memory a coder has to be much wider than with kernels."""

    def capacity(width, form):
        monkeypatch.setattr(steps.sparse, "sparse_form", lambda: form)
        plan = steps.make_plan(recipe(coder(3, width=width), sparse=2.0), model.config)
        return plan.capacity(plan.groups[0])

    assert [capacity(w, "cpu") for w in (32, 33, 8192)] == [0, 16, 16]
    assert [capacity(w, "xla") for w in (8192, 8193)] == [0, 16]


def test_several_coders_train_as_each_would_alone(model, tmp_path, monkeypatch):
    """In the sparse step, with a threshold near which many pre-activations lie."""
    monkeypatch.setitem(steps.sparse.FEATURES_A_SLOT, "xla", 2)  # without a compiler, too
    loss = dataclasses.replace(LOSS, bandwidth=0.1)
    last = coder(4, loss=dataclasses.replace(loss, l0_weight=0.5), target_l0=6.0, seed=1)
    config = recipe(
        coder(3, loss=loss), coder(3, target_l0=5.0, loss=loss), last, tokens=128 * 8, sparse=2.0
    )
    plan = steps.make_plan(config, model.config)
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


def test_a_run_on_a_store_needs_no_weights_and_says_what_is_read_again(
    model, tmp_path, monkeypatch, caplog
):
    batches = TokenBatches(documents(6), Letters(), 8, 32)  # of 820 tokens
    write_activations(model, batches, {"resid_post": (3,)}, tmp_path / "store", 1000)
    assert "the text has been read 2 times over" in caplog.text
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
    del older["precision"], older["optimizer"]["decay"]
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


# -------------------------------------------------------------------------------------------------
# What is refused


def one_line(excinfo):
    assert "\n" not in str(excinfo.value)


BAD_CODERS = {
    "width": (dict(width=0), "width must be a whole number from 1 on, not 0"),
    "target above width": (dict(width=10, target_l0=20), "must be below the width 10"),
    "negative target": (dict(target_l0=-1), "target_l0 must be positive"),
    "half a feature": (dict(width=64.5), "width must be a whole number"),
    "layers as text": (dict(layers="12"), "layers must be a tuple, not '12'"),
    "layer of another type": (dict(layers=(True, 2)), "layers must be a whole number"),
    "threshold": (dict(threshold=-1.0), "threshold must be a number that is not negative"),
    "prefixes as a number": (dict(prefixes=8), "prefixes must be a tuple, not 8"),
    "no layers": (dict(layers=()), "one layer, or several|must be below"),
    "layers falling": (dict(layers=(3, 1)), "rising order"),
    "a layer twice": (dict(layers=(3, 3)), "rising order"),
    "activation": (dict(activation="top"), "activation 'top' is none of .*topk"),
    "half a k": (dict(activation="topk", target_l0=7.5), "needs a whole target_l0, not 7.5"),
    "prefixes falling": (dict(prefixes=(8, 4)), "prefixes .* must rise"),
    "prefix above width": (dict(width=64, target_l0=8, prefixes=(64,)), "lie below 64"),
    "prefix of nothing": (dict(prefixes=(0, 8)), "prefixes"),
    "too few to start from": (dict(layers=(1, 2), init_layers=("a",)), "not one a layer"),
    "two starts": (dict(init_from="a", init_layers=("b",)), "exclude each other"),
}
BAD_LOSSES = {
    "sparsity": (dict(sparsity="squared"), "sparsity 'squared' is none of quadratic"),
    "bandwidth": (dict(bandwidth=0.0), "bandwidth must be positive"),
    "weight": (dict(l0_weight=-1.0), "l0_weight must be a number that is not negative"),
    "start": (dict(l0_start=-3.0), "l0_start must be positive"),
    "no limit": (dict(dead_below=0.0), "dead_below must be positive"),
    "part of an update": (dict(dead_after=1.5), "dead_after must be a whole number"),
    "nan": (dict(dead_weight=float("nan")), "dead_weight must be a number that is not negative"),
}
BAD_OPTIMIZERS = {
    "moments that never fade": (dict(b2=1.0), "b2 must be at least 0 and below 1"),
    "more decay than run": (dict(decay=2.0), "decay must be a share from 0 to 1"),
    "warmup": (dict(warmup=-1), "warmup must be a whole number from 0 on"),
}
BAD_RUNS = {
    "no coders": (dict(coders=()), "at least one coder"),
    "one name twice": (dict(coders=(coder(3), coder(3))), "two coders are called resid_post/layer"),
    "buffer too small": (dict(buffer=100), "buffer 100 must hold"),
    "buffer never full": (dict(tokens=1000), "tokens 1000 do not fill the buffer"),
    "tokens": (dict(tokens=-5), "tokens must be a whole number from 1 on"),
    "half a batch": (dict(batch=64.5), "batch must be a whole number"),
    "first": (dict(first=-1), "first must be a whole number from 0 on"),
    "mesh": (dict(mesh=(3,)), "mesh must be two numbers of devices"),
    "precision": (dict(precision="float16"), "precision 'float16' is none of default, bfloat16"),
    "two updates by effect": (
        dict(coders=(coder(3, loss=LossConfig(kl_weight=1.0)),), updates=2),
        "needs updates=1",
    ),
    "track": (dict(track=("tensorbord",)), "'tensorbord' is none of tensorboard"),
}


@pytest.mark.parametrize(
    "kind",
    [BAD_CODERS, BAD_LOSSES, BAD_OPTIMIZERS, BAD_RUNS],
    ids=["coder", "loss", "optimizer", "run"],
)
def test_bad_recipes_are_refused(kind):
    make = {
        id(BAD_CODERS): lambda c: CoderConfig(**dict(layers=3) | c),
        id(BAD_LOSSES): lambda c: LossConfig(**c),
        id(BAD_OPTIMIZERS): lambda c: OptimizerConfig(**c),
        id(BAD_RUNS): lambda c: TrainConfig(**dict(coders=(coder(3),)) | c),
    }[id(kind)]
    make({})
    for change, message in kind.values():
        with pytest.raises(InputError, match=message) as refused:
            make(change)
        one_line(refused)


def test_bad_runs_are_refused_before_anything_is_computed(model, tmp_path, monkeypatch):
    def refused(message, *coders, folder="a", data=None, **options):
        with pytest.raises(InputError, match=message) as why:
            training.train(recipe(*coders, **options), tmp_path / folder, model, data)
        one_line(why)

    refused("layer 99: the model has 0..7", coder(99))
    refused("layer 8: the model has 0..7", coder((3, 8)))
    refused("site 'resid_pots'", coder(3, reads="resid_pots"))
    refused("no.*file.*nowhere", coder(3), data=TextData(files=("nowhere/*.txt",)), folder="b")
    refused("no store|nowhere", coder(3), store=str(tmp_path / "nowhere"), folder="c")
    assert not (tmp_path / "c").exists()  # so that a corrected config may use the folder
    (tmp_path / "c").mkdir()
    for damaged in ('{"coders": [', "[3]", '{"coders": 3}'):
        (tmp_path / "c/config.json").write_text(damaged)
        refused("config.json: damaged", coder(3), folder="c")
    refused("rows 4 must be a multiple of the 8 devices", coder(3), mesh=(8, 1), folder="d")


def test_config_files_are_read_and_bad_ones_refused(tmp_path):
    path = tmp_path / "run.py"
    for text, message in (
        ("config = 3", "TrainConfig"),
        ("config = 1 / 0", "ZeroDivisionError"),
        ("config = (", "SyntaxError"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message) as refused:
            load_config(path)
        one_line(refused)
    with pytest.raises(InputError, match="no such config"):
        load_config(tmp_path / "none.py")
    path.write_text(
        "from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig\n"
        "config = TrainConfig(coders=(CoderConfig(5), CoderConfig((1, 2), width=32, target_l0=4)))"
    )
    config = load_config(path)
    assert [c.layer_tuple for c in config.coders] == [(5,), (1, 2)] and config.tokens == 4_000_000


def test_a_config_may_spell_the_place_of_its_text_otherwise(tmp_path):
    """A checkpoint knows the text by its content."""
    at = lambda files, **more: recipe(coder(3), data=TextData(files=(files,), **more))
    training._remember_config(at("./a.txt"), epath.Path(tmp_path), fresh=True)
    training._check_folder(at("/elsewhere/b.txt"), epath.Path(tmp_path))
    with pytest.raises(InputError, match="data differ"):
        training._check_folder(at("./a.txt", field="body"), epath.Path(tmp_path))
    for fresh, name in ((False, "./a.txt"), (True, "caf\ufffd.txt")):
        training._remember_config(at("caf\udce9.txt"), epath.Path(tmp_path), fresh=fresh)
        assert json.loads((tmp_path / "config.json").read_text())["data"]["files"] == [name]
