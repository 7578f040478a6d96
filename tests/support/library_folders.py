"""Random coders in the folders of SAELens, and the equations they are compared by."""

import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError

D, F, X = 6, 20, 3


RNG = np.random.default_rng(0)


HF = "model.layers.7."


MLP_IN, MLP_OUT = HF + "pre_feedforward_layernorm.output", HF + "post_feedforward_layernorm.output"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def saelens_tensors(architecture):
    tensors = {"W_enc": normal(D, F), "b_enc": normal(F), "W_dec": normal(F, D), "b_dec": normal(D)}
    if "jumprelu" in architecture:
        tensors["threshold"] = np.abs(normal(F))
    if "skip" in architecture:
        tensors["W_skip"] = normal(D, D)
    return tensors


def saelens_config(architecture, **changes):
    metadata = {"model_name": "google/gemma-3-270m", "hook_name": "blocks.7.hook_resid_post"}
    metadata["sae_lens_version"] = "6.54.12"
    if "transcoder" in architecture:
        metadata |= {"hook_name": "blocks.7.hook_mlp_in", "hook_name_out": "blocks.7.hook_mlp_out"}
        metadata |= {"hf_hook_name": MLP_IN, "hf_hook_name_out": MLP_OUT}
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if "transcoder" in architecture:
        config["d_out"] = D
    return {**config, **changes}


def write_saelens(folder, tensors, config):
    folder.mkdir(exist_ok=True)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "sae_weights.safetensors"
    )
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def saelens_forward(t, x, subtract=False, scale=1.0):
    """SAE.forward of sae-lens on scaled inputs, and the output scaled back."""
    x = x * scale
    z = (x - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]
    f = np.maximum(z, 0) * (z > t.get("threshold", 0))
    y = f @ t["W_dec"] + t["b_dec"]
    if "W_skip" in t:
        y = y + x @ t["W_skip"].T
    return f, y / scale


def agrees(coder, x, features, reconstruction):
    np.testing.assert_allclose(coder.encode(x), features, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(coder.encode(x)) > 0, features > 0)
    np.testing.assert_allclose(coder.reconstruct(x), reconstruction, atol=5e-5)


def transcoder(layer=7, skip=True, dtype=jnp.float32, **more):
    cast = lambda a: jnp.asarray(a, dtype)
    return SparseCoder(
        cast(normal(D, F)),
        cast(normal(F)),
        cast(np.abs(normal(F))),
        cast(normal(F, D)),
        cast(normal(D)),
        cast(normal(D, D)) if skip else None,
        layer=layer,
        reads="mlp_in",
        writes="mlp_out",
        info=CoderInfo("google/gemma-3-270m", "transcoder"),
        **more,
    )


def survives(load, folder, file, seed, flips=60):
    """Load with single bytes of `file` flipped, and cut short: a coder or a one-line InputError."""
    path, chance = Path(folder) / file, random.Random(seed)
    good = path.read_bytes()
    refused = 0
    for flip in range(flips):
        bad = bytearray(good)
        # Mostly in the first bytes: a safetensors header is there.
        at = chance.randrange(min(len(bad), 600) if flip % 4 else len(bad))
        bad[at] ^= chance.randrange(1, 256)
        path.write_bytes(bytes(bad) if flip % 10 else good[:at])
        try:
            load(folder)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    path.write_bytes(good)
    load(folder)
    assert refused > flips // 10
