"""What checkpoint formats share: names and shapes of stored weights, and numbers from metadata."""

import math
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import GemmaConfig, abstract_params

# leaf -> its name in Hugging Face's files, in GGUF files and in official checkpoints
NAMES = {
    "embed": ("embed_tokens", "token_embd", "embedder/input_embedding"),
    "final_norm": ("norm", "output_norm", "final_norm/scale"),
    "head": ("lm_head", "output", ""),
    "pre_attn_norm": ("input_layernorm", "attn_norm", "pre_attention_norm/scale"),
    "w_q": ("self_attn.q_proj", "attn_q", "attn/q_einsum/w"),
    "w_k": ("self_attn.k_proj", "attn_k", "attn/kv_einsum/w"),
    "w_v": ("self_attn.v_proj", "attn_v", "attn/kv_einsum/w"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm", "attn/_query_norm/scale"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm", "attn/_key_norm/scale"),
    "w_o": ("self_attn.o_proj", "attn_output", "attn/attn_vec_einsum/w"),
    "post_attn_norm": (
        "post_attention_layernorm",
        "post_attention_norm",
        "post_attention_norm/scale",
    ),
    "pre_mlp_norm": ("pre_feedforward_layernorm", "ffn_norm", "pre_ffw_norm/scale"),
    "w_gate": ("mlp.gate_proj", "ffn_gate", "mlp/gating_einsum/w"),
    "w_up": ("mlp.up_proj", "ffn_up", "mlp/gating_einsum/w"),
    "w_down": ("mlp.down_proj", "ffn_down", "mlp/linear/w"),
    "post_mlp_norm": ("post_feedforward_layernorm", "post_ffw_norm", "post_ffw_norm/scale"),
}
TOP = ("embed", "final_norm", "head")  # the leaves outside the layers
LAYER = tuple(leaf for leaf in NAMES if leaf not in TOP)


def our_shape(config: GemmaConfig, leaf: str) -> tuple[int, ...]:
    """The shape of a weight in our layout, without the layer axis."""
    shapes = abstract_params(config)
    if leaf in TOP:
        return getattr(shapes, leaf).shape
    return getattr(shapes.blocks, leaf).shape[1:]


def stored_shape(config: GemmaConfig, leaf: str) -> tuple[int, ...]:
    """The shape of a weight where matrices are stored as [out, in]."""
    shape = our_shape(config, leaf)
    if leaf in TOP or len(shape) == 1:
        return shape
    inputs = shape[:-1] if leaf == "w_o" else shape[:1]
    return math.prod(shape[len(inputs) :]), math.prod(inputs)


def ours(config: GemmaConfig, leaf: str, stored: np.ndarray) -> np.ndarray:
    """A weight within a layer, stored as in `stored_shape`, in our layout: a view if possible."""
    return stored.T.reshape(our_shape(config, leaf))


def positive(value: Any, kind: type, what: str, most: int = 2**31 - 1) -> Any:
    """`value` as a positive int (up to `most`) or float; `InputError` begins with `what`."""
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    least, most = (1, most) if kind is int else (1e-20, 10**20)
    if not number or not least <= value <= most:
        limit = f" up to {most:.0f}" if number and value > 0 and kind is int else ""
        wanted = "whole number" if kind is int else "number"
        raise InputError(f"{what} is {value!r:.60}, not a positive {wanted}{limit}")
    return kind(value)
