"""The architecture of Gemma 3 as data: sizes, presets, and the parameter pytree.

Axis glossary, used in every einsum and comment of the project:

    B batch            L layers         N query heads      M mlp hidden
    T tokens           D d_model        K key/value heads  V vocabulary
    S cache slots      H head dim       G N // K           F features
    X coder layers
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
    window: int  # keys that a query of a local layer sees, its own included
    query_scale: float  # multiplies q; 1/sqrt(head_dim), for 27B 1/sqrt(d_model/heads)
    global_rope_divisor: float = 1.0  # positions are divided by this in global layers
    vocab: int = 262_144
    context: int = 131_072
    local_rope_base: float = 10_000.0
    global_rope_base: float = 1_000_000.0
    global_every: int = 6  # layer i is global when (i + 1) % global_every == 0
    norm_epsilon: float = 1e-6
    tied: bool = True  # unembeds with its embedding, as published; else with `Params.head`

    def __repr__(self) -> str:
        sizes = f"{self.layers} layers, d_model {self.d_model}, {self.heads} heads"
        return f"GemmaConfig({self.name}: {sizes}, vocabulary {self.vocab:,})"

    def is_global(self, layer: int) -> bool:
        """Whether `layer` attends to the whole context rather than a local window."""
        return (layer + 1) % self.global_every == 0


_SHORT: dict[str, Any] = {"context": 32_768}
_LONG: dict[str, Any] = {"context": 131_072, "global_rope_divisor": 8.0}
PRESETS: dict[str, GemmaConfig] = {
    name: GemmaConfig(name, *sizes, query_scale=scalar**-0.5, **reach)
    for name, sizes, scalar, reach in (
        # layers, d_model, d_mlp, heads, kv_heads, head_dim, window
        ("gemma-3-270m", (18, 640, 2048, 4, 1, 256, 512), 256, _SHORT),
        ("gemma-3-1b", (26, 1152, 6912, 4, 1, 256, 512), 256, _SHORT),
        ("gemma-3-4b", (34, 2560, 10240, 8, 4, 256, 1024), 256, _LONG),
        ("gemma-3-12b", (48, 3840, 15360, 16, 8, 256, 1024), 256, _LONG),
        ("gemma-3-27b", (62, 5376, 21504, 32, 16, 128, 1024), 168, _LONG),
    )
}


def preset(name: str) -> GemmaConfig:
    """The preset for a model name: `gemma-3-1b`, `google/gemma-3-1b-pt`, `gemma-v3-1b-it`, ..."""
    short = name.removeprefix("google/").replace("gemma-v3-", "gemma-3-")
    short = short.removesuffix("-pt").removesuffix("-it")
    if short not in PRESETS:
        raise InputError(f"unknown model {name!r}{nearest(short, PRESETS)}")
    return PRESETS[short]


def normalise_model_name(name: str) -> str:
    """The Hugging Face id of a Gemma 3 in any published spelling; other names come back as given.

    `gemma-v3-1b-pt`, `gemma-3-1b-pt` -> `google/gemma-3-1b-pt`; `google/gemma-3-270m-pt` ->
    `google/gemma-3-270m`. Raises `InputError` for a size that does not exist (`gemma-3-9b`).
    """
    short = name.strip().lower().removeprefix("google/").replace("gemma-v3-", "gemma-3-")
    if not (match := re.fullmatch(r"(gemma-3-\d+[mb])(-pt|-it)?", short)):
        return name.strip()
    base, variant = match[1], match[2] or "-pt"
    if base not in PRESETS:
        raise InputError(f"there is no model {name!r}{nearest(base, PRESETS)}")
    return f"google/{base}" + ("" if (base, variant) == ("gemma-3-270m", "-pt") else variant)


def _weight(axes: str) -> Any:
    """A field that holds a weight. `axes` are letters of the glossary: they give the weight's shape
    (`abstract_params`) and its sharding (`sharding.param_shardings`)."""
    return dataclasses.field(metadata={"axes": axes})


@flax.struct.dataclass
class Block:
    """The weights of all layers, stacked on the leading axis L. Norms are float32, gain = 1 + w."""

    pre_attn_norm: jax.Array = _weight("LD")
    w_q: jax.Array = _weight("LDNH")
    w_k: jax.Array = _weight("LDKH")
    w_v: jax.Array = _weight("LDKH")
    q_norm: jax.Array = _weight("LH")
    k_norm: jax.Array = _weight("LH")
    w_o: jax.Array = _weight("LNHD")
    post_attn_norm: jax.Array = _weight("LD")
    pre_mlp_norm: jax.Array = _weight("LD")
    w_gate: jax.Array = _weight("LDM")
    w_up: jax.Array = _weight("LDM")
    w_down: jax.Array = _weight("LMD")
    post_mlp_norm: jax.Array = _weight("LD")


@flax.struct.dataclass
class Params:
    """All weights of a Gemma 3 text model."""

    embed: jax.Array  # [V, D]
    blocks: Block
    final_norm: jax.Array  # [D], float32
    head: jax.Array | None = None  # [V, D]: a fine-tune's own unembedding, if the config isn't tied

    def __repr__(self) -> str:
        return f"Params({_weights(self)})"

    @property
    def unembedding(self) -> jax.Array:
        """[V, D]: one direction for each token's logit."""
        return self.embed if self.head is None else self.head


def _weights(params: Any) -> str:
    """ "268,098,176 weights, bfloat16", or "no arrays" for the placeholder trees that JAX makes."""
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


def each_weight(config: GemmaConfig, make: Callable[[str, str], Any]) -> Params:
    """A `Params` whose leaves are `make(name, axes)`."""
    blocks = {f.name: make(f.name, f.metadata["axes"]) for f in dataclasses.fields(Block)}
    head = None if config.tied else make("head", "VD")
    return Params(make("embed", "VD"), Block(**blocks), make("final_norm", "D"), head)


def axis_sizes(config: GemmaConfig) -> dict[str, int]:
    """The sizes of the weights' axes, by the letters of the glossary."""
    c = config
    sizes = (c.layers, c.d_model, c.heads, c.kv_heads, c.head_dim, c.d_mlp, c.vocab)
    return dict(zip("LDNKHMV", sizes))


def abstract_params(config: GemmaConfig, dtype: DTypeLike = jnp.bfloat16) -> Params:
    """The `jax.ShapeDtypeStruct` of every weight."""
    size = axis_sizes(config)

    def weight(name: str, axes: str) -> jax.ShapeDtypeStruct:
        kind = jnp.float32 if name.endswith("norm") else dtype
        return jax.ShapeDtypeStruct(tuple(size[axis] for axis in axes), jnp.dtype(kind))

    return each_weight(config, weight)


def init_params(config: GemmaConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random weights at the scale of a trained model, for tests and from-scratch experiments."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    fan_in = {"w_o": config.heads * config.head_dim, "w_down": config.d_mlp}

    def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        scale = 0.2 if name.endswith("norm") else fan_in.get(name, config.d_model) ** -0.5
        return scale * jax.random.normal(key, shape)

    keys = jax.random.split(key, len(leaves))
    drawn = [draw(path[-1].name, x.shape, k).astype(x.dtype) for (path, x), k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, drawn)
