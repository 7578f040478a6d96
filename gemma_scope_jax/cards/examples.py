"""Where features are active: counts, histograms, the strongest examples and a random sample.

Three passes over the segments of a feature store, for all features at once. A table of the best
candidates so far, with F rows, is all that is kept, so memory does not grow with the text.

Outlier tokens have several times the norm of others and very large activations of many features.
They tell nothing about a single feature, so everything but `density` leaves out tokens whose
activations sum to more than `OUTLIER` times the median of their segment; the rest are the typical
tokens. The metrics use the norm, which a store does not hold: with the packaged SAE both rules
select the same tokens. Their sums are 6 to 8 times the median, and all others are below 4 times.
"""

import dataclasses
import os
from typing import NamedTuple

import numpy as np

from gemma_scope_jax.autointerp.examples import splitmix64, values_at
from gemma_scope_jax.cards.card_files import Stage
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.segment import Segment
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.progress import tracked

OUTLIER = 5.0


@dataclasses.dataclass(frozen=True)
class CardSettings:
    """What a card holds."""

    top: int = 20
    """The strongest examples of a feature, at most one from each piece of a document."""
    groups: int = 5
    """Equal parts of a feature's range (0, largest] from which random examples are drawn."""
    each: int = 5
    """Random examples from each of these parts."""
    before: int = 11
    """Tokens of an example before the one it was chosen for."""
    after: int = 4
    """Tokens of an example after it."""
    bins: int = 0
    """Bins of the histograms, a multiple of `groups`; 0 takes 8 for each group."""
    seed: int = 0
    """The random seed of the examples."""
    listed: int = 10
    """Logit tokens, correlated features and neighbours that are listed."""

    def __post_init__(self):
        for name in ("top", "groups", "each", "before", "after", "bins", "listed"):
            least = int(name in ("top", "groups", "listed"))
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: at least {least}")
        object.__setattr__(self, "bins", self.bins or 8 * self.groups)
        if self.bins % self.groups:
            raise InputError(f"bins {self.bins} must be a multiple of groups {self.groups}")

    @property
    def slots(self) -> int:
        return self.top + self.groups * self.each

    @property
    def window(self) -> int:
        return self.before + 1 + self.after


class SegmentActivations(NamedTuple):
    """The active features of one segment, ordered by feature, then token."""

    features: np.ndarray  # int32 [e]
    rows: np.ndarray  # int32 [e] counted from the segment's first token
    values: np.ndarray  # float32 [e]


def by_feature(segment: Segment, coder: str, layer: int) -> SegmentActivations:
    """All active features of a segment."""
    offsets, rows, values = segment.by_feature(coder, layer)
    features = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    return SegmentActivations(features, rows, values)


def without_outliers(rows: np.ndarray, values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """bool [n]: the tokens of the mask `counted` [n] that are not outliers; see the module.

    rows, values: the token and the activation of every active feature, [e].
    """
    sums = np.bincount(rows, values, minlength=len(counted))
    some = sums[counted & (sums > 0)]
    return counted & (sums <= OUTLIER * (np.median(some) if some.size else 0.0))


def typical(segment: Segment, coder: str, layer: int) -> SegmentActivations:
    """The active features of a segment on its typical tokens."""
    active = by_feature(segment, coder, layer)
    kept = without_outliers(active.rows, active.values, segment.counted_by(coder))[active.rows]
    return SegmentActivations(*(a[kept] for a in active))


class Best:
    """The K candidates with the largest keys in each of S slots, at most one per piece of text."""

    def __init__(self, slots: int, k: int):
        self.keys = np.full((slots, k), -np.inf)
        self.rows = np.full((slots, k), -1, np.int64)

    def add(
        self, slots: np.ndarray, keys: np.ndarray, rows: np.ndarray, pieces: np.ndarray, start: int
    ) -> None:
        """Candidates [e] in the order of the text: of equal keys the first one is kept.

        rows: of their tokens, counted from the row `start`; pieces: of text.
        """
        if not self.keys.shape[1]:
            return
        new = np.flatnonzero(keys > self.keys.min(-1)[slots])
        slots, keys, rows, pieces = slots[new], keys[new].astype(np.float64), rows[new], pieces[new]
        order = np.lexsort((rows, -keys, pieces, slots))  # by slot, piece, best first
        first = order[_starts(slots[order]) | _starts(pieces[order])]
        slots, keys, rows = slots[first], keys[first], rows[first]
        order = np.lexsort((rows, -keys, slots))
        slots, keys, rows = slots[order], keys[order], rows[order]
        begins = np.flatnonzero(_starts(slots))
        touched, count = slots[begins], np.diff(begins, append=len(slots))
        rank = np.arange(len(slots)) - np.repeat(begins, count)
        k = self.keys.shape[1]
        kept = rank < k
        place = np.repeat(np.arange(len(touched)), count)[kept], k + rank[kept]
        both_keys = np.pad(self.keys[touched], ((0, 0), (0, k)), constant_values=-np.inf)
        both_rows = np.pad(self.rows[touched], ((0, 0), (0, k)), constant_values=-1)
        both_keys[place], both_rows[place] = keys[kept], rows[kept].astype(np.int64) + start
        order = np.argsort(-both_keys, axis=-1, kind="stable")[:, :k]
        self.keys[touched] = np.take_along_axis(both_keys, order, -1)
        self.rows[touched] = np.take_along_axis(both_rows, order, -1)


def _starts(values: np.ndarray) -> np.ndarray:
    """bool [n]: where a new value begins in an ordered array."""
    return np.concatenate([np.ones(min(len(values), 1), bool), values[1:] != values[:-1]])


def chance(features: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """float64 in [0, 1): pseudorandom numbers that depend only on feature, row and seed."""
    with np.errstate(over="ignore"):
        x = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x ^= (features.astype(np.uint64) + np.uint64(seed)) * np.uint64(0xD1342543DE82EF95)
        x = splitmix64(x)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


class Sample:
    """A histogram of activations in `bins` equal parts of (0, largest], and random examples from
    `groups` of them, strongest first; for features from `begin` on."""

    def __init__(self, largest: np.ndarray, histogram: np.ndarray, s: CardSettings, begin: int = 0):
        self.largest, self.histogram, self.settings, self.begin = largest, histogram, s, begin
        self.best = Best(len(largest) * s.groups, s.each)

    def add(self, active: SegmentActivations, pieces: np.ndarray, start: int) -> None:
        """Activations of a segment whose first token is in row `start`, and their pieces [e]."""
        s = self.settings
        share = active.values.astype(np.float64) / np.maximum(self.largest, 1e-30)[active.features]
        bins = np.clip(np.ceil(share * s.bins).astype(np.int64) - 1, 0, s.bins - 1)
        np.add.at(self.histogram, (active.features, bins), 1)
        group = s.groups - 1 - bins // (s.bins // s.groups)
        rows = active.rows + np.int64(start)
        keys = chance(active.features + np.int64(self.begin), rows, s.seed)
        slots = active.features.astype(np.int64) * s.groups + group
        self.best.add(slots, keys, active.rows, pieces, start)

    @property
    def rows(self) -> np.ndarray:
        """int64 [F, groups * each]: the rows of the examples, -1: none."""
        return self.best.rows.reshape(len(self.largest), -1)


def gather_examples(
    store: FeatureStore, coder: str, layer: int, settings: CardSettings, stage: Stage
) -> None:
    """Make the arrays `density` to `example_values` from a feature store. Raises `InputError` if no
    feature of the coder is active in the store."""
    s = settings
    fired = np.asarray(store.fired(coder, layer), np.int64)
    width = len(fired)
    if not fired.any():
        raise InputError(f"{coder}: no feature is active anywhere in the store")
    total, count, best = np.zeros(width), np.zeros(width, np.int64), Best(width, s.top)
    for segment in tracked(store.segments(), "strongest examples", store.segment_count):
        active = typical(segment, coder, layer)
        total += np.bincount(active.features, active.values, minlength=width)
        count += np.bincount(active.features, minlength=width)
        pieces = segment.pieces[active.rows]
        best.add(active.features, active.values, active.rows, pieces, segment.start)
    largest = np.maximum(best.keys[:, 0], 0.0).astype(np.float32)
    sample = Sample(largest, stage.create("histogram", (width, s.bins), np.int64, 0), s)
    for segment in tracked(store.segments(), "histograms and samples", store.segment_count):
        active = typical(segment, coder, layer)
        sample.add(active, segment.pieces[active.rows], segment.start)
    _windows(store, coder, layer, s, np.concatenate([best.rows, sample.rows], -1), stage)
    counted = store.counted_by(coder)
    stage.put("density", fired / counted)
    stage.facts["tokens"] = counted
    stage.put("largest", largest)
    stage.put("mean", (total / np.maximum(count, 1)).astype(np.float32))


def _windows(
    store: FeatureStore, coder: str, layer: int, s: CardSettings, rows: np.ndarray, stage: Stage
) -> None:
    """Make the arrays `example_*` around `rows` int64 [F, E]."""
    width, slots = rows.shape
    tokens = stage.create("example_tokens", (width, slots, s.window), np.int32, -1)
    values = stage.create("example_values", (width, slots, s.window), np.float32, 0)
    documents = stage.create("example_documents", (width, slots), np.int64, -1)
    positions = stage.create("example_positions", (width, slots), np.int32, -1)
    sources = stage.create("example_sources", (width, slots), np.int32, 0)
    files: dict[str, int] = {}
    stage.put("example_rows", rows)
    order = np.argsort(rows.ravel(), kind="stable")
    ordered = rows.ravel()[order]
    for segment in tracked(store.segments(), "windows", store.segment_count):
        n = len(segment.tokens)
        some = order[slice(*np.searchsorted(ordered, [segment.start, segment.start + n]))]
        some = np.sort(some)  # by feature, as the arrays lie on the disk
        place = features, _ = np.divmod(some, slots)
        at = rows[place] - segment.start
        active = by_feature(segment, coder, layer)
        found = windows(segment.tokens, segment.pieces, active, features, at, s)
        tokens[place], values[place] = found
        documents[place], positions[place] = segment.documents[at], segment.positions[at]
        sources[place] = _numbered(segment, at, files)
    names = sorted({*files, *[""] * bool((rows < 0).any())})  # "" where there is no example
    order = np.array([names.index(file) for file in files] or [0], np.int32)
    sources[:] = np.where(rows < 0, 0, order[sources])
    stage.facts["sources"] = names


def windows(
    tokens: np.ndarray,
    pieces: np.ndarray,
    active: SegmentActivations,
    features: np.ndarray,
    at: np.ndarray,
    s: CardSettings,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and activations [e, W] of `features` [e] around the tokens `at` [e]: -1 and 0 outside
    their pieces. tokens, pieces [n]: of a segment of which `active` are the activations."""
    n = len(tokens)
    index = at[:, None] + np.arange(-s.before, s.after + 1, dtype=np.int64)
    inside = (index >= 0) & (index < n)
    index = np.clip(index, 0, n - 1)
    inside &= pieces[index] == pieces[at][:, None]
    keys = active.features.astype(np.int64) * n + active.rows  # ascending
    found = values_at(keys, active.values, features[:, None] * n + index)
    return np.where(inside, tokens[index], -1), np.where(inside, found, 0)


def _numbered(segment: Segment, rows: np.ndarray, files: dict[str, int]) -> np.ndarray:
    """The numbers of the files of rows' documents, int32 [n]; new files are added to `files`."""
    _, first, which = np.unique(segment.documents[rows], return_index=True, return_inverse=True)
    names = [os.path.basename(w.rpartition(", ")[0]) for w in segment.where(rows[first])]
    return np.array([files.setdefault(name, len(files)) for name in names], np.int32)[which]
