"""What is to be extracted, cut into shards: which documents, in which order, as packed batches.

A shard is a run of documents of the shuffled order, packed by itself. So what is in it depends on
nothing but its number: any process may make any shard, in any order, again and again, and the store
that many processes make is that of one.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gemma_scope_jax.data.batches import encode_record, fingerprint, same_text
from gemma_scope_jax.data.document_files import Record
from gemma_scope_jax.data.documents import Documents, Indexed, TextData, open_documents
from gemma_scope_jax.data.order import shuffled_positions
from gemma_scope_jax.data.packing import Piece, fill_rows
from gemma_scope_jax.data.prefetch import map_ahead
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.tokenizer import Tokenizer

SAMPLE = 2_000_000  # tokens counted before the start: a target up to here is met to the document
FEW = 200_000  # likewise where all the text is wanted
_BLOCK = 1024  # positions shuffled at a time


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents in an order, as tokens. seed None: as they lie."""

    documents: Documents
    data: TextData
    tokenizer: Tokenizer
    seed: int | None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.documents, self.data, self.tokenizer, self.seed)

    def same_text(self, there: Any) -> bool:
        """Whether `there` is the `fingerprint` of this text, also as older versions gave it."""
        return same_text(there, self.documents, self.data, self.tokenizer, self.seed)

    @property
    def shuffled(self) -> int | None:
        """Of how many documents the numbers are shuffled; None: they count the order itself."""
        if isinstance(self.documents, Indexed) and self.seed is not None:
            return self.documents.count
        return None

    def records(self, start: int, stop: int | None = None) -> Iterator[tuple[int, Record]]:
        """(number, record) of the documents at positions `start` to `stop` of the order.

        Numbers count documents as they lie, where they can be read in any order; of compressed
        files and iterables they count the order itself.
        """
        if isinstance(self.documents, Indexed):
            count = self.documents.count
            stop = count if stop is None else min(stop, count)
            for first in range(start, stop, _BLOCK):
                numbers = np.arange(first, min(first + _BLOCK, stop))
                if self.seed is not None:
                    numbers = shuffled_positions(numbers, count, self.seed, 0)
                for number in numbers.tolist():
                    yield number, self.documents.read(number)
            return
        some = (
            self.documents.in_order()
            if self.seed is None
            else self.documents.ordered(self.seed, 0, (0, 1))
        )
        yield from itertools.islice(enumerate(some), start, stop)

    def encode(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        return encode_record(self.tokenizer, record, self.data)


def open_text(source: Any, tokenizer: Tokenizer, seed: int | None) -> Text:
    """`source` as the trainer's. Raises `InputError` for what can be read only once."""
    data = source if isinstance(source, TextData) else TextData()
    documents = open_documents(source)
    if documents.once:
        raise InputError(
            "an iterator can be read only once; give a list or a function that returns an iterator"
        )
    return Text(documents, data, tokenizer, seed)


class Size(NamedTuple):
    """How many documents, tokens of one (with its `<bos>`), and the share of them that count."""

    documents: int
    mean: float
    share: float


def measure(text: Text, tokens: int | None, first: int = 1) -> Size:
    """How much of the text holds `tokens` tokens, each document's `<bos>` included; None: all.

    Reads the first tokens, at least to one that counts and lies at position `first` of its document
    or later, and goes on from their mean. Raises `InputError` if there is none.
    """
    read = counted = documents = 0
    wanted, found = FEW if tokens is None else min(tokens, SAMPLE), False

    def sizes(numbered: tuple[int, Record]) -> tuple[int, int, bool]:
        ids, mask = text.encode(numbered[1])
        late = bool(mask[max(first - 1, 0) :].any())  # <bos> is at position 0
        return len(ids) + (len(ids) > 0), int(mask.sum()), late

    with ThreadPoolExecutor(_threads(), "tokenise") as pool:
        for size, some, late in map_ahead(pool, sizes, text.records(0), 4 * _threads()):
            documents, read, counted = documents + 1, read + size, counted + some
            found |= late
            if read >= wanted and found:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if not read:
        raise InputError("no text: all documents are empty or unusable")
    if not found:
        raise InputError(
            "in all of the text no token counts: none is of the roles and kinds that do, or lies "
            f"at position {first} or later of its document"
        )
    size = Size(documents, read / documents, counted / read)
    if tokens is not None and (read >= tokens or read < wanted):
        return size
    known = text.documents.count if isinstance(text.documents, Indexed) else None
    if tokens is None:
        known = known if known is not None else sum(1 for _ in text.records(0))
        return size._replace(documents=known)
    needed = -int(-tokens // size.mean)
    if known is None:
        known = sum(1 for _ in text.records(0, needed + 1))
    return size._replace(documents=min(needed, known))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed batch of a shard: `pieces` int64 [p, 3] are (document's number, offset in it, its
    length with `<bos>`), row after row.
    """

    shard: int
    batch: TokenBatch
    pieces: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ended:
    """A shard is done: its documents, (number, where they are, tokens without `<bos>`) each."""

    shard: int
    documents: list[tuple[int, str, int]]


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """`documents` of the text's order, `per_shard` in each shard, in batches [B, T]."""

    text: Text
    documents: int
    per_shard: int
    batch_size: int
    context_size: int
    mean: float  # tokens a document, about
    share: float = 1.0  # of them that count, about

    @property
    def shards(self) -> int:
        return -(-self.documents // self.per_shard)

    def in_shard(self, shard: int) -> int:
        """How many documents a shard has."""
        return min(self.per_shard, self.documents - shard * self.per_shard)

    def batches(self, shards: Sequence[int]) -> Iterator[Packed | Ended]:
        """The batches of some shards, ascending, each shard's followed by its `Ended`."""
        with ThreadPoolExecutor(_threads(), "tokenise") as pool:
            encode = partial(_encode, self.text)
            numbered = self._records(shards)
            encoded = map_ahead(pool, encode, numbered, 4 * _threads())
            found = itertools.groupby(encoded, key=lambda e: e[0])
            for shard, documents in found:
                yield from self._shard(shard, documents)

    def _records(self, shards: Sequence[int]) -> Iterator[tuple[int, int, Record]]:
        n = self.per_shard
        if isinstance(self.text.documents, Indexed):
            for shard in shards:
                for number, record in self.text.records(
                    n * shard, n * shard + self.in_shard(shard)
                ):
                    yield shard, number, record
            return
        wanted, last = set(shards), max(shards, default=-1)
        stop = min(self.documents, n * (last + 1))
        for number, record in self.text.records(0, stop):
            if number // n in wanted:
                yield number // n, number, record

    def _shard(self, shard: int, encoded: Iterable[tuple]) -> Iterator[Packed | Ended]:
        documents: list[tuple[int, str, int]] = []

        def pieces() -> Iterator[Piece]:
            for place, (_, number, where, ids, mask) in enumerate(encoded):
                documents.append((number, shown(where), len(ids)))
                yield Piece(0, place, ids, mask)

        place = offset = 0
        bos = self.text.tokenizer.bos_id
        for batch, _ in fill_rows(pieces(), self.batch_size, self.context_size, bos):
            found = []
            for length in _piece_lengths(batch.segments):
                while offset == documents[place][2]:
                    place, offset = place + 1, 0
                found.append((documents[place][0], offset, length))
                offset += length - 1
            yield Packed(shard, batch, np.array(found, np.int64).reshape(-1, 3))
        yield Ended(shard, documents)


def _piece_lengths(segments: np.ndarray) -> list[int]:
    """Of rows of segment ids 1, 2, ... and 0: how long each piece is, row after row."""
    return [n for row in segments for n in np.bincount(row)[1:].tolist() if n]


def _encode(text: Text, item: tuple[int, int, Record]) -> tuple:
    shard, number, record = item
    ids, mask = text.encode(record)
    return shard, number, record.where, ids, mask


def _threads() -> int:
    return min(16, os.cpu_count() or 1)
