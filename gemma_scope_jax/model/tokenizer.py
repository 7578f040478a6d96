"""Text to Gemma's token ids and back; text cannot produce control tokens.

A tokenizer that turns "<end_of_turn>" in a user's message into the control token lets that message
forge a conversation. Here `encode` treats such text as ordinary characters; control tokens come
only from `bos`, from `chat`, and from text that the caller trusts (`allow_special`).
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import ArrayLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.tokenizer_files import SPACE, find_tokenizer, read_tokenizer

ROLES = {"system": "system", "user": "user", "model": "model", "assistant": "model"}
SPAN_ROLES = ("turn", "system", "user", "model")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A rendered conversation.

    ids    int32 [T]
    roles  int32 [T], indices into `SPAN_ROLES`: "system", "user" or "model" for a message, "turn"
           for the template around it
    """

    ids: np.ndarray
    roles: np.ndarray

    def mask(self, *roles: str) -> np.ndarray:
        """bool [T]: tokens with one of the `roles`. Raises `InputError` for unknown roles."""
        if unknown := set(roles) - set(SPAN_ROLES):
            raise InputError(f"no such role: {unknown}; choose from {', '.join(SPAN_ROLES)}")
        return np.isin(self.roles, [SPAN_ROLES.index(role) for role in roles])


class Tokenizer:
    """Gemma's SentencePiece tokenizer; made by `load_tokenizer`. It can be pickled."""

    def __init__(self, model: bytes, rows: int = 0, foreign_template: str = ""):
        """
        model             the serialised SentencePiece model of `tokenizer_files.read_tokenizer`
        rows              the least number of ids. Those beyond the vocabulary mean nothing: no text
                          encodes to them, `decode` omits them, `decode_tokens` shows their number
        foreign_template  the file with a chat template of another format; `chat` then refuses
        """
        self._model, self._rows, self._foreign_template = model, rows, foreign_template
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise InputError(f"not a usable SentencePiece model ({error})") from error
        ids = list(range(self._processor.get_piece_size()))
        self._pieces: list[str] = self._processor.id_to_piece(ids)
        special = np.array(self._processor.is_control(ids), bool)
        special |= np.array(self._processor.is_unknown(ids), bool)
        self._special_ids = named = {self._pieces[i]: i for i in np.flatnonzero(special).tolist()}
        spare = range(len(ids), rows)
        self._pieces += [f"<no token {i}>" for i in spare]
        self.special: np.ndarray = np.append(special, np.ones(len(spare), bool))
        """bool [V]: the ids no text encodes to"""
        self.pad_id, self.eos_id = named["<pad>"], named["<eos>"]
        self.bos_id, self.unk_id = named["<bos>"], named["<unk>"]
        self.start_of_turn_id = named["<start_of_turn>"]
        self.end_of_turn_id = named["<end_of_turn>"]

    def __reduce__(self):
        return Tokenizer, (self._model, self._rows, self._foreign_template)

    @property
    def sentencepiece(self) -> bytes:
        """The serialised SentencePiece model, as the file tokenizer.model. Raises `InputError` if a
        chat template of another format belongs to it, which would be lost."""
        if self._foreign_template:
            raise InputError(
                f"{self._foreign_template}: the tokenizer's chat template is not Gemma's and would "
                "not be saved; keep that folder's own tokenizer files"
            )
        return self._model

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, bos: bool = True, *, allow_special: bool = False) -> np.ndarray:
        """`text` as int32 ids [T], <bos> first unless `bos` is False.

        Control tokens spelled out in `text` are ordinary characters, unless `allow_special`: then
        they become the tokens (for templates and other trusted text only). Raises `InputError` for
        text that is not valid Unicode.
        """
        ids = [self.bos_id] if bos else []
        if not allow_special:
            return np.array(ids + self._encode(text), np.int32)
        start = 0
        for match in self._special_pattern.finditer(_checked(text)):
            if (special := self._special_ids.get(match[0])) is not None:
                ids += self._encode(text[start : match.start()])
                ids.append(special)
                start = match.end()
        return np.array(ids + self._encode(text[start:]), np.int32)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(_checked(text))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        unused = re.compile(r"<unused\d+>")  # thousands: matched as one, then looked up
        named = [re.escape(p) for p in self._special_ids if not unused.fullmatch(p)]
        return re.compile("|".join([unused.pattern, *sorted(named, key=len, reverse=True)]))

    def decode(self, ids: ArrayLike, *, special: bool = False) -> str:
        """The text of `ids` (integers, [T]), without control tokens unless `special`.

        Bytes that are not UTF-8 (a character cut in the middle) become U+FFFD. Raises `InputError`
        for ids outside the vocabulary.
        """
        ids = self._checked_ids(ids)
        if not special:
            ids = ids[~self.special[ids]]
        return b"".join(self._surfaces[i] for i in ids.tolist()).decode(errors="replace")

    def decode_tokens(self, ids: ArrayLike) -> list[str]:
        """One string per token to display: real spaces, control tokens by name, bytes as <0xE2>."""
        return [self._pieces[i].replace(SPACE, " ") for i in self._checked_ids(ids).tolist()]

    def pieces(self, ids: ArrayLike) -> list[str]:
        """The vocabulary entries themselves: spaces as U+2581, bytes as <0xE2>."""
        return [self._pieces[i] for i in self._checked_ids(ids).tolist()]

    @cached_property
    def _surfaces(self) -> list[bytes]:
        """The UTF-8 text that each id stands for."""
        surfaces = [p.replace(SPACE, " ").encode() for p in self._pieces]
        is_byte = self._processor.is_byte(list(range(self._processor.get_piece_size())))
        for i in np.flatnonzero(is_byte).tolist():
            surfaces[i] = bytes([int(self._pieces[i][3:5], 16)])
        return surfaces

    def _checked_ids(self, ids: ArrayLike) -> np.ndarray:
        array = np.asarray(ids)
        if array.shape == (0,):
            return array.astype(np.int64)  # an empty list makes an array of floats
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            given = f"{array.dtype} {array.shape}"
            raise InputError(f"token ids must be integers in one row, not {given}")
        if len(bad := array[(array < 0) | (array >= self.vocab_size)]):
            known = f"0 to {self.vocab_size - 1}"
            raise InputError(f"token id {bad[0]} is not in the vocabulary ({known})")
        return array

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> Chat:
        """Render `messages` ({"role", "content"}) in Gemma 3's chat template.

        A content is a text, or a list of text parts (see `message_text`). Roles alternate user,
        model ("assistant" is the same), user, ...; a first "system" message is put before the first
        user's text, as in the published template. Contents are stripped and cannot contain control
        tokens. With `add_generation_prompt` the model's turn is opened at the end. Raises
        `InputError` for anything the template has no place for, and if the tokenizer came with a
        template of another format.
        """
        if self._foreign_template:
            raise InputError(
                f"{self._foreign_template}: the model's chat template is not Gemma's; render the "
                "chat with it elsewhere and encode the text with allow_special=True"
            )
        system, turns = checked_messages(messages)
        ids, roles, newline = [self.bos_id], ["turn"], self._encode("\n")
        for number, (role, content) in enumerate(turns):
            parts = [(f"{role}\n", "turn")]
            if number == 0 and system is not None:
                parts += [(system, "system"), ("\n\n", "turn")]
            said = self._encode_parts([*parts, (content, role)])
            ids += [self.start_of_turn_id, *(i for i, _ in said), self.end_of_turn_id, *newline]
            roles += ["turn", *(role for _, role in said), *["turn"] * (1 + len(newline))]
        if add_generation_prompt:
            ids += [self.start_of_turn_id, *self._encode("model\n")]
        roles += ["turn"] * (len(ids) - len(roles))
        numbers = np.array([SPAN_ROLES.index(role) for role in roles], np.int32)
        return Chat(np.array(ids, np.int32), numbers)

    def _encode_parts(self, parts: list[tuple[str, str]]) -> list[tuple[int, str]]:
        """Encode the parts as one text; each id gets the role of the part it starts in."""
        ids = self._encode("".join(text for text, _ in parts))
        starts = np.cumsum([0, *(len(self._surfaces[i]) for i in ids[:-1])])
        # A literal U+2581 in the text is the same token as a space, which is shorter.
        ends = np.cumsum([len(text.replace(SPACE, " ").encode()) for text, _ in parts])
        part = np.searchsorted(ends, starts, side="right")
        return [(i, parts[p][1]) for i, p in zip(ids, part.tolist())]


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise InputError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"(U+{ord(text[error.start]):04X}) at character {error.start}"
        raise InputError(f"the text has a lone surrogate {where}; decode it again") from error
    return text


def message_text(content: Any, where: str, role: str = "user") -> str:
    """The text of a chat message: its `content`, a text or parts ({"type": "text", "text": ..}).

    Parts are stripped and joined with nothing between them, as in Gemma 3's published template. The
    template uses only the first part of a system message, so it may have only one. Raises
    `InputError`, beginning with `where`, for parts that are not text (images) and for anything
    else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        wanted = "give a text or a list of text parts"
        raise InputError(f"{where}: content is {content!r:.60}; {wanted}")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            only = 'only text parts, such as {"type": "text", "text": "Hello"}, are supported'
            raise InputError(f"{where}: part {number} is {kind!r:.60}; {only}")
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}: part {number} has no text")
        texts.append(part["text"])
    if role != "system":
        return "".join(text.strip() for text in texts)
    if len(texts) > 1:
        drops = f"Gemma's template drops all but the first of the {len(texts)} parts"
        raise InputError(f"{where}: {drops} of a system message; join them into one")
    return "".join(texts)


def checked_messages(messages: Any) -> tuple[str | None, list[tuple[str, str]]]:
    """The system text, if any, and (role, stripped content) of every turn. Raises `InputError` for
    messages that are no chat, whatever the tokenizer."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    turns: list[tuple[str, str]] = []
    system = None
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f'message {number} is not {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"message {number} has role {role!r}; known are {', '.join(ROLES)}")
        content = message_text(content, f"message {number} ({role})", role)
        if not _checked(content).strip():
            raise InputError(f"message {number} ({role}) is empty")
        wanted = ("user", "model")[len(turns) % 2]
        if role == "system" and number == 0:
            system = content
        elif ROLES[role] == wanted:
            turns.append((wanted, content.strip()))
        else:
            raise InputError(f"message {number} is from {role!r}, but must be from {wanted!r}")
    if not turns:
        raise InputError("a system message needs a user's message after it")
    return system, turns


def fit_tokenizer(tokenizer: Tokenizer, config: GemmaConfig) -> Tokenizer:
    """`tokenizer` with an id for each row of the model's embedding, which is often padded; rows
    without a token are shown by number.

    Raises `InputError` if the tokenizer has more ids than the embedding has rows: they would be run
    as other tokens.
    """
    count = len(tokenizer.special)
    if count > config.vocab:
        fewer = f"{config.name} has {config.vocab}: it belongs to another model"
        raise InputError(f"the tokenizer has {count} tokens, but {fewer}")
    if count == config.vocab or not isinstance(tokenizer, Tokenizer):
        return tokenizer
    return Tokenizer(tokenizer._model, config.vocab, tokenizer._foreign_template)


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """Gemma's tokenizer from a model's name ("gemma-3-270m"), a folder, a .gguf, a tokenizer.model
    or a tokenizer.json.

    A name uses the packaged model if the extra `demo` is installed, and the Hugging Face hub
    otherwise. Raises `InputError` for files that are missing, broken or not Gemma's.
    """
    model, foreign_template = read_tokenizer(find_tokenizer(source))
    return Tokenizer(model, foreign_template=foreign_template)
