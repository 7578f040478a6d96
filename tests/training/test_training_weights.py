"""Weights of the trainer: folding them into coders, grouping them, and how they start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from assertions import same
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training import init
from gemma_scope_jax.training.recipe import CoderConfig
from gemma_scope_jax.training.weights import CoderGroup, Weights, fold, groups, unfold, unit_decoder
from training_runs import LOSS, TRANSCODER, coder, recipe, run_by_hand

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
    D, E = 6, 6 if config.target == config.reads or config.is_multi_layer else 5
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


@pytest.mark.parametrize("config", KINDS.values(), ids=list(KINDS))
def test_folding_is_exact_and_unfolding_undoes_it(config):
    w, scales = random_weights(config)
    x = np.random.default_rng(1).standard_normal((len(config.layer_tuple), 20, 6))
    folded = fold(w, 1, config, scales, first=4)
    scale = {k: np.asarray(v, np.float64)[:, None, None] for k, v in scales.items()}
    f, y = run_by_hand(w, 1, config, x)
    raw = jnp.asarray(x * scale["in"], jnp.float32)
    raw = raw if config.is_multi_layer else raw[0]
    both = (f * scale["out"], y * scale["out"])
    assert np.any(f > 0)
    same(
        (folded.encode(raw), folded.reconstruct(raw)),
        both if config.is_multi_layer else (both[0][0], both[1][0]),
    )
    assert (folded.reads, folded.writes, folded.first) == (config.reads, config.target, 4)
    back = unfold(folded, config, scales)
    same(back, jax.tree.map(lambda v: v[1:], w))


@pytest.mark.parametrize("name", ["skip transcoder", "crosscoder"])
def test_unfolding_any_decoder_norm_keeps_the_function(name):
    """The decoders need not be of unit norm."""
    config = KINDS[name]
    w, scales = random_weights(config)
    folded = fold(w, 0, config, scales)
    norm = jnp.asarray(np.random.default_rng(5).uniform(0.3, 3, folded.w_dec.shape[:-1]))
    odd = folded.replace(w_dec=folded.w_dec * norm.astype(jnp.float32)[..., None])
    unfolded = unfold(odd, config, scales)
    squares = sum(jnp.sum(b[0, 0] ** 2, -1) for b in unfolded.w_dec)
    np.testing.assert_allclose(squares, 1.0, rtol=1e-5)
    x = 300 * np.random.default_rng(1).standard_normal((len(config.layer_tuple), 20, 6))
    x = jnp.asarray(x if config.is_multi_layer else x[0], jnp.float32)
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
    first, *others = (group.coders for group in groups(config))
    assert first == config.coders[:5]
    assert others == [(c,) for c in config.coders[5:]]


def test_random_coders_are_of_unit_norm_and_differ_by_seed_alone():
    pair = CoderGroup((coder((1, 2)), coder((4, 5), seed=1)))
    w = init.random_weights(pair, 6, 6, seed=3)
    squares = np.stack([np.sum(np.square(w.w_dec[0][:, 0]), -1), 0 * w.b_enc[:, 0]], 1)
    squares += np.stack([np.sum(np.square(w.w_dec[1][:, i]), -1) for i in range(2)], 1)
    np.testing.assert_allclose(squares, 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(w.w_enc, axis=-1), 1.0, rtol=1e-5)
    assert not np.any(w.b_enc) and not np.any(w.b_dec)
    for n, c in enumerate(pair.coders):
        moved = dataclasses.replace(c, layers=(0, 7))
        alone = init.random_weights(CoderGroup((moved,)), 6, 6, 3)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(w)):
            np.testing.assert_array_equal(a[0], b[n])
    assert not np.array_equal(w.w_enc[0], w.w_enc[1])


def test_coders_started_from_data_are_at_their_target_l0():
    options = dict(TRANSCODER, skip=True)
    pair = CoderGroup((coder((1, 2), **options), coder((4, 5), target_l0=20, **options)))
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


@pytest.mark.parametrize("layers", [3, (0, 2)])
def test_decoders_of_another_site_start_at_a_regression(layers):
    config = coder(layers, target_l0=8, **TRANSCODER)
    group, X = CoderGroup((config,)), len(config.layer_tuple)
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    x, true = draw(1, X, 2000, 6), draw(X, 6, 6)
    y = jnp.tanh(jnp.einsum("nxbd,xde->nxbe", x, true))
    w = init.from_data(init.random_weights(group, 6, 6, 0), group, x, y)
    for j in range(X):
        left = np.asarray(y[0, j], np.float64) - np.asarray(w.b_dec[0, j])
        left *= np.minimum(1, config.loss.outlier / np.linalg.norm(y[0, j], axis=1))[:, None]
        f, _ = run_by_hand(w, 0, config, np.asarray(x[0]))
        f = np.concatenate(list(np.asarray(f, np.float64)[: j + 1]), 1)
        best = np.linalg.lstsq(f, left, rcond=None)[0]
        start = np.asarray(w.w_dec[j][0], np.float64).reshape(len(best), -1)
        # Not the directions of a finished regression, but most features point its way, and one
        # factor for all makes the error smaller, as no factor does with random directions.
        assert (np.sum(best * start, 1) > 0).mean() > 0.75
        written = f @ start
        factor = np.sum(written * left) / np.sum(written**2)
        assert factor > 0
        assert np.sum((left - factor * written) ** 2) < 0.9 * np.sum(left**2)
    norms = np.sqrt(sum(np.sum(np.square(w.w_dec[j][0][0]), -1) for j in range(X)))
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_a_feature_that_is_active_nowhere_keeps_its_decoder():
    group = CoderGroup((coder(3, target_l0=8, **TRANSCODER),))
    w = init.random_weights(group, 6, 6, 0)
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((1, 50, 6)), jnp.float32) for _ in range(2))
    one = jax.tree.map(lambda leaf: leaf[0], w)
    one = dataclasses.replace(one, threshold=one.threshold.at[0, 3].set(1e3))
    (fit,) = init.fitted(one, x, y, 3.0)
    np.testing.assert_array_equal(fit[0, 3], one.w_dec[0][0, 3])
    assert not np.allclose(fit[0, 4], one.w_dec[0][0, 4], atol=0.1)
    (same_y,) = init.fitted(one, x, jnp.zeros_like(y) + one.b_dec[:, None], 3.0)  # nothing to fit
    np.testing.assert_array_equal(same_y, one.w_dec[0])


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
    with pytest.raises(InputError, match="b: only [456] features are left .* 8 are needed"):
        init.from_coders(planted(later_width=12)[0], config, scales)
