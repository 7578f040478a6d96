"""Short texts on which a feature fires and does not fire: explanations are made and scored on them.

The pieces of documents are split into two halves, once for all features: explanations see one,
scores the other, so no text is in both. Windows are 32 tokens around the local peaks of a feature
(Paulo et al. 2024, delphi: quantiles of the activation, non-activating windows, windows of
neighbours; SAEBench: the top windows and some drawn by importance). Everything follows from the
seed and the store.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.tokenizer import Tokenizer

POOL = 4096  # random windows drawn once, from which each feature takes its non-activating ones
HELD = 1 << 24  # entries of neighbouring features that are read, and kept, together
LEAST = {"length": 8, "test": 2, "least": 2, "weighted": 0, "hard": 0, "seed": 0}  # others: 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is drawn for a feature. Defaults: delphi's windows and test set, SAEBench's examples."""

    length: int = 32
    """Tokens of a window."""
    quantiles: int = 10
    """Quantiles of the activation over which the windows for scoring are spread."""
    top: int = 10
    """The strongest windows, from which a feature is explained."""
    weighted: int = 5
    """Windows for explaining that are drawn in proportion to their activation."""
    test: int = 50
    """Windows for scoring on which the feature fires."""
    non_activating: int = 50
    """Windows for scoring on which it does not fire."""
    hard: int = 0
    """How many of those are hard negatives: windows on which a neighbour of the feature fires."""
    neighbours: Literal["decoder", "cooccurring"] = "decoder"
    """What makes a neighbour: a similar decoder direction, or firing on the same tokens."""
    least: int = 10
    """Leave out features with fewer windows for explaining, or for scoring, than this."""
    seed: int = 0
    """The random seed."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int) and value < LEAST.get(name, 1):
                raise InputError(f"{name} is {value}: at least {LEAST.get(name, 1)}")
        if self.hard > self.non_activating:
            most = f"the {self.non_activating} non_activating windows that it is a part of"
            raise InputError(f"hard is {self.hard}, more than {most}")


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A window of n tokens, without `<bos>`."""

    tokens: tuple[str, ...]
    values: np.ndarray  # float32 [n], the feature's activations
    centre: int  # index of the token the window is around
    row: int  # of that token in the store
    quantile: int = -1  # 0 is the strongest; -1 where there is none
    other: np.ndarray | None = None  # float32 [n], activations of a hard negative's neighbour

    @property
    def peak(self) -> float:
        return float(self.values.max(initial=0.0))

    def cut(self, around: int) -> "Window":
        """The part of at most `around` tokens on either side of the centre."""
        start = max(0, self.centre - around)
        part = slice(start, self.centre + around + 1)
        other = None if self.other is None else self.other[part]
        centre, tokens, values = self.centre - start, self.tokens[part], self.values[part]
        return dataclasses.replace(self, tokens=tokens, values=values, centre=centre, other=other)


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """The examples of one feature."""

    feature: int
    train: list[Window]  # the strongest, then the weighted ones, for explaining
    test: list[Window]  # over the quantiles
    non_activating: list[Window]  # hard negatives first
    strong: list[Window]  # two top and two weighted ones of the test half (SAEBench's score)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A store seen through one coder (and one of its layers), with what all features share."""

    store: FeatureStore
    tokenizer: Tokenizer
    sampling: Sampling
    coder: str | None
    layer: int | None
    pool: np.ndarray  # int64 [n] rows of the test half, in random order
    pool_tokens: np.ndarray  # int32 [n, length]
    starts: np.ndarray  # int64 [pieces], ascending: the rows at which pieces of documents begin
    counts: np.ndarray  # int64 [V] how often each token occurs in the train half

    def feature(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [m], ascending, and activations float32 [m] of a feature."""
        if not 0 <= feature < self.store.width(self.coder):
            return self.store.feature(feature, self.coder, self.layer)  # raises the error
        run = int(np.searchsorted(self._runs, feature, side="right")) - 1
        offsets, rows, values = self._run(run)
        at = feature - self._runs[run]
        some = slice(offsets[at], offsets[at + 1])
        if not np.isfinite(values[some]).all():
            raise InputError(
                f"{self.store.folder}: feature {feature} has activations that are infinite or NaN; "
                "extract it again, or leave it out"
            )
        return rows[some], values[some]

    @functools.cached_property
    def _runs(self) -> np.ndarray:
        """int [n + 1]: features `_runs[i]` to `_runs[i + 1]` are read together."""
        fired = np.cumsum(self.store.fired(self.coder, self.layer))
        starts, width = [0], len(fired)
        while starts[-1] < width:
            before = fired[starts[-1] - 1] if starts[-1] else 0
            stop = int(np.searchsorted(fired, before + HELD, side="right"))
            starts.append(max(stop, starts[-1] + 1))
        return np.array(starts)

    @functools.cached_property
    def _run(self) -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Reads the features of a run; the last two runs stay in memory."""
        read = lambda n: self.store.features(
            int(self._runs[n]), int(self._runs[n + 1]), self.coder, self.layer
        )
        return functools.lru_cache(2)(read)

    def pieces(self, rows: np.ndarray) -> np.ndarray:
        """int64 [m]: the first row of the piece that holds each of `rows`, which identifies it."""
        return self.starts[np.searchsorted(self.starts, rows, side="right") - 1]


def sides(length: int) -> tuple[int, int]:
    """Tokens before and after the centre of a window."""
    return length // 2, length - 1 - length // 2


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A hash of uint64 numbers: the finaliser of splitmix64 (Steele et al. 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    step = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    return splitmix64(numbers.astype(np.uint64) + step)


def in_test(pieces: np.ndarray, seed: int) -> np.ndarray:
    """bool like `pieces`: whether a piece, given by its first row, belongs to the test half."""
    return (_mixed(pieces, seed) & np.uint64(1)) == 1


def open_corpus(
    store: FeatureStore,
    tokenizer: Tokenizer,
    sampling: Sampling = Sampling(),
    coder: str | None = None,
    layer: int | None = None,
) -> Corpus:
    """One pass over the store's tokens. Raises `InputError` if there are too few pieces."""
    counts, starts = np.zeros(tokenizer.vocab_size, np.int64), []
    pool, keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    for segment in store.segments():
        rows = segment.start + np.arange(len(segment.tokens), dtype=np.int64)
        starts.append(rows[segment.positions == 0])
        test = in_test(rows - segment.positions, sampling.seed)
        counted = segment.counted_by(coder)
        seen = segment.tokens[counted & ~test]
        counts += np.bincount(seen, minlength=len(counts))[: len(counts)]
        rows = rows[counted & test]
        pool, keys = np.r_[pool, rows], np.r_[keys, _mixed(rows, sampling.seed + 1)]
        order = np.argsort(keys, kind="stable")[:POOL]
        pool, keys = pool[order], keys[order]
    if not len(pool) or not counts.any():
        raise InputError("the store has too little text: extract from more than a few documents")
    tokens, pieces = _tokens_around(store, pool, sampling.length), np.concatenate(starts)
    return Corpus(store, tokenizer, sampling, coder, layer, pool, tokens, pieces, counts)


def _tokens_around(store: FeatureStore, rows: np.ndarray, length: int) -> np.ndarray:
    """int32 [n, length]: windows around `rows` [n] in any order."""
    order = np.argsort(rows)
    tokens = np.zeros((len(rows), length), np.int32)
    tokens[order] = store.windows(rows[order], *sides(length))
    return tokens


def peaks(rows: np.ndarray, values: np.ndarray, pieces: np.ndarray, length: int) -> np.ndarray:
    """Indices of the entries around which windows are cut: the largest in each stretch of `length`
    rows of a piece, unless a larger one in the next stretch is closer than `length`."""
    if not len(rows):
        return np.zeros(0, np.int64)
    stretch = (rows - pieces) // length
    new = np.r_[True, (stretch[1:] != stretch[:-1]) | (pieces[1:] != pieces[:-1])]
    group = np.cumsum(new) - 1
    order = np.lexsort((-values, group))
    best = order[np.flatnonzero(new)]  # groups keep their places when sorted by group
    near = (np.diff(rows[best]) < length) & (np.diff(pieces[best]) == 0)
    rises = np.diff(values[best]) > 0
    beaten = np.r_[near & rises, False] | np.r_[False, near & ~rises]
    return best[~beaten]


def values_at(rows: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """float32 like `wanted` (rows): the activation there, 0 where there is none."""
    if not len(rows):
        return np.zeros(wanted.shape, np.float32)
    at = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return np.where(rows[at] == wanted, values[at], np.float32(0))


def gather(corpus: Corpus, feature: int, neighbours: Sequence[int] = ()) -> Material | None:
    """The examples of a feature; None if it fires in too few windows (`Sampling.least`).

    neighbours: features whose windows serve as hard negatives where this one does not fire.
    """
    s = corpus.sampling
    rng = np.random.default_rng([s.seed, feature])
    rows, values = corpus.feature(feature)
    pieces = corpus.pieces(rows)
    at = peaks(rows, values, pieces, s.length)
    at = at[np.argsort(-values[at], kind="stable")]
    test_half = in_test(pieces[at], s.seed)
    train, test = at[~test_half], at[test_half]
    if min(len(train), len(test)) < s.least:
        return None
    train = train[top_and_weighted(values[train], s.top, s.weighted, rng)]
    quantile = np.arange(len(test)) * min(s.quantiles, len(test)) // len(test)
    drawn = spread(quantile, s.test, rng)
    strong = test[top_and_weighted(values[test], 2, 2, rng)]

    def firing(at: np.ndarray, quantile: np.ndarray | int = -1) -> list[Window]:
        around = _values_around(corpus, rows, values, rows[at])
        return _windows(corpus, rows[at], around, quantile)

    hard = _hard_negatives(corpus, rows, neighbours)[: s.hard]
    return Material(
        feature=feature,
        train=firing(train),
        test=firing(test[drawn], quantile[drawn]),
        non_activating=[*hard, *_non_activating(corpus, rows, s.non_activating - len(hard))],
        strong=firing(strong),
    )


def top_and_weighted(
    values: np.ndarray, top: int, weighted: int, rng: np.random.Generator
) -> np.ndarray:
    """Indices of the `top` largest of values [n] (descending), then of `weighted` of the others
    drawn in proportion to the value, without replacement, strongest first (SAEBench)."""
    first, rest = np.split(np.arange(len(values)), [top])
    if not weighted or not len(rest):
        return first
    chance = values[rest].astype(np.float64)
    drawn = rng.choice(rest, min(weighted, len(rest)), replace=False, p=chance / chance.sum())
    return np.concatenate([first, np.sort(drawn)])


def spread(quantile: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `count` indices, as many from each quantile as possible; ascending."""
    shuffled = rng.permutation(len(quantile))
    order = shuffled[np.argsort(quantile[shuffled], kind="stable")]
    ends = np.searchsorted(quantile[order], quantile[order])
    turn = np.arange(len(order)) - ends  # 0 for the first of each quantile, then 1, ...
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def _windows(
    corpus: Corpus,
    centres: np.ndarray,
    values: np.ndarray,
    quantile: np.ndarray | int = -1,
    tokens: np.ndarray | None = None,
    other: np.ndarray | None = None,
) -> list[Window]:
    """Windows around the rows `centres` [n], each cut to its own piece and without `<bos>`.

    values, other: activations float32 [n, length]. tokens: int32 [n, length], if they are known.
    """
    length, tokenizer = corpus.sampling.length, corpus.tokenizer
    if tokens is None:
        tokens = _tokens_around(corpus.store, centres, length)
    kept = (tokens >= 0) & (tokens != tokenizer.bos_id)
    places = kept[:, : length // 2].sum(1)
    quantile = np.broadcast_to(quantile, centres.shape)
    return [
        Window(
            tuple(tokenizer.decode_tokens(tokens[i, here])),
            values[i, here],
            *map(int, (places[i], centres[i], quantile[i])),
            other=None if other is None else other[i, here],
        )
        for i, here in enumerate(kept)
    ]


def _values_around(
    corpus: Corpus, rows: np.ndarray, values: np.ndarray, centres: np.ndarray
) -> np.ndarray:
    before, after = sides(corpus.sampling.length)
    return values_at(rows, values, centres[:, None] + np.arange(-before, after + 1)[None, :])


def _apart(rows: np.ndarray, length: int, count: int) -> list[int]:
    """Indices of the first `count` rows that are at least `length` away from the earlier ones."""
    kept: list[int] = []
    for i, row in enumerate(rows.tolist()):
        if all(abs(row - rows[k]) >= length for k in kept):
            kept.append(i)
            if len(kept) >= count:
                break
    return kept


def _is_free(corpus: Corpus, rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """bool like `centres`: whether none of `rows` is in the window around it."""
    before, after = sides(corpus.sampling.length)
    first, last = np.searchsorted(rows, [centres - before, centres + after + 1])
    return first == last


def _non_activating(corpus: Corpus, rows: np.ndarray, count: int) -> list[Window]:
    if count <= 0:
        return []
    free = np.flatnonzero(_is_free(corpus, rows, corpus.pool))
    free = free[_apart(corpus.pool[free], corpus.sampling.length, count)]
    tokens = corpus.pool_tokens[free]
    return _windows(corpus, corpus.pool[free], np.zeros(tokens.shape, np.float32), tokens=tokens)


def _hard_negatives(corpus: Corpus, rows: np.ndarray, neighbours: Sequence[int]) -> list[Window]:
    """Windows of the test half around the strongest tokens of neighbours, where none of `rows`,
    on which this feature fires, is in the window."""
    s, found = corpus.sampling, []
    if not s.hard or not len(neighbours):
        return []
    each = -(-s.hard // len(neighbours))
    for neighbour in neighbours:
        theirs, values = corpus.feature(neighbour)
        pieces = corpus.pieces(theirs)
        at = peaks(theirs, values, pieces, s.length)
        at = at[in_test(pieces[at], s.seed) & _is_free(corpus, rows, theirs[at])]
        at = at[np.argsort(-values[at], kind="stable")][: 4 * each]
        centres = np.sort(theirs[at[_apart(theirs[at], s.length, each)]])
        if not len(centres):
            continue
        others = _values_around(corpus, theirs, values, centres)
        found += _windows(corpus, centres, np.zeros_like(others), other=others)
    return found
