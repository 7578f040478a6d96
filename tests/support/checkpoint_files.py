"""Small checkpoints of every format, written the way others write them, for the loaders' tests."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.model.config import PRESETS, Model, abstract_params
from tiny import tiny

CONFIG = tiny(PRESETS["gemma-3-4b"], layers=2)  # 2 kv heads of 4, RoPE divisor 8


def random_model(config=CONFIG, dtype=np.float32, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config, dtype)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32).astype(x.dtype))
    return Model(jax.tree.map(draw, shapes), config)


def assert_same(loaded: Model, expected: Model) -> None:
    """Bit for bit, whatever the configurations' names."""
    assert dataclasses.replace(loaded.config, name="") == dataclasses.replace(
        expected.config, name=""
    )
    pairs = zip(jax.tree.leaves(expected.params), jax.tree.leaves(loaded.params))
    for i, (a, b) in enumerate(pairs):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), i


def edit_tensors(folder: Path, change) -> None:
    """Rewrite model.safetensors with `change(tensors) -> tensors`."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_into_shards(folder: Path, count: int = 3) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


GGUF_NAMES = {
    "pre_attn_norm": "attn_norm",
    "w_q": "attn_q",
    "w_k": "attn_k",
    "w_v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "w_o": "attn_output",
    "post_attn_norm": "post_attention_norm",
    "pre_mlp_norm": "ffn_norm",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}


def write_gguf(
    path: Path, model: Model, spare_rows: int = 0, tensors=(), plain=(), tokens=None, **metadata
) -> Path:
    """As llama.cpp's converter does: matrices (out, in), 1 added to the norms.

    `tensors` {name: array}, `plain` {key: text}, `tokens` (texts, types) and, under gemma3.,
    `metadata` (with __ for each dot) are written as well, or instead.
    """
    c, params = model.config, model.params
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(c.layers)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_mlp)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    if "attention__sliding_window" not in metadata:
        writer.add_sliding_window(c.window)
    if "context_length" not in metadata:
        writer.add_context_length(c.context)
    writer.add_rope_freq_base(c.global_rope_base)
    scaled = {f"rope__{key}" for key in ("scaling__type", "scaling__factor", "scale_linear")}
    if not scaled & metadata.keys():
        writer.add_rope_scaling_factor(c.global_rope_divisor)
    embed = np.pad(np.asarray(params.embed), ((0, spare_rows), (0, 0)))
    writer.add_tensor("token_embd.weight", embed)
    if params.head is not None:
        writer.add_tensor("output.weight", np.asarray(params.head))
    for name, x in dict(tensors).items():
        writer.add_tensor(name, x)
    for key, value in dict(plain).items():
        writer.add_string(key, value)
    if tokens is not None:
        writer.add_token_list(tokens[0])
        writer.add_token_types(tokens[1])
    for key, value in metadata.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add.get(type(value), writer.add_float32)(f"gemma3.{key.replace('__', '.')}", value)
    writer.add_tensor("output_norm.weight", np.asarray(params.final_norm) + np.float32(1))
    for leaf, stem in GGUF_NAMES.items():
        for layer, x in enumerate(np.asarray(getattr(params.blocks, leaf))):
            if x.ndim == 1:
                x = x + np.float32(1)
            else:
                x = x.reshape(-1, c.d_model) if leaf == "w_o" else x.reshape(len(x), -1)
                x = np.ascontiguousarray(x.T)
            writer.add_tensor(f"blk.{layer}.{stem}.weight", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def official_tree(model: Model) -> dict:
    """The nested parameters of gemma's Transformer; its mlp holds arrays, without a "w"."""
    p, b = model.params, jax.tree.map(np.asarray, model.params.blocks)
    tree = {
        "embedder": {"input_embedding": np.asarray(p.embed)},
        "final_norm": {"scale": np.asarray(p.final_norm)},
    }
    heads_first = lambda x: x.transpose(1, 0, 2)
    for i in range(model.config.layers):
        tree[f"layer_{i}"] = {
            "pre_attention_norm": {"scale": b.pre_attn_norm[i]},
            "post_attention_norm": {"scale": b.post_attn_norm[i]},
            "pre_ffw_norm": {"scale": b.pre_mlp_norm[i]},
            "post_ffw_norm": {"scale": b.post_mlp_norm[i]},
            "attn": {
                "q_einsum": {"w": heads_first(b.w_q[i])},
                "kv_einsum": {"w": np.stack([heads_first(b.w_k[i]), heads_first(b.w_v[i])])},
                "attn_vec_einsum": {"w": b.w_o[i]},
                "_query_norm": {"scale": b.q_norm[i]},
                "_key_norm": {"scale": b.k_norm[i]},
            },
            "mlp": {"gating_einsum": np.stack([b.w_gate[i].T, b.w_up[i].T]), "linear": b.w_down[i]},
        }
    return tree


def flat_tree(tree: dict, prefix: str = "transformer") -> dict:
    """The published layout: {"transformer/layer_0/attn/q_einsum": {"w": array}, ...}."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}"
        if not isinstance(value, dict):
            flat[name] = {"w": value}
        elif all(isinstance(x, np.ndarray) for x in value.values()) and key != "mlp":
            flat[name] = value
        else:
            flat |= flat_tree(value, name)
    return flat


def save_orbax(path: Path, tree: dict, **storage) -> Path:
    """`storage`: use_ocdbt, use_zarr3."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**storage)) as checkpointer:
        checkpointer.save(path, tree)
    return path
