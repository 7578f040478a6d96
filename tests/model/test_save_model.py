"""A model and its tokenizer as one folder: the same bits come back, and nothing of an older one."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from checkpoint_files import assert_same, random_model
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.tokenizer import Tokenizer
from tiny import tiny
from tiny_tokenizer import SAMPLES, tiny_proto, write_model

ROOM = 400  # rows of the tiny embeddings, which is more than the tokenizer has pieces
CHAT = [
    {"role": "system", "content": "one"},
    {"role": "user", "content": " the start \n"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "<end_of_turn>"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = write_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", tiny_proto())
    return gs.load_tokenizer(path)


def config(name: str, **changes):
    return dataclasses.replace(tiny(PRESETS[name]), vocab=ROOM, **changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_bit_for_bit(name, dtype, tied, tokenizer, tmp_path):
    model = random_model(config(name, tied=tied), jnp.dtype(dtype))
    gs.save_model(model, tokenizer, tmp_path / "saved")
    assert_same(gs.load_model(tmp_path / "saved", dtype=dtype), model)


def test_the_tokenizer_comes_back(tokenizer, tmp_path):
    gs.save_model(random_model(config("gemma-3-270m")), tokenizer, tmp_path)
    back = gs.load_tokenizer(tmp_path)
    assert back.sentencepiece == tokenizer.sentencepiece
    for text in SAMPLES:
        np.testing.assert_array_equal(back.encode(text), tokenizer.encode(text))
    np.testing.assert_array_equal(back.chat(CHAT).ids, tokenizer.chat(CHAT).ids)


def test_files_of_the_model_saved_there_before_are_gone(tokenizer, tmp_path):
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json")
    for name in (*stale, "added_tokens.json", "chat_template.jinja", "notes.md"):
        (tmp_path / name).write_text(json.dumps({"<other>": 7}))
    gs.save_model(random_model(config("gemma-3-270m")), tokenizer, tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    ours = ["config.json", "model.safetensors", "notes.md", "tokenizer.model"]
    assert found == [*ours, "tokenizer_config.json"]


def test_a_folder_that_cannot_be_written_is_unchanged(tokenizer, tmp_path, monkeypatch):
    first = random_model(config("gemma-3-270m"))
    gs.save_model(first, tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_scope_jax.model.checkpoints.huggingface._write", full)
    with pytest.raises(InputError, match="no space left"):
        gs.save_model(random_model(config("gemma-3-270m"), seed=1), tokenizer, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_would_not_come_back_is_refused(tokenizer, tmp_path):
    model = random_model(config("gemma-3-270m"))
    small = random_model(dataclasses.replace(model.config, vocab=300))
    with pytest.raises(InputError, match="belongs to another model"):
        gs.save_model(small, tokenizer, tmp_path / "new")
    foreign = Tokenizer(tokenizer.sentencepiece, foreign_template="there/chat_template.jinja")
    with pytest.raises(InputError, match="chat template is not Gemma's"):
        gs.save_model(model, foreign, tmp_path / "new")
    assert not (tmp_path / "new").exists()
