"""The laws of intercepts: what is read is what was there, what is written is what goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.model.intercept import LAYER_SITES
from tiny import tiny_model

LAYERS = 6  # the last one is global
T = 10  # beyond the window of 8
IDS = np.random.default_rng(0).integers(2, 300, (2, T)).astype(np.int32)
FROZEN = (
    "attn_pattern",
    "pre_attn_scale",
    "post_attn_scale",
    "pre_mlp_scale",
    "post_mlp_scale",
    "final_scale",
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-4b"], layers=LAYERS)


@pytest.fixture(scope="module")
def plain(model):
    """The untouched model: logits, and every layer's residual and MLP output, from one scan."""
    sites = ("embed", "resid_post", "mlp_out")
    return gs.run(model, IDS, [gs.capture(s) for s in sites])


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def differ(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) > 1e-3


# -------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.law
def test_scan_equals_unrolled(model, plain):
    """A capture of its own in each layer cuts the scan into single layers."""
    unrolled = [gs.capture("resid_post", layer, name=f"{layer}") for layer in range(LAYERS)]
    out = gs.run(model, IDS, unrolled)
    close(out.logits, plain.logits)
    close([out.reads[f"{layer}"] for layer in range(LAYERS)], plain.reads["resid_post"])


@pytest.mark.law
def test_captures_of_a_subset_equal_the_full_capture_in_the_order_given(model, plain):
    out = gs.run(model, IDS, [gs.capture("resid_post", (5, 0)), gs.capture("mlp_out", 0)])
    close(out.reads["resid_post"], plain.reads["resid_post"][np.array([5, 0])])
    close(out.reads["mlp_out"], plain.reads["mlp_out"][0])


def token_maximum(x, ctx, k):
    """Of the tokens that are there, and the layer it was."""
    x = jnp.where(ctx.valid[..., None], x, -jnp.inf)
    return jax.lax.top_k(x.max(1), 3)[0] * k, jnp.int32(ctx.layer)


def test_reducing_reads_keep_only_the_reduction(model, plain):
    read = gs.read("resid_post", None, token_maximum, 2.0, name="top")
    compiled = jax.jit(gs.forward).lower(model, IDS, [read]).compile()
    values, layer = compiled(model, IDS, [read]).reads["top"]
    close(values, 2 * np.sort(np.asarray(plain.reads["resid_post"]).max(2), -1)[..., :-4:-1])
    np.testing.assert_array_equal(layer, range(LAYERS))
    # Logits, the reduction, and some padding: no room for [L, B, T, D].
    assert compiled.memory_analysis().output_size_in_bytes < 4 * (2 * T * 300 + LAYERS * 7) + 1024


def test_reads_of_a_sweep_over_data_can_be_vmapped(model, plain):
    strengths = jnp.array([0.0, 3.0])
    steered = lambda s: gs.forward(model, IDS, [gs.steer("embed", None, s * jnp.ones(32))]).logits
    logits = jax.jit(jax.vmap(steered))(strengths)
    close(logits[0], plain.logits)
    assert differ(logits[1], plain.logits)


# -------------------------------------------------------------------------------------------------
# Writing


def double(x, ctx):
    return 2.0 * x


def increment(x, ctx, by):
    return x + by


def test_order_in_the_list_is_the_order_of_application(model):
    """Double, add one, double, in one layer, with reads in between; lists may be nested."""
    capture = lambda name: gs.capture("mlp_out", 5, name=name)
    twice, plus_one = gs.write("mlp_out", 5, double), gs.write("mlp_out", 5, increment, 1.0)
    order = [capture("a"), twice, capture("b"), [plus_one, capture("c")], (twice,), capture("d")]
    reads = gs.run(model, IDS, order).reads
    a = np.asarray(reads["a"])
    close(reads["b"], 2 * a, 1e-6)
    close(reads["c"], 2 * a + 1, 1e-6)
    close(reads["d"], 2 * (2 * a + 1), 1e-6)


def from_first_row(x, ctx, positions):
    return x.at[1, positions].set(x[0, positions])


def test_worlds_patch_carries_the_clean_row_into_the_corrupted_one(model, plain):
    """Row 0 clean, row 1 corrupted, one pass: all positions restore the logits, one just itself."""
    patched = lambda positions: gs.run(
        model,
        IDS,
        [gs.write("resid_post", 5, from_first_row, positions), gs.capture("resid_post", 5)],
    )
    assert differ(plain.logits[0], plain.logits[1])
    everywhere = patched(np.arange(T))
    np.testing.assert_array_equal(everywhere.logits[1], everywhere.logits[0])
    close(everywhere.logits[0], plain.logits[0])
    one = np.asarray(patched(np.full(T, 3)).reads["resid_post"])
    np.testing.assert_array_equal(one[1, 3], one[0, 3])
    others = np.arange(T) != 3
    close(one[1, others], plain.reads["resid_post"][5, 1, others])


def noise(x, ctx, strengths, *, index):
    wave = jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return x + strengths[index] * wave


def test_every_site_can_be_written(model, plain):
    """Noise at each site in turn changes the logits; without noise, nothing changes."""
    writes = [gs.write(s, None, noise, None, index=i) for i, s in enumerate(gs.SITES)]

    def logits(strengths):
        return gs.run(model, IDS, [w.replace(args=(strengths,)) for w in writes]).logits

    quiet = logits(np.zeros(len(gs.SITES), np.float32))
    close(quiet, plain.logits)
    for site, strengths in zip(gs.SITES, np.eye(len(gs.SITES), dtype=np.float32)):
        assert differ(logits(strengths), quiet), site


def test_steer_and_patch_act_on_their_tokens_only(model, plain):
    """Not on <bos>, not on padding; patches everywhere or at positions; patterns by query."""
    segments = np.ones_like(IDS)
    segments[1, :3] = 0  # left-padded: its <bos> is column 3
    work = [
        gs.capture("embed", name="before"),
        gs.steer("embed", None, np.full(32, 5, np.float32)),
        gs.capture("embed", name="steered"),
        gs.patch("embed", None, 7.0, positions=(2, 4)),
        gs.capture("embed", name="patched"),
        gs.patch("attn_pattern", None, 0.5, positions=2),
        gs.capture("attn_pattern"),
    ]
    reads = {k: np.asarray(v) for k, v in gs.run(model, IDS, work, segments=segments).reads.items()}
    row0, row1 = np.arange(T) >= 1, np.arange(T) >= 4
    np.testing.assert_array_equal(
        reads["steered"] - reads["before"] > 4, np.stack([row0, row1])[..., None].repeat(32, -1)
    )
    at = np.zeros((2, T), bool)
    at[0, [2, 4]] = at[1, [5, 7]] = True
    np.testing.assert_array_equal(reads["patched"][at], 7.0)
    np.testing.assert_array_equal(reads["patched"][~at], reads["steered"][~at])
    half = (reads["attn_pattern"] == 0.5).all((0, 2, 4))  # [B, queries]
    expected = np.zeros((2, T), bool)
    expected[0, 2] = expected[1, 5] = True
    np.testing.assert_array_equal(half, expected)


# -------------------------------------------------------------------------------------------------
# Layers as data


def gated(x, ctx, layer, vector):
    return x + jnp.where(ctx.layer == layer, vector, 0.0)[None, None, :]


def test_a_gate_and_a_per_layer_sweep_equal_static_layers(model):
    """One program that steers at the layer its data says; two layers against their own programs."""
    vector = jnp.linspace(-3, 3, 32)

    def at(layer):
        return gs.forward(model, IDS, [gs.write("resid_post", None, gated, layer, vector)]).logits

    def weighted(gate):
        steer = gs.steer("resid_post", None, gs.per_layer(gate[:, None] * vector[None, :]), first=0)
        return gs.forward(model, IDS, [steer]).logits

    by_gate = jax.jit(jax.vmap(at))(jnp.arange(LAYERS))
    by_weight = jax.jit(jax.vmap(weighted))(jnp.eye(LAYERS))
    close(by_gate, by_weight)
    for layer in (0, 5):
        static = gs.run(model, IDS, [gs.steer("resid_post", layer, vector, first=0)]).logits
        close(by_gate[layer], static)
    assert differ(by_gate[0], by_gate[5])


def test_per_layer_arguments_follow_the_layers_as_given(model, plain):
    """Unsorted layers, reached as single layers and within a scan."""
    layers, values = (5, 0, 4, 1), np.arange(4, dtype=np.float32).reshape(4, 1)
    out = gs.run(
        model, IDS, [gs.patch("resid_mid", layers, gs.per_layer(values)), gs.capture("resid_mid")]
    )
    got = np.asarray(out.reads["resid_mid"])
    for layer, value in zip(layers, values):
        assert (got[layer] == value).all()
    assert got[2].std() > 0


def count(x, ctx, state, step):
    total, layers = state
    return x, (total + x.sum() * step, layers + 1)


def test_fold_carries_its_state_through_its_layers(model, plain):
    start = (np.float32(1.0), np.int32(0))
    fold = gs.fold("mlp_out", (0, 1, 4), count, start, 2.0, name="sum")
    total, layers = gs.run(model, IDS, [fold]).reads["sum"]
    expected = 1 + 2 * np.asarray(plain.reads["mlp_out"], np.float64)[[0, 1, 4]].sum()
    assert int(layers) == 3
    assert abs(float(total) - expected) < 1e-3 * abs(expected)


# -------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.law
def test_the_gradient_at_a_site_equals_a_finite_difference(model):
    weights = np.random.default_rng(1).normal(size=(2, T, 300))
    direction = np.random.default_rng(2).normal(size=(2, T, 32)).astype(np.float32)
    site = lambda d: [gs.steer("resid_post", 0, d, first=0)]

    @jax.jit
    def gradient(d):
        metric = lambda d: (gs.forward(model, IDS, site(d)).logits * jnp.float32(weights)).sum()
        return jax.grad(metric)(d)

    def metric(d):  # the sum over the logits in float64, of the gradient's own shapes
        logits = gs.run(model, IDS, site(d), pad=False).logits
        return (np.asarray(logits, np.float64) * weights).sum()

    def slope(step):
        step = np.float32(step)
        return (metric(step * direction) - metric(-step * direction)) / (2 * step)

    # Two steps make it of fourth order, so that they may be large: float32's rounding, which
    # differs between machines, is then small beside the difference.
    numeric = (4 * slope(0.01) - slope(0.02)) / 3
    exact = float((np.asarray(gradient(np.zeros_like(direction))) * direction).sum())
    assert abs(exact - numeric) < 2e-3 * abs(numeric)


def test_attribution_is_complete(model, plain):
    """With patterns and norm scales frozen, a logit is linear in the embeddings and MLP outputs:
    the sum of gradient x source is the logit itself."""

    @jax.jit
    def attribution(embed, mlp, target):
        def logit(embed, mlp):
            sources = [gs.patch("embed", None, embed), gs.patch("mlp_out", None, gs.per_layer(mlp))]
            return gs.forward(model, IDS, [sources, gs.freeze(*FROZEN)]).logits[0, -1, target]

        return jax.value_and_grad(logit, (0, 1))(embed, mlp)

    sources = plain.reads["embed"], plain.reads["mlp_out"]
    largest = float(np.abs(plain.logits).max())
    for target in (int(plain.logits[0, -1].argmax()), 7):
        logit, gradients = attribution(*sources, target)
        total = sum((np.asarray(g, np.float64) * s).sum() for g, s in zip(gradients, sources))
        assert abs(float(logit) - float(plain.logits[0, -1, target])) < 1e-5 * largest
        assert abs(total - float(logit)) < 1e-6 * largest
        assert all(np.abs(g).max() > 0 for g in gradients)


def test_remat_policies_give_equal_gradients_in_less_memory(model):
    """Nothing kept, one site kept, everything kept."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, 300)), jnp.float32)

    def gradient(remat):
        def loss(v):
            out = gs.forward(model, IDS, [gs.steer("embed", None, v)], remat=remat)
            return (out.logits * weights).sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros(32)).compile()
        return compiled(jnp.zeros(32)), compiled.memory_analysis().temp_size_in_bytes

    (nothing, least), (some, more), (everything, most) = map(gradient, ((), ("mlp_act",), None))
    close(nothing, everything)
    close(some, everything)
    assert least < more < most


# -------------------------------------------------------------------------------------------------
# Bad input


def wrong_shape(x, ctx):
    return x[:1]


def wrong_dtype(x, ctx):
    return x.astype(jnp.bfloat16)


def no_array(x, ctx):
    return None


def grow(x, ctx, state):
    return x, jnp.concatenate([state, state])


BAD = {
    "site": (
        lambda: gs.capture("resid_pots"),
        "unknown site 'resid_pots'; did you mean resid_post",
    ),
    "write site": (lambda: gs.steer("mlp", None, 0.0), "unknown site 'mlp'; did you mean mlp_"),
    "fold site": (lambda: gs.fold("embed", None, count, 0), "fold acts at layer sites only"),
    "layer": (lambda: gs.capture("z", 6), r"layer 6 at 'z': the model has layers 0\.\.5"),
    "layers": (lambda: gs.capture("z", (0, 9)), "layer 9 at 'z'"),
    "write layer": (lambda: gs.steer("z", 6, 0.0), "layer 6 at 'z'"),
    "negative": (lambda: gs.capture("z", -1), "non-negative"),
    "twice": (lambda: gs.capture("z", (1, 1)), "distinct"),
    "no layers": (lambda: gs.capture("z", ()), "not empty"),
    "text layer": (lambda: gs.capture("z", "3"), "must be None, an int or several ints"),
    "float layer": (lambda: gs.capture("z", 1.0), "must be None, an int or several ints"),
    "layer of embed": (lambda: gs.capture("embed", 0), "'embed' is not inside a layer"),
    "names": (lambda: [gs.capture("z", 0), gs.capture("z", 1)], "two reads are called 'z'"),
    "no intercept": (lambda: "resid_post", "expected intercepts, got str"),
    "no intercepts": (lambda: [gs.capture("z"), None], "expected intercepts, got NoneType"),
    "shape": (lambda: gs.write("z", None, wrong_shape), "return the same shape and dtype"),
    "dtype": (lambda: gs.write("z", 2, wrong_dtype), r"\(wrong_dtype\) returned bfloat16"),
    "nothing": (lambda: gs.write("logits", None, no_array), "returned NoneType"),
    "state": (
        lambda: gs.fold("z", None, grow, np.zeros(2)),
        r"state float32\[4\] for float32\[2\]",
    ),
}
NEVER = {
    "layer": (lambda: gs.capture("z", 3), "'z' at 'z' is never reached: stop_at_layer is 3"),
    "one of": (lambda: gs.capture("z", (0, 4)), "never reached"),
    "logits": (lambda: gs.capture("logits"), "never reached"),
    "final": (lambda: gs.capture("resid_final"), "never reached"),
    "fold": (lambda: gs.fold("z", 5, count, (0.0, 0), name="n"), "'n' at 'z' is never reached"),
}


def check_raises(model, build, message, **options):
    with pytest.raises(gs.InputError, match=message) as raised:
        jax.eval_shape(lambda: gs.forward(model, jnp.asarray(IDS), build(), **options))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_intercepts_raise_one_line(model, case):
    check_raises(model, *BAD[case])


@pytest.mark.parametrize("case", NEVER)
def test_reads_never_reached_raise_one_line(model, case):
    check_raises(model, *NEVER[case], stop_at_layer=3)


def test_sites_are_told_by_layer_or_not():
    assert set(LAYER_SITES) < set(gs.SITES)
    assert len(set(gs.SITES)) == len(gs.SITES) == 20
