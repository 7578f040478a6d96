"""Sources of text: files, TensorFlow Datasets, Python objects; shuffled.

What can be read in any order (text, JSON Lines, ArrayRecord, TFDS, lists) is shuffled globally,
with only the byte offsets of the documents in memory. What can only be read from the beginning
(compressed files, iterables) is shuffled within a window. Either way the order is a function of
(seed, epoch), so a run resumes at a document's number.
"""

import codecs
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gemma_scope_jax.data import document_files as formats
from gemma_scope_jax.data.document_files import Record, decoded
from gemma_scope_jax.data.order import shuffled_positions, shuffled_window
from gemma_scope_jax.data.text_identity import file_digests, strings_digest
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.tokenizer import ROLES
from gemma_scope_jax.storage.manifest import digest

Chat = Sequence[Mapping[str, Any]]
_BLOCK = 1024  # positions shuffled at a time


@dataclasses.dataclass(frozen=True)
class TextData:
    """What to read: either `files` or `tfds`, and which part of a record is text.

    A compressed file among the files makes all of them a stream. Raises `InputError`.
    """

    files: tuple[str, ...] = ()
    """Text files, or globs of them: .txt (documents separated by a line holding one form feed),
    .jsonl (also .ndjson, .jsonlines), .jsonl.gz, .jsonl.zst and .array_record (UTF-8 text or JSON).
    Suffixes may be in any case."""
    tfds: str = ""
    """Read a TensorFlow Datasets name such as name/config:1.0.0, prepared as ArrayRecord, instead
    of files."""
    split: str = "train"
    """The split of the TFDS dataset."""
    tfds_folder: str = ""
    """Where TFDS datasets are; the default is TFDS's own folder."""
    field: str = "text"
    """The key that holds the text in JSON and TFDS records."""
    messages: str = ""
    """The key that holds a chat, a list of {"role": ..., "content": ...}; it replaces `field`."""
    roles: tuple[str, ...] = ("model",)
    """The roles whose tokens count in chats; "assistant" is the same as "model"."""
    shuffle_window: int = 10_000
    """Documents held in memory to shuffle what can only be read from its beginning."""
    skip_bad: bool = False
    """Leave out records that cannot be used, instead of stopping at the first."""

    def __post_init__(self):
        for name in ("files", "roles"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise InputError(f"{name} must be a tuple of strings, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.files and self.tfds:
            raise InputError("text comes from either files or tfds, not both")
        if unknown := set(self.roles) - set(ROLES):
            raise InputError(f"no such role: {sorted(unknown)}; known are {', '.join(ROLES)}")
        if self.messages and not self.roles:
            raise InputError("chats need at least one role whose tokens are used")
        if self.shuffle_window < 1:
            raise InputError(f"shuffle_window must be at least 1, not {self.shuffle_window}")


@dataclasses.dataclass(frozen=True)
class Indexed:
    """Documents that can be read in any order: `read` takes 0 to count - 1.

    `identity` is JSON that identifies them by content, `named` by names and sizes (older versions).
    """

    identity: Any
    named: Callable[[], Any]
    count: int
    read: Callable[[int], Record]
    once: ClassVar[bool] = False

    def numbers(
        self, seed: int | None, epoch: int, start: int, stop: int | None = None
    ) -> Iterator[int]:
        """Documents `start` to `stop`, by number, in an epoch's order; seed None: unshuffled."""
        end = self.count if stop is None else min(self.count, stop)
        for first in range(start, end, _BLOCK):
            positions = np.arange(first, min(end, first + _BLOCK))
            if seed is not None:
                positions = shuffled_positions(positions, self.count, seed, epoch)
            yield from positions.tolist()

    def ordered(self, seed: int | None, epoch: int = 0, start: int = 0) -> Iterator[Record]:
        """The documents of an epoch, from the `start`th on; seed None: unshuffled."""
        return map(self.read, self.numbers(seed, epoch, start))


@dataclasses.dataclass(frozen=True)
class StreamedDocuments:
    """Documents that can only be read from the beginning.

    `identity` and `named`: see `Indexed`. `read` takes the order of the parts (None: unshuffled)
    and gives all records; `once`: it can be called only once. `window`: documents held in memory.
    """

    identity: Any
    named: Callable[[], Any]
    parts: int
    read: Callable[[Sequence[int] | None], Iterator[Record]]
    window: int
    once: bool = False

    def ordered(self, seed: int | None, epoch: int = 0, start: int = 0) -> Iterator[Record]:
        """As `Indexed.ordered`; all earlier documents are read, too, to skip them."""
        if seed is None:
            records = self.read(None)
        else:
            order = shuffled_positions(np.arange(self.parts), self.parts, seed, epoch).tolist()
            records = shuffled_window(self.read(order), self.window, seed, epoch)
        return itertools.islice(records, start, None)


Documents = Indexed | StreamedDocuments
Source = TextData | Iterable[str] | Callable[[], Iterable[str]] | TokenBatch


def open_documents(source: Source) -> Documents:
    """The documents of `source`: a `TextData`, a list or other iterable of strings, a function
    that returns a fresh iterable for each epoch, or a batch.

    Reads files once, to identify them and to find the documents. Raises `InputError`.
    """
    if isinstance(source, TextData):
        if source.tfds:
            return _tfds(source)
        if not source.files:
            raise InputError("no text given: name files or a TFDS dataset")
        return _files(source)
    if isinstance(source, TokenBatch):
        return _of_batch(source)
    if isinstance(source, str):
        raise InputError('text must be TextData(files=("...",)) or several strings, not one string')
    if isinstance(source, Sequence):
        if not len(source):
            raise InputError("the list of documents is empty")
        get = lambda i: Record(f"document {i}", source[i], "string")
        named = lambda: ["list", [len(s) if isinstance(s, str) else -1 for s in source]]
        identity = ["list", len(source), strings_digest(source)]
        return Indexed(identity, named, len(source), get)
    if not callable(source) and not isinstance(source, Iterable):
        raise InputError(f"cannot take text from a {type(source).__name__}")

    def records(order: Sequence[int] | None) -> Iterator[Record]:
        strings = source() if callable(source) else source
        return (Record(f"document {i}", s, "string") for i, s in enumerate(strings))

    unknown = ["iterable"]  # until it is read
    once, window = isinstance(source, Iterator), TextData.shuffle_window
    return StreamedDocuments(unknown, lambda: unknown, 1, records, window, once)


def _of_batch(batch: TokenBatch) -> Indexed:
    """The documents of a batch: ids with <bos>, and the mask."""
    places = batch.document_slices()
    if not places:
        raise InputError("the TokenBatch holds no documents, only padding")
    ids, mask = np.asarray(batch.tokens, np.int32), np.asarray(batch.counted(0))
    found = [(ids[place], mask[place]) for place in places]
    get = lambda i: Record(f"document {i}", found[i], "tokens")
    parts = (len(t).to_bytes(8, "little") + t.tobytes() + used.tobytes() for t, used in found)
    identity = ["tokens", len(found), digest(b"".join(parts), 16)]
    return Indexed(identity, lambda: identity, len(found), get)


def _files(data: TextData) -> Documents:
    paths = formats.text_files(data.files)
    identity = ["files", file_digests(paths)]
    named = lambda: [[path.name, path.stat().st_size] for path in paths]
    if any(formats.kind_of(path) == "stream" for path in paths):

        def records(order: Sequence[int] | None) -> Iterator[Record]:
            for number in range(len(paths)) if order is None else order:
                yield from formats.stream_records(paths[number], skip_long=data.skip_bad)

        return StreamedDocuments(identity, named, len(paths), records, data.shuffle_window)
    files = [formats.indexed_file(path) for path in paths]
    ends = np.cumsum([file.count for file in files])
    if not ends[-1]:
        raise InputError(f"no text in {' '.join(data.files)}")

    def read(number: int) -> Record:
        which = int(np.searchsorted(ends, number, side="right"))
        return files[which].read(number - int(ends[which]) + files[which].count)

    return Indexed(identity, named, int(ends[-1]), read)


def _tfds(data: TextData) -> Indexed:
    """Random access to a prepared TFDS dataset, without TensorFlow."""
    what = f"TFDS dataset {data.tfds!r}"
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(f"{what} needs `pip install tensorflow-datasets array_record`") from None
    try:
        folder = os.path.expanduser(data.tfds_folder) or None
        builder = tfds.builder(data.tfds, data_dir=folder, file_format="array_record")
        source = builder.as_data_source(split=data.split)
    except Exception as error:  # TFDS raises dozens of types
        raise InputError(
            f"{what}, split {data.split!r}: {reason(error)}; prepare it by "
            f"`tfds build {data.tfds} --file_format=array_record`"
        ) from error
    if not len(source):
        raise InputError(f"{what}, split {data.split!r} is empty")
    name = f"TFDS {data.tfds} {data.split}"
    get = lambda i: Record(f"{name}, record {i}", source[i], "mapping")
    identity = [builder.info.full_name, data.split, len(source)]  # a version's data never change
    return Indexed(identity, lambda: identity, len(source), get)


def read_documents(patterns: Sequence[str]) -> list[str]:
    """All documents of the files in order. Raises `InputError` for bad files and if none match."""
    data = TextData(files=tuple(patterns))
    documents = [parse(record, data) for record in open_documents(data).ordered(None)]
    if not documents:
        raise InputError(f"no text in {' '.join(patterns)}")
    return documents  # type: ignore[return-value]  # no chats without `messages`


def sample_documents() -> list[str]:
    """The bundled sample: 2,600 tokens, too few to show small differences and rare features."""
    text = (Path(__file__).parent.parent / "packaged" / "sample.txt").read_text(encoding="utf-8")
    return text.split(formats.SEPARATOR)


def parse(record: Record, data: TextData) -> str | Chat:
    """The text of a record, or its chat if `data.messages`. `InputError`s name the place."""
    value, kind, where = record.value, record.kind, record.where
    if kind == "long":
        raise formats.too_long(where)
    if kind in ("text", "string") and data.messages:
        raise InputError(f"{where}: plain text holds no chats; leave out `messages`")
    if kind == "string":
        if not isinstance(value, str):
            raise InputError(f"{where}: must be a str, not {type(value).__name__}")
        return value
    if kind == "mapping":
        return _take(value, where, data)
    plain = kind == "either" and not data.messages
    other = plain and value.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{"
    if kind == "text" or other:
        return decoded(value, where)
    return _take_json(value, where, data, plain)


def _take_json(value: bytes, where: str, data: TextData, plain: bool) -> str | Chat:
    """`_take` of a line of JSON; with `plain` it may also be text that only looks like JSON.

    As fast as `json.loads`, and as strict as `strict_json` only about the keys that are read.
    """
    watched = (data.messages, "role", "content") if data.messages else (data.field,)
    try:
        text = value.decode("utf-8-sig")
        quoted = json.dumps(data.field, ensure_ascii=False)
        often = data.messages or text.count(quoted) > 1  # perhaps twice in one object
        found = json.loads(text, object_pairs_hook=partial(_once, watched) if often else None)
        taken = _take(found, where, data)
        if "\\ud" in text or "\\uD" in text:  # an escape may write half a character
            json.dumps(taken, ensure_ascii=False).encode()
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: not JSON (nested too deeply to be read)") from None
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: its text has a lone surrogate, half a character") from error
    except ValueError as error:
        if plain and isinstance(error, json.JSONDecodeError):
            return decoded(value, where)
        raise InputError(f"{where}: not JSON ({reason(error)})") from error
    return taken


def _once(watched: Sequence[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; raises `ValueError` if a key that is read occurs twice in it."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        if twice := [name for name in watched if names.count(name) > 1]:
            raise ValueError(f"the key {twice[0]!r} occurs twice in one object")
    return found


def _take(value: Any, where: str, data: TextData) -> str | Chat:
    """The text or the chat of a JSON or TFDS record."""
    key = data.messages or data.field
    if not isinstance(value, Mapping) or key not in value:
        keys = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no object"
        keys = keys if len(keys) <= 200 else f"{keys[:197]}..."
        raise InputError(f"{where}: no key {key!r} (it has {keys}); name it in the data's config")
    value = value[key]
    if not data.messages:
        value = _string(value, where)
        if not isinstance(value, str):
            raise InputError(f"{where}: {key!r} must be text, not {type(value).__name__}")
        return value
    messages = _rows(value)
    if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
        raise InputError(f"{where}: {key!r} must be a list of messages")
    return [_message(message, where) for message in messages]


def _message(message: Any, where: str) -> Any:
    """A message of strings, whose content may be a list of parts; `Tokenizer.chat` checks it."""
    if not isinstance(message, Mapping):
        return message
    strings = lambda part: {k: _string(v, where) for k, v in part.items()}
    plain = strings(message)
    content = _rows(plain.get("content"))
    if isinstance(content, Iterable) and not isinstance(content, str | Mapping):
        plain["content"] = [strings(p) if isinstance(p, Mapping) else p for p in content]
    return plain


def _rows(value: Any) -> Any:
    """A sequence of records, which TFDS stores as a record of sequences."""
    column = lambda v: isinstance(v, Sequence | np.ndarray) and not isinstance(v, str | bytes)
    if isinstance(value, Mapping) and all(map(column, value.values())):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value


def _string(value: Any, where: str) -> Any:
    """A string, which TFDS stores as bytes."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from error
