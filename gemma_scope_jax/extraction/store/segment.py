"""A segment of a feature store: some ten thousands of tokens, by token and by feature."""

import functools
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.codec import (
    Entries,
    expand_values,
    offsets_of,
    undo_differences,
)
from gemma_scope_jax.extraction.store.shards import Shard

_TOKENS, _FEATURES = ("count", "feature", "value"), ("fired", "rows", "values")


class Segment:
    """Some ten thousands of tokens of a store. Arrays are read when they are asked for.

    start      the store's row of its first token
    tokens     int32 [n], `<bos>` of every piece included
    pieces     int32 [n]: which piece of the segment a token belongs to
    positions  int32 [n], in its piece: `<bos>` is 0
    documents  int64 [n]: the number of its document
    offsets    int32 [n]: its place in the document's tokens; -1: a `<bos>`
    counted    bool [n]: whether features count, and are stored: from the coders' smallest `first`
               on; those of one coder: `counted_by`
    """

    def __init__(self, store: Any, shard: Shard, number: int, start: int):
        self._store, self._shard, self._number, self.start = store, shard, number, start
        self._about = shard.footer["segments"][number]

    def __len__(self) -> int:
        return self._about["tokens"]

    def _read(self, *names: str) -> list[np.ndarray]:
        return self._shard.blocks(self._number, names)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return self._read("tokens")[0]

    @functools.cached_property
    def counted(self) -> np.ndarray:
        return np.unpackbits(self._read("counted")[0])[: len(self)].astype(bool)

    def counted_by(self, coder: str | None = None) -> np.ndarray:
        """bool [n]: where a coder's features count: `counted`, from its own `first` on."""
        return self.counted & (self.positions >= self._store.about(coder)["first"])

    @functools.cached_property
    def _piece_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document in the shard, offset in it and length of every piece."""
        documents, offsets, lengths = self._read(
            "piece_documents", "piece_offsets", "piece_lengths"
        )
        return documents, offsets, lengths

    @functools.cached_property
    def pieces(self) -> np.ndarray:
        lengths = self._piece_table[2]
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        lengths = self._piece_table[2]
        starts = np.cumsum(lengths) - lengths
        return (np.arange(len(self)) - np.repeat(starts, lengths)).astype(np.int32)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        numbers = np.array([d[0] for d in self._shard.footer["documents"]], np.int64)
        return numbers[self._piece_table[0]][self.pieces]

    def where(self, rows: Any) -> list[str]:
        """Where the documents of some of the segment's rows come from, as "FILE, byte 123"."""
        documents = self._shard.footer["documents"]
        return [documents[d][1] for d in self._piece_table[0][self.pieces[rows]].tolist()]

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        at = self._piece_table[1][self.pieces] + self.positions - 1
        return np.where(self.positions > 0, at, -1).astype(np.int32)

    def by_token(self, coder: str | None = None, layer: int | None = None) -> Entries:
        """(offsets [n + 1], features, values): those of token i begin at offsets[i]."""
        c = self._store.place(coder, layer)
        return self._lists(c, 0, self._about["coders"][c]["token_parts"], *_TOKENS)

    def rows(
        self, start: int, stop: int, coder: str | None = None, layer: int | None = None
    ) -> Entries:
        """`by_token` of the segment's rows `start` to `stop`; reads the blocks that hold them."""
        c = self._store.place(coder, layer)
        return self._some(c, start, stop, self._about["coders"][c]["token_parts"], _TOKENS)

    def features(
        self, start: int, stop: int, coder: str | None = None, layer: int | None = None
    ) -> Entries:
        """`by_feature` of features `start` to `stop`; reads the blocks that hold them."""
        c = self._store.place(coder, layer)
        return self._some(c, start, stop, self._about["coders"][c]["parts"], _FEATURES)

    def _some(self, c: int, start: int, stop: int, ends: list[int], names: Any) -> Entries:
        """The lists `start` to `stop` of those whose blocks end at `ends`."""
        if not 0 <= start < stop <= ends[-1]:
            raise InputError(f"{start} to {stop} is no range of what there is, 0 to {ends[-1]}")
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        begin = 0 if first == 0 else ends[first - 1]
        offsets, ids, values = self._lists(c, first, ends[: last + 1], *names)
        offsets = offsets[start - begin : stop - begin + 1]
        some = slice(offsets[0], offsets[-1])
        return Entries(offsets - offsets[0], ids[some], values[some])

    def by_feature(self, coder: str | None = None, layer: int | None = None) -> Entries:
        """(offsets [F + 1], rows, values): of each feature, the segment's tokens, ascending."""
        c = self._store.place(coder, layer)
        return self._lists(c, 0, self._about["coders"][c]["parts"], *_FEATURES)

    def feature(
        self, feature: int, coder: str | None = None, layer: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the segment, values) of one feature; reads the block of the index around it."""
        found = self.features(feature, feature + 1, coder, layer)
        return found.ids, found.values

    def _lists(self, c: int, first: int, ends: list[int], *names: str) -> Entries:
        """The lists in the parts from `first` on, up to the last of `ends`."""
        sizes, ids, values = (f"{c}.{name}" for name in names)
        begin = 0 if first == 0 else ends[first - 1]
        counts = self._read(sizes)[0][begin : ends[-1]]
        offsets = offsets_of(counts)
        exponent, found = self._about["coders"][c]["exponent"], []
        for part, stop in enumerate(ends[first:], first):
            start = begin if part == first else ends[part - 1]
            some = offsets[start - begin : stop - begin + 1]
            steps, stored = self._read(f"{ids}.{part}", f"{values}.{part}")
            steps = undo_differences(steps, some - some[0])
            found.append((steps, expand_values(stored, exponent)))
        return Entries(offsets, *(np.concatenate(some) for some in zip(*found)))
