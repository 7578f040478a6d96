"""Sparse features read back: by token, by document, by feature; a segment at a time, never a store.

    store = FeatureStore("store")
    rows, values = store.feature(1234)              # every token on which it is active
    store.windows(rows[:10], before=8, after=4)     # the tokens around
    for segment in store.segments():
        offsets, features, values = segment.by_token()

A token's row is its place in the store, from 0. Tokens come in pieces of documents, each beginning
with `<bos>`. The files' format: `shards.py`.
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
from gemma_scope_jax.extraction.store.shards import Shard
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.progress import byte_size
from gemma_scope_jax.storage.paths import folder_path

_OPEN_SHARDS = 64
_HELD_SEGMENTS = 128  # half a megabyte of tokens and pieces each: windows come from all over


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of a store. tokens int32 [n] without `<bos>`; rows int64 [n] in the store."""

    number: int
    where: str  # "FILE, byte 123"
    tokens: np.ndarray
    rows: np.ndarray


class FeatureStore:
    """Sparse features written by `extract`. `len` is the number of tokens, `<bos>` included.

    folder    local or in a bucket
    manifest  the model, the coders, the data: see `manifest.py`
    coders    their names
    counted   the number of tokens that have features, for the coder with the smallest `first`
    complete  whether all of the extraction is there; what there is can be read in any case

    Raises `InputError` for other folders, damaged files, unknown coders and features.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = folder_path(folder)
        self.manifest = manifests.read_features_manifest(self.folder)
        self.coders: tuple[str, ...] = tuple(c["name"] for c in self.manifest["coders"])
        self.lists = manifests.lists(self.manifest)
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

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON: the folder, tokens, bytes, and each coder's L0, layer by layer."""
        entries = [sum(of) for of in zip(*(shard["entries"] for shard in self.shards))]
        l0 = [
            {"coder": l.coder, "layer": l.layer, "l0": n / max(self.counted_by(l.coder), 1)}
            for l, n in zip(self.lists, entries)
        ]
        facts = {"complete": self.complete, "tokens": len(self), "counted": self.counted}
        return {"folder": str(self.folder), **facts, "bytes": self.bytes, "l0": l0}

    def summary(self) -> str:
        """A few lines: each coder's L0, layer by layer, tokens and bytes, and the folder."""
        lines = [
            f"{i['coder']}  layer {i['layer']}  L0 {i['l0']:.1f}" for i in self.describe()["l0"]
        ]
        size = f"{byte_size(self.bytes)}, {self.bytes / max(len(self), 1):.0f} bytes a token"
        lines.append(f"{self.counted:,} tokens with features, {len(self):,} in all, {size}")
        rest = "" if self.complete else "  (not complete: others are at work, or run it again)"
        return "\n".join([*lines, f"store: {self.folder}{rest}"])

    @functools.lru_cache(_OPEN_SHARDS)  # noqa: B019  (a store lives as long as its program)
    def _open(self, number: int) -> Shard:
        return Shard(self.folder, number)

    def place(self, coder: str | None = None, layer: int | None = None) -> int:
        """The number in `lists` of a coder's layer (of the model)."""
        about = self.about(coder)
        name, layers = about["name"], about["layers"]
        if layer is None and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            raise InputError(f"{name}: layer {layer} is none of its layers {layers}")
        return next(n for n, l in enumerate(self.lists) if (l.coder, l.layer) == (name, layer))

    def about(self, coder: str | None = None) -> dict[str, Any]:
        """A coder's entry in the manifest; None: the only coder's."""
        if coder is None and len(self.coders) > 1:
            raise InputError(f"{self.folder}: which coder? it has {', '.join(self.coders)}")
        name = self.manifest["coders"][0]["name"] if coder is None else coder
        if name not in self.coders:
            raise InputError(f"{self.folder}: no coder {name!r}{nearest(name, self.coders)}")
        return self.manifest["coders"][self.coders.index(name)]

    def width(self, coder: str | None = None) -> int:
        """The number of features (per layer) of a coder."""
        return self.about(coder)["width"]

    def counted_by(self, coder: str | None = None) -> int:
        """The number of tokens that have features of a coder."""
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
        """All segments in order; their arrays are not kept."""
        return map(self._make_segment, range(self.segment_count))

    def _by_segment(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Segment, np.ndarray]]:
        """(indices into `rows`, their segment, their rows in it)."""
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

    def windows(self, rows: np.ndarray, before: int, after: int) -> np.ndarray:
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

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(document number int64 [m], position in its piece int32 [m]) of `rows` [m]."""
        documents = np.empty(len(rows), np.int64)
        positions = np.empty(len(rows), np.int32)
        for which, segment, local in self._by_segment(rows):
            documents[which] = segment.documents[local]
            positions[which] = segment.positions[local]
        return documents, positions

    def tokens_of(
        self, rows: np.ndarray, coder: str | None = None, layer: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(features, values) of each of `rows`."""
        found: list[Any] = [None] * len(rows)
        for which, segment, local in self._by_segment(rows):
            offsets, ids, values = segment.by_token(coder, layer)
            for i, row in zip(which.tolist(), local.tolist()):
                some = slice(offsets[row], offsets[row + 1])
                found[i] = (ids[some], values[some])
        return found

    # ---- by document -----------------------------------------------------------------------------

    def _held(self, place: int) -> list[tuple[int, str, int]]:
        """(number, where, tokens) of the documents of `shards[place]`."""
        return self._open(self.shards[place]["shard"]).footer["documents"]

    def _may_hold(self, number: int) -> range:
        """The places in `shards` where a document can be: that of its place in the order, or all if
        the order is not in the manifest."""
        if "shuffled" not in self.manifest:
            return range(len(self.shards))
        count, position = self.manifest["shuffled"], np.array([number])
        if count is not None and 0 <= number < count:
            position = positions_of(position, count, self.manifest["data"]["seed"], 0)
        shard = position.item() // self.manifest["per_shard"]
        place = bisect.bisect_left(self.shards, shard, key=lambda shard: shard["shard"])
        held = place < len(self.shards) and self.shards[place]["shard"] == shard
        return range(place, place + held)

    def _find(self, number: int) -> tuple[int, str]:
        """(place of a document's shard in `shards`, where the document comes from)."""
        for place in self._may_hold(number):
            for held, where, _ in self._held(place):
                if held == number:
                    return place, where
        raise InputError(f"{self.folder}: document {number} is not in the store")

    @property
    def document_numbers(self) -> list[int]:
        """The numbers of all documents, in the store's order."""
        return [number for place in range(len(self.shards)) for number, _, _ in self._held(place)]

    def where(self, number: int) -> str:
        """Where a document comes from, as "FILE, byte 123"."""
        return self._find(number)[1]

    def document(self, number: int, start: int = 0, stop: int | None = None) -> Document:
        """A document, or its tokens `start` to `stop`. Raises `InputError` if it is not stored."""
        place, where = self._find(number)
        before = sum(len(shard["segments"]) for shard in self.shards[:place])
        none = np.zeros(0, np.int32)
        tokens, rows, at = [none], [none.astype(np.int64)], [none]
        for n in range(before, before + len(self.shards[place]["segments"])):
            segment = self.segment(n)
            (here,) = np.nonzero((segment.documents == number) & (segment.positions > 0))
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

        Neighbouring features share row groups: reading a run of them takes the time of one.
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
        """int64 [F]: the number of tokens on which each feature is active."""
        place = self.place(coder, layer)
        total = np.zeros(self.lists[place].width, np.int64)
        for segment in self.segments():
            total += segment.fired(place)
        return total

    def verify(self) -> None:
        """Read every byte. Raises `InputError` naming the first damaged file."""
        for shard in self.shards:
            there = Shard(self.folder, shard["shard"])
            there.verify(self.lists)
            if manifests.summary(there, self._digest) != shard:
                index = self.folder / manifests.INDEX
                raise InputError(f"{index}: is damaged; delete it and extract again")
