"""The forward pass against its formulas in float64; laws of batches, caches and meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.model import attention
from gemma_scope_jax.model.attention import Tokens, attend, by_document, mix, pattern, visible
from gemma_scope_jax.model.batch import default_positions
from tiny import tiny_model

LAYERS = 6  # the last one is global


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-4b"], layers=LAYERS)


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(2, 300, shape).astype(np.int32)


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


# -------------------------------------------------------------------------------------------------
# Gemma 3 once more, plainly, in numpy float64


def numpy_forward(model, ids):
    """Every site of one row of ids [T], by name; layer sites are stacked."""
    c, p = model.config, jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
    sites, T = {}, len(ids)

    def at(site, x):
        sites.setdefault(site, []).append(x)
        return x

    def norm(x, w, site=None):
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        if site:
            at(site, scale)
        return x * scale * (1 + w)

    def rope(x, base, divisor):  # x [T, heads, H]
        half = c.head_dim // 2
        angle = np.arange(T)[:, None] / divisor * base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = at("embed", p.embed[ids] * np.sqrt(c.d_model))
    for layer in range(c.layers):
        w = jax.tree.map(lambda a, layer=layer: a[layer], p.blocks)
        is_global = layer % 6 == 5
        spin = (1e6, c.global_rope_divisor) if is_global else (1e4, 1.0)
        h = norm(at("resid_pre", x), w.pre_attn_norm, "pre_attn_scale")
        q = at("q", rope(norm(np.einsum("td,dnh->tnh", h, w.w_q), w.q_norm), *spin))
        k = at("k", rope(norm(np.einsum("td,dkh->tkh", h, w.w_k), w.k_norm), *spin))
        v = at("v", np.einsum("td,dkh->tkh", h, w.w_v))
        group = c.heads // c.kv_heads
        scores = np.einsum("tnh,snh->nts", q, k.repeat(group, 1)) * c.query_scale
        back = np.arange(T)[:, None] - np.arange(T)[None, :]
        scores[:, (back < 0) | ((back >= c.window) & (not is_global))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        probs = at("attn_pattern", weights / weights.sum(-1, keepdims=True))
        z = at("z", np.einsum("nts,snh->tnh", probs, v.repeat(group, 1)).reshape(T, -1))
        h = z @ w.w_o.reshape(-1, c.d_model)
        x = at("resid_mid", x + at("attn_out", norm(h, w.post_attn_norm, "post_attn_scale")))
        h = at("mlp_in", norm(x, w.pre_mlp_norm, "pre_mlp_scale"))
        g = h @ w.w_gate
        gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        h = at("mlp_act", gelu * (h @ w.w_up)) @ w.w_down
        x = at("resid_post", x + at("mlp_out", norm(h, w.post_mlp_norm, "post_mlp_scale")))
    at("logits", norm(at("resid_final", x), p.final_norm, "final_scale") @ p.embed.T)
    return {name: np.stack(values) for name, values in sites.items()}


@pytest.mark.law
@pytest.mark.parametrize("name", list(gs.PRESETS))
def test_every_site_equals_the_formulas_in_float64(name):
    model = tiny_model(gs.PRESETS[name], seed=1, layers=LAYERS)
    ids = random_ids(20)  # beyond the window of 8
    out = gs.run(model, ids[None], [gs.capture(site) for site in gs.SITES])
    expected = numpy_forward(model, ids)
    assert sorted(out.reads) == sorted(expected) == sorted(gs.SITES)
    for site, value in expected.items():
        read = out.reads[site]
        in_layer = site not in ("embed", "resid_final", "final_scale", "logits")
        close(read[:, 0] if in_layer else read, value)
    close(out.logits, expected["logits"])
    assert out.logits.dtype == jnp.float32


def test_dtypes_of_a_bfloat16_model():
    """The residual is bfloat16; scales and logits are float32."""
    half = jax.eval_shape(lambda: tiny_model(gs.PRESETS["gemma-3-1b"], dtype=jnp.bfloat16))
    sites = ("resid_post", "z", "pre_mlp_scale", "attn_pattern", "logits")
    reads = jax.eval_shape(gs.forward, half, random_ids(1, 5), [gs.capture(s) for s in sites]).reads
    assert [reads[s].dtype.name for s in sites] == ["bfloat16", "bfloat16", *["float32"] * 3]


# -------------------------------------------------------------------------------------------------
# Batches


def test_padded_and_packed_rows_equal_separate_runs(model):
    a, b = random_ids(9, seed=1), random_ids(9, seed=2)
    alone = gs.run(model, np.stack([a, b])).logits
    garbage = random_ids(9, seed=3)
    none, one = np.zeros(9, np.int32), np.ones(9, np.int32)
    tokens = np.stack([np.r_[a, garbage], np.r_[garbage, b], np.r_[a, b]])
    segments = np.stack([np.r_[one, none], np.r_[none, one], np.r_[one, 2 * one]])
    together = gs.run(model, tokens, segments=segments).logits
    close(together[0, :9], alone[0])
    close(together[1, 9:], alone[1])
    close(together[2, :9], alone[0])
    close(together[2, 9:], alone[1])
    assert np.isfinite(together).all()


def test_documents_of_a_row_never_see_each_other(model):
    """Whatever their ids, and where positions start over; so too with the kernels' own rule (one
    run, one number) and in attention patterns."""
    docs = [random_ids(n, seed=n) for n in (7, 3, 8)]
    starts, row = np.r_[0, 7, 10, 18], np.concatenate(docs)[None]
    ids = lambda *given: np.repeat(given, np.diff(starts))[None]
    again = np.concatenate([np.arange(len(d)) for d in docs])[None]
    ways = [
        dict(segments=ids(1, 2, 3)),
        dict(segments=ids(1, 2, 1)),
        dict(positions=again),
        dict(segments=ids(1, 1, 2), positions=again),
        dict(positions=again + 5),
    ]
    alone = [np.asarray(gs.run(model, d[None]).logits[0]) for d in docs]
    for options in ways:
        out = gs.run(model, row, **options)
        close(out.logits[0], np.concatenate(alone))
    pattern = gs.run(model, row, [gs.capture("attn_pattern", 5)], segments=ids(1, 2, 1))
    seen = np.asarray(pattern.reads["attn_pattern"])[0].max(0) > 0
    of = ids(0, 1, 2)[0]
    np.testing.assert_array_equal(seen, (of[:, None] == of) & np.tri(18, dtype=bool))


def test_by_document_numbers_runs_and_passes_over_padding():
    """Positions grow within a document; a cache's `last` goes on, and only it."""
    segments = jnp.array([[0, 1, 1, 0, 1, 1], [1, 2, 2, 1, 1, 1], [0, 0, 3, 3, 0, 0]])
    positions = jnp.array([[9, 4, 5, 0, 6, 6], [0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1]])
    last = jnp.array([[3, 1, 2], [0, 0, 0], [0, 4, 1]])
    given = Tokens(positions, segments)
    tokens, then = by_document(given, 10, last)
    expected = [[0, 2, 2, 0, 2, 16], [11, 12, 12, 14, 14, 16], [0, 0, 13, 13, 0, 0]]
    np.testing.assert_array_equal(tokens.segments, expected)
    np.testing.assert_array_equal(then, [[6, 1, 16], [0, 1, 16], [1, 3, 13]])
    nothing = Tokens(positions, jnp.zeros_like(segments))
    np.testing.assert_array_equal(by_document(nothing, 10, last)[1], last)


def test_a_document_that_begins_in_a_later_chunk_sees_nothing_before_it(model):
    tokens = random_ids(1, 9)
    cache = gs.init_cache(model.config, 1, 9, model.dtype)
    first = gs.run(model, tokens[:, :4], cache=cache)
    rest = tokens[:, 4:]
    segments = np.array([[1, 1, 2, 2, 2]])
    then = gs.run(model, rest, segments=segments, cache=first.cache).logits
    close(then[:, :2], gs.run(model, tokens[:, :6]).logits[:, 4:])
    close(then[:, 2:], gs.run(model, tokens[:, 6:]).logits)


def test_default_positions_count_within_runs():
    segments = jnp.array([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0], [3, 3, 3, 3, 3]])
    expected = [[0, 1, 0, 1, 2], [0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(default_positions(segments), expected)


def test_a_cache_filled_in_chunks_equals_one_pass_also_with_padding(model):
    tokens = random_ids(3, 12)
    segments = np.ones_like(tokens)
    segments[1, :4] = 0  # left-padded
    segments[2, 4:6] = 0  # padded at the end of the first chunk
    whole = gs.run(model, tokens, segments=segments).logits
    cache = gs.init_cache(model.config, 3, 16, model.dtype)
    first = gs.run(model, tokens[:, :6], segments=segments[:, :6], cache=cache)
    then = gs.run(model, tokens[:, 6:], segments=segments[:, 6:], cache=first.cache)
    chunked = np.concatenate([first.logits, then.logits], 1)
    close(chunked[0], whole[0])
    close(chunked[1, 4:], whole[1, 4:])
    assert int(then.cache.used) == 12
    # Row 2 went on where it stopped: as the ten tokens that it has.
    ten = np.delete(tokens[2], (4, 5))
    close(np.delete(chunked[2], (4, 5), 0), numpy_forward(model, ten)["logits"][0])


def test_last_logits_are_the_last_of_all_and_may_be_steered(model):
    tokens, extra = random_ids(2, 9), np.linspace(-1, 1, 300, dtype=np.float32)
    everything = gs.run(model, tokens, [gs.steer("logits", None, extra)])
    last = gs.run(model, tokens, [gs.steer("logits", None, extra)], logits="last")
    close(last.logits, everything.logits[:, -1:])
    short = jax.eval_shape(lambda: gs.forward(model, tokens, [gs.capture("z")], logits="none"))
    assert short.logits is None
    assert list(short.reads) == ["z"]


def test_stop_at_layer_leaves_out_the_later_layers(model):
    tokens, capture = random_ids(2, 9), [gs.capture("resid_post")]
    run = jax.jit(gs.forward, static_argnames="stop_at_layer")
    short = run(model, tokens, capture, stop_at_layer=3)
    close(short.reads["resid_post"], run(model, tokens, capture).reads["resid_post"][:3])
    assert short.logits is None


@pytest.mark.law
def test_a_four_by_two_mesh_equals_one_device(model):
    tokens = random_ids(4, 9)
    work = [gs.capture("z"), gs.steer("resid_post", None, np.ones(32, np.float32))]
    one = gs.run(model, tokens, work)
    mesh = gs.make_mesh(4, 2)
    params = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    many = gs.run(model.replace(params=params), gs.shard_batch(mesh, tokens), work)
    assert len(many.logits.sharding.device_set) == 8
    close(many.logits, one.logits)
    close(many.reads["z"], one.reads["z"])


# -------------------------------------------------------------------------------------------------
# Attention


@pytest.fixture(scope="module")
def qkv():
    """Two rows of 10 tokens: packed and right-padded, left-padded; 4 heads over 2."""
    r = np.random.default_rng(0)
    q, k, v = (r.normal(size=(2, 10, n, 16)).astype(np.float32) for n in (4, 2, 2))
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    return q, k, v, Tokens(default_positions(segments), segments)


def test_a_query_sees_its_window_of_its_own_segment_and_nothing_later(qkv):
    tokens = qkv[3]
    mask = np.asarray(visible(tokens, tokens, 3))
    segments, positions = np.asarray(tokens.segments), np.asarray(tokens.positions)
    for b, t, s in np.ndindex(2, 10, 10):
        same = segments[b, t] == segments[b, s] != 0
        assert mask[b, t, s] == (same and 0 <= positions[b, t] - positions[b, s] <= 2)
    np.testing.assert_array_equal(mask[1].sum(-1), [0, 0, 0, 1, 2, 3, 3, 3, 3, 3])


def test_pattern_rows_sum_to_one_and_those_of_padding_to_zero(qkv):
    q, k, _, tokens = qkv
    probs = pattern(q, k, 0.25, visible(tokens, tokens, 3))
    real = np.broadcast_to(np.asarray(tokens.segments > 0)[:, None], probs.shape[:3])
    np.testing.assert_allclose(probs.sum(-1), real, atol=1e-6)


def test_a_row_of_padding_gives_zeros_and_finite_gradients(qkv):
    q, k, v, tokens = qkv
    empty = Tokens(tokens.positions, jnp.zeros_like(tokens.segments))

    @jax.jit
    def total(q, k, v):
        return attend(q, k, v, 0.25, empty, empty, jnp.int32(3), True).sum()

    assert float(total(q, k, v)) == 0.0
    for gradient in jax.grad(total, (0, 1, 2))(q, k, v):
        np.testing.assert_array_equal(gradient, 0.0)


# 10 queries, with and without a rest
@pytest.mark.parametrize(("chunk", "causal"), [(4, True), (5, False)])
def test_chunked_attention_equals_the_whole_and_so_do_its_gradients(
    monkeypatch, qkv, chunk, causal
):
    q, k, v, tokens = qkv
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def whole(q, k, v):
        return mix(pattern(q, k, 0.25, visible(tokens, tokens, 3)), v)

    def chunked(q, k, v):
        return attend(q, k, v, 0.25, tokens, tokens, jnp.int32(3), causal)

    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, q, k, v):
        z, pull = jax.vjp(f, q, k, v)
        return z, *pull(weights)

    for a, b in zip(*(value_and_gradients(f, q, k, v) for f in (chunked, whole))):
        close(a, b, 1e-6)
        assert np.abs(b).max() > 0


# -------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros((1, 0), np.int32), {}, "the prompt is empty"),
        ([[]], {}, "the prompt is empty"),
        (np.zeros(5, np.int32), {}, r"tokens must be integers \[B, T\], got int32\[5\]"),
        (np.zeros((1, 5)), {}, "tokens must be integers"),
        ([[1, 2], [3]], {}, "pad rows of unequal lengths"),
        ([[1, 300]], {}, r"token id 300 is outside 0\.\.299"),
        ([[-1, 2]], {}, "token id -1"),
        (np.zeros((1, 65), np.int32), {}, "65 tokens are more than the model's context of 64"),
        ([[1, 2, 3]], {"positions": np.arange(3)}, r"positions must be integers \[1, 3\]"),
        ([[1, 2, 3]], {"segments": np.ones((1, 3))}, r"segments must be integers \[1, 3\]"),
        ([[1, 2]], {"stop_at_layer": 7}, r"stop_at_layer must be in 0\.\.6"),
    ],
)
def test_bad_tokens_raise_one_line(model, tokens, options, message):
    with pytest.raises(gs.InputError, match=message) as raised:
        gs.run(model, tokens, **options)
    assert "\n" not in str(raised.value)


def test_more_tokens_than_cache_slots_raise_one_line(model):
    cache = gs.init_cache(model.config, 1, 4, model.dtype)
    with pytest.raises(gs.InputError, match="5 tokens are more than the cache's slots of 4"):
        gs.run(model, random_ids(1, 5), cache=cache)


def test_unknown_presets_name_the_nearest():
    assert gs.preset("google/gemma-3-1b-it") is gs.PRESETS["gemma-3-1b"]
    with pytest.raises(gs.InputError, match="gemma-3-12b"):
        gs.preset("gemma-3-12")
