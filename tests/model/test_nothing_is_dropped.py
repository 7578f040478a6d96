"""Loaders x what a source can say: each thing is used, known not to matter, or refused by name.

A loader that skips what it does not know loads another model than was saved, without a word. Here a
sound source of each kind is given one thing more; the rows say what has to come of it.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint_files import (
    assert_same,
    edit_config,
    edit_tensors,
    random_model,
    split_into_shards,
    write_gguf,
)
from gemma_scope_jax.autointerp.judges import model as model_judge
from gemma_scope_jax.coders.directions import _extreme_tokens, extreme_logits
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.checkpoints import load
from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface
from gemma_scope_jax.model.checkpoints.huggingface_config import HARMLESS, huggingface_config
from gemma_scope_jax.model.checkpoints.load import load_model
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import unembed
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.sharding import make_mesh

ONES = np.ones((2, 32), np.float32)
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_huggingface(model, tmp_path / "hf")
    return tmp_path / "hf"


def refused(source, message: str, **options) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(source, dtype="float32", **options)
    assert "\n" not in str(caught.value)


# --- Hugging Face: tensors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        (f"{LAYER}.lora_A.weight", "belongs to an unmerged adapter"),
        (f"base_model.model.{LAYER}.base_layer.weight", "belongs to an unmerged adapter"),
        (f"{LAYER}.bias", "q_proj.bias is not one of Gemma 3's"),
        ("model.layers.0.self_attn.sinks", "sinks is not one of Gemma 3's"),
        ("language_model.model.embed_tokens.weight", "is not one of Gemma 3's"),  # once more
        ("model.layers.7.mlp.up_proj.weight", "is not one of Gemma 3's"),
        ("score.weight", "score.weight is not one of Gemma 3's"),
        (f"{LAYER}.weight_scale", "weight_scale is not one of Gemma 3's"),
        ("model.vision_tower.patches.weight", None),
        ("multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_tensors_of_a_folder(model, folder, name, message, shards):
    edit_tensors(folder, lambda t: t | {name: ONES})
    if shards:  # also where the index does not list what a shard holds
        split_into_shards(folder)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.write_text(json.dumps(content))
    if message:
        refused(folder, message)
    else:
        assert_same(load_model(folder, dtype="float32"), model)


def test_a_tensor_that_two_shards_hold(folder):
    split_into_shards(folder)
    first, second = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    save_file(load_file(second) | dict(list(load_file(first).items())[:1]), second)
    refused(folder, "is both in")


# --- heads of their own --------------------------------------------------------------------------


def untied(model: Model) -> Model:
    config = dataclasses.replace(model.config, tied=False)
    head = np.random.default_rng(5).standard_normal(model.params.embed.shape, np.float32)
    return Model(dataclasses.replace(model.params, head=head), config)


IDS = np.arange(3, 20)[None]


@pytest.mark.parametrize("kind", ["folder", "gguf", "mesh"])
def test_a_head_of_its_own_makes_the_logits(model, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(load, "EMBED_SLICE", 4 * 32 * 77)
    wanted, mesh = untied(model), make_mesh(2, 4) if kind == "mesh" else None
    source = tmp_path / "x.gguf"
    if kind == "gguf":
        write_gguf(source, wanted)
    else:
        save_huggingface(wanted, source)
    loaded = load_model(source, dtype="float32", mesh=mesh)
    np.testing.assert_array_equal(loaded.params.head, wanted.params.head)
    if kind != "gguf":  # which adds 1 to the norms and takes it away again
        assert_same(loaded, wanted)
    out = run(loaded, IDS, [capture("resid_final")])
    swapped = dataclasses.replace(loaded.params, embed=loaded.params.head, head=None)
    same = unembed(model.config, swapped, out.reads["resid_final"])
    np.testing.assert_allclose(out.logits, same, rtol=1e-5, atol=1e-4)
    tied = dataclasses.replace(loaded.params, head=None)
    assert model_identity(loaded)["weights"] != model_identity(Model(tied, model.config))["weights"]


def test_a_head_and_a_config_must_agree(model, folder):
    name, embed = "lm_head.weight", np.asarray(model.params.embed)
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, "tensor lm_head.weight is missing")
    edit_config(folder, tie_word_embeddings=True)
    for other in (embed[::-1].copy(), embed[:-1], embed.astype(np.int8)):
        edit_tensors(folder, lambda t, x=other: t | {name: x})
        refused(folder, "lm_head.weight is not the embedding, but config.json ties the two")
    for same in (embed, embed.astype(np.float64)):
        edit_tensors(folder, lambda t, x=same: t | {name: x})
        assert_same(load_model(folder, dtype="float32"), model)


def test_a_gguf_file_may_hold_its_embedding_twice(model, tmp_path):
    embed = np.asarray(model.params.embed)
    path = write_gguf(tmp_path / "x.gguf", model, tensors={"output.weight": embed})
    assert load_model(path, dtype="float32").config.tied


def test_decoder_rows_are_read_with_the_head(model):
    rows = jnp.asarray(np.random.default_rng(3).standard_normal((4, 32), np.float32))
    own = untied(model)
    top = _extreme_tokens(own, rows, jnp.ones(300, bool), k=5, gain="notebook", bins=0)[0]
    expected = np.asarray(rows) * np.asarray(own.params.final_norm) @ np.asarray(own.params.head).T
    np.testing.assert_array_equal(top[1], np.argsort(-expected, -1)[:, :5])


def test_a_judge_with_a_head_of_its_own_chooses_with_it(model):
    own, ids = untied(model), np.arange(3, 11, dtype=np.int32)[None]
    first, rest = (TokenBatch(part, np.ones_like(part)) for part in (ids[:, :4], ids[:, 4:]))
    prefix = model_judge._prefix(own, first, slots=8)
    choices, last = np.array([5, 9], np.int32), np.array([[3]], np.int32)
    logits = model_judge._choice_logits(own, prefix, rest, last, choices)[0, 0]
    np.testing.assert_allclose(logits, run(own, ids).logits[0, -1, choices], rtol=1e-4, atol=1e-3)


def test_rows_that_no_token_has_are_no_logits_of_a_feature(model):
    rng = np.random.default_rng(0)
    coder = SparseCoder(
        *(jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((32, 4), 4, 4, (4, 32), 32)),
        None,
        layer=1,
        reads="resid_post",
        writes="resid_post",
    )
    tok = SimpleNamespace(special=np.arange(290) < 3)
    top, _, bottom, *_ = next(iter(extreme_logits(model, coder, tok, range(4), k=280)))
    assert min(top.min(), bottom.min()) >= 3 and max(top.max(), bottom.max()) < 290


# --- Hugging Face: config.json -------------------------------------------------------------------

NESTED = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
REFUSED_KEYS = {
    "hidden_act": "silu",
    "hidden_activation": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": True,
    "partial_rotary_factor": 0.5,
    "quantization_config": {"bits": 4},
    "quantization": {"bits": 4, "group_size": 64},
    "auto_map": {"AutoModel": "own.Model"},
    "pruned_heads": {"0": [1]},
    "num_experts": 4,
    "use_qk_norm": False,
    "is_encoder_decoder": True,
    "text_config": {"hidden_size": 32},
    "sliding_window": None,
    "hidden_size": None,
    "rope_theta": None,
    "query_pre_attn_scalar": 1e-300,
    "num_hidden_layers": 2**39,
    "tie_word_embeddings": "no",
}
ROPES = [  # of a config whose global layers are scaled by 8
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "type 'yarn' is not supported"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 8.0}}, "is not supported"),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 8.0}}, "not supported"),
    ({"rope_scaling": {"factor": 8.0}}, "of type 'default' with factor 8.0"),
    ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "of type 'default' with factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "of type 'linear' with factor None"),
    ({"rope_scaling": NESTED["full_attention"] | {"beta_fast": 32}}, "beta_fast is not supported"),
    ({"rope_scaling": NESTED["full_attention"] | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_scaling": NESTED["full_attention"] | {"rope_theta": 5e5}}, "rope_theta is stated tw"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_theta is stated tw"),
    ({"rope_parameters": {"sliding_attention": {"rope_theta": 5e5}}}, "base_freq is stated tw"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, "factor is"),
    ({"rope_parameters": NESTED["full_attention"]}, "belong to no kind of layer"),
    ({"rope_parameters": {"sliding_attention": NESTED["full_attention"]}}, "stated twice"),
    ({"sliding_window_pattern": 2, "_sliding_window_pattern": 3}, "pattern is stated tw"),
    ({"rope_scaling": NESTED["full_attention"]}, None),
    ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8}}, None),
    ({"rope_parameters": NESTED}, None),
    ({"rope_scaling": None, "rope_parameters": NESTED, "rope_theta": 1_000_000}, None),
    ({"rope_scaling": None, "rope_parameters": NESTED}, None),
    ({"partial_rotary_factor": 1.0, "hidden_act": "gelu_pytorch_tanh"}, None),
    ({"mlp_bias": False, "is_encoder_decoder": False}, None),
    ({"an_unknown_key": None, "another": "", "a_third": []}, None),
]


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_that_are_refused(folder, key):
    edit_config(folder, **{key: REFUSED_KEYS[key]})
    refused(folder, key)


def test_keys_that_are_known_not_to_matter(model, folder):
    for reason, keys in HARMLESS.items():
        said = {key: {"x": reason} for key in keys if key != "model_type"}
        edit_config(folder, **said)
    assert huggingface_config(folder) == dataclasses.replace(model.config, name="hf")


@pytest.mark.parametrize("changes, message", ROPES)
def test_rope_and_patterns(model, folder, changes, message):
    edit_config(folder, **changes)
    if message is None:
        assert huggingface_config(folder) == dataclasses.replace(model.config, name="hf")
    else:
        with pytest.raises(InputError, match=message):
            huggingface_config(folder)


def test_what_stands_beside_text_config_must_agree_with_it(model, folder):
    text = json.loads((folder / "config.json").read_text())
    where = folder / "config.json"

    def write(inner=(), **top):
        nested = text | dict(inner)
        where.write_text(json.dumps({"model_type": "gemma3", "text_config": nested} | top))

    write(hidden_size=32, vocab_size=300, vision_config={"hidden_size": 7})
    assert huggingface_config(folder) == dataclasses.replace(model.config, name="hf")
    for top in ({"hidden_size": 64}, {"rope_theta": 1e4}, {"rope_scaling": None}):
        write(**top)
        with pytest.raises(InputError, match=f"{next(iter(top))} is .* at the top and .* in text_"):
            huggingface_config(folder)
    write(attention_bias=True)
    refused(folder, "attention_bias")
    write(inner={"model_type": "gemma3n_text"})
    refused(folder, "model_type of text_config is 'gemma3n_text'")
    write(tie_word_embeddings=False)
    refused(folder, "tie_word_embeddings is False at the top and True in text_config")


# --- Hugging Face: what else lies in the folder --------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_adapters(folder, name):
    (folder / name).write_text("{}")
    refused(folder, f"holds an unmerged LoRA adapter .{name}.; merge it")
    for other in ("config.json", "model.safetensors"):
        (folder / other).unlink()
        refused(folder, f"holds an unmerged LoRA adapter .{name}.")


@pytest.mark.parametrize(
    "name, message",
    [
        ("pytorch_model.bin", "but pytorch_model.bin, which can run code"),
        ("pytorch_model.bin.index.json", "but pytorch_model.bin, which can run code"),
        ("gemma.safetensors", "neither model.safetensors nor .*, but gemma.safetensors"),
        ("x.gguf", "pass the file x.gguf itself"),
        ("notes.txt", "neither model.safetensors nor .*; download the folder again"),
    ],
)
def test_other_weights_than_safetensors(folder, name, message):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, message)


def test_one_file_comes_before_an_index(model, folder):
    """Saving removes what it supersedes."""
    old = random_model(seed=9)
    split_into_shards(folder)
    shards = sorted(folder.glob("model*"))
    for shard in shards[:2]:
        save_file({k: x * np.float32(2) for k, x in load_file(shard).items()}, shard)
    save_huggingface(old, folder.with_name("old"))
    single = folder / "model.safetensors"
    single.write_bytes((folder.with_name("old") / "model.safetensors").read_bytes())
    assert_same(load_model(folder, dtype="float32"), old)
    shards[0].unlink()  # transformers leaves the index, and not the shards
    assert_same(load_model(folder, dtype="float32"), old)
    save_huggingface(model, folder)
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_model(folder, dtype="float32"), model)
