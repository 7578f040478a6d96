"""The paths of the linear model that meet at an attention head.

A frozen head h of layer l carries what the residual stream holds at a key s to the query t:

    pattern[h, t, s] . g[t] . post_norm W_o W_v pre_norm . x[s]

where x is what a source has put into resid_pre of the layer, and g is the gradient of a target in
its resid_mid. Both come either along all paths, or along those through no head at all: the residual
stream and the skips of affine transcoders, which stay at one token and cost next to nothing.

    x along       g along      the product is
    all paths     no head      what takes h as its last head
    no head       all paths    what takes h as its first head
    all paths     all paths    all that takes h

`linear.py` walks down from targets; here sources are walked up. Axes: see `linear`, and A sources,
E edges.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.circuits.linear import (
    Frozen,
    TargetRows,
    begun,
    chunk_of,
    cut,
    dot,
    entry,
    norm_factor,
    pattern_of,
    pattern_tile,
    put,
    reach,
    through_attention,
    through_skip,
)
from gemma_scope_jax.model.config import Model

Span = tuple[jax.Array, jax.Array]  # the first chunk of tokens, and one past the last


@flax.struct.dataclass
class Writers:
    """What A sources write, each at one token: to the embedding, then to every layer's MLP output.

    So rows[l] is written just below resid_pre of layer l.
    """

    position: Any  # int32 [A]
    rows: Any  # float32 [L + 1, A, D]


# --- Through no head -----------------------------------------------------------------------------


def beside_heads_down(
    model: Model, frozen: Frozen, skip, rows: TargetRows
) -> tuple[jax.Array, jax.Array]:
    """The gradient of each term along the residual stream and skips: after each layer, below the
    first one too [L + 1, R, Q, D], and in each layer's resid_mid [L, R, Q, D]."""

    def begin(b, stage):
        return b + rows.vector * (rows.stage == stage).astype(jnp.float32)[..., None]

    def step(b, layer):
        above = b = begin(b, 2 * layer + 1)
        if skip is not None:
            factor = _factor(model, frozen, layer, rows.position)
            b = b + dot("rqe,de->rqd", b, entry(skip, layer)) * factor
        b = begin(b, 2 * layer)
        return b, (above, b)

    layers = jnp.arange(model.config.layers, dtype=jnp.int32)
    b, (above, mid) = jax.lax.scan(step, jnp.zeros_like(rows.vector), layers, reverse=True)
    return jnp.concatenate([begin(b, -1)[None], above]), mid


def beside_heads_up(model: Model, frozen: Frozen, skip, writers: Writers) -> jax.Array:
    """What each source puts into resid_pre of every layer through no head: [L, A, D]."""

    def step(x, layer):
        after = x
        if skip is not None:
            factor = _factor(model, frozen, layer, writers.position)
            after = x + dot("ad,de->ae", x * factor, entry(skip, layer))
        return after + entry(writers.rows, layer + 1), x

    layers = jnp.arange(model.config.layers, dtype=jnp.int32)
    return jax.lax.scan(step, writers.rows[0], layers)[1]


def _factor(model: Model, frozen: Frozen, layer, positions) -> jax.Array:
    """The frozen norm before an MLP as a factor [..., D], at some tokens."""
    scale = entry(frozen.pre_mlp_scale, layer)[positions][..., None]
    return gained(scale, entry(model.params.blocks.pre_mlp_norm, layer))


def gained(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D or 1] times a norm's gain, 1 + w [D]."""
    return x * (1.0 + w).reshape((1,) * (x.ndim - 1) + w.shape)


# --- Up from sources -----------------------------------------------------------------------------


def attention_up(model: Model, frozen: Frozen, layer, span: Span, x: jax.Array) -> jax.Array:
    """x [T, A, D] in resid_pre to resid_mid: itself, and what the heads make of it.

    span: the chunks of tokens from the first with anything in it to the last that matters
    """
    c, b = model.config, model.params.blocks
    C, take = chunk_of(x.shape[0]), partial(entry, i=layer)
    w_o = take(b.w_o).reshape(c.kv_heads, -1, c.head_dim, c.d_model)
    after, gain = take(frozen.post_attn_scale), take(b.post_attn_norm)
    v = values(model, frozen, layer, span, x)

    def of_queries(n, out):
        z = mixed(model, frozen, layer, span, v, n)
        inner = dot("kgtah,kghd->tad", z, w_o) * norm_factor(cut(after, n, C, 0), gain)
        return put(out, cut(out, n, C, 0) + inner, n, 0)

    return jax.lax.fori_loop(*span, of_queries, x)


def values(model: Model, frozen: Frozen, layer, span: Span, x: jax.Array) -> jax.Array:
    """The values [K, T, A, H] of what is in resid_pre [T, A, D]."""
    c, b, (T, A, _) = model.config, model.params.blocks, x.shape
    C, scale, w_v = chunk_of(T), entry(frozen.pre_attn_scale, layer), entry(b.w_v, layer)
    gain = entry(b.pre_attn_norm, layer)

    def of_keys(m, v):
        normed = cut(x, m, C, 0) * norm_factor(cut(scale, m, C, 0), gain)
        return put(v, dot("sad,dkh->ksah", normed, w_v), m, 1)

    v = jnp.zeros((c.kv_heads, T, A, c.head_dim), jnp.float32)
    return jax.lax.fori_loop(*span, of_keys, v)


def mixed(model: Model, frozen: Frozen, layer, span: Span, v: jax.Array, n) -> jax.Array:
    """Values [K, T, A, H] as the heads of chunk `n` of queries mix them: [K, G, C, A, H]."""
    c, (K, T, A, H) = model.config, v.shape
    C = chunk_of(T)
    low = jnp.maximum(jnp.maximum(n * C - reach(c, layer) + 1, 0) // C, span[0])

    def of_keys(m, z):
        p = pattern_tile(c, frozen, layer, n, m)
        return z + dot("kgts,ksah->kgtah", p, cut(v, m, C, 1))

    z = jnp.zeros((K, c.heads // K, C, A, H), jnp.float32)
    return jax.lax.fori_loop(low, n + 1, of_keys, z)


def layer_up(model: Model, frozen: Frozen, skip, writers: Writers, layer, span: Span, x):
    """x [T, A, D] from resid_pre of a layer to that of the next, with what is written there."""
    x = attention_up(model, frozen, layer, span, x)
    if skip is not None:
        C, w = chunk_of(x.shape[0]), entry(skip, layer)
        scale = entry(frozen.pre_mlp_scale, layer)
        gain = entry(model.params.blocks.pre_mlp_norm, layer)

        def of_chunk(n, x):
            some = cut(x, n, C, 0)
            inner = some * norm_factor(cut(scale, n, C, 0), gain)
            return put(x, some + dot("tad,de->tae", inner, w), n, 0)

        x = jax.lax.fori_loop(*span, of_chunk, x)
    return _placed(writers, layer + 1, x)


def _placed(writers: Writers, layer, x: jax.Array) -> jax.Array:
    """x [T, A, D] in resid_pre of a layer, with what is written just below it."""
    each = jnp.arange(len(writers.position), dtype=jnp.int32)
    return x.at[writers.position, each].add(entry(writers.rows, layer))


def _lowest(writers: Writers) -> jax.Array:
    """The first layer with anything in its resid_pre, L if there is none."""
    below = jnp.any(writers.rows[:-1] != 0, (1, 2))
    return jnp.where(below.any(), jnp.argmax(below), len(below)).astype(jnp.int32)


def _span(frozen: Frozen, writers: Writers, rows: TargetRows) -> Span:
    """The chunks of tokens from the first source to the last target."""
    C = chunk_of(frozen.embed.shape[0])
    return jnp.min(writers.position) // C, 1 + jnp.max(rows.position) // C


def mid_down(model: Model, frozen: Frozen, skip, rows: TargetRows, layer, chunks, g):
    """g [T, R, D] after a layer to its resid_mid, with the terms that begin there."""
    g = begun(rows, g, 2 * layer + 1)
    if skip is not None:
        g = through_skip(model, frozen, skip, layer, chunks, g)
    return begun(rows, g, 2 * layer)


# --- Programs ------------------------------------------------------------------------------------


@jax.jit
def by_last_head(
    model: Model, frozen: Frozen, skip, writers: Writers, source, rows: TargetRows
) -> tuple[jax.Array, jax.Array]:
    """Edges from sources, numbers `source` [E], to targets, one row an edge: by the last head and
    the key it reads [L, E, N, T], and through no head [E]."""
    c, scales = model.config, frozen.post_attn_scale
    above, mid = beside_heads_down(model, frozen, skip, rows)
    places = rows.position, writers.position[source]
    none = _without_heads(above, writers.rows[:, source], *places)
    span, low = _span(frozen, writers, rows), _lowest(writers)

    def step(layer, carry):
        x, found = carry
        at = entry(scales, layer)[rows.position][..., None]
        wanted = _reads(model, layer, entry(mid, layer) * at)  # [E, Q, N, D]
        scaled = x * entry(frozen.pre_attn_scale, layer)[:, None, None]

        def of_edge(edge):
            a, positions, want = edge
            p = pattern_of(c, frozen, layer, _tokens(positions), _every)
            p = p.reshape(c.heads, *p.shape[2:])
            return (p * dot("sd,qnd->nqs", scaled[:, a], want)).sum(1)

        new = jax.lax.map(of_edge, (source, rows.position, wanted))
        return layer_up(model, frozen, skip, writers, layer, span, x), found.at[layer].set(new)

    T, D = frozen.embed.shape
    x = jnp.zeros((T, len(writers.position), D), jnp.float32)
    found = jnp.zeros((c.layers, len(source), c.heads, T), jnp.float32)
    top = jnp.max(rows.stage) // 2
    carry = _placed(writers, low, x), found
    return jax.lax.fori_loop(low, top + 1, step, carry)[1], none


@jax.jit
def by_first_head(
    model: Model, frozen: Frozen, skip, writers: Writers, target, rows: TargetRows
) -> tuple[jax.Array, jax.Array]:
    """Edges from sources, one an edge, to targets, numbers `target` [E]: by the first head and the
    query that it serves [L, E, N, T], and through no head [E]."""
    c, (T, D), R = model.config, frozen.embed.shape, len(rows.stage)
    below = beside_heads_up(model, frozen, skip, writers)
    above = beside_heads_down(model, frozen, skip, rows)[0][:, target]
    none = _without_heads(above, writers.rows, rows.position[target], writers.position)
    chunks, top = _span(frozen, writers, rows)[1], jnp.max(rows.stage) // 2

    def step(n, carry):
        g, found = carry
        layer = top - n
        g = mid_down(model, frozen, skip, rows, layer, chunks, g)
        at = entry(frozen.pre_attn_scale, layer)[writers.position][:, None]
        given = _writes(model, layer, entry(below, layer) * at)  # [E, N, D]
        scaled = g * entry(frozen.post_attn_scale, layer)[:, None, None]

        def of_edge(edge):
            r, position, writes = edge
            p = pattern_of(c, frozen, layer, _every, _tokens(position[None]))
            return p.reshape(c.heads, T) * dot("td,nd->nt", scaled[:, r], writes)

        new = jax.lax.map(of_edge, (target, writers.position, given))
        return through_attention(model, frozen, layer, chunks, g), found.at[layer].set(new)

    g = jnp.zeros((T, R, D), jnp.float32)
    found = jnp.zeros((c.layers, len(target), c.heads, T), jnp.float32)
    return jax.lax.fori_loop(0, top + 1, step, (g, found))[1], none


def _without_heads(above, written, queries, keys) -> jax.Array:
    """Edges [E] through no head, of gradients [L + 1, E, Q, D] at tokens [E, Q], and of what is
    written [L + 1, E, D] at tokens [E]."""
    same = (queries == keys[:, None]).astype(jnp.float32)
    return (dot("leqd,led->eq", above, written) * same).sum(1)


@jax.jit
def all_paths(model: Model, frozen: Frozen, skip, writers: Writers, rows: TargetRows):
    """x in each layer's resid_pre [L, T, A, D], g in each resid_mid [L, T, R, D], both along all
    paths, and the effects [L + 1, R, A] of what is written below each layer and to the last."""
    c, (T, D) = model.config, frozen.embed.shape
    span, R, low = _span(frozen, writers, rows), len(rows.stage), _lowest(writers)
    top = jnp.max(rows.stage) // 2
    begin = partial(begun, rows)

    def up(layer, carry):
        x, kept = carry
        return layer_up(model, frozen, skip, writers, layer, span, x), kept.at[layer].set(x)

    x = jnp.zeros((T, len(writers.position), D), jnp.float32)
    carry = _placed(writers, low, x), jnp.zeros((c.layers, *x.shape), jnp.float32)
    xs = jax.lax.fori_loop(low, top + 1, up, carry)[1]

    def direct(g, layer):
        return dot("ard,ad->ra", g[writers.position], entry(writers.rows, layer))

    def down(n, carry):
        g, kept, found = carry
        layer = top - n
        found = found.at[layer + 1].set(direct(begin(g, 2 * layer + 1), layer + 1))
        g = mid_down(model, frozen, skip, rows, layer, span[1], g)
        return through_attention(model, frozen, layer, span[1], g), kept.at[layer].set(g), found

    g = jnp.zeros((T, R, D), jnp.float32)
    found = jnp.zeros((c.layers + 1, R, len(writers.position)), jnp.float32)
    carry = g, jnp.zeros((c.layers, *g.shape), jnp.float32), found
    g, gs, found = jax.lax.fori_loop(0, top + 1, down, carry)
    return xs, gs, found.at[0].set(direct(begin(g, -1), 0))


@jax.jit
def flows(model: Model, frozen: Frozen, writers: Writers, rows: TargetRows, xs, gs) -> jax.Array:
    """What takes each head, along `all_paths`: [L, N, R, A]."""
    c, b = model.config, model.params.blocks
    span, C = _span(frozen, writers, rows), chunk_of(xs.shape[1])

    def of_layer(layer):
        take = partial(entry, i=layer)
        w_o = take(b.w_o).reshape(c.kv_heads, -1, c.head_dim, c.d_model)
        g, scale, gain = take(gs), take(frozen.post_attn_scale), take(b.post_attn_norm)
        v = values(model, frozen, layer, span, take(xs))

        def of_queries(n, sums):
            z = dot(
                "trd,kghd->kgtrh", cut(g, n, C, 0) * norm_factor(cut(scale, n, C, 0), gain), w_o
            )
            return sums + dot("kgtrh,kgtah->kgra", z, mixed(model, frozen, layer, span, v, n))

        shape = (*w_o.shape[:2], gs.shape[2], xs.shape[2])
        return jax.lax.fori_loop(*span, of_queries, jnp.zeros(shape, jnp.float32))

    found = jax.lax.map(of_layer, jnp.arange(c.layers, dtype=jnp.int32))
    return found.reshape(c.layers, c.heads, *found.shape[3:])


@jax.jit
def by_heads_of(model: Model, frozen: Frozen, layer, x, g) -> tuple[jax.Array, jax.Array]:
    """One edge at one layer, of x in resid_pre and g in resid_mid [T, D]: by head, query and key
    [N, T, T], and past the heads."""
    c = model.config
    writes = _writes(model, layer, x * entry(frozen.pre_attn_scale, layer)[:, None])
    g_scaled = g * entry(frozen.post_attn_scale, layer)[:, None]
    p = pattern_of(c, frozen, layer, _every, _every).reshape(c.heads, len(x), len(x))
    return p * dot("td,snd->nts", g_scaled, writes), dot("td,td->", x, g)


def _reads(model: Model, layer, b: jax.Array) -> jax.Array:
    """What each head hands down of gradients b [..., D] in its output, no scales: [..., N, D]."""
    w = model.params.blocks
    take = partial(entry, i=layer)
    w_o = take(w.w_o).reshape(model.config.kv_heads, -1, *w.w_o.shape[2:])
    z = dot("...d,kghd->...kgh", gained(b, take(w.post_attn_norm)), w_o)
    x = gained(dot("...kgh,dkh->...kgd", z, take(w.w_v)), take(w.pre_attn_norm))
    return x.reshape(*b.shape[:-1], -1, b.shape[-1])


def _writes(model: Model, layer, x: jax.Array) -> jax.Array:
    """What each head writes of x [..., D] in resid_pre, no scales: [..., N, D]."""
    w = model.params.blocks
    take = partial(entry, i=layer)
    w_o = take(w.w_o).reshape(model.config.kv_heads, -1, *w.w_o.shape[2:])
    v = dot("...d,dkh->...kh", gained(x, take(w.pre_attn_norm)), take(w.w_v))
    out = gained(dot("...kh,kghd->...kgd", v, w_o), take(w.post_attn_norm))
    return out.reshape(*x.shape[:-1], -1, x.shape[-1])


def _every(x: jax.Array, axis: int) -> jax.Array:
    return x


def _tokens(at: jax.Array):
    """Picks the tokens `at` [n]."""
    return lambda x, axis: jnp.take(x, at, axis)
