"""A chat as a prompt: what a model reads before it answers, or goes on with an answer."""

import glob
import os
from collections.abc import Mapping

import numpy as np

from gemma_scope_jax.data.documents import Chat, TextData, open_documents, parse
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import ROLES, Tokenizer


def read_chat(file: str | os.PathLike, messages: str) -> Chat:
    """The one chat of a JSON Lines file (as `TextData`), under the key `messages` of its object.

    Raises `InputError` for a file of several chats, or none.
    """
    data = TextData(files=(glob.escape(os.fspath(file)),), messages=messages)
    found = [record for record, _ in zip(open_documents(data).ordered(None), range(2))]
    if len(found) != 1:
        held = "several chats" if found else "no chat"
        raise InputError(f"{file}: holds {held}: give a file with one, a line of JSON")
    return parse(found[0], data)  # type: ignore[return-value]  # no text with `messages`


def chat_prompt(tokenizer: Tokenizer, chat: Chat) -> np.ndarray:
    """The ids int32 [T] of a chat, `<bos>` first, as they stand before the model's next token.

    The model's turn is opened at the end; if the last message is the model's, it is left open, so
    that the model goes on with it. Raises `InputError` for what `Tokenizer.chat` refuses.
    """
    last = chat[-1] if chat else None
    begun = isinstance(last, Mapping) and ROLES.get(str(last.get("role"))) == "model"
    ids = tokenizer.chat(chat, add_generation_prompt=not begun).ids
    if begun:
        ids = ids[: np.flatnonzero(ids == tokenizer.end_of_turn_id)[-1]]
    return ids
