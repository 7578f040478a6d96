"""Hugging Face folders: every layout bit for bit, every config, one line for every broken file."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint_files import (
    CONFIG,
    assert_same,
    edit_config,
    edit_tensors,
    random_model,
    split_into_shards,
)
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface
from gemma_scope_jax.model.checkpoints.huggingface_config import huggingface_config
from gemma_scope_jax.model.checkpoints.load import load_model
from gemma_scope_jax.model.config import PRESETS, Model


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_huggingface(model, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.model.", "model.language_model.", "language_model.", ""]
)
def test_round_trip_under_every_prefix(model, folder, prefix):
    edit_tensors(
        folder, lambda t: {prefix + name.removeprefix("model."): x for name, x in t.items()}
    )
    assert_same(load_model(folder, dtype="float32"), model)


def test_round_trip_of_shards_and_of_a_multimodal_folder(model, folder):
    vision = {
        "vision_tower.vision_model.embeddings.position_embedding.weight": np.ones((2, 3), "f4"),
        "multi_modal_projector.mm_input_projection_weight": np.full((2, 2), np.nan, "f4"),
    }
    edit_tensors(
        folder,
        lambda t: t | vision | {"language_model.lm_head.weight": t["model.embed_tokens.weight"]},
    )
    split_into_shards(folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert_same(load_model(str(folder), dtype="float32"), model)


def test_padded_vocabulary_is_cut(tmp_path):
    config = dataclasses.replace(CONFIG, layers=1, d_model=4, vocab=262_144)
    model = random_model(config)
    save_huggingface(model, tmp_path)
    pad = lambda x: np.concatenate([x, np.full((64, 4), np.inf, np.float32)])
    name = "model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda t: t | {name: pad(t[name])})
    edit_config(tmp_path, vocab_size=262_208)
    assert_same(load_model(tmp_path, dtype="float32"), model)


# What the hub's config.json files hold, but for keys that say nothing about the text model.
HUB = {
    "gemma-3-270m": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": 512, "vocab_size": 262144,
        "_sliding_window_pattern": 6, "attention_bias": False, "final_logit_softcapping": None,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "max_position_embeddings": 32768, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144, "rope_theta": 1000000,
        "rope_local_base_freq": 10000, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma-3-4b": {
        "model_type": "gemma3", "vision_config": {"hidden_size": 1152},
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "query_pre_attn_scalar": 168, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "type": "linear"},
        },
    },
    "gemma-3-12b": {  # as transformers 5 saves it
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "sliding_window": 1024,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 8,
            "rope_parameters": {
                "full_attention": {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_config_of_the_published_models_is_the_preset(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    assert huggingface_config(tmp_path) == PRESETS[name]


def test_config_of_other_patterns(tmp_path):
    def period(layers, **keys):
        text = HUB["gemma-3-1b"] | {"num_hidden_layers": layers} | keys
        (tmp_path / "config.json").write_text(json.dumps(text))
        return huggingface_config(tmp_path).global_every

    local, full = ["sliding_attention"], ["full_attention"]
    assert period(6, layer_types=(local * 2 + full) * 2) == 3
    assert period(2, layer_types=full * 2) == 1
    assert period(4, layer_types=local * 4) == 6
    assert period(8, layer_types=local * 8) == 9  # never global
    assert period(8, sliding_window_pattern=4) == 4
    assert huggingface_config(tmp_path).name == tmp_path.name
    with pytest.raises(InputError, match="pattern"):
        period(4, layer_types=full + local * 3)
    with pytest.raises(InputError, match="list of 4"):
        period(4, layer_types=full)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma2"}, "only Gemma 3"),
        ({"model_type": None}, "only Gemma 3"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
        ({"hidden_size": "640"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 31.5}, "hidden_size"),
        ({"num_hidden_layers": 10**40}, "num_hidden_layers is"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_hidden_layers": 9_999}, "layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "NaN is not a number"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"head_dim": 15}, "do not divide"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": "linear"}, "RoPE"),
        ({"rope_parameters": [1]}, "rope_parameters is .1., not an object"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}}, "local"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "tensor lm_head.weight is missing"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"layer_types": None, "sliding_window_pattern": "6"}, "sliding_window_pattern"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "beyond"),
        ({"hidden_size": 48}, r"\(300, 32\), but config.json makes it \(300, 48\)"),
        ({"vocab_size": 299}, "embed_tokens"),
    ],
)
def test_configs_that_cannot_be_used(folder, changes, message):
    if "num_hidden_layers" in changes:
        changes |= {"layer_types": None}
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def _with(folder, name, value):
    edit_tensors(folder, lambda t: t | {name: value(t[name])})


def _bad(x, value):
    x = x.copy()
    x.flat[-1] = value
    return x


Q1 = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 50_000),
        "not a complete safetensors file",
    ),
    "foreign": (lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4" * 99), "safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither a Hugging Face folder"),
    "config not JSON": (lambda f: (f / "config.json").write_bytes(b"{\xff"), "not UTF-8"),
    "config cut off": (lambda f: os.truncate(f / "config.json", 90), "not usable as JSON"),
    "config nested": (lambda f: (f / "config.json").write_text("[" * 99_999), "JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    "missing": (lambda f: edit_tensors(f, lambda t: (t.pop(Q1), t)[1]), f"{Q1} is missing"),
    "renamed": (lambda f: edit_tensors(f, lambda t: t | {Q1[:-1]: t.pop(Q1)}), f"{Q1} is missing"),
    "other model": (
        lambda f: edit_tensors(f, lambda t: {f"transformer.{k}": v for k, v in t.items()}),
        "no tensor embed_tokens",
    ),
    "transposed": (lambda f: _with(f, Q1, lambda x: np.ascontiguousarray(x.T)), Q1),
    "flat": (lambda f: _with(f, Q1, np.ravel), Q1),
    "short norm": (lambda f: _with(f, "model.norm.weight", lambda x: x[:-1]), "model.norm.weight"),
    "one number": (
        lambda f: (
            edit_config(f, vocab_size=262_144),
            _with(f, "model.embed_tokens.weight", lambda x: np.array(x[0, 0])),
        ),
        r"embed_tokens.weight is \(\), but",
    ),
    "integers": (lambda f: _with(f, Q1, lambda x: x.astype(np.int8)), "I8"),
    "nan": (lambda f: _with(f, Q1, lambda x: _bad(x, np.nan)), "w_q of layer 1 holds NaN"),
    "inf": (
        lambda f: _with(f, "model.embed_tokens.weight", lambda x: _bad(x, np.inf)),
        "embed holds NaN or inf",
    ),
    "nan norm": (lambda f: _with(f, "model.norm.weight", lambda x: _bad(x, np.nan)), "final_norm"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders(folder, kind):
    break_it, message = BROKEN[kind]
    break_it(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"model.embed_tokens.weight": "../hf/model.safetensors"}}, "is '../hf"),
        ({"weight_map": {"model.embed_tokens.weight": 3}}, "is '3'"),
        ({"weight_map": {"model.embed_tokens.weight": "a\0b"}}, "of tensor"),
        ({"weight_map": [1]}, "weight_map is "),
        ({}, "lacks 'weight_map'"),
        (None, "is None, not an object"),
    ],
)
def test_broken_index(folder, index, message):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_missing_shard_and_tensor_missing_from_its_shard(folder):
    split_into_shards(folder)
    shard = folder / "model-00002-of-00003.safetensors"
    save_file(dict(list(load_file(shard).items())[1:]), shard)
    with pytest.raises(InputError, match="is missing"):
        load_model(folder)
    shard.unlink()
    with pytest.raises(InputError, match="no such file"):
        load_model(folder)


def test_flipped_bytes_raise_input_errors_or_load(folder):
    split_into_shards(folder)
    rng = np.random.default_rng(0)
    files = sorted(folder.iterdir())
    failed = 0
    for i in range(120):
        path = files[i % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        # Mostly in the header of a safetensors file, which holds everything that can go wrong.
        for at in rng.integers(0, min(len(bad), 3000), rng.integers(1, 4)):
            bad[at] = rng.integers(256)
        path.write_bytes(bad)
        try:
            load_model(folder, dtype="float32")
        except InputError as error:
            failed += 1
            assert "\n" not in str(error)
        path.write_bytes(good)
    assert 60 < failed < 120
