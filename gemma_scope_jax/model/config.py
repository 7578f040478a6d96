"""The architecture of Gemma 3 as data: sizes, presets, and the parameter pytree.

Axis glossary, used in every einsum and comment of the project:

    B batch            L layers         N query heads      M mlp hidden
    T tokens           D d_model        K key/value heads  V vocabulary
    S cache slots      H head dim       G N // K           F features
    X coder layers
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """A Gemma 3 text model's architecture; hashable, so it can be a static argument.

    Source: gemma.gm `TransformerConfig` and the `config.json` of the google/gemma-3-* repositories.
    """

    name: str
    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int  # a local layer's query sees this many keys, itself included
    query_scale: float  # multiplies q; 1/sqrt(head_dim), but for 27B 1/sqrt(d_model/heads)
    global_rope_divisor: float = 1.0  # positions are divided by this in global layers
    vocab: int = 262_144
    context: int = 131_072
    local_rope_base: float = 10_000.0
    global_rope_base: float = 1_000_000.0
    global_every: int = 6  # layer i is global when (i + 1) % global_every == 0
    norm_epsilon: float = 1e-6
    tied: bool = True  # unembeds with its embedding, as published; else with a matrix of its own

    def __repr__(self) -> str:
        sizes = f"{self.layers} layers, d_model {self.d_model}, {self.heads} heads"
        return f"GemmaConfig({self.name}: {sizes}, vocabulary {self.vocab:,})"

    def is_global(self, layer: int) -> bool:
        """Whether `layer` attends to the whole context rather than a local window."""
        return (layer + 1) % self.global_every == 0


def _preset(name, layers, d_model, d_mlp, heads, kv_heads, head_dim, window, **more) -> GemmaConfig:
    more.setdefault("query_scale", head_dim**-0.5)
    return GemmaConfig(name, layers, d_model, d_mlp, heads, kv_heads, head_dim, window, **more)


PRESETS: dict[str, GemmaConfig] = {
    c.name: c
    for c in (
        _preset("gemma-3-270m", 18, 640, 2048, 4, 1, 256, 512, context=32_768),
        _preset("gemma-3-1b", 26, 1152, 6912, 4, 1, 256, 512, context=32_768),
        _preset("gemma-3-4b", 34, 2560, 10240, 8, 4, 256, 1024, global_rope_divisor=8.0),
        _preset("gemma-3-12b", 48, 3840, 15360, 16, 8, 256, 1024, global_rope_divisor=8.0),
        _preset(
            "gemma-3-27b",
            62,
            5376,
            21504,
            32,
            16,
            128,
            1024,
            global_rope_divisor=8.0,
            query_scale=(5376 // 32) ** -0.5,
        ),
    )
}


def preset(name: str) -> GemmaConfig:
    """The preset for a model name: `gemma-3-1b`, `google/gemma-3-1b-pt`, `gemma-v3-1b-it`, ..."""
    short = name.removeprefix("google/").replace("gemma-v3-", "gemma-3-")
    short = short.removesuffix("-pt").removesuffix("-it")
    if short not in PRESETS:
        raise InputError(f"unknown model {name!r}{nearest(short, PRESETS)}")
    return PRESETS[short]


@flax.struct.dataclass
class Block:
    """The weights of all layers, stacked on the leading axis L. Norms are float32, gain = 1 + w."""

    pre_attn_norm: Any  # [L, D]
    w_q: Any  # [L, D, N, H]
    w_k: Any  # [L, D, K, H]
    w_v: Any  # [L, D, K, H]
    q_norm: Any  # [L, H]
    k_norm: Any  # [L, H]
    w_o: Any  # [L, N, H, D]
    post_attn_norm: Any  # [L, D]
    pre_mlp_norm: Any  # [L, D]
    w_gate: Any  # [L, D, M]
    w_up: Any  # [L, D, M]
    w_down: Any  # [L, M, D]
    post_mlp_norm: Any  # [L, D]


@flax.struct.dataclass
class Params:
    """All weights of a Gemma 3 text model; it unembeds with its embedding, transposed.

    A fine-tune may have been given an unembedding of its own: `head`, where the config is not tied.
    """

    embed: Any  # [V, D]
    blocks: Block
    final_norm: Any  # [D], float32
    head: Any = None  # [V, D], or None

    def __repr__(self) -> str:
        return f"Params({_weights(self)})"

    @property
    def unembedding(self) -> Any:
        """[V, D]: one direction for each token's logit."""
        return self.embed if self.head is None else self.head


def _weights(params: Any) -> str:
    """ "268,098,176 weights, bfloat16"; of a tree of anything else, as jax makes some, its type."""
    shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(params)]
    if None in shapes:
        return "no arrays"
    dtype = getattr(params.embed, "dtype", "no dtype")
    return f"{sum(math.prod(shape) for shape in shapes if shape):,} weights, {dtype}"


@flax.struct.dataclass
class Model:
    """A configuration and its weights: a pytree whose config is static."""

    params: Params
    config: GemmaConfig = flax.struct.field(pytree_node=False)

    def __repr__(self) -> str:
        return f"Model({self.config.name}: {self.config.layers} layers, {_weights(self.params)})"

    @property
    def dtype(self) -> jnp.dtype:
        return self.params.embed.dtype


def abstract_params(config: GemmaConfig, dtype: Any = jnp.bfloat16) -> Params:
    """The `jax.ShapeDtypeStruct` of every weight: the one place that knows the shapes."""
    c = config
    L, D, M, N, K, H = c.layers, c.d_model, c.d_mlp, c.heads, c.kv_heads, c.head_dim

    def weight(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def norm(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32))

    return Params(
        embed=weight(c.vocab, D),
        blocks=Block(
            pre_attn_norm=norm(L, D),
            w_q=weight(L, D, N, H),
            w_k=weight(L, D, K, H),
            w_v=weight(L, D, K, H),
            q_norm=norm(L, H),
            k_norm=norm(L, H),
            w_o=weight(L, N, H, D),
            post_attn_norm=norm(L, D),
            pre_mlp_norm=norm(L, D),
            w_gate=weight(L, D, M),
            w_up=weight(L, D, M),
            w_down=weight(L, M, D),
            post_mlp_norm=norm(L, D),
        ),
        final_norm=norm(D),
        head=None if c.tied else weight(c.vocab, D),
    )


def init_params(config: GemmaConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random weights at the scale of a trained model, for tests and from-scratch experiments."""
    shapes = abstract_params(config, dtype)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    fan_in = {
        "w_q": config.d_model,
        "w_k": config.d_model,
        "w_v": config.d_model,
        "w_o": config.heads * config.head_dim,
        "w_gate": config.d_model,
        "w_up": config.d_model,
        "w_down": config.d_mlp,
        "embed": config.d_model,
        "head": config.d_model,
    }
    names = [path[-1].name for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    out = []
    for name, leaf, k in zip(names, leaves, keys):
        scale = fan_in[name] ** -0.5 if name in fan_in else 0.2
        out.append((scale * jax.random.normal(k, leaf.shape)).astype(leaf.dtype))
    return jax.tree.unflatten(treedef, out)
