"""transformers as the oracle: our configuration and weights in its classes, and hooks at our sites.

Needs torch and transformers, so only the peers' environment (`make peers`) can import it.
"""

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_scope_jax.model.config import GemmaConfig, Params
from golden.weights import huggingface_state


def peer_config(config: GemmaConfig) -> Gemma3TextConfig:
    """`config` as transformers 4.57 spells it."""
    divisor = config.global_rope_divisor
    return Gemma3TextConfig(
        vocab_size=config.vocab,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        sliding_window=config.window,
        query_pre_attn_scalar=config.query_scale**-2,
        rope_theta=config.global_rope_base,
        rope_local_base_freq=config.local_rope_base,
        rope_scaling=None if divisor == 1 else {"rope_type": "linear", "factor": divisor},
        rms_norm_eps=config.norm_epsilon,
        attn_implementation="eager",
    )


def peer_model(config: GemmaConfig, params: Params) -> Gemma3ForCausalLM:
    """transformers' model with these float32 weights, every one of them assigned."""
    model = Gemma3ForCausalLM(peer_config(config)).eval()
    state = {name: torch.from_numpy(w) for name, w in huggingface_state(config, params).items()}
    model.load_state_dict(state, strict=True)
    return model


def peer_forward(
    model: Gemma3ForCausalLM, ids: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [B, T, V] and, by site, activations [L, B, T, ...] of transformers' forward pass."""
    seen: dict[str, list] = {"resid_post": [], "z": [], "mlp_in": [], "mlp_out": []}

    def keep_output(site):
        return lambda module, args, output: seen[site].append(
            output[0] if isinstance(output, tuple) else output
        )

    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_hook(keep_output("resid_post")),
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda module, args: seen["z"].append(args[0])
            ),
            layer.pre_feedforward_layernorm.register_forward_hook(keep_output("mlp_in")),
            layer.post_feedforward_layernorm.register_forward_hook(keep_output("mlp_out")),
        ]
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, {site: torch.stack(values).numpy() for site, values in seen.items()}


def peer_generate(model: Gemma3ForCausalLM, ids: np.ndarray, tokens: int) -> np.ndarray:
    """int32 [B, tokens]: what greedy decoding adds; it never stops early."""
    with torch.inference_mode():
        out = model.generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[:, ids.shape[1] :].numpy().astype(np.int32)
