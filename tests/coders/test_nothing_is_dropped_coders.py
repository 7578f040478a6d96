"""Formats of coders by things that a reader could drop: each is consulted, harmless or refused."""

import json
import struct

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from gemma_scope_jax.coders.interop.circuit_tracer import HARMLESS as YAML_HARMLESS
from gemma_scope_jax.coders.interop.hooks import read_tensors
from gemma_scope_jax.coders.interop.saelens_keys import HARMLESS as SAELENS_HARMLESS
from gemma_scope_jax.coders.load import load_coder, load_coders
from gemma_scope_jax.coders.release.config import HARMLESS, untrained_positions
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from published import publish

D, F = 6, 8
RNG = np.random.default_rng(0)
METADATA = {"model_name": "acme/tiny", "hook_name": "blocks.2.hook_resid_post"}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def published_sae(tmp):
    return publish(tmp, "resid_post/layer_12_width_16k_l0_small", F=F)


def published_crosscoder(tmp):
    return publish(tmp, "crosscoder/layer_5_9_12_15_width_65k_l0_big", F=F)


def saelens(tmp, architecture="jumprelu", **changes):
    folder = tmp / "sae"
    folder.mkdir()
    tensors = {"W_enc": normal(D, F), "b_enc": normal(F), "W_dec": normal(F, D), "b_dec": normal(D)}
    if architecture == "jumprelu":
        tensors["threshold"] = np.abs(normal(F))
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": METADATA,
    }
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    return folder


def circuit_tracer(tmp, kind="transcoder_set", X=2):
    folder = tmp / "set"
    folder.mkdir()
    for i in range(X):
        t = {"W_enc": normal(F, D), "b_enc": normal(F), "b_dec": normal(D)}
        if kind == "transcoder_set":
            save_file(t | {"W_dec": normal(F, D)}, folder / f"layer_{i}.safetensors")
            continue
        save_file({f"{k}_{i}": v for k, v in t.items()}, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": normal(F, X - i, D)}, folder / f"W_dec_{i}.safetensors")
    config = {
        "model_kind": kind,
        "model_name": "acme/tiny",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def circuit_tracer_clt(tmp):
    return circuit_tracer(tmp, "cross_layer_transcoder")


FORMATS = {  # what makes a folder, its config, a file of tensors, one of its tensors
    "published": (published_sae, "config.json", "params.safetensors", "w_enc"),
    "published layers": (
        published_crosscoder,
        "config.json",
        "params_layer_1.safetensors",
        "b_dec",
    ),
    "saelens": (saelens, "cfg.json", "sae_weights.safetensors", "W_dec"),
    "set": (circuit_tracer, "config.yaml", "layer_1.safetensors", "W_dec"),
    "clt": (circuit_tracer_clt, "config.yaml", "W_enc_1.safetensors", "b_enc_1"),
}


def edit_config(path, **keys):
    read, write = (
        (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    )
    path.write_text(write({**read(path.read_text()), **keys}))


def edit_tensors(path, **tensors):
    save_file({**load_file(path), **tensors}, path)


def refused(folder, *words):
    with pytest.raises(InputError) as why:
        load_coders(folder)
    text = str(why.value)
    assert "\n" not in text and len(text) < 700
    assert all(word in text for word in words), text


@pytest.fixture(params=FORMATS, ids=list(FORMATS))
def at(request, tmp_path):
    """(folder, config, tensors' file, a tensor) of each format, which loads."""
    make, config, file, tensor = FORMATS[request.param]
    folder = make(tmp_path)
    load_coders(folder)
    return folder, folder / config, folder / file, tensor


@pytest.mark.parametrize("name", ["b_gate", "r_mag", "scaling_factor2", "activation_rms", "bias"])
def test_a_tensor_nobody_asks_for(at, name):
    folder, _, file, _ = at
    edit_tensors(file, **{name: normal(F)})
    refused(folder, name, file.name)


@pytest.mark.parametrize("key, value", [
    ("activation", "gelu"), ("normalize_activations", "layer_norm"), ("input_scale", 3.0),
    ("applyBDec", True), ("gate", True), ("center_input", True), ("topk", 32),
    ("rescale_acts_by_decoder_norm", True), ("apply_b_dec_to_input", [1]), ("noise_std", 0.1),
])  # fmt: skip
def test_a_key_that_speaks_of_what_is_computed(at, key, value):
    folder, config, _, _ = at
    edit_config(config, **{key: value})
    refused(folder, str(folder), key)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_in_the_weights(at, bad):
    folder, _, file, tensor = at
    stored = load_file(file)[tensor]
    stored.reshape(-1)[-1] = bad
    edit_tensors(file, **{tensor: stored})
    refused(folder, file.name, tensor, "NaN or infinite")


def test_weights_that_float32_does_not_hold(tmp_path):
    save_file({"b": np.array([1.0, 1e300])}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="b holds NaN or infinite values"):
        read_tensors(tmp_path / "a.safetensors", {"b": 1})


JSON = {
    "NaN": "NaN", "infinity": "-Infinity", "1e400": "1e400", "400 digits": "1" * 400,
    "nesting": "[" * 100_000 + "]" * 100_000, "half a character": '"\\ud800"',
}  # fmt: skip
YAML = {
    "NaN": ".nan", "infinity": "-.inf", "1e400": "1e400000", "400 digits": "1" * 400,
    "nesting": "[" * 5_000 + "]" * 5_000, "half a character": '"\\ud800"',
    "alias": "[&a [x, x], *a, *a]", "tag": "!!python/object/apply:os.getcwd []",
    "date": "2026-01-01",
}  # fmt: skip


@pytest.mark.parametrize("what", sorted({*JSON, *YAML}))
def test_values_that_no_config_needs(at, what):
    folder, config, _, _ = at
    text = config.read_text()
    if config.suffix == ".yaml" and what in YAML and what != "1e400":  # which is text in YAML 1.1
        config.write_text(text + f"scan: {YAML[what]}\n")
    elif what in JSON and config.suffix == ".json":
        key = "release" if config.name == "cfg.json" else "note"
        config.write_text(f'{text.rstrip()[:-1]}, "{key}": {JSON[what]}}}')
    else:
        load_coders(folder)
        return
    refused(folder, config.name)


def test_a_key_twice(at):
    folder, config, _, _ = at
    text = config.read_text()
    if config.suffix == ".yaml":
        config.write_text(text + "model_name: other\n")
    else:
        config.write_text(text.rstrip()[:-1] + ', "model_name": "a", "model_name": "b"}')
    refused(folder, config.name, "model_name", "twice")


@pytest.mark.parametrize("value", [[1], {"a": 1}, True, 2**39, -1, 1.5])
def test_values_of_another_kind(at, value):
    folder, config, _, _ = at
    keys = {
        "config.json": ("width", "l0", "model_name", "first"),
        "cfg.json": ("d_in", "hook_name"),
        "config.yaml": ("model_kind", "model_name", "transcoders", "feature_input_hook"),
    }
    before = config.read_bytes()
    for key in keys[config.name]:
        if (key, value) in (("l0", 1.5), ("apply_b_dec_to_input", True)):
            continue
        edit_config(config, **{key: value})
        refused(folder, key)
        config.write_bytes(before)


def test_tensors_that_overlap_or_leave_gaps(at):
    folder, _, file, tensor = at
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    for shift in (-8, 8):
        moved = json.loads(json.dumps(header))
        for name in names[1:]:
            moved[name]["data_offsets"] = [a + shift for a in moved[name]["data_offsets"]]
        text = json.dumps(moved).encode()
        more = data + bytes(8) if shift > 0 else data[:shift]
        file.write_bytes(struct.pack("<Q", len(text)) + text + more)
        refused(folder, file.name)
    assert tensor in header


# What is particular to a format


def test_files_beyond_those_of_the_layers(tmp_path):
    folder = published_crosscoder(tmp_path)
    (folder / "params_layer_4.safetensors").write_bytes(
        (folder / "params_layer_3.safetensors").read_bytes()
    )
    refused(folder, "has params_layer_4.safetensors")
    folder = circuit_tracer_clt(tmp_path)
    for end in ("enc", "dec"):  # W_enc_2 is missing: those after it would not be read
        save_file({f"W_{end}_3": normal(F, D)}, folder / f"W_{end}_3.safetensors")
    refused(folder, "has W_dec_3.safetensors")


@pytest.mark.parametrize("name", ["../other/layer_0.safetensors", "a/../../b.safetensors",
                                  "/etc/layer_0.safetensors", "..\\b.safetensors"])  # fmt: skip
def test_paths_that_leave_the_folder(tmp_path, name):
    folder = circuit_tracer(tmp_path)
    edit_config(folder / "config.yaml", transcoders=[name, "layer_1.safetensors"])
    refused(folder, "outside the config")


@pytest.mark.parametrize("changes, words", [
    ({"reshape_activations": "hook_z"}, "reshape_activations"),
    ({"reshape_activations": "flat"}, "reshape_activations"),
    ({"activation_fn_kwargs": {"leak": 0.1}}, "activation_fn_kwargs"),
    ({"seqpos_slice": [5, None, 2]}, "seqpos_slice"),
    ({"metadata": {**METADATA, "architecture": "gated"}}, "architecture"),
    ({"metadata": {**METADATA, "k": 3}}, "k is in metadata"),
    ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
    ({"hook_name": "blocks.3.hook_resid_post"}, "keep one"),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "center_writing"),
    ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm of a jumprelu"),
])  # fmt: skip
def test_keys_of_saelens_that_change_the_coder(tmp_path, changes, words):
    refused(saelens(tmp_path, **changes), str(tmp_path / "sae"), words)


def test_keys_of_saelens_that_are_consulted(tmp_path):
    assert load_coder(saelens(tmp_path, seqpos_slice=[5, None])).first == 5
    config = {"k": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    (tmp_path / "old").mkdir()
    assert load_coder(saelens(tmp_path / "old", "standard", **config)).k == 3


@pytest.mark.parametrize("harmless, make, config", [
    (HARMLESS, published_sae, "config.json"),
    ({key: "x" for keys in SAELENS_HARMLESS.values() for key in keys}, saelens, "cfg.json"),
    ({key: "x" for key in YAML_HARMLESS}, circuit_tracer, "config.yaml"),
    ({"run": "a", "made_by": {"who": "me"}}, published_sae, "config.json"),  # notes of one's own
])  # fmt: skip
def test_keys_that_are_known_to_change_nothing(tmp_path, harmless, make, config):
    folder = make(tmp_path)
    edit_config(folder / config, **harmless)
    load_coders(folder)


@pytest.mark.parametrize("name, first", [
    ("google/gemma-3-1b-it", 4), ("gemma-3-1b-IT", 4), ("acme/gemma_3_1b_it", 4),
    ("google/gemma-3-270m-it-qat-q4_0-unquantized", 4), ("gemma-3-4b-it-GGUF", 4),
    ("google/gemma-3-1b-pt", 1), ("acme/kit-1b", 1), ("acme/iterated-item", 1), ("", 1),
    ("acme/tiny-italian", 1),
])  # fmt: skip
def test_instruction_tuned_models_by_any_spelling(tmp_path, name, first):
    assert untrained_positions(name) == first
    folder = saelens(tmp_path)
    edit_config(folder / "cfg.json", metadata=METADATA | {"model_name": name})
    coder = load_coder(folder)
    assert coder.first == first
    if not name.startswith("g"):  # those of Gemma's own have other sizes
        save_coder(coder, tmp_path / "own")
        assert load_coder(tmp_path / "own").first == first
