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

No MLP is run, nothing is differentiated, and a batch begins at its highest layer, which is data:
one program serves all layers.

Source: Ameisen et al. 2025, Circuit Tracing (the local replacement model), for Gemma's norms before
and after attention and MLP. Axes: see `model.config`, and R rows, I blocks of P groups of C slots.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.model.attention import LOWEST, Tokens, visible
from gemma_scope_jax.model.config import GemmaConfig, Model

QUERIES = 256  # of a prompt, whose attention patterns exist at a time
GROUPS, SLOTS = 8, 16  # a block: this many tokens, with this many features of each
EXACT = jax.lax.Precision.HIGHEST


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
    constant: jax.Array  # [L, T, D]: biases, and MLPs at positions without features
    rest: jax.Array  # [L, T, D]: active features that have no slot
    skip: jax.Array | None  # [L, D, D]: x @ skip, or None


@flax.struct.dataclass
class Rows:
    """Where R targets begin: each is a sum of Q terms, vector . residual stream at a token.

    stage: 2 l is resid_mid of layer l, 2 l + 1 its resid_post; -1: no term.
    """

    stage: jax.Array  # int32 [R, Q]
    position: jax.Array  # int32 [R, Q]
    vector: jax.Array  # float32 [R, Q, D]


@flax.struct.dataclass
class Effects:
    """The contributions to R targets; together with a target's own bias they are its value."""

    slots: jax.Array  # [R, results P C]
    errors: jax.Array  # [R, L, T]
    tokens: jax.Array  # [R, T]
    constant: jax.Array  # [R]
    rest: jax.Array  # [R]


@jax.jit
def effects(model: Model, frozen: Frozen, written: Written, rows: Rows) -> Effects:
    """The effect of every source on each of `rows`."""
    c, b, blocks = model.config, model.params.blocks, written.blocks
    T, D = frozen.embed.shape
    R = rows.position.shape[0]
    one = jnp.arange(R, dtype=jnp.int32)
    dot = partial(jnp.einsum, precision=EXACT, preferred_element_type=jnp.float32)

    def begin(g, stage):
        here = (rows.stage == stage).astype(jnp.float32)[:, :, None]
        return g.at[rows.position, one[:, None]].add(here * rows.vector)

    def layer_step(n, carry):
        g, slots, errors, sums = carry
        layer = top - n
        take = lambda w: float32(jax.lax.dynamic_index_in_dim(w, layer, keepdims=False))
        g = begin(g, 2 * layer + 1)

        def block(i, slots):
            at = g[blocks.positions[i]]  # [P, R, D]
            found = dot("prd,pcd->prc", at, float32(blocks.rows[i]))
            return slots.at[blocks.result[i]].add(found)

        slots = jax.lax.fori_loop(blocks.start[layer], blocks.start[layer + 1], block, slots)
        whole = jnp.stack([take(w) for w in (written.error, written.constant, written.rest)], -1)
        whole = dot("trd,tds->trs", g, whole)
        errors, sums = errors.at[layer].set(whole[..., 0]), sums + whole[..., 1:].sum(0)

        if written.skip is not None:
            inner = dot("tre,de->trd", g, take(written.skip))
            g = g + inner * _norm(take(frozen.pre_mlp_scale), take(b.pre_mlp_norm))
        g = begin(g, 2 * layer)
        after = g * _norm(take(frozen.post_attn_scale), take(b.post_attn_norm))
        inner = _attention(c, frozen, layer, take(b.w_o), take(b.w_v), after)
        g = g + inner * _norm(take(frozen.pre_attn_scale), take(b.pre_attn_norm))
        return g, slots, errors, sums

    top = jnp.max(rows.stage) // 2
    carry = (
        jnp.zeros((T, R, D), jnp.float32),
        jnp.zeros((blocks.results, GROUPS, R, SLOTS), jnp.float32),
        jnp.zeros((c.layers, T, R), jnp.float32),
        jnp.zeros((R, 2), jnp.float32),
    )
    g, slots, errors, sums = jax.lax.fori_loop(0, top + 1, layer_step, carry)
    return Effects(
        slots.transpose(2, 0, 1, 3).reshape(R, -1),
        errors.transpose(2, 0, 1),
        dot("trd,td->rt", g, frozen.embed),
        sums[:, 0],
        sums[:, 1],
    )


def _norm(scale: jax.Array, w: jax.Array) -> jax.Array:
    """A frozen norm as a factor [T, 1, D]: scale [T] times the gain 1 + w [D]."""
    return scale[:, None, None] * (1.0 + w)[None, None, :]


def _attention(c: GemmaConfig, frozen: Frozen, layer, w_o, w_v, g) -> jax.Array:
    """Frozen attention backwards, [T, R, D] to [T, R, D]: from its output, before the post-norm, to
    its normalised input."""
    K, G = c.kv_heads, c.heads // c.kv_heads
    dot = partial(jnp.einsum, precision=EXACT, preferred_element_type=jnp.float32)
    z = dot("trd,kghd->kgtrh", g, w_o.reshape(K, G, c.head_dim, -1))
    v = pulled_back(c, frozen, layer, z)
    return dot("ksrh,dkh->srd", v, w_v)


def pulled_back(c: GemmaConfig, frozen: Frozen, layer, z: jax.Array) -> jax.Array:
    """What reaches each key: z [K, G, T, R, H] at queries to [K, T, R, H] at keys."""
    T = z.shape[2]
    size = min(QUERIES, T)
    k = jax.lax.dynamic_index_in_dim(frozen.k, layer, keepdims=False)
    q = jax.lax.dynamic_index_in_dim(frozen.q, layer, keepdims=False)
    dot = partial(jnp.einsum, precision=EXACT, preferred_element_type=jnp.float32)
    is_global = (layer + 1) % c.global_every == 0

    def of_queries(v, start, reach: int, window):
        """Add what queries start : start + size send to the `reach` keys that end with them."""
        first = jnp.clip(start + size - reach, 0, T - reach)
        some = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        keys = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=reach)
        at = lambda cut, axis: jax.tree.map(lambda x: cut(x, axis=axis), frozen.tokens)
        p = frozen_pattern(c, some(q), keys(k), at(some, 1), at(keys, 1), window)
        new = dot("kgcs,kgcrh->ksrh", p, some(z, axis=2))
        old = keys(v, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(v, old + new, first, axis=1)

    whole, near = jnp.int32(2**30), jnp.int32(c.window)
    v = jnp.zeros((z.shape[0], T, *z.shape[3:]), jnp.float32)
    if T <= size:
        return of_queries(v, 0, T, jnp.where(is_global, whole, near))
    reach = min(T, -(-(c.window + size) // size) * size)

    def step(n, v):
        return jax.lax.cond(
            is_global,
            lambda v: of_queries(v, n * size, T, whole),
            lambda v: of_queries(v, n * size, reach, near),
            v,
        )

    return jax.lax.fori_loop(0, -(-T // size), step, v)


def frozen_pattern(c: GemmaConfig, q, k, queries: Tokens, keys: Tokens, window) -> jax.Array:
    """Attention probabilities [K, G, T, S] of q [T, N, H] and k [S, K, H]."""
    q = q.reshape(q.shape[0], c.kv_heads, -1, c.head_dim)
    # as the model computes them: products of its own dtype, sums in float32
    scores = jnp.einsum("tkgh,skh->kgts", q, k, preferred_element_type=jnp.float32)
    mask = visible(queries, keys, window)[0]
    scores = jnp.where(mask[None, None], scores * c.query_scale, LOWEST)
    return jnp.where(mask[None, None], jax.nn.softmax(scores, -1), 0.0)
