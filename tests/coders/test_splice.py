"""Coders inside the model: what they read, replace and change, against float64 and themselves."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.coders.multi_layer_coder import block_index
from gemma_scope_jax.model.config import abstract_params
from gemma_scope_jax.model.intercept import Context
from tiny import tiny_model

LAYERS, D, Z, F = 4, 32, 64, 48
T = 9
IDS = np.random.default_rng(0).integers(2, 300, (2, T)).astype(np.int32)
SEGMENTS = np.ones_like(IDS)
SEGMENTS[1, :2] = 0  # the second row is left-padded: its <bos> is column 2


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-4b"], layers=LAYERS)


@pytest.fixture(scope="module")
def plain(model):
    return gs.run(model, IDS, segments=SEGMENTS)


def sparse_coder(seed=0, d=D, skip=False, **place):
    r = np.random.default_rng(seed)
    normal = lambda *shape: r.normal(size=shape).astype(np.float32)
    return gs.SparseCoder(
        w_enc=normal(d, F) / d**0.5,
        b_enc=0.1 * normal(F),
        threshold=0.5 + r.random(F, np.float32),
        w_dec=normal(F, d) / F**0.5,
        b_dec=0.1 * normal(d),
        w_skip=0.2 * normal(d, d) if skip else None,
        **place,
    )


def multi_layer_coder(layers, seed=0, skip=False, **place):
    r, X = np.random.default_rng(seed), len(layers)
    normal = lambda *shape: r.normal(size=shape).astype(np.float32)
    return gs.MultiLayerCoder(
        w_enc=normal(X, D, F) / D**0.5,
        b_enc=0.1 * normal(X, F),
        threshold=0.5 + r.random((X, F), np.float32),
        w_dec=normal(X * (X + 1) // 2, F, D) / F**0.5,
        b_dec=0.1 * normal(X, D),
        w_skip=0.2 * normal(X, D, D) if skip else None,
        layers=layers,
        **place,
    )


MLP = {"reads": "mlp_in", "writes": "mlp_out"}
CODERS = {
    "sae": sparse_coder(layer=3),
    "attention sae": sparse_coder(layer=3, d=Z, reads="z", writes="z"),
    "transcoder": sparse_coder(layer=3, **MLP),
    "skip transcoder": sparse_coder(layer=3, skip=True, **MLP),
    "crosscoder": multi_layer_coder((0, 2, 3)),
    "clt": multi_layer_coder(tuple(range(LAYERS)), **MLP),
    "skip clt": multi_layer_coder(tuple(range(LAYERS)), skip=True, **MLP),
}


def masked(first):
    """bool [B, T]: tokens that a coder with this `first` works on."""
    positions = np.stack([np.arange(T), np.arange(T) - 2])
    return positions >= first


def encode(coder, x):
    """The formula in float64: x [X, B, T, D] or [B, T, D] -> f."""
    w, b, t = (np.asarray(a, np.float64) for a in (coder.w_enc, coder.b_enc, coder.threshold))
    if w.ndim == 2:
        z = x @ w + b
        return z * (z > t)
    z = np.einsum("x...d,xdf->x...f", x, w) + b[:, None, None]
    return z * (z > t[:, None, None])


def decode(coder, f, x):
    """The formula in float64; several layers: the dense sum over the triangle."""
    w_dec, b_dec = np.asarray(coder.w_dec, np.float64), np.asarray(coder.b_dec, np.float64)
    skip = 0.0 if coder.w_skip is None else x @ _spread(coder.w_skip)
    if w_dec.ndim == 2:
        return f @ w_dec + b_dec + skip
    X = len(coder.layers)
    y = np.zeros((*f.shape[:-1], D))
    for i in range(X):
        for j in range(i, X):
            y[j] += f[i] @ w_dec[block_index(i, j, X)]
    return y + b_dec[:, None, None] + skip


def _spread(w):
    """[D, D] or [X, D, D] -> with an axis for the batch."""
    return np.asarray(w, np.float64) if w.ndim == 2 else np.asarray(w, np.float64)[:, None]


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def observe(model, coder, *work):
    """Run `work` between captures of what the coder reads and of what it writes."""
    layers = coder.layers if coder.multi_layer else coder.layer
    capture = lambda site, name: gs.capture(site, layers, name=name)
    around = [capture(coder.reads, "read"), capture(coder.writes, "before"), *work]
    around.append(capture(coder.writes, "after"))
    out = gs.run(model, IDS, around, segments=SEGMENTS)
    return out, {k: np.asarray(v, np.float64) for k, v in out.reads.items() if k in NAMES}


NAMES = ("read", "before", "after", "features")


# -------------------------------------------------------------------------------------------------
# Features and splicing


@pytest.mark.parametrize("kind", CODERS)
def test_splicing_without_error_leaves_what_the_formulas_say(model, plain, kind):
    """Features, reconstruction and skip in float64; <bos> and padding left alone."""
    coder = CODERS[kind]
    out, seen = observe(model, coder, gs.features(coder), gs.splice(coder, error=False))
    where = masked(1)[..., None]
    f = np.where(where, encode(coder, seen["read"]), 0.0)
    close(seen["features"], f)
    assert 0.02 < (f[..., masked(1), :] > 0).mean() < 0.6
    expected = np.where(where, decode(coder, f, seen["read"]), seen["before"])
    close(seen["after"], expected)
    assert (seen["after"] == seen["before"])[..., ~masked(1), :].all()
    assert np.abs(out.logits - plain.logits).max() > 0.1


@pytest.mark.law
def test_splices_with_error_leave_the_logits_alone(model, plain):
    """Every kind of coder, all at once."""
    spliced = gs.run(model, IDS, [gs.splice(c) for c in CODERS.values()], segments=SEGMENTS)
    close(spliced.logits, plain.logits, 2e-6)


def test_a_splice_with_error_changes_no_bit_in_bfloat16(model):
    """What it replaces stays as it was."""
    cast = lambda a, like: np.asarray(a).astype(like.dtype)
    params = jax.tree.map(cast, model.params, abstract_params(model.config, jnp.bfloat16))
    model = model.replace(params=params)
    for coder in (CODERS["transcoder"], CODERS["crosscoder"]):
        _, seen = observe(model, coder, gs.splice(coder))
        np.testing.assert_array_equal(seen["after"], seen["before"])
        assert np.abs(seen["before"]).max() > 0.1


def test_with_error_gradients_flow_through_the_features_alone(model):
    """The error is a constant: the gradient at the read site is that of the reconstruction."""
    coder = sparse_coder(layer=LAYERS - 1)

    @jax.jit
    def gradients(delta):
        def out(delta, *work):
            steered = gs.steer("resid_post", LAYERS - 1, delta)
            captured = gs.capture("resid_post", LAYERS - 1)
            return gs.forward(model, IDS, [steered, *work, captured]).reads["resid_post"].sum()

        return jax.grad(out)(delta, gs.splice(coder)), jax.grad(out)(delta)

    x = gs.run(model, IDS, [gs.capture("resid_post", LAYERS - 1)]).reads["resid_post"]
    through, plainly = gradients(np.zeros_like(x))
    expected = np.asarray(jax.grad(lambda x: coder.reconstruct(x).sum())(x))
    close(through[:, 1:], expected[:, 1:])
    close(plainly[:, 1:], np.ones_like(expected[:, 1:]))


def test_top_k_features_are_the_largest_of_all(model):
    for coder in (CODERS["sae"], CODERS["clt"]):
        work = [gs.features(coder), gs.features(coder, k=5, name="top")]
        reads = gs.run(model, IDS, work, segments=SEGMENTS).reads
        f, (values, indices) = np.asarray(reads["features"]), reads["top"]
        np.testing.assert_array_equal(values, -np.sort(-f, -1)[..., :5])
        np.testing.assert_array_equal(np.take_along_axis(f, np.asarray(indices), -1), values)
        assert values.shape[-1] == 5
        assert indices.dtype == jnp.int32


def test_first_positions_are_skipped_and_may_be_chosen(model):
    chat = CODERS["sae"].replace(first=4)
    work = [gs.features(chat), gs.features(chat, first=0, name="all")]
    reads = gs.run(model, IDS, work, segments=SEGMENTS).reads
    f, everything = np.asarray(reads["features"]), np.asarray(reads["all"])
    assert (f[~masked(4)] == 0).all()
    np.testing.assert_array_equal(f[masked(4)], everything[masked(4)])
    assert (everything[masked(0)].max(-1) > 0).all()
    assert (everything[~masked(0)] == 0).all()


# -------------------------------------------------------------------------------------------------
# Edits


def halve(f, ctx):
    return 0.5 * f


@pytest.mark.parametrize("kind", ["sae", "skip transcoder", "crosscoder", "skip clt"])
def test_an_edit_adds_the_change_of_the_decoded_features(model, kind):
    coder = CODERS[kind]
    _, seen = observe(model, coder, gs.features(coder), gs.edit(coder, halve, positions=(3, 5, 6)))
    f, x = seen["features"], seen["read"]
    here = masked(1) & np.isin(masked(0).cumsum(1) - 1, (3, 5, 6))
    g = np.where(here[..., None], 0.5 * f, f)
    expected = seen["before"] + decode(coder, g, x) - decode(coder, f, x)
    close(seen["after"], expected)
    assert (seen["after"] == seen["before"])[..., ~here, :].all()
    assert (seen["after"] != seen["before"])[..., here, :].any(-1).all()


def test_clamp_sets_one_or_several_features(model):
    f = jnp.asarray(np.random.default_rng(0).random((2, 3, F)), jnp.float32)
    at = lambda layer: Context(layer, jnp.arange(3)[None], jnp.ones((1, 3), bool), {})
    got = np.asarray(gs.clamp(f, at(2), 5, 0.0))
    np.testing.assert_array_equal(got, np.where(np.arange(F) == 5, 0.0, f))
    got = np.asarray(gs.clamp(f, at(2), np.array([7, 1]), np.array([2.0, 3.0])))
    assert (got[..., 7] == 2).all() and (got[..., 1] == 3).all()
    assert (np.delete(got, (1, 7), -1) == np.delete(f, (1, 7), -1)).all()
    got = np.asarray(gs.clamp(f, at(2), np.array([7, 1]), 9.0, np.array([2, 3])))
    assert (got[..., 7] == 9).all() and (got[..., 1] == f[..., 1]).all()
    np.testing.assert_array_equal(gs.clamp(f, at(2), 7, 9.0, 3), f)


def test_an_edit_beside_an_intercept_at_another_single_layer(model):
    """The layers are then cut apart, and a layer's number may be one that the coder lacks."""
    items = [gs.edit(sparse_coder(layer=2), gs.clamp, 5, 9.0), gs.steer("resid_post", (0, 3), 1.0)]
    np.testing.assert_allclose(
        gs.run(model, IDS, items).logits, gs.forward(model, IDS, items).logits, atol=2e-5
    )


def test_a_clamped_feature_reads_back_as_the_value(model):
    """An SAE whose decoder rows are its encoder's columns, orthogonal: the edit is exact."""
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0].astype(np.float32)
    zeros = np.zeros(D, np.float32)
    sae = gs.SparseCoder(orthogonal, zeros, zeros, orthogonal.T, zeros, layer=3)
    read = lambda name: gs.features(sae, name=name)
    work = [read("f"), gs.edit(sae, gs.clamp, 11, 6.0), gs.edit(sae, gs.clamp, 3, 0.0), read("g")]
    reads = gs.run(model, IDS, work, segments=SEGMENTS).reads
    f, g = np.asarray(reads["f"]), np.asarray(reads["g"])
    others = np.delete(np.arange(D), (3, 11))
    # A negative pre-activation is no feature: its error stays and is added to what is set.
    active = f[..., 11] > 0
    assert active.any()
    close(g[active, 11], np.full(active.sum(), 6.0))
    close(g[..., 3], np.zeros((2, T)))
    close(g[..., others], f[..., others])
    assert (f[..., 3] > 0.1).any()


# -------------------------------------------------------------------------------------------------
# In generation, and without compiling


def test_coders_with_a_cache_equal_recomputing(model):
    """A CLT in place of all MLPs and an edit at given positions: prompt, then token by token."""
    clt, sae = CODERS["skip clt"], CODERS["sae"]
    work = [gs.splice(clt, error=False), gs.edit(sae, gs.clamp, 3, 20.0, positions=(2, 7))]
    work.append(gs.features(sae))
    whole = gs.run(model, IDS, work, segments=SEGMENTS)
    cache = gs.init_cache(model.config, 2, T, model.dtype)
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        parts.append(
            gs.run(model, IDS[:, start:stop], work, cache=cache, segments=SEGMENTS[:, start:stop])
        )
        cache = parts[-1].cache
    real = masked(0)
    logits = np.concatenate([p.logits for p in parts], 1)
    close(logits[real], np.asarray(whole.logits)[real])
    features = np.concatenate([p.reads["features"] for p in parts], 1)
    close(features, whole.reads["features"])


@contextmanager
def compilations():
    """The list of programs that XLA compiled meanwhile."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.law
def test_new_data_compiles_nothing(model):
    """Tokens, steering vector, positions, coder, feature and value are data; the clamp's count of
    features is a shape, so it does compile: the measurement measures."""

    def logits(seed, feature):
        r = np.random.default_rng(seed)
        sae = sparse_coder(seed, layer=3)
        clt = multi_layer_coder(tuple(range(LAYERS)), seed, **MLP)
        work = [
            gs.steer("resid_mid", None, r.normal(size=D).astype(np.float32), positions=seed + 2),
            gs.features(sae, k=3),
            gs.splice(clt, error=False),
            gs.edit(sae, gs.clamp, feature, r.normal(), positions=np.array([seed + 1, 5])),
        ]
        tokens = r.integers(2, 300, (2, T)).astype(np.int32)
        return np.asarray(gs.run(model, tokens, work).logits)

    with compilations() as first:
        a = logits(0, 4)
    with compilations() as second:
        b = logits(1, 9)
    with compilations() as third:
        logits(2, np.array([4, 9]))
    assert len(first) >= 1
    assert second == []
    assert len(third) >= 1
    assert np.abs(a - b).max() > 0.1


# -------------------------------------------------------------------------------------------------
# Bad input


def fewer(f, ctx):
    return f[..., :3]


SAE, CLT = CODERS["sae"], CODERS["clt"]
BAD = {
    "a set": (lambda: gs.features(gs.CoderSet([SAE])), r"one coder \(take one with \.at\(layer"),
    "no coder": (lambda: gs.splice(gs.capture("z")), "expected one coder .*, got Intercept"),
    "layer": (lambda: gs.features(SAE.replace(layer=4)), r"the model has layers 0\.\.3"),
    "layers": (lambda: gs.splice(CLT.replace(layers=(1, 2, 3, 4))), "layer 4"),
    "site": (lambda: gs.splice(SAE.replace(reads="resid")), "reads 'resid' and writes"),
    "outside": (lambda: gs.features(SAE.replace(reads="embed")), "has no place in a layer"),
    "backwards": (lambda: gs.edit(SAE.replace(writes="z"), halve), "reads 'resid_post' and writes"),
    "width": (
        lambda: gs.features(CODERS["attention sae"].replace(reads="mlp_in", writes="mlp_in")),
        "expected mlp_in of layer 3 with last axis 64",
    ),
    "output": (
        lambda: gs.splice(SAE.replace(reads="mlp_in", writes="mlp_act")),
        "writes 32 values where the model has 48",
    ),
    "edit output": (
        lambda: gs.edit(SAE.replace(reads="mlp_in", writes="mlp_act"), halve),
        "writes 32 values where the model has 48",
    ),
    "k": (lambda: gs.features(SAE, k=F + 1), "k is 49: this sae has 48 features"),
    "no k": (lambda: gs.features(SAE, k=0), "k is 0"),
    "feature": (lambda: gs.edit(SAE, gs.clamp, F, 0.0), "feature 48 is not an id from 0 to 47"),
    "negative": (lambda: gs.edit(CLT, gs.clamp, [3, -1], 0.0), "feature -1 is not an id"),
    "float": (lambda: gs.edit(SAE, gs.clamp, 1.5, 0.0), "feature 1.5 is not an id"),
    "shape": (lambda: gs.edit(SAE, fewer), r"fewer returned \(2, 9, 3\)"),
    "decoder": (lambda: gs.splice(CLT.replace(w_dec=None)), "decoder .* was left on disk"),
}


@pytest.mark.parametrize("case", BAD)
def test_coders_that_do_not_fit_raise_one_line(model, case):
    build, message = BAD[case]
    with pytest.raises(gs.InputError, match=message) as raised:
        jax.eval_shape(lambda: gs.forward(model, jnp.asarray(IDS), build()))
    assert "\n" not in str(raised.value)


def test_features_need_no_decoder(model):
    work = [gs.features(CLT), gs.features(CLT.replace(w_dec=None), name="without")]
    reads = jax.eval_shape(lambda: gs.forward(model, jnp.asarray(IDS), work)).reads
    assert reads["without"].shape == reads["features"].shape == (LAYERS, 2, T, F)
