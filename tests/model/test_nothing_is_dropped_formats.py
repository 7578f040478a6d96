"""Loaders x what a source can say, for GGUF files, official checkpoints and tokenizers.

As `test_nothing_is_dropped`: each thing is used, known not to matter, or refused by name.
"""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from checkpoint_files import (
    CONFIG,
    assert_same,
    official_tree,
    random_model,
    save_orbax,
    write_gguf,
)
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints import gguf_gemma, huggingface
from gemma_scope_jax.model.checkpoints import huggingface_config as config_file
from gemma_scope_jax.model.checkpoints.gguf import open_gguf
from gemma_scope_jax.model.checkpoints.gguf_gemma import gguf_config
from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface
from gemma_scope_jax.model.checkpoints.huggingface_config import huggingface_config
from gemma_scope_jax.model.checkpoints.load import load_model
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import load_tokenizer
from tiny_tokenizer import hugging_face, tiny_proto, write_json, write_model
from tiny_tokenizer import write_gguf as write_tokens

ONES = np.ones((2, 32), np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model()


# --- vocabularies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, tokens, kept",
    [
        (305, {}, 305),  # a fine-tune's own tokens
        (364, {}, 300),  # the padding of the multimodal repositories
        (364, {"<image_soft_token>": 300}, 300),
        (364, {"<image_soft_token>": 300, "<think>": 301}, 364),
    ],
)
@pytest.mark.parametrize("kind", ["added_tokens", "tokenizer_config", "tokenizer", "gguf"])
def test_only_padding_is_cut_from_a_vocabulary(tmp_path, rows, tokens, kept, kind, monkeypatch):
    for module in (huggingface, config_file, gguf_gemma):  # 262,144 and 262,208
        monkeypatch.setattr(module, "TEXT_VOCAB", 300)
        monkeypatch.setattr(module, "PADDED_VOCAB", 364)
    model = random_model(dataclasses.replace(CONFIG, vocab=rows))
    if kind == "gguf":
        names = [f"t{i}" for i in range(300)] + [*tokens]
        names += [f"[PAD{i}]" for i in range(len(names), rows)]
        types = [1] * 300 + [4] * len(tokens) + [5] * (rows - 300 - len(tokens))
        path = write_gguf(tmp_path / "x.gguf", model, tokens=(names, types) if tokens else None)
        assert gguf_config(open_gguf(path)).vocab == kept
        return
    save_huggingface(model, tmp_path)
    added = [{"id": i, "content": text} for text, i in tokens.items()]
    content = {
        "added_tokens": tokens,
        "tokenizer_config": {
            "added_tokens_decoder": {str(t["id"]): t for t in added},
            "model_max_length": int(1e30),  # as transformers writes it
        },
        "tokenizer": {"added_tokens": added},
    }[kind]
    (tmp_path / f"{kind}.json").write_text(json.dumps(content))
    assert huggingface_config(tmp_path).vocab == kept
    loaded = load_model(tmp_path, dtype="float32")
    np.testing.assert_array_equal(loaded.params.embed, model.params.embed[:kept])


# --- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("blk.0.attn_q.bias", "blk.0.attn_q.bias is not one of Gemma 3's"),
        ("blk.0.attn_q.weight.lora_a", "lora_a is not one of Gemma 3's"),
        ("blk.2.ffn_up.weight", "blk.2.ffn_up.weight is not one of Gemma 3's"),
        ("rope_freqs.weight", "rope_freqs.weight is not one of Gemma 3's"),
        ("cls.weight", "cls.weight is not one of Gemma 3's"),
        ("v.blk.0.ln1.weight", None),
        ("mm.input_projection.weight", None),
    ],
)
def test_tensors_of_a_gguf_file(model, tmp_path, name, message):
    path = write_gguf(tmp_path / "x.gguf", model, tensors={name: ONES})
    if message is None:
        assert gguf_config(open_gguf(path)).layers == 2
    else:
        with pytest.raises(InputError, match=message):
            load_model(path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("rope.scaling.type", "yarn", "rope.scaling.type 'yarn' is not supported"),
        ("rope.scaling.type", 3, "rope.scaling.type 3 is not supported"),
        ("rope.scaling.attn_factor", 2.0, "attn_factor = 2.0 is not known"),
        ("rope.dimension_count", 8, "rope.dimension_count is 8, only 16"),
        ("attention.value_length", 8, "attention.value_length is 8, only 16"),
        ("attention.scale", 0.5, "attention.scale is 0.5, only 0.25"),
        ("attention.causal", False, "attention.causal = False is not known"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping = 30.0"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0"),
        ("expert_count", 8, "expert_count = 8 is not known"),
        ("rope.global.freq_base", 5e5, "rope.global.freq_base is 500000.0, elsewhere 1000000.0"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "rms_epsilon is nan"),
        ("attention.layer_norm_rms_epsilon", float("inf"), "rms_epsilon is inf"),
        ("attention.sliding_window_pattern", "x", "pattern is 'x'"),
        ("rope.dimension_count", 16, None),
        ("attention.value_length", 16, None),
        ("attention.causal", True, None),
        ("vocab_size", 300, None),
        ("vision.block_count", 27, None),
        ("mm.tokens_per_image", 256, None),
        ("rope.scaling.finetuned", True, None),
        ("rope.local.freq_base", 1e4, None),
    ],
)
def test_keys_of_a_gguf_file(model, tmp_path, key, value, message):
    path = write_gguf(tmp_path / "x.gguf", model, **{key.replace(".", "__"): value})
    if message is None:
        expected = dataclasses.replace(model.config, name="gemma3")
        assert dataclasses.replace(gguf_config(open_gguf(path)), name="gemma3") == expected
    else:
        with pytest.raises(InputError, match=message):
            load_model(path)


@pytest.mark.parametrize(
    "said, divisor",
    [
        ({}, 1.0),
        ({"rope.scaling.factor": 8.0}, 8.0),
        ({"rope.scale_linear": 8.0}, 8.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, 1.0),
        ({"rope.scale_linear": 8.0, "rope.scaling.factor": 4.0}, None),
    ],
)
def test_rope_of_a_gguf_file(model, tmp_path, said, divisor):
    metadata = {key.replace(".", "__"): value for key, value in said.items()}
    path = write_gguf(tmp_path / "x.gguf", model, **(metadata or {"rope__scaling__type": "linear"}))
    if divisor is None:
        with pytest.raises(InputError, match=r"RoPE has several scaling factors: \[4.0, 8.0\]"):
            gguf_config(open_gguf(path))
    else:
        assert gguf_config(open_gguf(path)).global_rope_divisor == divisor


@pytest.mark.parametrize("key, value", [("general.type", "adapter"), ("adapter.type", "lora")])
def test_adapters_as_gguf_files(model, tmp_path, key, value):
    path = write_gguf(tmp_path / "x.gguf", model, plain={key: value})
    with pytest.raises(InputError, match="holds an adapter .* merge it into its base model"):
        load_model(path)


# --- official ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, message",
    [
        ("layer_0/attn/q_einsum/lora", "layer_0/attn/q_einsum/lora/x belongs to unmerged LoRA"),
        ("layer_0/attn/bias", "layer_0/attn/bias/x is not one of Gemma 3's"),
        ("layer_3/mlp", "layer_3/mlp/x is not one of Gemma 3's"),
        ("ema", "ema/x is not one of Gemma 3's"),
        ("vision_encoder", None),
        ("embedder/mm_input_projection", None),
    ],
)
def test_arrays_of_an_official_checkpoint(model, tmp_path, where, message):
    tree = official_tree(model)
    *path, last = where.split("/")
    inner = tree
    for part in path:
        inner = inner.setdefault(part, {})
    inner[last] = {"x": ONES}
    save_orbax(tmp_path / "ckpt", tree)
    if message is None:
        assert_same(load_model(tmp_path / "ckpt", dtype="float32", config=model.config), model)
    else:
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / "ckpt", config=model.config)


def test_a_config_for_what_says_its_own_is_refused(model, tmp_path):
    save_huggingface(model, tmp_path)
    with pytest.raises(InputError, match="states its architecture"):
        load_model(tmp_path, config=model.config)


# --- tokenizers ----------------------------------------------------------------------------------

FIRST = len(tiny_proto().pieces)
WORD, THINK = "covfefe", "<think>"
IMAGE = {"id": FIRST, "content": "<image_soft_token>", "special": True}
ADDED = [
    IMAGE,
    {"id": FIRST + 1, "content": THINK, "special": False},
    {"id": FIRST + 2, "content": WORD, "special": False},
    {"id": FIRST + 3, "content": "two words", "special": False},
]


def added_beside(kind: str, folder: Path) -> Path:
    """A tokenizer with `ADDED`, which a file of the `kind` tells of."""
    if kind == "json":
        data = hugging_face(tiny_proto())
        data["added_tokens"] = data["added_tokens"][:-1] + ADDED
        return write_json(folder / "tokenizer.json", data)
    if kind == "gguf":
        return write_tokens(folder / "x.gguf", tiny_proto(), added=ADDED[1:])
    path = write_model(folder / "tokenizer.model", tiny_proto())
    if kind == "added_tokens.json":
        content = {t["content"]: t["id"] for t in ADDED}
    elif kind == "tokenizer_config.json":
        content = {"added_tokens_decoder": {str(t["id"]): t for t in ADDED}}
        content["model_max_length"] = int(1e30)  # as transformers writes it
    else:
        content = {"added_tokens": ADDED}
    write_json(folder / kind, content)
    return path


@pytest.mark.parametrize(
    "kind", ["json", "gguf", "added_tokens.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_added_tokens_have_ids_and_words_among_them_are_text(tmp_path, kind):
    plain = load_tokenizer(write_model(tmp_path / "plain.model", tiny_proto()))
    folder = tmp_path / "t"
    folder.mkdir()
    tok = load_tokenizer(added_beside(kind, folder))
    assert tok.vocab_size == FIRST + 4
    assert tok.decode_tokens(range(FIRST + 1, FIRST + 4)) == [THINK, WORD, "two words"]
    the = plain.encode("the", bos=False).tolist()
    assert tok.encode(f"{WORD}the", bos=False).tolist() == [FIRST + 2, *the]
    assert (
        tok.encode(f"the{THINK}", bos=False).tolist() == plain.encode(f"the{THINK}", False).tolist()
    )
    assert tok.encode(f"{THINK}the", False, allow_special=True).tolist() == [FIRST + 1, *the]
    ids = tok.encode("the two words", bos=False)
    assert FIRST + 3 in ids and tok.decode(ids) == "the two words"


def test_the_images_placeholder_alone_is_no_token_of_text(tmp_path):
    data = hugging_face(tiny_proto())
    assert load_tokenizer(write_json(tmp_path / "tokenizer.json", data)).vocab_size == FIRST


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer is"),
        (lambda d: d["normalizer"].update(pattern={"Regex": " +"}), "normalizer is"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer is"),
        (lambda d: d.update(decoder={"type": "WordPiece"}), "decodes by 'WordPiece'"),
        (lambda d: d.update(a_new_step={"x": 1}), "a_new_step is not known"),
        (lambda d: d["model"].update(dropout=0.1), "dropout is 0.1"),
        (lambda d: d["model"].update(ignore_merges=True), "ignore_merges is True"),
        (lambda d: d["model"].update(byte_fallback=False), "byte_fallback is False"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda d: d["added_tokens"][-1].update(id=FIRST + 9), f"id {FIRST + 9}, but the vocabula"),
        (lambda d: d["added_tokens"][0].update(id=77), "added there|elsewhere"),
        (lambda d: d["added_tokens"][-1].update(lstrip=True), "has lstrip"),
        (lambda d: d["added_tokens"][-1].update(id=2**39), "added token 549755813888"),
        (lambda d: d["added_tokens"][-1].update(id=10**400), "too large"),
        (lambda d: d["added_tokens"][-1].update(id="x"), "malformed"),
    ],
)
def test_what_a_tokenizer_json_may_not_say(tmp_path, change, message):
    data = hugging_face(tiny_proto())
    change(data)
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_json(tmp_path / "tokenizer.json", data))


def test_what_a_tokenizer_json_may_say_beside(tmp_path):
    data = hugging_face(tiny_proto())
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    data |= {
        "version": "1.0",
        "truncation": {"max_length": 9},
        "padding": {"length": 9},
        "pre_tokenizer": split | {"invert": False},
        "post_processor": {"type": "Template"},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    }
    tok = load_tokenizer(write_json(tmp_path / "tokenizer.json", data))
    assert tok.decode(tok.encode("the  turn")) == "the  turn"


def test_files_beside_each_other_must_agree(tmp_path):
    path = write_model(tmp_path / "tokenizer.model", tiny_proto())
    write_json(tmp_path / "added_tokens.json", {THINK: FIRST})
    write_json(tmp_path / "tokenizer.json", {"added_tokens": [{"id": FIRST, "content": WORD}]})
    with pytest.raises(InputError, match=f"token {FIRST} is '{THINK}', elsewhere '{WORD}'"):
        load_tokenizer(path)
    (tmp_path / "added_tokens.json").unlink()
    write_json(tmp_path / "tokenizer.json", {"added_tokens": [{"id": 2, "content": "<s>"}]})
    with pytest.raises(InputError, match="token 2 is '<bos>', but '<s>' was added there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [("add_space_prefix", True), ("remove_extra_whitespaces", True), ("precompiled_charsmap", [1])],
)
def test_what_the_tokenizer_of_a_gguf_file_may_not_say(tmp_path, key, value):
    path = write_tokens(tmp_path / "x.gguf", tiny_proto(), **{key: value})
    with pytest.raises(InputError, match=f"{key} is on"):
        load_tokenizer(path)


GEMMAS = "{{ bos_token }}<start_of_turn>user {{ x }}<end_of_turn>"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}"


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "named", "gguf"]
)
@pytest.mark.parametrize("template, is_gemmas", [(GEMMAS, True), (CHATML, False)])
def test_a_chat_template_of_another_format(tmp_path, file, template, is_gemmas):
    if file == "gguf":
        where = write_tokens(tmp_path / "x.gguf", tiny_proto(), template=template)
    else:
        write_model(tmp_path / "tokenizer.model", tiny_proto())
        said = [{"name": "tool_use", "template": CHATML}, {"name": "default", "template": template}]
        where = tmp_path / file.replace("named", "tokenizer_config.json")
        content = json.dumps({"chat_template": said if file == "named" else template})
        where.write_text(template if where.suffix == ".jinja" else content)
    tok = pickle.loads(pickle.dumps(load_tokenizer(tmp_path)))
    chat = [{"role": "user", "content": "one"}]
    if is_gemmas:
        assert tok.chat(chat).ids[0] == tok.bos_id
    else:
        with pytest.raises(InputError, match=f"{where}: the model's chat template is not Gemma's"):
            tok.chat(chat)
