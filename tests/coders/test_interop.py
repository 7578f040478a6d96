"""Other libraries' folders: the same function as theirs, in and out, and no silent misreading.

The references are the equations of sae-lens 6.54 and circuit-tracer, written out in numpy.
"""

import json
import os
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.interop.circuit_tracer import (
    is_circuit_tracer_folder,
    load_circuit_tracer,
    save_circuit_tracer,
)
from gemma_scope_jax.coders.interop.saelens import is_saelens_folder, load_saelens, save_saelens
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
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


@pytest.mark.parametrize(
    "architecture, kind",
    [
        ("standard", "sae"),
        ("jumprelu", "sae"),
        ("transcoder", "transcoder"),
        ("skip_transcoder", "skip_transcoder"),
        ("jumprelu_transcoder", "transcoder"),
        ("jumprelu_skip_transcoder", "skip_transcoder"),
    ],
)
def test_saelens_architectures(tmp_path, architecture, kind):
    tensors = saelens_tensors(architecture)
    folder = write_saelens(tmp_path / "sae", tensors, saelens_config(architecture))
    assert is_saelens_folder(folder) and not is_saelens_folder(tmp_path)
    coder, x = load_saelens(folder), normal(5, 2, D)
    agrees(coder, x, *saelens_forward(tensors, x))
    assert (coder.kind, coder.layer, coder.first) == (kind, 7, 1)
    sites = ("resid_post", "resid_post") if kind == "sae" else ("mlp_in", "mlp_out")
    assert (coder.reads, coder.writes) == sites
    assert coder.info.model_name == "google/gemma-3-270m"

    save_saelens(coder, tmp_path / "again")
    again = load_saelens(str(tmp_path / "again"))
    assert jax.tree.structure(again) == jax.tree.structure(coder)
    jax.tree.map(np.testing.assert_array_equal, again, coder)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_saelens_input_transformations_fold_exactly(tmp_path, architecture, scale):
    tensors = saelens_tensors(architecture)
    config = saelens_config(architecture, apply_b_dec_to_input=True)
    if scale != 1:
        config["normalize_activations"] = "expected_average_only_in"
    folder = write_saelens(tmp_path / "sae", tensors, config)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    x = normal(50, D)
    agrees(load_saelens(folder), x, *saelens_forward(tensors, x, subtract=True, scale=scale))


def test_saelens_before_version_6(tmp_path):
    """The flat config: hook_point, b_dec subtracted by default, a bool to normalise."""
    tensors = saelens_tensors("standard") | {"scaling_factor": np.ones(F, np.float32)}
    config = {
        "model_name": "gemma-3-1b-it",
        "hook_point": "blocks.2.hook_resid_pre",
        "d_in": D,
        "d_sae": F,
        "hook_point_head_index": None,
        "normalize_activations": False,
        "activation_fn_str": "relu",
    }
    coder, x = load_saelens(write_saelens(tmp_path / "sae", tensors, config)), normal(9, D)
    agrees(coder, x, *saelens_forward(tensors, x, subtract=True))
    assert (coder.reads, coder.layer, coder.first) == ("resid_pre", 2, 4)
    assert coder.info.model_name == "google/gemma-3-1b-it"


@pytest.mark.parametrize(
    "names, place",
    [
        ({"hook_name": "blocks.3.attn.hook_z"}, ("z", 3)),
        ({"hook_name": "blocks.3.hook_mlp_out"}, ("mlp_out", 3)),
        ({"hook_name": "blocks.3.mlp.hook_in"}, ("mlp_in", 3)),
        ({"hook_name": "blocks.3.hook_resid_mid"}, ("resid_mid", 3)),
        ({"hook_name": "blocks.3.hook_mlp_in",
          "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output"}, ("mlp_in", 3)),
        ({"hook_name": "anything",
          "hf_hook_name": "model.language_model.layers.3.self_attn.o_proj.input"}, ("z", 3)),
        ({"hf_hook_name": "model.layers.11.output"}, ("resid_post", 11)),
    ],
)  # fmt: skip
def test_hook_names(tmp_path, names, place):
    config = saelens_config("jumprelu", metadata=names)
    coder = load_saelens(write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config))
    assert (coder.reads, coder.layer) == place


@pytest.mark.parametrize(
    "names, says",
    [
        ({"hook_name": "blocks.3.hook_mlp_in"}, "before the norm.*set hf_hook_name"),
        ({"hook_name": "blocks.3.ln2.hook_normalized"}, "gain"),
        ({"hook_name": "blocks.3.mlp.hook_out"}, "before the post-norm"),
        ({"hook_name": "blocks.3.hook_resid_pst"}, "did you mean hook_resid_post"),
        ({"hook_name": "resid"}, "resid"),
        ({"hook_name": 5}, "hook_name is a int"),
        ({"hook_name": "model.layers.{1,2}.output"}, "one layer"),
        ({}, "where the coder is"),
    ],
)
def test_hook_names_that_do_not_say_which_tensor(tmp_path, names, says):
    config = saelens_config("jumprelu", metadata=names)
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    with pytest.raises(InputError, match=says) as error:
        load_saelens(folder)
    assert str(folder / "cfg.json") in str(error.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"architecture": "topk"}, "topk is not supported, only standard, jumprelu"),
        ({"architecture": "gated"}, "gated"),
        ({"architecture": "matryoshka_batchtopk"}, "matryoshka_batchtopk"),
        ({"activation_fn_str": "topk"}, "standard with topk|jumprelu with topk"),
        ({"normalize_activations": "layer_norm"}, "layer_norm.*does not fold"),
        ({"normalize_activations": "constant_norm_rescale"}, "does not fold"),
        ({"normalize_activations": "covariance_whitening"}, "does not fold"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "activation_scaler.json is missing",
        ),
        ({"hook_head_index": 3}, "single head"),
        ({"d_in": D + 1}, "d_in 7"),
        ({"d_sae": 1}, "d_sae 1"),
        ({"metadata": 3}, "metadata"),
        ({"architecture": ["jumprelu"]}, "architecture is a list"),
    ],
)
def test_saelens_coders_that_are_another_function(tmp_path, changes, says):
    config = saelens_config("jumprelu") | changes
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    with pytest.raises(InputError, match=says) as error:
        load_saelens(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("threshold"), "no tensor 'threshold'"),
        (lambda t: t.update(r_mag=normal(F)), "tensor 'r_mag' is not one of"),
        (lambda t: t.update(b_enc=normal(F + 1)), "b_enc"),
        (lambda t: t.update(W_dec=normal(F, 7), b_dec=normal(7)), "writes 7 values"),
        (lambda t: t.update(W_enc=np.zeros((D, F), np.int32)), "I32"),
        (lambda t: t.update(b_dec=normal(1, D)), "1 axes"),
        (lambda t: t.update(scaling_factor=np.full(F, 2, np.float32)), "scaling_factor"),
    ],
)
def test_saelens_weights_that_do_not_fit(tmp_path, change, says):
    tensors = saelens_tensors("jumprelu")
    change(tensors)
    with pytest.raises(InputError, match=says):
        load_saelens(write_saelens(tmp_path / "s", tensors, saelens_config("jumprelu")))


@pytest.mark.parametrize("factor", [0, -1, True, None, "2", 10**400, 1e-300])
def test_a_scale_that_is_none(tmp_path, factor):
    config = saelens_config("jumprelu", normalize_activations="expected_average_only_in")
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(InputError, match="scaling_factor"):
        load_saelens(folder)


def test_a_transcoder_cannot_subtract_b_dec_or_skip_layers(tmp_path):
    tensors = saelens_tensors("transcoder")
    config = saelens_config("transcoder", apply_b_dec_to_input=True)
    with pytest.raises(InputError, match="apply_b_dec_to_input"):
        load_saelens(write_saelens(tmp_path / "s", tensors, config))
    config = saelens_config("transcoder")
    config["metadata"]["hf_hook_name_out"] = MLP_OUT.replace("7", "8")
    with pytest.raises(InputError, match="reads layer 7 and writes layer 8"):
        load_saelens(write_saelens(tmp_path / "s", tensors, config))


def transcoder(layer=7, skip=True, dtype=jnp.float32, **more):
    cast = lambda a: jnp.asarray(a, dtype)
    return SparseCoder(
        cast(normal(D, F)), cast(normal(F)), cast(np.abs(normal(F))), cast(normal(F, D)),
        cast(normal(D)), cast(normal(D, D)) if skip else None, layer=layer, reads="mlp_in",
        writes="mlp_out", info=CoderInfo("google/gemma-3-270m", "transcoder"), **more,
    )  # fmt: skip


def test_saved_for_saelens_is_what_its_gemma_scope_2_loader_makes(tmp_path):
    coder = transcoder()
    save_saelens(coder, tmp_path / "new" / "s")
    config = json.loads((tmp_path / "new" / "s" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "new" / "s" / "sae_weights.safetensors")
    assert config["architecture"] == "jumprelu_skip_transcoder"
    assert (config["d_in"], config["d_sae"], config["d_out"]) == (D, F, D)
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    metadata = config["metadata"]
    assert metadata["hook_name"] == "blocks.7.hook_mlp_in"
    assert metadata["hook_name_out"] == "blocks.7.hook_mlp_out"
    assert (metadata["hf_hook_name"], metadata["hf_hook_name_out"]) == (MLP_IN, MLP_OUT)
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    x = normal(4, D)
    agrees(coder, x, *saelens_forward(tensors, x))


def test_a_gemma_scope_2_sae_for_saelens(tmp_path):
    coder = transcoder(skip=False, dtype=jnp.bfloat16).replace(reads="z", writes="z")
    save_saelens(coder, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu" and "d_out" not in config
    assert config["metadata"]["hook_name"] == "blocks.7.attn.hook_z"
    again = load_saelens(tmp_path)
    assert again.w_enc.dtype == jnp.float32
    np.testing.assert_array_equal(again.w_enc, coder.w_enc.astype(jnp.float32))


def test_metadata_survives_a_round_trip(tmp_path):
    config = saelens_config("jumprelu")
    config["metadata"] |= {"neuronpedia_id": "m/3-set", "context_size": 512}
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    save_saelens(load_saelens(folder), tmp_path / "t")
    metadata = json.loads((tmp_path / "t" / "cfg.json").read_text())["metadata"]
    assert (metadata["neuronpedia_id"], metadata["context_size"]) == ("m/3-set", 512)


# circuit-tracer


def circuit_tracer_config(kind="transcoder_set", **changes):
    return {
        "model_kind": kind, "model_name": "google/gemma-3-270m-pt",
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out",
        "scan": "someone/some-set", **changes,
    }  # fmt: skip


def write_set(folder, skip=True, threshold=True, **changes):
    folder.mkdir(exist_ok=True)
    layers = []
    for i in range(X):
        t = {"W_enc": normal(F, D), "b_enc": normal(F), "W_dec": normal(F, D), "b_dec": normal(D)}
        if skip:
            t["W_skip"] = normal(D, D)
        if threshold:
            t["activation_function.threshold"] = np.abs(normal(F))
        save_file(t, folder / f"layer_{i}.safetensors")
        layers.append(t)
    (folder / "config.yaml").write_text(yaml.safe_dump(circuit_tracer_config(**changes)))
    return layers


def write_clt(folder, skip=True, threshold=True, **changes):
    folder.mkdir(exist_ok=True)
    layers = []
    for i in range(X):
        t = {"W_enc": normal(F, D), "b_enc": normal(F), "b_dec": normal(D)}
        if skip:
            t["W_skip"] = normal(D, D)
        if threshold:
            t["threshold"] = np.abs(normal(F))
        save_file({f"{k}_{i}": v for k, v in t.items()}, folder / f"W_enc_{i}.safetensors")
        t["W_dec"] = normal(F, X - i, D)
        save_file({f"W_dec_{i}": t["W_dec"]}, folder / f"W_dec_{i}.safetensors")
        layers.append(t)
    config = circuit_tracer_config("cross_layer_transcoder", **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return layers


def jump_relu(z, threshold):
    return np.maximum(z, 0) if threshold is None else z * (z > threshold)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [True, False])
def test_circuit_tracer_set(tmp_path, skip, threshold):
    layers = write_set(tmp_path / "s", skip, threshold)
    assert is_circuit_tracer_folder(tmp_path / "s") and not is_circuit_tracer_folder(tmp_path)
    coders = load_circuit_tracer(tmp_path / "s")
    assert coders.layers == (0, 1, 2) and coders.names == ("layer_0", "layer_1", "layer_2")
    for i, t in enumerate(layers):
        x = normal(5, D)
        f = jump_relu(x @ t["W_enc"].T + t["b_enc"], t.get("activation_function.threshold"))
        y = f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)
        agrees(coders[i], x, f, y)
        assert (coders[i].reads, coders[i].writes, coders[i].layer) == ("mlp_in", "mlp_out", i)
        assert coders[i].info.model_name == "google/gemma-3-270m"

    save_circuit_tracer(coders, tmp_path / "t")
    for i, t in enumerate(layers):
        written = load_file(tmp_path / "t" / f"layer_{i}.safetensors")
        t.setdefault("activation_function.threshold", np.zeros(F, np.float32))
        assert set(written) == set(t)
        for name in t:
            np.testing.assert_array_equal(written[name], t[name])
    config = yaml.safe_load((tmp_path / "t" / "config.yaml").read_text())
    assert config == circuit_tracer_config(model_name="google/gemma-3-270m")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [True, False])
def test_circuit_tracer_clt(tmp_path, skip, threshold):
    layers = write_clt(tmp_path / "s", skip, threshold)
    (clt,) = load_circuit_tracer(tmp_path / "s")
    assert isinstance(clt, MultiLayerCoder) and clt.kind == "clt" and clt.layers == (0, 1, 2)
    x = normal(X, 5, D)
    f = [jump_relu(x[i] @ t["W_enc"].T + t["b_enc"], t.get("threshold")) for i, t in
         enumerate(layers)]  # fmt: skip
    y = [
        sum(f[i] @ layers[i]["W_dec"][:, j - i] for i in range(j + 1)) + layers[j]["b_dec"]
        + (x[j] @ layers[j]["W_skip"] if skip else 0)
        for j in range(X)
    ]  # fmt: skip
    agrees(clt, x, np.stack(f), np.stack(y))
    assert clt.info.width == X * F

    save_circuit_tracer(clt, tmp_path / "t")
    for i, t in enumerate(layers):
        written = load_file(tmp_path / "t" / f"W_enc_{i}.safetensors")
        written |= load_file(tmp_path / "t" / f"W_dec_{i}.safetensors")
        t.setdefault("threshold", np.zeros(F, np.float32))
        assert set(written) == {f"{name}_{i}" for name in t}
        for name in t:
            np.testing.assert_array_equal(written[f"{name}_{i}"], t[name])


def test_bfloat16_stays_bfloat16(tmp_path):
    coders = [transcoder(i, dtype=jnp.bfloat16) for i in range(2)]
    save_circuit_tracer(coders, tmp_path)
    again = load_circuit_tracer(tmp_path)
    for coder in coders:
        jax.tree.map(np.testing.assert_array_equal, again[coder.layer], coder)
        assert again[coder.layer].w_dec.dtype == jnp.bfloat16


def test_a_set_that_lists_its_files(tmp_path):
    write_set(tmp_path / "s", transcoders=["layer_2.safetensors", "layer_0.safetensors"])
    coders = load_circuit_tracer(tmp_path / "s")
    w_enc = load_file(tmp_path / "s" / "layer_2.safetensors")["W_enc"]
    np.testing.assert_array_equal(coders[0].w_enc, w_enc.T)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_kind": "sae"}, "transcoder_set or cross_layer_transcoder"),
        ({"activation": "topk", "k": 16}, "'topk' is not supported"),
        ({"feature_input_hook": "hook_mlp_in"}, "before the norm"),
        ({"feature_input_hook": "ln2.hook_normalized"}, "gain"),
        ({"feature_output_hook": "mlp.hook_out"}, "post-norm"),
        ({"feature_output_hook": "hook_mlp_ot"}, "did you mean hook_mlp_out"),
        ({"transcoders": "layer_0.safetensors"}, "not a list"),
        ({"transcoders": []}, "no layer_"),
        ({"transcoders": ["gone.safetensors"]}, "no such file"),
        (
            {"transcoders": ["hf://google/gemma-scope-2-4b-it/transcoder_all/layer_0_width_16k_"
                             "l0_small_affine/params.safetensors"]},
            "google/gemma-scope-2-4b-it/transcoder_all/layer_0_width_16k_l0_small_affine$",
        ),
    ],
)  # fmt: skip
def test_circuit_tracer_configs_that_cannot_be_used(tmp_path, changes, says):
    write_set(tmp_path / "s", **{"kind": changes.pop("model_kind", "transcoder_set"), **changes})
    with pytest.raises(InputError, match=says) as error:
        load_circuit_tracer(tmp_path / "s")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: b: c", "!!int ''", "!!timestamp ''", "\t"])
def test_config_yaml_that_is_none(tmp_path, text):
    write_set(tmp_path / "s")
    (tmp_path / "s" / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="config.yaml"):
        load_circuit_tracer(tmp_path / "s")


def test_circuit_tracer_files_that_do_not_fit(tmp_path):
    write_clt(tmp_path / "a")
    (tmp_path / "a" / "W_dec_1.safetensors").unlink()
    with pytest.raises(InputError, match="W_dec_1.safetensors: no such file"):
        load_circuit_tracer(tmp_path / "a")
    layers = write_clt(tmp_path / "b")
    save_file({"W_dec_1": layers[0]["W_dec"]}, tmp_path / "b" / "W_dec_1.safetensors")
    with pytest.raises(InputError, match=r"W_dec_1 has shape \[20, 3, 6\], expected \[20, 2, 6\]"):
        load_circuit_tracer(tmp_path / "b")
    t = {f"{k}_2": layers[2][k] for k in ("W_enc", "b_enc", "b_dec", "threshold")}
    write_clt(tmp_path / "c")
    save_file(t, tmp_path / "c" / "W_enc_2.safetensors")
    with pytest.raises(InputError, match="2 of 3 layers have W_skip"):
        load_circuit_tracer(tmp_path / "c")
    layers = write_set(tmp_path / "d")
    layers[0]["activation_function.threshold"][3] = -1
    save_file(layers[0], tmp_path / "d" / "layer_0.safetensors")
    with pytest.raises(InputError, match="negative threshold"):
        load_circuit_tracer(tmp_path / "d")


def test_what_circuit_tracer_cannot_hold(tmp_path):
    layer_0 = transcoder(0)
    crosscoder = MultiLayerCoder(
        *(jnp.asarray(a) for a in (normal(X, D, F), normal(X, F), normal(X, F), normal(6, F, D),
                                   normal(X, D))), layers=(0, 1, 2))  # fmt: skip
    for coders, says in (
        ([layer_0, transcoder(2)], "every layer from 0 on, got 0, 2"),
        ([layer_0, transcoder(1, skip=False)], "kind is transcoder in layer 1"),
        ([], "at least one"),
        ([1], "expected coders"),
        ([layer_0, crosscoder], "one SparseCoder a layer"),
        ([layer_0.replace(reads="q")], "no hook for site 'q'"),
        (crosscoder, "not a crosscoder"),
        (crosscoder.replace(reads="mlp_in", writes="mlp_out", w_dec=None), "left on disk"),
    ):
        with pytest.raises(InputError, match=says):
            save_circuit_tracer(coders, tmp_path / "t")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="one layer"):
        save_saelens(crosscoder, tmp_path / "t")
    with pytest.raises(InputError, match="'q'"):
        save_saelens(layer_0.replace(reads="q", writes="q", w_skip=None), tmp_path / "t")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    save_saelens(transcoder(), tmp_path / "s")
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    replace = os.replace

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for save, coder in ((save_saelens, transcoder()), (save_circuit_tracer, [transcoder(0)])):
        for name in ("s", "new"):
            with pytest.raises(InputError, match="no space"):
                save(coder, tmp_path / name)
    monkeypatch.undo()
    assert os.replace is replace
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]

    save_circuit_tracer([transcoder(0), transcoder(1)], tmp_path / "t")
    with pytest.raises(InputError, match="layer_1.safetensors of another coder"):
        save_circuit_tracer([transcoder(0)], tmp_path / "t")


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


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "activation_scaler.json"])
def test_damaged_saelens_folders(tmp_path, file):
    config = saelens_config("jumprelu", normalize_activations="expected_average_only_in")
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    (folder / "activation_scaler.json").write_text(
        '{"scaling_factor": 0.5, "has_whitening": false}'
    )
    survives(load_saelens, folder, file, seed=len(file))


@pytest.mark.parametrize(
    "write, file",
    [
        (write_set, "config.yaml"),
        (write_set, "layer_1.safetensors"),
        (write_clt, "config.yaml"),
        (write_clt, "W_enc_0.safetensors"),
        (write_clt, "W_dec_2.safetensors"),
    ],
)
def test_damaged_circuit_tracer_folders(tmp_path, write, file):
    write(tmp_path / "s")
    survives(load_circuit_tracer, tmp_path / "s", file, seed=len(file))


@pytest.mark.parametrize("load", [load_saelens, load_circuit_tracer])
def test_folders_that_are_none(tmp_path, load):
    for path in (tmp_path, tmp_path / "gone", str(tmp_path / "nul\0byte")):
        with pytest.raises(InputError):
            load(path)
        assert not is_saelens_folder(path) and not is_circuit_tracer_folder(path)
