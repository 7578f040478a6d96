"""Weights that both sides of the parity tests can make, from numpy's generator, in both layouts.

`random_params` draws them in our layout; `huggingface_state` renames and transposes them for
transformers, written out here once more, independently of the package's own checkpoint code.
"""

import jax
import numpy as np

from gemma_scope_jax.model.config import Block, GemmaConfig, Params, abstract_params

SITES = ("resid_post", "z", "mlp_in", "mlp_out")
KEPT = 8  # of the shrunken models, the last tokens that are stored


def random_params(config: GemmaConfig, seed: int) -> Params:
    """Float32 numpy weights: one `standard_normal` draw a leaf, in the pytree's order, scaled.

    Matrices are scaled by fan_in ** -0.5, norm weights by 0.3 (so gains of about 0.4 to 1.6).
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].name
        fan_in = np.prod(leaf.shape[1:3] if name == "w_o" else leaf.shape[1:2])
        scale = 0.3 if "norm" in name else fan_in**-0.5
        return np.float32(scale) * rng.standard_normal(leaf.shape, dtype=np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config, np.float32))


def random_ids(config: GemmaConfig, seed: int, length: int) -> np.ndarray:
    """int32 [1, length]: <bos>, then random tokens that are not special."""
    ids = np.random.default_rng(seed).integers(3, config.vocab, (1, length), dtype=np.int32)
    ids[:, 0] = 2
    return ids


def checksum(params: Params) -> float:
    """One number that tells whether both sides drew the same weights."""
    return float(sum(np.abs(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(params)))


def huggingface_state(config: GemmaConfig, params: Params) -> dict[str, np.ndarray]:
    """The state dict of `Gemma3ForCausalLM`: Linear weights are [out, in], layers are numbered."""
    state = {
        "model.embed_tokens.weight": params.embed,
        "lm_head.weight": params.embed,
        "model.norm.weight": params.final_norm,
    }
    for layer in range(config.layers):
        b: Block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params.blocks)
        flat_in = lambda w: w.reshape(config.d_model, -1).T
        tensors = {
            "input_layernorm": b.pre_attn_norm,
            "self_attn.q_proj": flat_in(b.w_q),
            "self_attn.k_proj": flat_in(b.w_k),
            "self_attn.v_proj": flat_in(b.w_v),
            "self_attn.q_norm": b.q_norm,
            "self_attn.k_norm": b.k_norm,
            "self_attn.o_proj": b.w_o.reshape(-1, config.d_model).T,
            "post_attention_layernorm": b.post_attn_norm,
            "pre_feedforward_layernorm": b.pre_mlp_norm,
            "mlp.gate_proj": b.w_gate.T,
            "mlp.up_proj": b.w_up.T,
            "mlp.down_proj": b.w_down.T,
            "post_feedforward_layernorm": b.post_mlp_norm,
        }
        state |= {f"model.layers.{layer}.{name}.weight": w for name, w in tensors.items()}
    return {name: np.ascontiguousarray(w) for name, w in state.items()}


def stored(array: np.ndarray, bits: int = 18) -> np.ndarray:
    """Rounded to steps of 2^-bits to 2^-(bits - 1) of the largest value of each entry of the first
    axis, a layer or a row, far below the tolerances: it is compressed better."""
    largest = np.abs(array).max(axis=tuple(range(1, array.ndim)), keepdims=True)
    step = 2.0 ** (np.ceil(np.log2(np.maximum(largest, 1e-30))) - bits)
    return (np.round(array / step) * step).astype(array.dtype)
