"""Where text comes from: files, TensorFlow Datasets, Python objects; shuffled, split over hosts.

What can be read in any order (text, JSON Lines, ArrayRecord, TFDS, lists) is shuffled globally: the
memory holds the byte offsets of the documents and nothing else. What can only be read from its
beginning (compressed files, iterables) is shuffled within a window. Either way the order is a
function of (seed, epoch), so a run resumes by a document's number.
"""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gemma_scope_jax.data.document_files import (
    Record,
    decoded,
    indexed_file,
    is_stream,
    stream_records,
    text_files,
    too_long,
)
from gemma_scope_jax.data.order import shuffled_positions, shuffled_window
from gemma_scope_jax.data.text_identity import file_digests, strings_digest
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.tokenizer import ROLES

Chat = Sequence[Mapping[str, Any]]
HostShard = tuple[int, int]  # (index, count): which of `count` hosts this is
_BLOCK = 1024  # positions shuffled at a time


@dataclasses.dataclass(frozen=True)
class TextData:
    """What to read: either `files` or `tfds`, and what of a record is text.

    files           names or glob patterns; .txt (documents separated by a line holding one form
                    feed), .jsonl (also .ndjson, .jsonlines), .jsonl.gz, .jsonl.zst, .array_record
                    (UTF-8 text or JSON); suffixes in any case
    tfds            a TensorFlow Datasets name such as "name/config:1.0.0", prepared as ArrayRecord
    split           of the TFDS dataset
    tfds_folder     where TFDS datasets lie; default: TFDS's own
    field           the key that holds the text in JSON and TFDS records
    messages        instead of `field`: the key that holds a chat, [{"role": ..., "content": ...}],
                    as `model.tokenizer.Tokenizer.chat` takes it
    roles           whose tokens count in chats ("assistant" is the same as "model")
    shuffle_window  documents held in memory to shuffle compressed files and iterables
    skip_bad        leave out records that cannot be used instead of stopping at the first

    One compressed file among the files makes all of them a stream. Raises `InputError`.
    """

    files: tuple[str, ...] = ()
    tfds: str = ""
    split: str = "train"
    tfds_folder: str = ""
    field: str = "text"
    messages: str = ""
    roles: tuple[str, ...] = ("model",)
    shuffle_window: int = 10_000
    skip_bad: bool = False

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
            raise InputError("chats need at least one role whose tokens count")
        if self.shuffle_window < 1:
            raise InputError(f"shuffle_window must be at least 1, not {self.shuffle_window}")

    @property
    def counted_roles(self) -> tuple[str, ...]:
        """`roles` as `tokenizer.Chat.mask` knows them."""
        return tuple(dict.fromkeys(ROLES[role] for role in self.roles))


@dataclasses.dataclass(frozen=True)
class Indexed:
    """Documents that can be read in any order.

    `identity` is JSON that tells these documents from others, by content; `named` gives what older
    versions took for it (names and sizes). `read` takes 0 .. count - 1.
    """

    identity: Any
    count: int
    read: Callable[[int], Record]
    named: Callable[[], Any]
    once: bool = False

    def ordered(self, seed: int, epoch: int, shard: HostShard, start: int = 0) -> Iterator[Record]:
        """This host's documents of an epoch, from its `start`th on."""
        index, hosts = shard
        for first in range(index + start * hosts, self.count, hosts * _BLOCK):
            stop = min(self.count, first + hosts * _BLOCK)
            positions = np.arange(first, stop, hosts)
            for number in shuffled_positions(positions, self.count, seed, epoch).tolist():
                yield self.read(number)

    def in_order(self) -> Iterator[Record]:
        """All documents as they lie."""
        return map(self.read, range(self.count))


@dataclasses.dataclass(frozen=True)
class StreamedDocuments:
    """Documents that can only be read from the beginning.

    `identity` and `named` as of `Indexed`. `read` takes the order of the parts (None: as they lie)
    and gives all records; `once`: it can be called once only.
    """

    identity: Any
    parts: int
    read: Callable[[Sequence[int] | None], Iterator[Record]]
    window: int
    named: Callable[[], Any]
    once: bool = False

    def ordered(self, seed: int, epoch: int, shard: HostShard, start: int = 0) -> Iterator[Record]:
        """This host's documents of an epoch, from its `start`th on; all are read, to skip them."""
        index, hosts = shard
        order = shuffled_positions(np.arange(self.parts), self.parts, seed, epoch).tolist()
        shuffled = shuffled_window(self.read(order), self.window, seed, epoch)
        for position, record in enumerate(shuffled):
            if position % hosts == index and position // hosts >= start:
                yield record

    def in_order(self) -> Iterator[Record]:
        """All documents as they lie."""
        return self.read(None)


Documents = Indexed | StreamedDocuments
Source = TextData | Iterable[str] | Callable[[], Iterable[str]] | TokenBatch


def open_documents(source: Source, window: int = 10_000) -> Documents:
    """The documents of `source`: a `TextData`, a list or other iterable of strings, a function
    that returns a fresh iterable for each epoch (`window` is its shuffle window), or a batch.

    Reads the files once, for their identity and for where documents begin. Raises `InputError` for
    what cannot be read.
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
        return Indexed(identity, len(source), get, named)
    if not callable(source) and not isinstance(source, Iterable):
        raise InputError(f"cannot take text from a {type(source).__name__}")

    def records(order):
        strings = source() if callable(source) else source
        return (Record(f"document {i}", s, "string") for i, s in enumerate(strings))

    identity = ["iterable"]  # of what comes nothing is known before it comes
    once = isinstance(source, Iterator)
    return StreamedDocuments(identity, 1, records, window, lambda: identity, once=once)


def _of_batch(batch: TokenBatch) -> Indexed:
    """The documents of a batch: ids with <bos>, and the mask."""
    places = batch.document_slices()
    if not places:
        raise InputError("the TokenBatch holds no documents, only padding")
    ids, mask = np.asarray(batch.tokens, np.int32), np.asarray(batch.counted(0))
    found = [(ids[place], mask[place]) for place in places]
    get = lambda i: Record(f"document {i}", found[i], "tokens")
    digest = hashlib.blake2b(digest_size=16)
    for tokens, used in found:
        digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + used.tobytes())
    identity = ["tokens", len(found), digest.hexdigest()]
    return Indexed(identity, len(found), get, lambda: identity)


def _files(data: TextData) -> Documents:
    paths = text_files(data.files)
    identity = ["files", file_digests(paths)]
    named = lambda: [[path.name, path.stat().st_size] for path in paths]
    if any(is_stream(path) for path in paths):

        def records(order):
            for number in range(len(paths)) if order is None else order:
                yield from stream_records(paths[number], skip_long=data.skip_bad)

        return StreamedDocuments(identity, len(paths), records, data.shuffle_window, named)
    files = [indexed_file(path) for path in paths]
    ends = np.cumsum([file.count for file in files])
    if not ends[-1]:
        raise InputError(f"no text in {' '.join(data.files)}")

    def read(number: int) -> Record:
        which = int(np.searchsorted(ends, number, side="right"))
        return files[which].read(number - int(ends[which]) + files[which].count)

    return Indexed(identity, int(ends[-1]), read, named)


def _tfds(data: TextData) -> Indexed:
    """Random access to a prepared TFDS dataset, without TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(
            f"TFDS dataset {data.tfds!r} needs `pip install tensorflow-datasets array_record`"
        ) from None
    try:
        builder = tfds.builder(
            data.tfds,
            data_dir=os.path.expanduser(data.tfds_folder) or None,
            file_format="array_record",
        )
        source = builder.as_data_source(split=data.split)
    except Exception as error:  # TFDS raises dozens of types
        raise InputError(
            f"TFDS dataset {data.tfds!r}, split {data.split!r}: {reason(error)}; prepare it by "
            f"`tfds build {data.tfds} --file_format=array_record`"
        ) from error
    if not len(source):
        raise InputError(f"TFDS dataset {data.tfds!r}, split {data.split!r} is empty")
    name = f"TFDS {data.tfds} {data.split}"
    get = lambda i: Record(f"{name}, record {i}", source[i], "mapping")
    identity = [builder.info.full_name, data.split, len(source)]  # a version's data never change
    return Indexed(identity, len(source), get, lambda: identity)


def read_documents(patterns: Sequence[str]) -> list[str]:
    """All documents of the files as they lie. Raises `InputError` for bad files and for none."""
    data = TextData(files=tuple(patterns))
    documents = [parse(record, data) for record in open_documents(data).in_order()]
    if not documents:
        raise InputError(f"no text in {' '.join(patterns)}")
    return documents  # type: ignore[return-value]  # no chats without `messages`


def parse(record: Record, data: TextData) -> str | Chat:
    """The text of a record, or its chat if `data.messages`. Raises `InputError` saying where."""
    value, kind = record.value, record.kind
    if kind == "long":
        raise too_long(record.where)
    if kind in ("text", "string") and data.messages:
        raise InputError(f"{record.where}: plain text holds no chats; leave out `messages`")
    if kind == "string":
        if not isinstance(value, str):
            raise InputError(f"{record.where}: must be a str, not {type(value).__name__}")
        return value
    if kind == "text":
        return decoded(value, record.where)
    if kind == "mapping":
        return _take(value, record.where, data)
    plain = kind == "either" and not data.messages
    if plain and value.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
        return decoded(value, record.where)
    return _take_json(value, record.where, data, plain)


def _take_json(value: bytes, where: str, data: TextData, plain: bool) -> str | Chat:
    """`_take` of a line of JSON; with `plain` it may also be text that only looks like it.

    Stricter than `json.loads` where the text is concerned and as fast: what other keys hold does
    not matter, so not all that `strict_json` refuses is refused here.
    """
    watched = (data.messages, "role", "content") if data.messages else (data.field,)
    try:
        text = value.decode("utf-8-sig")
        quoted = json.dumps(data.field, ensure_ascii=False)
        often = data.messages or text.count(quoted) > 1  # perhaps in one object
        found = json.loads(text, object_pairs_hook=partial(_once, watched) if often else None)
        taken = _take(found, where, data)
        if "\\ud" in text or "\\uD" in text:  # an escape may write half a character
            json.dumps(taken, ensure_ascii=False).encode()
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: not JSON (nested too deeply to be read)") from None
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: a lone surrogate in its text, half a character") from error
    except ValueError as error:
        if plain and isinstance(error, json.JSONDecodeError):
            return decoded(value, where)
        raise InputError(f"{where}: not JSON ({reason(error)})") from error
    return taken


def _once(watched: Sequence[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which the keys that are read are there once: else which of them was meant?"""
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
    """A message of strings, whose content may be a list of parts; what else it is `chat` says."""
    if not isinstance(message, Mapping):
        return message
    plain = {k: _string(v, where) for k, v in message.items()}
    content = _rows(plain.get("content"))
    if isinstance(content, Iterable) and not isinstance(content, str | Mapping):
        strings = lambda p: {k: _string(v, where) for k, v in p.items()}
        plain["content"] = [strings(p) if isinstance(p, Mapping) else p for p in content]
    return plain


def _rows(value: Any) -> Any:
    """TFDS keeps a sequence of records as a record of sequences."""
    columns = isinstance(value, Mapping) and all(
        isinstance(v, Sequence | np.ndarray) and not isinstance(v, str | bytes)
        for v in value.values()
    )
    return [dict(zip(value, row)) for row in zip(*value.values())] if columns else value


def _string(value: Any, where: str) -> Any:
    """TFDS keeps strings as bytes."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from error
