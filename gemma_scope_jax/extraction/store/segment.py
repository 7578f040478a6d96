"""A segment of a feature store: some ten thousand tokens, by token and by feature."""

import functools
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.codec import Entries, turned
from gemma_scope_jax.extraction.store.shards import Shard, first_row
from gemma_scope_jax.extraction.store.tables import damaged, opened


def _column(name: str) -> Any:
    return property(lambda segment: segment._table[name])


class Segment:
    """Some ten thousand tokens of a store. Arrays are read when first used.

    start      the store's row of its first token
    tokens     int32 [n], with the `<bos>` of every piece
    pieces     int32 [n]: the token's piece in the segment
    positions  int32 [n], in the piece: `<bos>` is 0
    documents  int64 [n]: the number of its document
    offsets    int32 [n]: its place in the document's tokens; -1: a `<bos>`
    counted    bool [n]: whether the token has features, from the coders' smallest `first` on; for
               one coder: `counted_by`
    """

    def __init__(self, store: Any, shard: Shard, number: int, start: int):
        self._store, self._shard, self.start = store, shard, start
        segments = shard.footer["segments"]
        self._about = segments[number]
        before = sum(segment["tokens"] for segment in segments[:number])
        self._row = first_row(shard.number) + before  # the first token's row in the files
        self._files = shard.files(number, store.lists)

    def __len__(self) -> int:
        return self._about["tokens"]

    @functools.cached_property
    def _table(self) -> dict[str, np.ndarray]:
        path, there = self._files[0]
        with opened(path, there) as file:
            names = ("document", "position", "offset", "token", "counted")
            table = file.read(list(names), use_threads=False)
            found = {name: table[name].to_numpy() for name in names}
        if table.num_rows != len(self):
            raise damaged(path, f"it has {table.num_rows} tokens, not {len(self)}")
        return found

    tokens = _column("token")
    positions = _column("position")
    documents = _column("document")
    offsets = _column("offset")
    counted = _column("counted")

    def counted_by(self, coder: str | None = None) -> np.ndarray:
        """bool [n]: the tokens that have features of a coder: `counted`, from its `first` on."""
        return self.counted & (self.positions >= self._store.about(coder)["first"])

    @functools.cached_property
    def pieces(self) -> np.ndarray:
        return np.cumsum(self.positions == 0, dtype=np.int32) - np.int32(1)

    def where(self, rows: np.ndarray) -> list[str]:
        """The sources of the documents at some of the segment's rows, as "FILE, byte 123"."""
        places = {number: where for number, where, _ in self._shard.footer["documents"]}
        return [places[number] for number in self.documents[rows].tolist()]

    def by_token(self, coder: str | None = None, layer: int | None = None) -> Entries:
        """(offsets [n + 1], features, values) of all tokens, see `Entries`."""
        return turned(self.by_feature(coder, layer), len(self))

    def by_feature(self, coder: str | None = None, layer: int | None = None) -> Entries:
        """(offsets [F + 1], rows, values): the segment's tokens of each feature, ascending."""
        return self.features(0, self._store.width(coder), coder, layer)

    def features(
        self, start: int, stop: int, coder: str | None = None, layer: int | None = None
    ) -> Entries:
        """`by_feature` of features `start` to `stop`; reads the row groups that hold them."""
        c = self._store.place(coder, layer)
        width = self._store.lists[c].width
        if not 0 <= start < stop <= width:
            raise InputError(f"features {start} to {stop}: the coder has 0 to {width - 1}")
        path, there = self._files[1 + c]
        with opened(path, there) as file:
            table = file.read_row_groups(_groups(file.metadata, start, stop), use_threads=False)
            features, rows, values = (table[n].to_numpy() for n in ("feature", "row", "value"))
        rows = (rows - self._row).astype(np.int32)
        inside = not len(rows) or 0 <= rows.min() <= rows.max() < len(self)
        if not inside or (np.diff(features) < 0).any():
            raise damaged(path, "rows or features outside of the segment")
        offsets = np.searchsorted(features, np.arange(start, stop + 1)).astype(np.int64)
        here = slice(offsets[0], offsets[-1])
        return Entries(offsets - offsets[0], rows[here], values[here])

    def fired(self, c: int) -> np.ndarray:
        """int64 [F]: the number of tokens on which each feature of a list is active."""
        path, there = self._files[1 + c]
        with opened(path, there) as file:
            features = file.read(["feature"], use_threads=False)["feature"].to_numpy()
        width = self._store.lists[c].width
        if len(features) and not 0 <= features.min() <= features.max() < width:
            raise damaged(path, f"features beyond {width}")
        return np.bincount(features, minlength=width)


def _groups(metadata: Any, start: int, stop: int) -> list[int]:
    """The row groups that hold features `start` to `stop`."""
    found = []
    for group in range(metadata.num_row_groups):
        held = metadata.row_group(group).column(0).statistics
        if held is None or not held.has_min_max or (held.min < stop and held.max >= start):
            found.append(group)
    return found
