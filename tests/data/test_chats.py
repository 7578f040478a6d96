"""A chat as a prompt: the model's turn is open at its end."""

import json
import re

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
    for wrong in ([], asked[0], "one", None):
        with pytest.raises(InputError, match="messages must be a list"):
            gs.chat_prompt(tok, wrong)


def test_the_chat_of_a_file(tmp_path):
    path = tmp_path / "chat [1].jsonl"
    path.write_text(json.dumps({"id": 3, "chat": CHAT}) + "\n")
    assert gs.read_chat(path, "chat") == CHAT


USER = {"role": "user", "content": "one"}
LINE = json.dumps({"chat": [USER]}) + "\n"
WRONG = {
    "another key": ("a.jsonl", '{"talk": []}', r"no key 'chat' \(it has talk\); name the key of"),
    "no messages": ("a.jsonl", '{"chat": []}', "the list 'chat' is empty; put a user's message"),
    "no list": ("a.jsonl", '{"chat": "one"}', "'chat' must be a list of messages"),
    "a blank message": (
        "a.jsonl",
        json.dumps({"chat": [{"role": "user", "content": " "}]}),
        r"message 0 \(user\) is empty; correct the chat under 'chat'",
    ),
    "two users": ("a.jsonl", json.dumps({"chat": [USER, USER]}), "message 1 .* from 'model'; corr"),
    "three chats": ("a.jsonl", LINE * 3, "several chats: give a file with one"),
    "an empty file": ("a [1].jsonl", "\n", "no chat: give a file with one"),
    "plain text": ("a.txt", LINE, "is plain text, not a chat: give a file named .jsonl"),
    "another format": ("a.json", "[]", "convert it to .jsonl"),
    "no file": ("a [1].jsonl", None, "no such file"),
    "a folder": ("", None, "is a folder; name a file in it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_chat_is_one_line_with_the_file(tmp_path, what):
    name, text, says = WRONG[what]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / name))}[:,] .*{says}"):
        gs.read_chat(tmp_path / name, "chat")
