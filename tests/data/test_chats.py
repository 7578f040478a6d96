"""A chat as a prompt: the model's turn is open at its end."""

import json

import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.errors import InputError
from text_files import CHAT


def test_the_models_turn_is_open(gemma_like):
    """Its last message goes on; after the user's, a new one begins."""
    tok = gemma_like
    asked = [{"role": "user", "content": "the start of turn"}]
    assert gs.chat_prompt(tok, asked).tolist() == tok.chat(asked).ids.tolist()
    whole = [*asked, {"role": "assistant", "content": "one two"}]
    ids, closed = gs.chat_prompt(tok, whole), tok.chat(whole, add_generation_prompt=False).ids
    assert ids.tolist() == closed[: len(ids)].tolist() and closed[len(ids)] == tok.end_of_turn_id
    assert tok.decode(ids).endswith("one two")
    with pytest.raises(InputError, match="messages must be a list"):
        gs.chat_prompt(tok, [])


def test_the_chat_of_a_file(tmp_path):
    path = tmp_path / "chat [1].jsonl"
    path.write_text(json.dumps({"id": 3, "chat": CHAT}) + "\n")
    assert gs.read_chat(path, "chat") == CHAT
    with pytest.raises(InputError, match="no key 'messages'"):
        gs.read_chat(path, "messages")
    path.write_text((json.dumps({"chat": CHAT}) + "\n") * 3)
    with pytest.raises(InputError, match="several chats: give a file with one"):
        gs.read_chat(path, "chat")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="convert it to .jsonl"):
        gs.read_chat(tmp_path / "x.json", "chat")
