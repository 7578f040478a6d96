"""SAELens folders: the same function as its own, in and out, and no silent misreading."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_scope_jax.coders.interop.saelens import is_saelens_folder, save_saelens
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.errors import InputError
from library_folders import (
    MLP_IN,
    MLP_OUT,
    D,
    F,
    agrees,
    normal,
    saelens_config,
    saelens_forward,
    saelens_tensors,
    survives,
    transcoder,
    write_saelens,
)


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
    coder, x = load_coder(folder), normal(5, 2, D)
    agrees(coder, x, *saelens_forward(tensors, x))
    assert (coder.kind, coder.layer, coder.first) == (kind, 7, 1)
    sites = ("resid_post", "resid_post") if kind == "sae" else ("mlp_in", "mlp_out")
    assert (coder.reads, coder.writes) == sites
    assert coder.info.model_name == "google/gemma-3-270m"

    save_saelens(coder, tmp_path / "again")
    again = load_coder(str(tmp_path / "again"))
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
    agrees(load_coder(folder), x, *saelens_forward(tensors, x, subtract=True, scale=scale))


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
    coder, x = load_coder(write_saelens(tmp_path / "sae", tensors, config)), normal(9, D)
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
    coder = load_coder(write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config))
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
        load_coder(folder)
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
        load_coder(folder)
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
        load_coder(write_saelens(tmp_path / "s", tensors, saelens_config("jumprelu")))


@pytest.mark.parametrize("factor", [0, -1, True, None, "2", 10**400, 1e-300])
def test_a_scale_that_is_none(tmp_path, factor):
    config = saelens_config("jumprelu", normalize_activations="expected_average_only_in")
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(InputError, match="activation_scaler.json: .*(scaling_factor|too large)"):
        load_coder(folder)


def test_a_transcoder_cannot_subtract_b_dec_or_skip_layers(tmp_path):
    tensors = saelens_tensors("transcoder")
    config = saelens_config("transcoder", apply_b_dec_to_input=True)
    with pytest.raises(InputError, match="apply_b_dec_to_input"):
        load_coder(write_saelens(tmp_path / "s", tensors, config))
    config = saelens_config("transcoder")
    config["metadata"]["hf_hook_name_out"] = MLP_OUT.replace("7", "8")
    with pytest.raises(InputError, match="reads layer 7 and writes layer 8"):
        load_coder(write_saelens(tmp_path / "s", tensors, config))


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
    again = load_coder(tmp_path)
    assert again.w_enc.dtype == jnp.float32
    np.testing.assert_array_equal(again.w_enc, coder.w_enc.astype(jnp.float32))


def test_metadata_survives_a_round_trip(tmp_path):
    config = saelens_config("jumprelu")
    config["metadata"] |= {"neuronpedia_id": "m/3-set", "context_size": 512}
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    save_saelens(load_coder(folder), tmp_path / "t")
    metadata = json.loads((tmp_path / "t" / "cfg.json").read_text())["metadata"]
    assert (metadata["neuronpedia_id"], metadata["context_size"]) == ("m/3-set", 512)


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "activation_scaler.json"])
def test_damaged_saelens_folders(tmp_path, file):
    config = saelens_config("jumprelu", normalize_activations="expected_average_only_in")
    folder = write_saelens(tmp_path / "s", saelens_tensors("jumprelu"), config)
    (folder / "activation_scaler.json").write_text(
        '{"scaling_factor": 0.5, "has_whitening": false}'
    )
    survives(load_coder, folder, file, seed=len(file))
