"""A chat as a prompt: what a model reads before it answers, or goes on with an answer."""

import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope_jax.data.document_files import kind_of, stream_records
from gemma_scope_jax.data.documents import Chat, TextData, parse
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import ROLES, Tokenizer, checked_messages
from gemma_scope_jax.storage.paths import expanded, is_remote


def read_chat(file: str | os.PathLike, messages: str) -> Chat:
    """The one chat of a local JSON Lines file, under the key `messages` of its object.

    Raises `InputError`, which names the file, for one of several chats or none, and for messages
    that `Tokenizer.chat` refuses.
    """
    path = expanded(file)
    if is_remote(file):
        raise InputError(f"{file}: a chat is read from a local file; copy it here first")
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "no such file"
        raise InputError(f"{file}: {what}")
    if kind_of(path) == "text":
        says = "is plain text, not a chat: give a file named .jsonl with a line of JSON"
        raise InputError(f"{file}: {says}")
    found = list(itertools.islice(stream_records(path), 2))
    if len(found) != 1:
        held = "several chats" if found else "no chat"
        raise InputError(f"{file}: holds {held}: give a file with one, a line of JSON")
    try:
        chat = parse(found[0], TextData(messages=messages))
    except InputError as error:  # of a whole data set's keys, here of one
        says = str(error).replace("name it in the data's config", "name the key of the chat")
        raise InputError(says) from None
    if not chat:
        raise InputError(f"{file}: the list {messages!r} is empty; put a user's message into it")
    try:
        checked_messages(chat)
    except InputError as error:
        raise InputError(f"{file}: {error}; correct the chat under {messages!r}") from None
    return chat  # type: ignore[return-value]  # no text with `messages`


def chat_prompt(tokenizer: Tokenizer, chat: Chat) -> np.ndarray:
    """The ids int32 [T] of a chat, `<bos>` first, as they stand before the model's next token.

    The model's turn is opened at the end; if the last message is the model's, it is left open, so
    that the model goes on with it. Raises `InputError` for what `Tokenizer.chat` refuses.
    """
    last = chat[-1] if isinstance(chat, Sequence) and chat else None
    begun = isinstance(last, Mapping) and ROLES.get(str(last.get("role"))) == "model"
    ids = tokenizer.chat(chat, add_generation_prompt=not begun).ids
    if begun:
        ids = ids[: np.flatnonzero(ids == tokenizer.end_of_turn_id)[-1]]
    return ids
