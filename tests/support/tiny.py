"""The real architecture shrunk: every preset keeps its quirks at a size that runs in no time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.model.config import GemmaConfig, Model, abstract_params


def tiny(config: GemmaConfig, layers: int = 8) -> GemmaConfig:
    """Same ratio of heads and RoPE divisor, a window of 8, 8 layers (not a multiple of 6)."""
    heads = min(config.heads, 4)
    kv_heads = max(1, heads * config.kv_heads // config.heads)
    return dataclasses.replace(
        config,
        name=f"tiny-{config.name}",
        layers=layers,
        d_model=32,
        d_mlp=48,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=16,
        window=8,
        vocab=300,
        context=64,
        # 27B's scale is not head_dim ** -0.5, and neither is its shrunken one.
        query_scale=(24**-0.5 if config.head_dim == 128 else 16**-0.5),
    )


def tiny_model(config: GemmaConfig, seed: int = 0, dtype=jnp.float32, layers: int = 8) -> Model:
    """Random weights at the scale of trained ones; drawn by numpy, which compiles nothing."""
    shrunk, rng = tiny(config, layers), np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].name
        fan_in = np.prod(leaf.shape[1:-1]) if name in ("w_o", "w_down") else shrunk.d_model
        scale = 0.2 if "norm" in name else fan_in**-0.5
        drawn = (scale * rng.standard_normal(leaf.shape)).astype(np.float32)
        return jnp.asarray(drawn.astype(leaf.dtype))

    shapes = abstract_params(shrunk, dtype)
    return Model(jax.tree_util.tree_map_with_path(draw, shapes), shrunk)
