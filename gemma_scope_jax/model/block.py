"""One layer of Gemma 3: norms, RoPE, attention and the gated MLP, and what all layers share.

Every step has a `named_scope`, so that a profile reads like the model. Axes: see `config.py`.
"""

from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, named_scope
from jax.sharding import AbstractMesh

from gemma_scope_jax.model.attention import Tokens, attend, mix, pattern, visible
from gemma_scope_jax.model.attention_kernels import attend_in_order
from gemma_scope_jax.model.config import Block, GemmaConfig
from gemma_scope_jax.model.sharding import place

if TYPE_CHECKING:
    from gemma_scope_jax.model.gemma import Cache


@flax.struct.dataclass
class Where:
    """What every layer shares: RoPE tables, the tokens, the cache slot being filled, the mesh."""

    is_global: Array  # bool [L]
    rope_local: tuple[Array, Array]
    rope_global: tuple[Array, Array]
    queries: Tokens
    keys: Tokens
    slot: Array | None
    materialise: bool = flax.struct.field(pytree_node=False, default=False)  # attention patterns
    in_order: bool = flax.struct.field(pytree_node=False, default=False)  # of position; no cache
    packed: bool = flax.struct.field(pytree_node=False, default=True)  # or padded
    mesh: AbstractMesh | None = flax.struct.field(pytree_node=False, default=None)


def where_for(config: GemmaConfig, queries: Tokens, cache: "Cache | None", **static) -> Where:
    c, keys, slot = config, queries, None
    if cache is not None:
        slot = cache.used
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, slot))
        keys = jax.tree.map(put, cache.tokens, queries)
    is_global = jnp.array([c.is_global(l) for l in range(c.layers)])
    local = rope_tables(queries.positions, c.head_dim, c.local_rope_base, 1.0)
    divisor = c.global_rope_divisor
    whole = rope_tables(queries.positions, c.head_dim, c.global_rope_base, divisor)
    return Where(is_global, local, whole, queries, keys, slot, **static)


def rms_norm(x: Array, w: Array, epsilon: float, at=None, site: str = "") -> Array:
    """x / rms(x) * (1 + w), in float32 whatever x is; calls `at(site, 1/rms)` if given."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
    if at is not None:
        scale = at(site, scale)
    gain = (1.0 + w).reshape((1,) * (x.ndim - 1) + w.shape)
    return wide * scale * gain


def rope_tables(
    positions: Array, head_dim: int, base: float, divisor: float
) -> tuple[Array, Array]:
    """cos, sin [B, T, 1, H/2] of Gemma's split-half rotary embedding of positions / divisor."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    inverse = jnp.asarray(1.0 / (base**exponent) / divisor, jnp.float32)
    angle = positions[..., None, None].astype(jnp.float32) * inverse[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of x [B, T, heads, H], pairing channel i with i + H/2; float32."""
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def project(x: Array, w: Array) -> Array:
    """x [B, T, D] through w [D, ...], accumulated and returned in float32."""
    flat = w.reshape(w.shape[0], -1)
    y = jnp.einsum("btd,de->bte", x, flat, preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:2], *w.shape[1:])


def attention(config: GemmaConfig, p: Block, x, layer, where, kv, at):
    """One layer's attention: z projected, float32 [B, T, D] before the post-norm, and the cache."""
    c, eps = config, config.norm_epsilon
    is_global = c.is_global(layer) if isinstance(layer, int) else where.is_global[layer]
    cos = jnp.where(is_global, where.rope_global[0], where.rope_local[0])
    sin = jnp.where(is_global, where.rope_global[1], where.rope_local[1])
    window = jnp.where(is_global, jnp.int32(2**30), jnp.int32(c.window))

    dtype = p.w_q.dtype
    heads = lambda w: place(where.mesh, project(x, w), "data", None, "model", None)
    with named_scope("qkv"):
        q, k, v = heads(p.w_q), heads(p.w_k), heads(p.w_v).astype(dtype)
    with named_scope("rope"):
        q = rotate(rms_norm(q, p.q_norm, eps), cos, sin).astype(dtype)
        k = rotate(rms_norm(k, p.k_norm, eps), cos, sin).astype(dtype)
    q, k, v = at("q", q), at("k", k), at("v", v)
    if kv is not None:
        slot = (jnp.int32(layer), 0, where.slot, 0, 0)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None], slot)
        kv = put(kv[0], k), put(kv[1], v)
        k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv)
    with named_scope("scores"):
        if where.materialise:
            mask = visible(where.queries, where.keys, window)
            z = mix(at("attn_pattern", pattern(q, k, c.query_scale, mask)), v)
        elif where.in_order:
            share = (where.queries, where.packed, c.window, is_global, where.mesh)
            z = attend_in_order(q, k, v, c.query_scale, *share)
        else:
            z = attend(q, k, v, c.query_scale, where.queries, where.keys, window, kv is None)
    z = at("z", z.reshape(*z.shape[:2], c.heads * c.head_dim))
    with named_scope("out"):
        out = project(z, p.w_o.reshape(c.heads * c.head_dim, c.d_model))
    return place(where.mesh, out, "data", None, None), kv


def gelu(x: Array) -> Array:
    """Gemma's activation function: the approximation by tanh."""
    return jax.nn.gelu(x, approximate=True)


def mlp(p: Block, x, mesh, at):
    """The gated MLP of one layer, float32 [B, T, D] before its post-norm."""
    hidden = lambda w: place(mesh, project(x, w), "data", None, "model")
    with named_scope("gate"):
        gate = hidden(p.w_gate)
    with named_scope("up"):
        up = hidden(p.w_up)
    with named_scope("act"):
        act = (gelu(gate) * up).astype(x.dtype)
    act = at("mlp_act", act)
    with named_scope("down"):
        out = project(act, p.w_down)
    return place(mesh, out, "data", None, None)


def block(config: GemmaConfig, p: Block, x, layer, where, kv, at):
    """One layer: residual [B, T, D] in, residual and cache out. `at` is called once per site."""
    eps, dtype = config.norm_epsilon, x.dtype
    x = at("resid_pre", x)
    with named_scope("attention"):
        with named_scope("norm"):
            h = rms_norm(x, p.pre_attn_norm, eps, at, "pre_attn_scale").astype(dtype)
        h, kv = attention(config, p, h, layer, where, kv, at)
        with named_scope("post_norm"):
            h = rms_norm(h, p.post_attn_norm, eps, at, "post_attn_scale").astype(dtype)
    h = at("attn_out", h)
    x = at("resid_mid", x + h)
    with named_scope("mlp"):
        with named_scope("norm"):
            h = rms_norm(x, p.pre_mlp_norm, eps, at, "pre_mlp_scale").astype(dtype)
        h = mlp(p, at("mlp_in", h), where.mesh, at)
        with named_scope("post_norm"):
            h = rms_norm(h, p.post_mlp_norm, eps, at, "post_mlp_scale").astype(dtype)
    h = at("mlp_out", h)
    return at("resid_post", x + h), kv
