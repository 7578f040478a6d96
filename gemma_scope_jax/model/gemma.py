"""The Gemma 3 forward pass: a pure function over a pytree, with a name for every activation.

Axis glossary (B T S L D N K H G M V F X): see `config.py`. Sites, in order of appearance:

    embed                                   [B, T, D]   embedding x sqrt(D), the first residual
    per layer
      resid_pre                             [B, T, D]
      pre_attn_scale                        [B, T, 1]   1 / rms of resid_pre, float32
      q, k, v                               [B, T, N|K, H]  q and k after their norms and RoPE
      attn_pattern                          [B, N, T, S]    computed only if an intercept uses it
      z                                     [B, T, N*H] heads concatenated, the input of w_o
      post_attn_scale, attn_out             [B, T, 1], [B, T, D]  after the post-norm
      resid_mid                             [B, T, D]
      pre_mlp_scale, mlp_in                 [B, T, 1], [B, T, D]  after the pre-norm and its gain
      mlp_act                               [B, T, M]   gelu(gate) * up
      post_mlp_scale, mlp_out               [B, T, 1], [B, T, D]  after the post-norm
      resid_post                            [B, T, D]
    resid_final                             [B, T, D]   the last residual, before the final norm
    final_scale                             [B, T, 1]
    logits                                  [B, T, V]   float32

All layers run in the same scan, in segments (see `hooks.py`): local and global layers differ by a
flag. The stacked weights are indexed inside the body, because slicing would copy them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import named_scope
from jax.typing import DTypeLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import hooks
from gemma_scope_jax.model import intercept as ic
from gemma_scope_jax.model.attention import Tokens
from gemma_scope_jax.model.batch import TokenBatch, check_tokens, documents, tokens_and_segments
from gemma_scope_jax.model.block import Where, block, rms_norm, where_for
from gemma_scope_jax.model.config import GemmaConfig, Model, Params
from gemma_scope_jax.model.sharding import check_axes, mesh_of, place

Logits = Literal["all", "last", "none"]
Remat = tuple[str, ...] | None  # sites kept under differentiation; see `forward`


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far; all rows fill the same slots, from 0."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    tokens: Tokens  # [B, S], by document; 0 marks padding and empty slots
    used: jax.Array  # int32 scalar: the next slot to fill
    last: jax.Array  # int32 [B, 3]: position, segment id and document of each row's last token


@flax.struct.dataclass
class Output:
    """What a forward pass returns: logits (None if not requested), reads by name, the cache."""

    logits: Any
    reads: dict[str, Any]
    cache: Any = None


def init_cache(config: GemmaConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """An empty cache of `slots` tokens for `batch` rows."""
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    zeros, nobody = jnp.zeros(shape, dtype), jnp.zeros((batch, 3), jnp.int32)
    return Cache(zeros, zeros, Tokens(empty, empty), jnp.zeros((), jnp.int32), nobody)


def site_width(config: GemmaConfig, site: str) -> int:
    """The last axis of a layer site that a coder can read or write. Raises `InputError`."""
    no_coder = ("q", "k", "v", "attn_pattern")
    if site not in ic.LAYER_SITES or site in no_coder or site.endswith("_scale"):
        raise InputError(f"no coder can stand at site {site!r}")
    widths = {"z": config.heads * config.head_dim, "mlp_act": config.d_mlp}
    return widths.get(site, config.d_model)


@named_scope("embed")
def embed(config: GemmaConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """[B, T, D]: table rows times sqrt(D), the factor rounded to the table's dtype, as trained."""
    # an id outside the vocabulary gives NaN, not another token's row
    rows = params.embed.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    x = place(mesh_of(params.embed), rows, "data", None, None)
    return x * jnp.asarray(config.d_model**0.5, params.embed.dtype)


@named_scope("unembed")
def unembed(config: GemmaConfig, params: Params, x: jax.Array, at=None) -> jax.Array:
    """Logits float32 [B, T, V] of a final residual [B, T, D]."""
    h = rms_norm(x, params.final_norm, config.norm_epsilon, at, "final_scale")
    h = h.astype(params.embed.dtype)
    out = jnp.einsum("btd,vd->btv", h, params.unembedding, preferred_element_type=jnp.float32)
    return place(mesh_of(params.embed), out, "data", None, "model")


def forward(
    model: Model,
    tokens: jax.Array | TokenBatch,
    intercepts: ic.Intercept | Sequence = (),
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    stop_at_layer: int | None = None,
    remat: Remat = (),
    logits: Logits = "all",
) -> Output:
    """Run Gemma 3 on `tokens`, int [B, T] or a `TokenBatch` (see `gs.tokens`): the bare function,
    for use inside your own `jit`.

    segments       int [B, T]: 0 is padding, each run of equal ids is a document (packing). No
                   document sees another, even with equal ids; default: all one
    positions      int [B, T]: absolute; default: counted within each run of equal segment ids.
                   Where they do not grow, another document begins
    cache          keys and values so far; the tokens go to its next slots. A row's first run
                   continues the document before it if it has the same segment id
    stop_at_layer  run layers 0 .. stop_at_layer - 1 only, without logits
    remat          under differentiation keep only these sites of a layer and recompute the rest
                   (default: only the residual between layers); None keeps everything
    logits         "all", "last" (of the last token only), or "none"
    Raises `InputError` for sites, layers, reads and shapes that do not fit.
    """
    tokens, segments = tokens_and_segments(tokens, segments)
    items = hooks.flatten(intercepts)
    check_pass(model, tokens, items, positions, segments, cache, stop_at_layer, remat, logits)
    given = {"positions": positions, "segments": segments, "cache": cache}
    return one_pass(model, tokens, items, stop_at_layer, remat=remat, logits=logits, **given)


def check_pass(model, tokens, items, positions, segments, cache, stop_at_layer, remat, logits):
    """Raise `InputError` for what `forward` cannot run."""
    if logits not in get_args(Logits):
        raise InputError(f"logits must be one of {', '.join(get_args(Logits))}, not {logits!r}")
    if unknown := set(remat or ()) - set(ic.SITES):
        raise InputError(f"remat: unknown site {min(unknown)!r} (all: {' '.join(ic.SITES)})")
    check_axes(model.params.embed)
    hooks.check(items, model.config.layers, stop_at_layer)
    check_tokens(model.config, tokens, cache, positions, segments)


def one_pass(
    model: Model,
    tokens: jax.Array,
    items: tuple[ic.Intercept, ...],
    stop_at_layer: int | jax.Array | None = None,
    length: jax.Array | None = None,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    remat: Remat = (),
    logits: Logits = "all",
) -> Output:
    """`forward` of checked arguments. Two may be data here, int32 scalars:

    stop_at_layer  if no read is at more than one layer, and nothing is differentiated
    length         the number of real tokens in each row; the rest is filling. Only without a cache
    """
    c, params = model.config, model.params
    tokens = tokens.astype(jnp.int32)
    in_order, packed = positions is None and cache is None, segments is not None
    if length is not None:  # no token sees the filling, which comes after all tokens
        there = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < length
        segments = jnp.where(there, 1 if segments is None else segments, 0)
        segments = jnp.broadcast_to(segments, tokens.shape)
    queries, last = documents(tokens.shape, positions, segments, cache)
    static = {"in_order": in_order, "packed": packed, "mesh": mesh_of(params.embed)}
    materialise = any(i.site == "attn_pattern" for i in items)
    where = where_for(c, queries, cache, materialise=materialise, **static)
    everything = tuple(n for n, i in enumerate(items) if i.site not in ic.LAYER_SITES)
    top = hooks.At(items, everything, -1, c.layers, queries.positions, queries.segments > 0, {})

    x = top("embed", embed(c, params, tokens))
    states = {
        n: i.init_fn(x, *i.args) if i.init_fn else i.init
        for n, i in enumerate(items)
        if i.kind == "fold"
    }
    kv = None if cache is None else (cache.k, cache.v)
    ran = c.layers if stop_at_layer is None else stop_at_layer
    x, kv, states, collected = _layers(model, x, kv, states, items, where, ran, remat)

    out = None
    if stop_at_layer is None:
        x = top("resid_final", x)
        if logits == "last":
            end = tokens.shape[1] if length is None else length
            one = partial(jax.lax.dynamic_slice_in_dim, start_index=end - 1, slice_size=1, axis=1)
            x, top.positions, top.valid = one(x), one(top.positions), one(top.valid)
        if logits != "none" or any(i.site in ("final_scale", "logits") for i in items):
            out = top("logits", unembed(c, params, x, top))
    reads = _named_reads(items, collected, top.reads, states)
    if cache is not None:
        k, v = kv
        cache = Cache(k, v, where.keys, cache.used + tokens.shape[1], last)
    return Output(None if logits == "none" else out, reads, cache)


def _layers(model: Model, x, kv, states, items, where: Where, ran, remat: Remat) -> Any:
    """Run layers 0 .. ran - 1, one scan per segment; returns the reads of each segment by index."""
    c, blocks = model.config, model.params.blocks

    def body(active, carry, layer):
        x, kv, states = carry
        take = lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False)
        valid = where.queries.segments > 0
        at = hooks.At(items, active, layer, c.layers, where.queries.positions, valid, states)
        x, kv = block(c, jax.tree.map(take, blocks), x, layer, where, kv, at)
        return (x, kv, at.states), at.reads

    held = [n for n, i in enumerate(items) if i.layer is not None and i.kind == "read"]
    if held:  # a read at a layer that is data: its value is carried on from that layer
        shapes = jax.eval_shape(partial(body, held), (x, kv, states), jnp.int32(0))[1]
        states = states | jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    collected: dict[int, list] = {}
    carry = (x, kv, states)
    if not isinstance(ran, int):
        active, upto = tuple(range(len(items))), jnp.int32(ran)
        carry = jax.lax.fori_loop(0, upto, lambda l, carry: body(active, carry, l)[0], carry)
        return *carry, collected
    policy = jax.checkpoint_policies.save_only_these_names(*(remat or ()))
    for start, stop, active in hooks.segments(items, ran):
        step = partial(body, active)
        if stop - start == 1:
            one = partial(step, layer=start)
            if remat is not None:
                one = jax.checkpoint(one, policy=policy)
            carry, reads = one(carry)
            reads = jax.tree.map(lambda a: a[None], reads)
        else:
            if remat is not None:
                step = jax.checkpoint(step, policy=policy, prevent_cse=False)
            carry, reads = jax.lax.scan(step, carry, jnp.arange(start, stop, dtype=jnp.int32))
        for n, value in reads.items():
            collected.setdefault(n, []).append(value)
    return *carry, collected


def _named_reads(items, collected, top_reads, states) -> dict[str, Any]:
    reads = {}
    for n, i in enumerate(items):
        if i.name is None:
            continue
        if n in states or n in top_reads:
            reads[i.name] = states[n] if n in states else top_reads[n]
        else:
            parts = collected[n]
            stacked = jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *parts)
            if i.of_one_layer:
                stacked = jax.tree.map(lambda a: a[0], stacked)
            elif i.layers is not None and tuple(sorted(i.layers)) != i.layers:
                order = np.argsort(np.argsort(i.layers))
                stacked = jax.tree.map(partial(jnp.take, indices=order, axis=0), stacked)
            reads[i.name] = stacked
    return reads
