"""What to extract, cut into shards: which documents, in which order, as packed batches.

A shard is a run of documents of the shuffled order, packed by itself, so its content depends only
on its number: any process may make any shard at any time, and the store is the same.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gemma_scope_jax.data.batches import THREADS, Text, tokenisers
from gemma_scope_jax.data.document_files import Record
from gemma_scope_jax.data.documents import Source, TextData, open_documents
from gemma_scope_jax.data.packing import Piece, fill_rows
from gemma_scope_jax.data.prefetch import map_ahead
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.tokenizer import Tokenizer

SAMPLE = 2_000_000  # tokens counted before the start: targets up to here are met to the document
FEW = 200_000  # tokens counted before the start if all the text is wanted
Encoded = tuple[int, int, str, np.ndarray, np.ndarray]  # shard, number, where, ids, mask


def open_text(source: Source, tokenizer: Tokenizer, seed: int | None) -> Text:
    """`source` as for training. Raises `InputError` for what can be read only once."""
    documents = open_documents(source)
    if documents.once:
        raise InputError(
            "an iterator can be read only once; give a list, or a function that returns one"
        )
    data = source if isinstance(source, TextData) else TextData()
    return Text(documents, data, tokenizer, seed)


class Size(NamedTuple):
    """The number of documents, tokens per document (with `<bos>`), and the share that is used."""

    documents: int
    mean: float
    share: float


def measure(text: Text, tokens: int | None, first: int = 1) -> Size:
    """How much of the text holds `tokens` tokens, each document's `<bos>` included; None: all.

    Reads the first tokens, up to at least one that is used at position `first` of its document or
    later, and extrapolates their mean. Raises `InputError` if there is no such token.
    """
    read = used = documents = 0
    wanted, found = FEW if tokens is None else min(tokens, SAMPLE), False

    def sizes(numbered: tuple[int, Record]) -> tuple[int, int, bool]:
        ids, mask = text.encode(numbered[1])
        late = bool(mask[max(first - 1, 0) :].any())  # <bos> is at position 0
        return len(ids) + (len(ids) > 0), int(mask.sum()), late

    with tokenisers() as pool:
        for size, some, late in map_ahead(pool, sizes, text.records(0), 4 * THREADS):
            documents, read, used = documents + 1, read + size, used + some
            found |= late
            if read >= wanted and found:
                break
    if not read:
        raise InputError("no text: all documents are empty or unusable")
    if not found:
        raise InputError(
            "no token counts in the whole text: none has one of the selected roles and kinds and "
            f"lies at position {first} or later of its document"
        )
    size = Size(documents, read / documents, used / read)
    if tokens is not None and (read >= tokens or read < wanted):
        return size
    needed = None if tokens is None else -int(-tokens // size.mean)
    known = text.count
    if known is None:
        known = sum(1 for _ in text.records(0, None if needed is None else needed + 1))
    return size._replace(documents=known if needed is None else min(needed, known))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed batch of a shard: `pieces` int64 [p, 3] are (document's number, offset in it, length
    with `<bos>`), row by row.
    """

    shard: int
    batch: TokenBatch
    pieces: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a shard: (number, where, tokens without `<bos>`) of each of its documents."""

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
    mean: float  # tokens per document, about
    share: float = 1.0  # of these that are used, about

    @property
    def shards(self) -> int:
        return -(-self.documents // self.per_shard)

    def in_shard(self, shard: int) -> int:
        """The number of documents of a shard."""
        return min(self.per_shard, self.documents - shard * self.per_shard)

    def batches(self, shards: Sequence[int]) -> Iterator[Packed | Ended]:
        """The batches of some shards, in ascending order, each shard's followed by its `Ended`."""
        with tokenisers() as pool:
            encoded = map_ahead(pool, self._encode, self._records(shards), 4 * THREADS)
            for shard, documents in itertools.groupby(encoded, key=lambda e: e[0]):
                yield from self._shard(shard, documents)

    def _encode(self, item: tuple[int, int, Record]) -> Encoded:
        shard, number, record = item
        return shard, number, record.where, *self.text.encode(record)

    def _records(self, shards: Sequence[int]) -> Iterator[tuple[int, int, Record]]:
        """(shard, number, record) of the documents of some shards."""
        n = self.per_shard
        if self.text.count is not None:
            for shard in shards:
                start = n * shard
                for number, record in self.text.records(start, start + self.in_shard(shard)):
                    yield shard, number, record
            return
        wanted, last = set(shards), max(shards, default=-1)
        for number, record in self.text.records(0, min(self.documents, n * (last + 1))):
            if number // n in wanted:
                yield number // n, number, record

    def _shard(self, shard: int, encoded: Iterable[Encoded]) -> Iterator[Packed | Ended]:
        documents: list[tuple[int, str, int]] = []

        def pieces() -> Iterator[Piece]:
            for place, (_, number, where, ids, mask) in enumerate(encoded):
                documents.append((number, shown(where), len(ids)))
                yield Piece(0, place, ids, mask)

        place = offset = 0
        bos = self.text.tokenizer.bos_id
        for batch, _ in fill_rows(pieces(), self.batch_size, self.context_size, bos):
            found = []
            lengths = [n for row in batch.segments for n in np.bincount(row)[1:].tolist() if n]
            for length in lengths:
                while offset == documents[place][2]:
                    place, offset = place + 1, 0
                found.append((documents[place][0], offset, length))
                offset += length - 1
            yield Packed(shard, batch, np.array(found, np.int64).reshape(-1, 3))
        yield Ended(shard, documents)
