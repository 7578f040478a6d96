"""Text in, packed token batches out: deterministic, shuffled, resumable at any batch boundary.

Rows are filled document after document; every piece of a document starts with <bos>, and segment
ids keep the pieces apart, so no token sees another document. Where the next batch begins is a
number of a document and a token in it: resuming tokenises nothing that came before.
"""

import collections
import contextlib
import copy
import dataclasses
import json
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import numpy as np

from gemma_scope_jax.data.document_files import SEPARATOR, Record
from gemma_scope_jax.data.documents import (
    Documents,
    HostShard,
    Source,
    StreamedDocuments,
    TextData,
    open_documents,
    parse,
    read_documents,
)
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.manifest import digest

__all__ = [
    "SEPARATOR",
    "TextData",
    "TokenBatch",
    "TokenBatches",
    "counting",
    "pack",
    "prefetch",
    "read_documents",
    "readings",
]

LABELS = ("turn", "system", "user", "model")  # what a chat's tokens may be of, see `Span`
_PLACE = ("epoch", "document", "offset")
_MIN_ROOM = 8  # a piece cut to fewer tokens would see next to nothing


@flax.struct.dataclass
class TokenBatch:
    """Packed rows: tokens and segment ids, int32 [B, T]; segment 0 is padding.

    `counts`, bool [B, T]: the tokens that the data lets count; no control tokens, and of chats only
    what the wanted roles say. None: nothing is known beyond the segments.
    """

    tokens: np.ndarray
    segments: np.ndarray
    counts: Any = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens of a document without <bos>, which of them count, where to start in them."""

    epoch: int
    document: int
    ids: np.ndarray
    counts: np.ndarray
    offset: int = 0


def fill_rows(
    pieces: Iterable[Piece], rows: int, length: int, bos: int, dtype: Any = bool
) -> Iterator[tuple[TokenBatch, Piece | None]]:
    """Batches of `rows` rows, each with the document from whose offset on the next one goes on.

    The last batch may be padded; nothing comes after it (None). `dtype` is that of `counts`, which
    may also be numbers that say more of a token, 0 for <bos> and padding.
    """
    if rows < 1 or length < 2:
        raise InputError(f"rows must hold <bos> and a token: batch {rows}, length {length}")
    tokens = np.zeros((rows, length), np.int32)
    segments, counts = np.zeros_like(tokens), np.zeros((rows, length), dtype)
    row, column, number = 0, 0, 1
    for piece in pieces:
        at, size = piece.offset, len(piece.ids)
        while at < size:
            room = length - column - 1
            if column and room < min(_MIN_ROOM, size - at):
                row, column, number = row + 1, 0, 1
                if row == rows:
                    batch = TokenBatch(tokens.copy(), segments.copy(), counts.copy())
                    yield batch, dataclasses.replace(piece, offset=at)
                    tokens[:], segments[:], counts[:], row = 0, 0, 0, 0
                continue
            part = slice(at, min(size, at + room))
            stop = column + 1 + part.stop - part.start
            tokens[row, column], tokens[row, column + 1 : stop] = bos, piece.ids[part]
            counts[row, column + 1 : stop] = piece.counts[part]
            segments[row, column:stop] = number
            at, column, number = part.stop, stop, number + 1
    if segments.any():
        yield TokenBatch(tokens, segments, counts), None


def pack(
    documents: Iterable[str], encode: Callable[[str], np.ndarray], batch: int, length: int, bos: int
) -> Iterator[TokenBatch]:
    """Batches of `batch` rows of `length` tokens; the last one is padded with segment 0.

    `encode` maps a document to token ids without <bos>; all of them count. A document that would
    get fewer than 8 tokens at the end of a row starts in the next.
    """
    ids = (encode(document) for document in documents)
    pieces = (Piece(0, 0, i, np.ones(len(i), bool)) for i in ids)
    return (filled for filled, _ in fill_rows(pieces, batch, length, bos))


class TokenBatches:
    """An iterator of `TokenBatch`es, [rows, length] each, packed as by `pack`.

    source     a `TextData`, a list or other iterable of strings, or a function returning one
    tokenizer  `model.tokenizer.Tokenizer` (`bos_id`, `special`, `encode`; `chat` for chats)
    seed       of the order; every epoch has another
    shard      (index, count): of `count` hosts this is the `index`th and takes its share
    epochs     how often the documents come; None: without end. The last batch may be padded
    position   a `position` of an earlier iterator over the same data: go on from there
    workers    threads that tokenise (a core each; about 0.5 million tokens/s); None: one a core,
               up to 16. They change nothing in the batches

    `position` is a small JSON-able dict: where the batch after the last one given begins. `rows`
    and `length` may change on resuming, everything else must not. Raises `InputError` for sources
    that cannot be read and positions that belong to other data.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        rows: int,
        length: int,
        *,
        seed: int = 0,
        shard: HostShard = (0, 1),
        epochs: int | None = None,
        position: Mapping[str, Any] | None = None,
        workers: int | None = None,
    ):
        self.rows, self.length, self.seed, self.shard = rows, length, seed, shard
        self.data = source if isinstance(source, TextData) else TextData()
        self._tokenizer = tokenizer
        self._documents: Documents = open_documents(source)
        self._workers = min(16, os.cpu_count() or 1) if workers is None else workers
        if self._workers < 1:
            raise InputError(f"workers must be at least 1, not {workers}")
        self._epochs = 1 if self._documents.once else epochs
        _check_shard(shard, self._documents)
        about = (self._documents, self.data, tokenizer, seed, shard)
        self.fingerprint = fingerprint(*about)
        self._about = about
        beginning = {"data": self.fingerprint, **dict.fromkeys(_PLACE, 0)}
        self._go_to(beginning if position is None else position)

    def at(self, position: Mapping[str, Any]) -> "TokenBatches":
        """The same batches from a position on, without looking through the files again."""
        other = copy.copy(self)
        other._go_to(position)
        return other

    def same_text(self, there: Any) -> bool:
        """Whether `there` is the `fingerprint` of this text, also as older versions gave it."""
        return there == self.fingerprint or same_text(there, *self._about)

    def _go_to(self, position: Mapping[str, Any]) -> None:
        numbers = [position.get(k) for k in _PLACE] if isinstance(position, Mapping) else [None]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise InputError(f"not a position in a text: {position!r}")
        if not self.same_text(position.get("data")):
            raise InputError(
                "the position to resume from belongs to other data: the text, its settings, seed, "
                "hosts or tokenizer have changed; restore them, or start again"
            )
        self.position: dict[str, Any] = {**position, "data": self.fingerprint}
        self._batches = fill_rows(self._pieces(), self.rows, self.length, self._tokenizer.bos_id)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        batch, rest = next(self._batches)
        if rest is None:
            place = (self._epochs, 0, 0)
        else:
            place = (rest.epoch, rest.document, rest.offset)
        self.position = {"data": self.fingerprint, **dict(zip(_PLACE, place))}
        return batch

    def _pieces(self) -> Iterator[Piece]:
        epoch, start, offset = (self.position[k] for k in _PLACE)
        with ThreadPoolExecutor(self._workers, "tokenise") as pool:
            while self._epochs is None or epoch < self._epochs:
                some = start > 0 or offset > 0
                records = self._documents.ordered(self.seed, epoch, self.shard, start)
                encoded = map_ahead(pool, self._encode, records, 4 * self._workers)
                for number, (ids, counts) in enumerate(encoded, start):
                    if offset > len(ids):
                        raise InputError("the text has changed since the run was stopped")
                    some |= len(ids) > 0
                    yield Piece(epoch, number, ids, counts, offset)
                    offset = 0
                if not some:
                    raise InputError("no text: all documents of this host are empty or unusable")
                epoch, start, offset = epoch + 1, 0, 0

    def _encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        return encode_record(self._tokenizer, record, self.data)


def fingerprint(
    documents: Documents,
    data: TextData,
    tok: Any,
    seed: int | None,
    shard: HostShard = (0, 1),
    *,
    named: bool = False,
) -> str:
    """Tells data, order and tokenizer from others; 16 hexadecimal digits.

    Where the text lies, and how that is spelled, does not matter: its content does. `named`: as
    versions before did, which knew files by names and sizes.
    """
    settings = dataclasses.asdict(data)
    for name in ("files", "tfds", "tfds_folder"):  # those are in the documents' identity
        del settings[name]
    if not isinstance(documents, StreamedDocuments):
        del settings["shuffle_window"]
    sample = tok.encode("A sample: 12 of them, über\n\tall.", bos=True).tolist()
    identity = documents.named() if named else documents.identity
    parts = [identity, settings, seed, list(shard), sample]
    return digest(json.dumps(parts))


def same_text(there: Any, *about: Any) -> bool:
    """Whether `there` is the `fingerprint` of `about`, or what it was before it knew content."""
    return there == fingerprint(*about) or there == fingerprint(*about, named=True)


def readings(position: Mapping[str, Any]) -> int:
    """How many times the text has been begun before a position: 2 where it is read again."""
    epoch, *rest = (position[name] for name in _PLACE)
    return epoch + any(rest)


def counting(
    batches: Iterable[tuple[TokenBatch, Any]], first: int, position: Mapping[str, Any]
) -> Iterator[tuple[TokenBatch, Any]]:
    """(batch, position after it) as they come, from `position` on, for those who wait for tokens
    that count: not before position `first` of their piece.

    Raises `InputError` once a whole pass over the text has had none.
    """
    place = lambda position: tuple(position[name] for name in _PLACE)
    epoch, *rest = place(position)
    waiting = True
    for batch, after in batches:
        if waiting:
            waiting = not _counts(batch, first)
            if waiting and place(after) >= (epoch + 1, *rest):
                raise InputError(
                    "in all of the text no token counts: none is of the roles and kinds that do, "
                    f"or lies at position {first} or later of its piece of a document"
                )
        yield batch, after


def _counts(batch: TokenBatch, first: int) -> bool:
    """Whether any token counts that is not before position `first` of its segment."""
    starts = np.diff(batch.segments, axis=1, prepend=0) != 0
    columns = np.arange(batch.segments.shape[1])
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    counts = True if batch.counts is None else np.asarray(batch.counts) != 0
    return bool(((batch.segments > 0) & (positions >= first) & counts).any())


def encode_record(tok: Any, record: Record, data: TextData) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a document without <bos>, int32 [n], and which of them count, bool [n]."""
    return labelled_record(tok, record, data)[:2]


def labelled_record(
    tok: Any, record: Record, data: TextData
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`encode_record`, and of which of `LABELS` each token is, int32 [n]; 0 outside of chats."""
    nobody = lambda n: np.zeros(n, np.int32)
    try:
        document = parse(record, data)
        if isinstance(document, str):
            ids = tok.encode(document, bos=False)
            return ids, ~tok.special[ids], nobody(len(ids))
        chat = tok.chat(document, add_generation_prompt=False)
    except InputError as error:
        if data.skip_bad:
            return nobody(0), np.zeros(0, bool), nobody(0)
        where = "" if record.where in str(error) else f"{record.where}: "
        hint = "" if record.kind == "string" else " (or set skip_bad=True)"
        raise InputError(f"{where}{error}{hint}") from error
    ids, said = chat.ids[1:], chat.mask(*data.counted_roles)[1:]
    numbers = np.array([LABELS.index(span.role) for span in chat.spans], np.int32)
    roles = np.repeat(numbers, [span.stop - span.start for span in chat.spans])[1:]
    return ids, said & ~tok.special[ids], roles


def _check_shard(shard: HostShard, documents: Documents) -> None:
    index, count = shard
    if not 0 <= index < count:
        raise InputError(f"shard {shard}: must be (index, count) with 0 <= index < count")
    if not isinstance(documents, StreamedDocuments) and documents.count < count:
        raise InputError(f"{documents.count} documents are too few to split over {count} hosts")


# -------------------------------------------------------------------------------------------------
# Ahead of time


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int
) -> Iterator[Any]:
    """`map(function, items)`, in order, with up to `ahead` items under way in the pool."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Prefetched:
    """What `prefetch` returns: an iterator of (batch, position after it).

    `close()` ends the thread, as does leaving a `with` block or forgetting the iterator.
    """

    def __init__(self, batches: Iterable[Any], n: int):
        self._queue: queue.Queue = queue.Queue(n)
        self._stop = threading.Event()
        arguments = (batches, self._queue, self._stop)  # not self: it must be collectable
        self._thread = threading.Thread(target=_run_ahead, args=arguments, daemon=True)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self._stop.is_set():
            raise StopIteration
        batch, position, error = self._queue.get()
        if error is not None:
            self._stop.set()
            raise error
        return batch, position

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _run_ahead(batches: Iterable[Any], done: queue.Queue, stop: threading.Event) -> None:
    def put(item) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                done.put(item, timeout=0.1)
                return

    try:
        for batch in batches:
            put((batch, getattr(batches, "position", None), None))
            if stop.is_set():
                return
        put((None, None, StopIteration()))
    except BaseException as error:  # whatever it is, the consumer must see it
        put((None, None, error))


def prefetch(batches: Iterable[Any], n: int = 4) -> Prefetched:
    """(batch, position after it), made ahead of time by one background thread; up to `n` wait.

    `position` is that of the batch taken, however far ahead `batches` is; None where `batches` has
    none. Errors in the thread reach whoever takes the next batch.
    """
    if n < 1:
        raise InputError(f"prefetch at least one batch, not {n}")
    return Prefetched(batches, n)
