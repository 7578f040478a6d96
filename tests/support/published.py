"""Published folders of every kind, F features a layer, written with the safetensors library."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

REPO = "gemma-scope-2-270m-pt"
HOOKS = {  # category -> hook points of layer L and d_in of the 270m
    "resid_post": ("model.layers.L.output",) * 2 + (640,),
    "attn_out": ("model.layers.L.self_attn.o_proj.input",) * 2 + (1024,),
    "mlp_out": ("model.layers.L.post_feedforward_layernorm.output",) * 2 + (640,),
    "transcoder": (
        "model.layers.L.pre_feedforward_layernorm.output",
        "model.layers.L.post_feedforward_layernorm.output",
        640,
    ),
    "crosscoder": ("model.layers.L.output",) * 2 + (640,),
    "clt": (
        "model.layers.L.pre_feedforward_layernorm.output",
        "model.layers.L.post_feedforward_layernorm.output",
        640,
    ),
}
SITES = {
    "resid_post": "resid_post",
    "attn_out": "z",
    "mlp_out": "mlp_out",
    "transcoder": "mlp_in",
    "crosscoder": "resid_post",
    "clt": "mlp_in",
}
SINGLE = [
    *(f"{c}{every}/layer_12_width_16k_l0_small" for c in list(HOOKS)[:4] for every in ("", "_all")),
    "transcoder/layer_12_width_16k_l0_big_affine",
    "transcoder_all/layer_3_width_262k_l0_big_affine",
    "resid_post/layer_12_width_262k_l0_medium_seed_1",
]
MULTI = [
    "crosscoder/layer_5_9_12_15_width_65k_l0_big",
    "clt/width_262k_l0_medium",
    "clt/width_262k_l0_big_affine",
]


def tensors(seed, d, F, outputs=None, affine=False, dtype=np.float32, first_output=0):
    """The tensors of one parameter file; zeros before `first_output`."""
    draw = np.random.default_rng(seed).normal
    w_dec = draw(size=(F, d) if outputs is None else (F, outputs, d))
    if outputs is not None:
        w_dec[:, :first_output] = 0
    found = {"w_enc": draw(size=(d, F)), "b_enc": draw(size=F), "threshold": abs(draw(size=F))}
    found |= {"w_dec": w_dec, "b_dec": draw(size=d)}
    if affine:
        found["affine_skip_connection"] = draw(size=(d, d))
    return {name: array.astype(dtype) for name, array in found.items()}


def publish(root, where, F=8, dtype=np.float32, **extra):
    """Write a folder as published, but with F features a layer, and return its path."""
    folder = Path(root) / REPO / where
    folder.mkdir(parents=True)
    category = where.split("/")[0].removesuffix("_all")
    reads, writes, d = HOOKS[category]
    layers = {"crosscoder": "{5,9,12,15}", "clt": "{all}"}.get(category)
    layers = layers or where.split("layer_")[1].split("_")[0]
    X = {"crosscoder": 4, "clt": 18}.get(category)
    affine = where.endswith("_affine")
    for i in range(X or 1):
        name = "params.safetensors" if X is None else f"params_layer_{i}.safetensors"
        save_file(tensors(i, d, F, X, affine, dtype, i), folder / name)
    config = {
        "hf_hook_point_in": reads.replace("L", layers),
        "hf_hook_point_out": writes.replace("L", layers),
        "width": F * (X or 1),
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 55,
        "affine_connection": affine,
        "type": category if category in ("transcoder", "crosscoder", "clt") else "sae",
    }
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    return folder


def same_leaves(one, other):
    leaves, structure = jax.tree.flatten(one)
    others, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for a, b in zip(leaves, others):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def sparse_file(path, d, F, rows):
    """A parameter file of zeros that occupies no disk, but for the given decoder rows."""
    shapes = {"b_dec": (d,), "b_enc": (F,), "threshold": (F,), "w_dec": (F, d), "w_enc": (d, F)}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for row, values in rows.items():
            file.seek(8 + len(text) + header["w_dec"]["data_offsets"][0] + 4 * d * row)
            file.write(values.astype(np.float32).tobytes())
