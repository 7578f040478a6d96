"""Sparse features read back: by token, by document, by feature; a segment at a time, never a store.

    store = FeatureStore("store")
    rows, values = store.feature(1234)              # every token on which it is active
    store.windows(rows[:10], before=8, after=4)     # the tokens around
    for segment in store.segments():
        offsets, features, values = segment.by_token()

Tokens have a row in the store, from 0 on; they come in pieces of documents, each beginning with
`<bos>`. How the files look: `shard_files.py`.
"""

import bisect
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_scope_jax.data.order import positions_of
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction.store.codec import Entries, offsets_of
from gemma_scope_jax.extraction.store.segment import Segment
from gemma_scope_jax.extraction.store.shards import Shard, shard_name
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.storage.paths import folder_path

_OPEN_SHARDS = 64
_HELD_SEGMENTS = 128  # with half a megabyte of tokens and pieces each: windows come from all over


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of a store. tokens int32 [n] without `<bos>`; rows int64 [n]: where they are."""

    number: int
    where: str  # "FILE, byte 123"
    tokens: np.ndarray
    rows: np.ndarray


class FeatureStore:
    """Sparse features written by `extract`. `len` is the number of tokens, `<bos>` included.

    folder    local or in a bucket
    manifest  the model, the coders, the data: see `manifest.py`
    coders    their names
    counted   on how many tokens features count, of the coder with the smallest `first`
    complete  whether all that was asked for is there; else what there is can be read

    Raises `InputError` for folders that are no store, damaged files, unknown coders and features.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = folder_path(folder)
        self.manifest = manifests.read_features_manifest(self.folder)
        self.coders: tuple[str, ...] = tuple(c["name"] for c in self.manifest["coders"])
        self._digest = manifests.store_digest(self.manifest)
        index = manifests.read_index(self.folder, self.manifest["documents"])
        self.complete = index is not None
        if index is None:
            there = manifests.shards_there(self.folder)
            index = [manifests.summary(self._open(number), self._digest) for number in there]
        self.shards: list[dict[str, Any]] = index
        sizes = [size for shard in index for size in shard["segments"]]
        self._starts = np.cumsum(np.array([0, *(size[0] for size in sizes)], np.int64))
        self._places = [(s["shard"], n) for s in index for n in range(len(s["segments"]))]
        self.counted = sum(counted for _, counted in sizes)
        self._counted_by = {min(c["first"] for c in self.manifest["coders"]): self.counted}
        self._segment = functools.lru_cache(_HELD_SEGMENTS)(self._make_segment)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    @functools.lru_cache(_OPEN_SHARDS)  # noqa: B019  (a store lives as long as its program)
    def _open(self, number: int) -> Shard:
        return Shard(self.folder / shard_name(number))

    def place(self, coder: str | None = None, layer: int | None = None) -> int:
        """Which of the stored lists a coder's layer (of the model) is."""
        if coder is None:
            coder = self._only_coder()
        at = 0
        for about in self.manifest["coders"]:
            layers = about["layers"]
            if about["name"] != coder:
                at += len(layers)
            elif layer is None and len(layers) == 1:
                return at
            elif layer in layers:
                return at + layers.index(layer)
            else:
                raise InputError(f"{coder}: layer {layer} is none of its layers {layers}")
        raise InputError(f"{self.folder}: no coder {coder!r}{nearest(coder, self.coders)}")

    def _only_coder(self) -> str:
        if len(self.coders) > 1:
            raise InputError(f"{self.folder}: which coder? it has {', '.join(self.coders)}")
        return self.manifest["coders"][0]["name"]

    def about(self, coder: str | None = None) -> dict[str, Any]:
        """What the manifest says of a coder."""
        name = self._only_coder() if coder is None else coder
        if name not in self.coders:
            raise InputError(f"{self.folder}: no coder {name!r}{nearest(name, self.coders)}")
        return self.manifest["coders"][self.coders.index(name)]

    def width(self, coder: str | None = None) -> int:
        """Features (a layer) of a coder."""
        return self.about(coder)["width"]

    def counted_by(self, coder: str | None = None) -> int:
        """On how many tokens a coder's features count."""
        first = self.about(coder)["first"]
        if first not in self._counted_by:
            counts = (int(segment.counted_by(coder).sum()) for segment in self.segments())
            self._counted_by[first] = sum(counts)
        return self._counted_by[first]

    # ---- by token --------------------------------------------------------------------------------

    @property
    def segment_count(self) -> int:
        return len(self._places)

    def segment(self, number: int) -> Segment:
        if not 0 <= number < self.segment_count:
            raise InputError(f"{self.folder}: segment {number}: has 0 to {self.segment_count - 1}")
        return self._segment(number)

    def _make_segment(self, number: int) -> Segment:
        shard, within = self._places[number]
        return Segment(self, self._open(shard), within, int(self._starts[number]))

    def segments(self) -> Iterator[Segment]:
        """All segments in order; what was read of one is forgotten with it."""
        for number, (shard, within) in enumerate(self._places):
            yield Segment(self, self._open(shard), within, int(self._starts[number]))

    def _by_segment(self, rows: Any) -> Iterator[tuple[np.ndarray, Segment, np.ndarray]]:
        """(which of `rows`, their segment, their rows in it)."""
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise InputError(f"{self.folder}: rows must be whole numbers, not {rows.dtype}")
        rows = rows.astype(np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise InputError(f"{self.folder}: rows must be 0 to {len(self) - 1}")
        number = np.searchsorted(self._starts, rows, side="right") - 1
        for n in np.unique(number).tolist():
            which = np.flatnonzero(number == n)
            yield which, self.segment(n), rows[which] - self._starts[n]

    def windows(self, rows: Any, before: int, after: int) -> np.ndarray:
        """Tokens int32 [m, before + 1 + after] around `rows` [m]; -1 outside of their pieces."""
        around = np.arange(-before, after + 1)[None, :]
        found = np.full((len(rows), around.shape[1]), -1, np.int32)
        for which, segment, local in self._by_segment(rows):
            at = local[:, None] + around
            inside = (at >= 0) & (at < len(segment))
            at = np.clip(at, 0, len(segment) - 1)
            inside &= segment.pieces[at] == segment.pieces[local][:, None]
            found[which] = np.where(inside, segment.tokens[at], -1)
        return found

    def places(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """(document number int64 [m], position in its piece int32 [m]) of `rows` [m]."""
        documents = np.empty(len(rows), np.int64)
        positions = np.empty(len(rows), np.int32)
        for which, segment, local in self._by_segment(rows):
            documents[which] = segment.documents[local]
            positions[which] = segment.positions[local]
        return documents, positions

    def tokens_of(
        self, rows: Any, coder: str | None = None, layer: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(features, values) of each of `rows`."""
        found: list[Any] = [None] * len(rows)
        for which, segment, local in self._by_segment(rows):
            start = int(local.min())
            offsets, ids, values = segment.rows(start, int(local.max()) + 1, coder, layer)
            for i, row in zip(which.tolist(), (local - start).tolist()):
                some = slice(offsets[row], offsets[row + 1])
                found[i] = (ids[some], values[some])
        return found

    # ---- by document -----------------------------------------------------------------------------

    def _held(self, place: int) -> list[tuple[int, str, int]]:
        """Number, where it is, and tokens of the documents of `shards[place]`."""
        return self._open(self.shards[place]["shard"]).footer["documents"]

    def _may_hold(self, number: int) -> range:
        """The places in `shards` where a document can be: its shard, which its place in the order
        says, or all of a store that does not tell the order."""
        if "shuffled" not in self.manifest:
            return range(len(self.shards))
        count, position = self.manifest["shuffled"], np.array([number])
        if count is not None and 0 <= number < count:
            position = positions_of(position, count, self.manifest["data"]["seed"], 0)
        shard = position.item() // self.manifest["per_shard"]
        place = bisect.bisect_left(self.shards, shard, key=lambda shard: shard["shard"])
        held = place < len(self.shards) and self.shards[place]["shard"] == shard
        return range(place, place + held)

    def _find(self, number: int) -> tuple[int, int]:
        """(place of a document's shard in `shards`, place in the shard)."""
        for place in self._may_hold(number):
            for within, (held, _, _) in enumerate(self._held(place)):
                if held == number:
                    return place, within
        raise InputError(f"{self.folder}: document {number} is not in the store")

    @property
    def document_numbers(self) -> list[int]:
        """The numbers of the documents there are, in the store's order; a list of them all."""
        return [number for place in range(len(self.shards)) for number, _, _ in self._held(place)]

    def where(self, number: int) -> str:
        """Where a document comes from, as "FILE, byte 123"."""
        place, within = self._find(number)
        return self._held(place)[within][1]

    def document(self, number: int, start: int = 0, stop: int | None = None) -> Document:
        """A document, or its tokens `start` to `stop`. Raises `InputError` if it is not stored."""
        place, within = self._find(number)
        where = self._held(place)[within][1]
        before = sum(len(shard["segments"]) for shard in self.shards[:place])
        none = np.zeros(0, np.int32)
        tokens, rows, at = [none], [none.astype(np.int64)], [none]
        for n in range(before, before + len(self.shards[place]["segments"])):
            segment = self.segment(n)
            documents = segment._piece_table[0][segment.pieces]
            (here,) = np.nonzero((documents == within) & (segment.positions > 0))
            tokens.append(segment.tokens[here])
            rows.append(here + segment.start)
            at.append(segment.offsets[here])
        offsets = np.concatenate(at)
        keep = (offsets >= start) & (offsets < (len(offsets) if stop is None else stop))
        return Document(number, where, np.concatenate(tokens)[keep], np.concatenate(rows)[keep])

    # ---- by feature ------------------------------------------------------------------------------

    def feature(
        self, feature: int, coder: str | None = None, layer: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows int64 [m] ascending, values float32 [m]): the tokens on which a feature is active.

        `layer`, the model's, for coders of several.
        """
        feature = whole_number("feature", feature)
        if not 0 <= feature < self.width(coder):
            raise InputError(f"feature {feature}: the coder has 0 to {self.width(coder) - 1}")
        found = self.features(feature, feature + 1, coder, layer)
        return found.ids, found.values

    def features(
        self, start: int, stop: int, coder: str | None = None, layer: int | None = None
    ) -> Entries:
        """(offsets [stop - start + 1], rows int64, values) of features `start` to `stop`.

        Neighbours share blocks of the index: a run of them is read in the time of one.
        """
        width = self.width(coder)
        if not 0 <= start < stop <= width:
            raise InputError(f"features {start} to {stop}: the coder has 0 to {width - 1}")
        parts = [(s.start, s.features(start, stop, coder, layer)) for s in self.segments()]
        counts = np.zeros(stop - start, np.int64)
        for _, some in parts:
            counts += np.diff(some.offsets)
        offsets = offsets_of(counts)
        rows, values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.float32)
        filled = offsets[:-1].copy()
        for first, some in parts:
            sizes = np.diff(some.offsets)
            to = np.repeat(filled - some.offsets[:-1], sizes) + np.arange(len(some.ids))
            rows[to], values[to] = some.ids + np.int64(first), some.values
            filled += sizes
        return Entries(offsets, rows, values)

    def fired(self, coder: str | None = None, layer: int | None = None) -> np.ndarray:
        """int64 [F]: on how many tokens each feature is active."""
        place, width = self.place(coder, layer), self.width(coder)
        total = np.zeros(width, np.int64)
        for shard in self.shards:
            total += self._open(shard["shard"]).fired(place, width)
        return total

    def verify(self) -> None:
        """Read every byte. Raises `InputError` naming the file and the block that is damaged."""
        for shard in self.shards:
            there = Shard(self.folder / shard_name(shard["shard"]))
            if there.size != shard["bytes"]:
                raise InputError(
                    f"{there.path}: has {there.size} bytes where {shard['bytes']} are expected; "
                    "delete it and run the same extract again"
                )
            there.verify()
            if manifests.summary(there, self._digest) != shard:
                index = self.folder / manifests.INDEX
                raise InputError(f"{index}: is damaged; delete it and extract again")
