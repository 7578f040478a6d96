"""The linear model of one prompt, and its rows: the effect of every source on a batch of targets.

Attention patterns and norm scales are frozen at the prompt's values, and every MLP is replaced by
what its transcoder writes plus a constant error. What remains is linear: a target is a sum over
features, errors and embeddings. Its row is found by walking down the layers with one vector g per
token, the target's gradient with respect to the residual stream:

    at resid_post   each source that writes to layer l contributes g . (what it writes)
    skip            g += (W_skip g) * gain / rms          (affine transcoders)
    at resid_mid    targets that read layer l's transcoder input begin here
    attention       g += the frozen heads, backwards: O, pattern, V, norms
    at embed        each token contributes g . (its embedding)

No MLP is run, nothing is differentiated, and a batch begins at its highest layer and ends at its
last token, which are data: one program serves all layers. Patterns exist a tile at a time.

Source: Ameisen et al. 2025, Circuit Tracing (the local replacement model), for Gemma's norms before
and after attention and MLP. Axes: see `model.config`, and R rows, I blocks of P groups of C slots.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.model.attention import LOWEST, Tokens, visible
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.sharding import mesh_of, place

WHOLE = 64  # prompts up to this many tokens are one chunk
Pick = Callable[[jax.Array, int], jax.Array]  # some tokens of an array, along an axis
dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class Frozen:
    """The prompt's own values, float32 but for q and k."""

    q: jax.Array  # [L, T, N, H], after norm and RoPE
    k: jax.Array  # [L, T, K, H]
    pre_attn_scale: jax.Array  # [L, T]: 1 / rms
    post_attn_scale: jax.Array  # [L, T]
    pre_mlp_scale: jax.Array  # [L, T]
    final_scale: jax.Array  # [T]
    embed: jax.Array  # [T, D]
    log_sums: jax.Array  # [L, N, T]: of each query's scores, the normaliser of its pattern
    tokens: Tokens  # [1, T], segments 0 where filled up


@flax.struct.dataclass
class Blocks:
    """What single sources write, by the layer they write to: I blocks of P x C slots.

    A block's P groups are tokens, and its slots sources at these tokens; unused slots are zeros.
    Cross-layer features have slots in a block of every layer that they write to.
    """

    rows: jax.Array  # [I, P, C, D]: activation times decoder row
    positions: jax.Array  # int32 [I, P]
    result: jax.Array  # int32 [I]: which block of results it adds to
    start: jax.Array  # int32 [L + 1]: the blocks of layer l are start[l] : start[l + 1]
    results: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class Written:
    """All that replaces the MLPs: single sources, and what each layer writes as a whole."""

    blocks: Blocks
    error: jax.Array  # [L, T, D]
    bias: jax.Array  # [L, D], but for the first tokens
    start: jax.Array  # [L, S, D]: the constant at the first tokens, whose MLPs have no features
    rest: jax.Array | None  # [L, T, D]: active features that have no slot, if there are any
    skip: jax.Array | None  # [L, D, D]: x @ skip, or None


@flax.struct.dataclass
class TargetRows:
    """Where R targets begin: each is a sum of Q terms, vector . residual stream at a token.

    stage: 2 l is resid_mid of layer l, 2 l + 1 its resid_post, -1 the embedding. Where there is no
    term, stage is -1 and the vector zeros.
    """

    stage: Any  # int32 [R, Q]
    position: Any  # int32 [R, Q]
    vector: Any  # float32 [R, Q, D]


@flax.struct.dataclass
class Effects:
    """The contributions to R targets; together with a target's own bias they are its value."""

    slots: jax.Array  # [R, results P C]
    errors: jax.Array  # [R, L, T]
    tokens: jax.Array  # [R, T]
    constant: jax.Array  # [R]
    rest: jax.Array  # [R]


def room_for(length: int) -> int:
    """The tokens that a prompt of `length` is filled up to, so that few programs are compiled."""
    step = max(2, 1 << max(0, (length - 1).bit_length() - 3))
    size = -(-length // step) * step
    return -(-size // chunk_of(size)) * chunk_of(size)


def chunk_of(size: int) -> int:
    """The tokens that are worked on at a time: a prompt is a whole number of chunks."""
    return size if size <= WHOLE else 32 if size <= 256 else 64


def prefixes(size: int) -> tuple[int, ...]:
    """The lengths to which a prompt of `size` tokens is cut, where targets need no later ones.

    A longer prompt is worked on in chunks, as many as a batch of targets needs.
    """
    if size > WHOLE:
        return (size,)
    return tuple(sorted({min(size, -(-size * k // 8) * 2) for k in (1, 2, 3, 4)}))


def _cut_short(frozen: Frozen, written: Written, size: int) -> tuple[Frozen, Written]:
    """The first `size` tokens; sources at later ones have no effects (see `effects`)."""
    of_layers = lambda x: None if x is None else x[:, :size]
    names = ("q", "k", "pre_attn_scale", "post_attn_scale", "pre_mlp_scale")
    short = {name: of_layers(getattr(frozen, name)) for name in names}
    frozen = dataclasses.replace(
        frozen,
        **short,
        final_scale=frozen.final_scale[:size],
        embed=frozen.embed[:size],
        log_sums=frozen.log_sums[:, :, :size],
        tokens=frozen.tokens[:size],
    )
    same = {name: of_layers(getattr(written, name)) for name in ("error", "start", "rest")}
    return frozen, dataclasses.replace(written, **same)


@partial(jax.jit, static_argnames="size")
def effects(
    model: Model, frozen: Frozen, written: Written, rows: TargetRows, size: int | None = None
) -> Effects:
    """The effect of every source on each of `rows`; they lie among the first `size` tokens."""
    if size is not None:
        frozen, written = _cut_short(frozen, written, size)
    c, blocks = model.config, written.blocks
    (T, D), R = frozen.embed.shape, rows.position.shape[0]
    C = chunk_of(T)
    kinds = 2 if written.rest is None else 3  # error, constant, rest
    chunks = 1 + jnp.max(jnp.where(rows.stage < 0, 0, rows.position)) // C
    top = jnp.max(rows.stage) // 2
    begin = partial(begun, rows)
    spread = partial(place, mesh_of(model.params.embed))  # rows over "data", slots over "model"

    def layer_step(n, carry):
        g, slots, errors, sums = carry
        layer = top - n
        take = partial(entry, i=layer)
        g = begin(g, 2 * layer + 1)

        def block(i, slots):
            at = g.at[blocks.positions[i]].get(mode="fill", fill_value=0.0)  # [P, R, D]
            found = dot("prd,pcd->prc", at, float32(blocks.rows[i]))
            return slots.at[blocks.result[i]].add(found)

        slots = jax.lax.fori_loop(blocks.start[layer], blocks.start[layer + 1], block, slots)
        constant = jnp.broadcast_to(take(written.bias), (T, D))
        whole = [take(written.error), put(constant, take(written.start), 0, 0)]
        whole = jnp.stack(whole if written.rest is None else [*whole, take(written.rest)], -1)

        def of_chunk(n, found):
            new = dot("trd,tds->trs", cut(g, n, C, 0), cut(whole, n, C, 0))
            return put(found, new, n, 0)

        found = jax.lax.fori_loop(0, chunks, of_chunk, jnp.zeros((T, R, kinds), jnp.float32))
        errors, sums = errors.at[layer].set(found[..., 0]), sums + found[..., 1:].sum(0)
        if written.skip is not None:
            g = through_skip(model, frozen, written.skip, layer, chunks, g)
        g = through_attention(model, frozen, layer, chunks, begin(g, 2 * layer))
        return spread(g, None, "data", None), slots, errors, sums

    _, P, S, _ = blocks.rows.shape
    slots = jnp.zeros((blocks.results, P, R, S), jnp.float32)
    carry = (
        spread(jnp.zeros((T, R, D), jnp.float32), None, "data", None),
        spread(slots, None, None, "data", "model"),
        jnp.zeros((c.layers, T, R), jnp.float32),
        jnp.zeros((R, kinds - 1), jnp.float32),
    )
    g, slots, errors, sums = jax.lax.fori_loop(0, top + 1, layer_step, carry)
    g = begin(g, -1)
    return Effects(
        slots.transpose(2, 0, 1, 3).reshape(R, -1),
        errors.transpose(2, 0, 1),
        dot("trd,td->rt", g, frozen.embed),
        sums[:, 0],
        sums[:, 1:].sum(1),
    )


def begun(rows: TargetRows, g: jax.Array, stage) -> jax.Array:
    """g [T, R, D] at a stage, with the terms of `rows` that begin there."""
    here = (rows.stage == stage).astype(jnp.float32)[:, :, None]
    row = jnp.arange(len(rows.stage), dtype=jnp.int32)[:, None]
    return g.at[rows.position, row].add(here * rows.vector)


begun_at = jax.jit(begun)


@jax.jit
def down_a_layer(model: Model, frozen: Frozen, skip, layer, rows: TargetRows, g, back) -> jax.Array:
    """g [T, R, D] from a layer's output to its input, all of its tokens; `back` [T, R, D] is what
    comes through the MLP besides the skip."""
    chunks = g.shape[0] // chunk_of(g.shape[0])
    if skip is not None:
        g = through_skip(model, frozen, skip, layer, chunks, g)
    return through_attention(model, frozen, layer, chunks, begun(rows, g + back, 2 * layer))


def through_skip(model: Model, frozen: Frozen, skip, layer, chunks, g: jax.Array) -> jax.Array:
    """g [T, R, D] at resid_post, and what comes back through the skip of the layer's transcoder."""
    C, w = chunk_of(g.shape[0]), entry(skip, layer)
    scale, gain = entry(frozen.pre_mlp_scale, layer), entry(model.params.blocks.pre_mlp_norm, layer)

    def of_chunk(n, g):
        some = cut(g, n, C, 0)
        inner = dot("tre,de->trd", some, w)
        return put(g, some + inner * norm_factor(cut(scale, n, C, 0), gain), n, 0)

    return jax.lax.fori_loop(0, chunks, of_chunk, g)


def through_attention(model: Model, frozen: Frozen, layer, chunks, g: jax.Array) -> jax.Array:
    """g [T, R, D] at resid_mid to g at resid_pre: itself, and what comes back through the heads."""
    c, b = model.config, model.params.blocks
    T, R, D = g.shape
    K, G, H, C = c.kv_heads, c.heads // c.kv_heads, c.head_dim, chunk_of(T)
    take, of_tokens = partial(entry, i=layer), partial(cut, size=C, axis=0)
    w_o, w_v = take(b.w_o).reshape(K, G, H, D), take(b.w_v)
    after, before = take(frozen.post_attn_scale), take(frozen.pre_attn_scale)
    window = reach(c, layer)

    def of_queries(n, v):
        some = of_tokens(g, n) * norm_factor(of_tokens(after, n), take(b.post_attn_norm))
        z = dot("trd,kghd->kgtrh", some, w_o)

        def of_keys(m, v):
            p = pattern_tile(c, frozen, layer, n, m)
            return put(v, cut(v, m, C, 1) + dot("kgts,kgtrh->ksrh", p, z), m, 1)

        return jax.lax.fori_loop(jnp.maximum(n * C - window + 1, 0) // C, n + 1, of_keys, v)

    v = jnp.zeros((K, T, R, H), jnp.float32)
    v = jax.lax.fori_loop(0, chunks, of_queries, v)

    def of_inputs(n, g):
        inner = dot("ksrh,dkh->srd", cut(v, n, C, 1), w_v)
        factor = norm_factor(of_tokens(before, n), take(b.pre_attn_norm))
        return put(g, of_tokens(g, n) + inner * factor, n, 0)

    return jax.lax.fori_loop(0, chunks, of_inputs, g)


def entry(stacked: jax.Array, i) -> jax.Array:
    """Layer `i` of an array, float32."""
    return float32(jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False))


def cut(x: jax.Array, n, size: int, axis: int) -> jax.Array:
    """Chunk `n` along an axis."""
    return jax.lax.dynamic_slice_in_dim(x, n * size, size, axis)


def put(x: jax.Array, new: jax.Array, n, axis: int) -> jax.Array:
    """`x` with its chunk `n` replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, new, n * new.shape[axis], axis)


def norm_factor(scale: jax.Array, w: jax.Array) -> jax.Array:
    """A frozen norm as a factor [T, 1, D]: scale [T] times the gain 1 + w [D]."""
    return scale[:, None, None] * (1.0 + w)[None, None, :]


# --- Frozen attention patterns -------------------------------------------------------------------


def reach(c: GemmaConfig, layer) -> jax.Array:
    """How many keys a query of a layer sees, its own included."""
    is_global = (layer + 1) % c.global_every == 0
    return jnp.where(is_global, jnp.int32(2**30), jnp.int32(c.window))


def chunk(size: int, n) -> Pick:
    """Picks the tokens of chunk `n`."""
    return lambda x, axis: cut(x, n, size, axis)


def _scores(c: GemmaConfig, frozen: Frozen, layer, queries: Pick, keys: Pick) -> jax.Array:
    """Masked scores [K, G, T, S] of some queries on some keys."""
    q = queries(jax.lax.dynamic_index_in_dim(frozen.q, layer, keepdims=False), 0)
    k = keys(jax.lax.dynamic_index_in_dim(frozen.k, layer, keepdims=False), 0)
    q = q.reshape(q.shape[0], c.kv_heads, -1, c.head_dim)
    # as the model computes them: products of its own dtype, sums in float32
    scores = jnp.einsum("tkgh,skh->kgts", q, k, preferred_element_type=jnp.float32)
    of = lambda pick: jax.tree.map(lambda x: pick(x, 1), frozen.tokens)
    mask = visible(of(queries), of(keys), reach(c, layer))[0]
    return jnp.where(mask[None, None], scores * c.query_scale, LOWEST)


def pattern_of(c: GemmaConfig, frozen: Frozen, layer, queries: Pick, keys: Pick) -> jax.Array:
    """Attention probabilities [K, G, T, S] of some queries on some keys."""
    sums = queries(jax.lax.dynamic_index_in_dim(frozen.log_sums, layer, keepdims=False), 1)
    scores = _scores(c, frozen, layer, queries, keys)
    return jnp.exp(scores - sums.reshape(*scores.shape[:3], 1))


def pattern_tile(c: GemmaConfig, frozen: Frozen, layer, n, m) -> jax.Array:
    """Attention probabilities [K, G, C, C] of the queries of chunk `n` on the keys of chunk `m`."""
    C = chunk_of(frozen.embed.shape[0])
    return pattern_of(c, frozen, layer, chunk(C, n), chunk(C, m))


@partial(jax.jit, static_argnames="c")
def normalised(c: GemmaConfig, frozen: Frozen) -> Frozen:
    """`frozen` with its `log_sums`."""
    L, T = frozen.q.shape[:2]
    C = chunk_of(T)

    def of_chunk(i):
        layer, n = i // (T // C), i % (T // C)

        def add(m, sums):
            scores = _scores(c, frozen, layer, chunk(C, n), chunk(C, m))
            return jnp.logaddexp(sums, jax.nn.logsumexp(scores, -1))

        first = jnp.maximum(n * C - reach(c, layer) + 1, 0) // C
        return jax.lax.fori_loop(
            first, n + 1, add, jnp.full((c.kv_heads, c.heads // c.kv_heads, C), -jnp.inf)
        )

    sums = jax.lax.map(of_chunk, jnp.arange(L * (T // C), dtype=jnp.int32))
    # queries that see no key, where a prompt is filled up, have patterns of zeros: with ones there
    # what is walked up from sources would grow at each layer, and overflow in deep models
    sums = jnp.where(sums > LOWEST / 2, sums, 0.0)
    sums = sums.reshape(L, T // C, c.heads, C)
    return dataclasses.replace(frozen, log_sums=jnp.moveaxis(sums, 1, 2).reshape(L, c.heads, T))
