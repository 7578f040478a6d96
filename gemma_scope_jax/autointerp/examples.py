"""Where a feature fires and where not, as short texts: what explanations are made and scored from.

Pieces of documents are dealt to two halves once for all features: explanations see the one, scores
the other, so that no text is in both. Windows are 32 tokens around the local peaks of a feature
(Paulo et al. 2024, delphi: quantiles of the activation, silent windows, neighbours' windows;
SAEBench: the top ones and some drawn by importance). Everything follows from the seed and the
store.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Tokenizer

POOL = 4096  # random windows drawn once, among which each feature finds its silent ones
HELD = 1 << 24  # entries of neighbouring features that are read together, and held


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
    silent: int = 50
    """Windows for scoring on which it does not fire."""
    hard: int = 0
    """How many of those are hard negatives: windows on which a neighbour of the feature fires."""
    neighbours: Literal["decoder", "cooccurring"] = "decoder"
    """What makes a neighbour: a similar decoder direction, or firing on the same tokens."""
    least: int = 10
    """Leave out features with fewer windows for explaining, or for scoring, than this."""
    seed: int = 0
    """The random seed of all that is drawn."""

    def __post_init__(self):
        for name, low in (
            ("length", 8),
            ("quantiles", 1),
            ("top", 1),
            ("test", 2),
            ("silent", 1),
            ("least", 2),
            ("weighted", 0),
            ("hard", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < low:
                raise InputError(f"{name} is {getattr(self, name)}: at least {low}")
        if self.hard > self.silent:
            raise InputError(f"hard is {self.hard}: of {self.silent} silent windows in all")


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A window of n tokens, `<bos>` left out."""

    tokens: tuple[str, ...]
    values: np.ndarray  # float32 [n], the feature's activations; 0 where it is silent
    centre: int  # index of the token the window is around
    row: int  # of the store, of that token
    piece: int  # row at which its piece of a document begins
    quantile: int = -1  # 0 is the strongest; -1: silent, or not asked for
    other: np.ndarray | None = None  # float32 [n], of the neighbour that fires in a hard negative

    @property
    def peak(self) -> float:
        return float(self.values.max(initial=0.0))

    def cut(self, around: int) -> "Window":
        """The part of at most `around` tokens on either side of the centre."""
        a, b = max(0, self.centre - around), self.centre + around + 1
        other = None if self.other is None else self.other[a:b]
        return dataclasses.replace(
            self,
            tokens=self.tokens[a:b],
            values=self.values[a:b],
            centre=self.centre - a,
            other=other,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """The examples of one feature, each list strongest first where there is an order."""

    feature: int
    train: list[Window]  # the top and the weighted ones, for explaining
    test: list[Window]  # over the quantiles
    silent: list[Window]  # hard ones first
    strong: list[Window]  # two top and two weighted ones of the test half (SAEBench's score)
    fired: int  # tokens, in the whole store


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A store seen through one coder (and one layer of it), with what all features share."""

    store: Any  # extraction.store.FeatureStore
    tokenizer: Tokenizer
    sampling: Sampling
    coder: str | None
    layer: int | None
    pool: np.ndarray  # int64 [n] rows of the test half, in random order
    pool_tokens: np.ndarray  # int32 [n, length]
    starts: np.ndarray  # int64 [pieces], ascending: the rows at which pieces of documents begin
    counts: np.ndarray  # int64 [V] how often each token counts in the train half

    def feature(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [m], ascending, and activations float32 [m] of a feature."""
        if not 0 <= feature < self.store.width(self.coder):
            return self.store.feature(feature, self.coder, self.layer)  # says what is wrong
        run = int(np.searchsorted(self._runs, feature, side="right")) - 1
        offsets, rows, values = self._run(run)
        at = feature - self._runs[run]
        some = slice(offsets[at], offsets[at + 1])
        if not np.isfinite(values[some]).all():
            raise InputError(
                f"{self.store.folder}: feature {feature} has activations that are infinite or no "
                "numbers; extract it anew, or leave it out"
            )
        return rows[some], values[some]

    @functools.cached_property
    def _runs(self) -> np.ndarray:
        """int [n + 1]: features that are read together, those of a run from `_runs[i]` on."""
        fired = np.cumsum(self.store.fired(self.coder, self.layer))
        starts, width = [0], len(fired)
        while starts[-1] < width:
            before = fired[starts[-1] - 1] if starts[-1] else 0
            stop = int(np.searchsorted(fired, before + HELD, side="right"))
            starts.append(max(stop, starts[-1] + 1))
        return np.array(starts)

    @functools.cached_property
    def _run(self) -> Callable[[int], Any]:
        """The features of a run, of which the last few stay in memory."""
        read = lambda n: self.store.features(
            int(self._runs[n]), int(self._runs[n + 1]), self.coder, self.layer
        )
        return functools.lru_cache(2)(read)

    def windows(self, rows: np.ndarray) -> np.ndarray:
        before, after = sides(self.sampling.length)
        return self.store.windows(rows, before, after)

    def pieces(self, rows: np.ndarray) -> np.ndarray:
        """int64 [m]: where the pieces begin that hold `rows`; pieces are named by that."""
        return self.starts[np.searchsorted(self.starts, rows, side="right") - 1]


def sides(length: int) -> tuple[int, int]:
    """Tokens before and after the centre of a window."""
    return length // 2, length - 1 - length // 2


def mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A hash, uint64 like `numbers`: the finaliser of splitmix64."""
    x = numbers.astype(np.uint64) + np.uint64(
        (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def in_test(pieces: np.ndarray, seed: int) -> np.ndarray:
    """bool like `pieces`: whether a piece, named by its first row, belongs to the test half."""
    return (mixed(pieces, seed) & np.uint64(1)) == 1


def open_corpus(
    store: Any,
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
        pool, keys = np.r_[pool, rows], np.r_[keys, mixed(rows, sampling.seed + 1)]
        order = np.argsort(keys, kind="stable")[:POOL]
        pool, keys = pool[order], keys[order]
    if not len(pool) or not counts.any():
        raise InputError("the store has too little text: extract from more than a few documents")
    order = np.argsort(pool)
    tokens = np.zeros((len(pool), sampling.length), np.int32)
    tokens[order] = store.windows(pool[order], *sides(sampling.length))
    return Corpus(
        store, tokenizer, sampling, coder, layer, pool, tokens, np.concatenate(starts), counts
    )


def peaks(rows: np.ndarray, values: np.ndarray, pieces: np.ndarray, length: int) -> np.ndarray:
    """Indices of the entries around which windows are cut: the largest of each stretch of `length`
    rows of a piece, unless a larger one is nearer than that in the stretch beside it."""
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
    """float32 like `wanted` (rows): the activation there, 0 where the feature is silent."""
    if not len(rows):
        return np.zeros(wanted.shape, np.float32)
    at = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return np.where(rows[at] == wanted, values[at], np.float32(0))


def gather(corpus: Corpus, feature: int, neighbours: Sequence[int] = ()) -> Material | None:
    """The examples of a feature; None if it fires in too few windows (`Sampling.least`).

    neighbours: features whose windows serve as hard negatives where this one is silent.
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
    chosen = top_and_weighted(values[train], s.top, s.weighted, rng)
    quantile = quantiles_of(len(test), s.quantiles)
    drawn = spread(quantile, s.test, rng)
    strong = top_and_weighted(values[test], 2, 2, rng)
    picked = np.r_[train[chosen], test[drawn], test[strong]]
    quantile = np.r_[np.full(len(chosen), -1), quantile[drawn], np.full(len(strong), -1)]
    made = _examples(corpus, rows, values, rows[picked], quantile)
    ends = np.cumsum([len(chosen), len(drawn)])
    hard = _hard_negatives(corpus, rows, neighbours)[: s.hard]
    return Material(
        feature=feature,
        train=made[: ends[0]],
        test=made[ends[0] : ends[1]],
        silent=[*hard, *_silent(corpus, rows, s.silent - len(hard))],
        strong=made[ends[1] :],
        fired=len(rows),
    )


def top_and_weighted(values: np.ndarray, top: int, weighted: int, rng: Any) -> np.ndarray:
    """Indices of the `top` largest of values [n] (descending), then of `weighted` of the others
    drawn in proportion to the value, without replacement, strongest first (SAEBench)."""
    first, rest = np.arange(min(top, len(values))), np.arange(min(top, len(values)), len(values))
    if not weighted or not len(rest):
        return first
    chance = values[rest].astype(np.float64)
    drawn = rng.choice(rest, min(weighted, len(rest)), replace=False, p=chance / chance.sum())
    return np.concatenate([first, np.sort(drawn)])


def quantiles_of(n: int, quantiles: int) -> np.ndarray:
    """int [n]: the quantile of each of n examples in order, equal in size but for the remainder."""
    return np.arange(n) * min(quantiles, n) // n


def spread(quantile: np.ndarray, count: int, rng: Any) -> np.ndarray:
    """Up to `count` indices, as many from each quantile as there are; ascending."""
    shuffled = rng.permutation(len(quantile))
    order = shuffled[np.argsort(quantile[shuffled], kind="stable")]
    ends = np.searchsorted(quantile[order], quantile[order])
    turn = np.arange(len(order)) - ends  # 0 for the first of each quantile, then 1, ...
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def _examples(corpus: Corpus, rows, values, centres, quantile) -> list[Window]:
    order = np.argsort(centres)
    tokens = np.zeros((len(centres), corpus.sampling.length), np.int32)
    tokens[order] = corpus.windows(centres[order])
    found = _values_around(corpus, rows, values, centres)
    pieces = corpus.pieces(centres)
    return [
        _example(corpus.tokenizer, *some)
        for some in zip(tokens, found, centres.tolist(), pieces.tolist(), quantile.tolist())
    ]


def _values_around(corpus: Corpus, rows, values, centres) -> np.ndarray:
    before, after = sides(corpus.sampling.length)
    return values_at(rows, values, centres[:, None] + np.arange(-before, after + 1)[None, :])


def _example(tokenizer, tokens, values, row, piece, quantile=-1, other=None) -> Window:
    """Cut a window to its own piece and take `<bos>` out of it."""
    kept = (tokens >= 0) & (tokens != tokenizer.bos_id)
    centre = int(kept[: sides(len(tokens))[0]].sum())
    text = tuple(tokenizer.decode_tokens(tokens[kept]))
    other = None if other is None else other[kept]
    return Window(text, values[kept], centre, row, piece, quantile, other)


def _apart(rows: np.ndarray, length: int, count: int) -> list[int]:
    """Indices of the first `count` rows that are at least `length` from those before."""
    kept: list[int] = []
    for i, row in enumerate(rows.tolist()):
        if all(abs(row - rows[k]) >= length for k in kept):
            kept.append(i)
            if len(kept) >= count:
                break
    return kept


def _is_silent(corpus: Corpus, rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    before, after = sides(corpus.sampling.length)
    first, last = (
        np.searchsorted(rows, centres - before),
        np.searchsorted(rows, centres + after + 1),
    )
    return first == last


def _silent(corpus: Corpus, rows: np.ndarray, count: int) -> list[Window]:
    if count <= 0:
        return []
    free = np.flatnonzero(_is_silent(corpus, rows, corpus.pool))
    free = free[_apart(corpus.pool[free], corpus.sampling.length, count)]
    zeros, rows = np.zeros(corpus.sampling.length, np.float32), corpus.pool[free]
    pieces = corpus.pieces(rows)
    return [
        _example(corpus.tokenizer, tokens, zeros, row, piece)
        for tokens, row, piece in zip(corpus.pool_tokens[free], rows.tolist(), pieces.tolist())
    ]


def _hard_negatives(corpus: Corpus, rows: np.ndarray, neighbours: Sequence[int]) -> list[Window]:
    """Windows of the test half around the strongest tokens of neighbours, this feature silent."""
    s, found = corpus.sampling, []
    if not s.hard or not len(neighbours):
        return []
    each = -(-s.hard // len(neighbours))
    for neighbour in neighbours:
        theirs, values = corpus.feature(neighbour)
        pieces = corpus.pieces(theirs)
        at = peaks(theirs, values, pieces, s.length)
        at = at[in_test(pieces[at], s.seed) & _is_silent(corpus, rows, theirs[at])]
        at = at[np.argsort(-values[at], kind="stable")][: 4 * each]
        at = at[_apart(theirs[at], s.length, each)]
        if not len(at):
            continue
        order = np.argsort(theirs[at])
        at = at[order]
        others = _values_around(corpus, theirs, values, theirs[at])
        zeros = np.zeros(s.length, np.float32)
        for i, tokens, other in zip(at.tolist(), corpus.windows(theirs[at]), others):
            place = int(theirs[i]), int(pieces[i])
            found.append(_example(corpus.tokenizer, tokens, zeros, *place, -1, other))
    return found
