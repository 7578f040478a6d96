"""Intervals and tests for everything that this room reports: no figure stands without one.

An interval is a bootstrap over items (texts, pairs, prompts), never over tokens, which are not
independent. Tests of many features at once come with two corrections: Benjamini-Hochberg's q for
which features to look at, and `family_p`, one number for whether there is anything at all. The
latter permutes what the items are called, so it is exact whatever the features' distribution:
features of coders are sparse and skewed, and a t test of each alone is not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.strict_json import finite

FEWEST = 5  # items of an arm, below which no permutation could tell anything
EXACT = 2000  # items up to which an interval is corrected for bias and skew
AT_ONCE = 1 << 22  # drawn numbers in memory
LARGEST = (
    1 - 1e-6
)  # of a squared correlation: a feature that never varies has d 1,000, not infinity

Statistic = Callable[[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure over n items, and where it might lie had other items been drawn."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; None for what is not defined."""
        return finite(dataclasses.asdict(self))

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high


def bootstrap(
    values: ArrayLike,
    statistic: Statistic | None = None,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The interval of a statistic of `values` [n] or [n, k] by drawing rows again.

    statistic  of rows [m] or [m, k]; default: the mean, of values [n]. A draw for which it is not
               finite is left out
    clusters   [n]: rows of one cluster, such as the questions of one template, are drawn together

    Corrected for bias and skew (BCa, Efron 1987) with up to 2,000 rows or clusters; with more the
    correction is nil and percentiles are given. Raises `InputError` without rows, and for a mean of
    values that are not finite.
    """
    values = np.asarray(values, np.float64)
    _check_level(level, draws)
    if not len(values):
        raise InputError("an interval needs at least one value")
    if statistic is None and (values.ndim != 1 or not np.isfinite(values).all()):
        raise InputError("the interval of a mean needs a list of finite numbers")
    number, count = _numbered(clusters, len(values))
    rng = np.random.default_rng(seed)
    if statistic is None:
        sums = np.bincount(number, values, count)
        sizes = np.bincount(number, minlength=count).astype(np.float64)
        value = float(values.mean())
        found = _over_counts(lambda w: (w @ sums) / (w @ sizes), count, draws, rng)
        rest = float(sizes.sum()) - sizes
        without = (sums.sum() - sums) / np.where(rest > 0, rest, np.nan)
    else:
        members = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1])
        rows = lambda some: values[np.concatenate([members[i] for i in some])]
        of = lambda some: float(statistic(rows(some)))
        value = float(statistic(values))
        found = np.array([of(rng.integers(count, size=count)) for _ in range(draws)])
        # with one cluster there is nothing to leave out
        left_out = range(count if 1 < count <= EXACT else 0)
        without = np.array([of(np.delete(np.arange(count), i)) for i in left_out])
    return Interval(value, *_limits(value, found, without, level), len(values))


def share(hits: int, n: int, level: float = 0.95) -> Interval:
    """The share of `hits` among n items with Wilson's interval, which also holds for none or all of
    them. Raises `InputError` unless 0 <= hits <= n and n > 0."""
    from scipy.special import ndtri

    _check_level(level, 1)
    if not 0 <= hits <= n or n < 1:
        raise InputError(f"a share needs 0 <= hits <= n and n > 0, not {hits} of {n}")
    z = float(ndtri(0.5 + level / 2))
    p, shrink = hits / n, 1 / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) * shrink
    half = z * shrink * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(p, low if hits else 0.0, high if hits < n else 1.0, int(n))


def auc_interval(
    y: ArrayLike,
    scores: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The area under the ROC curve (`data.ranks.auc`) of scores [n] for the classes y [n] > 0.

    Draws within each class; with `clusters` [n], such as the number of the pair that an item is
    from, whole clusters instead. The interval is of percentiles: with an area of 1 it is [1, 1].
    Raises `InputError` with one class only, or for scores that are not finite.
    """
    from gemma_scope_jax.data.ranks import auc

    _check_level(level, draws)
    y, scores = np.asarray(y) > 0, np.asarray(scores, np.float64)
    if y.shape != scores.shape or y.ndim != 1 or not np.isfinite(scores).all():
        raise InputError("an AUC needs one finite score for each label")
    if y.all() or not y.any():
        raise InputError("an AUC needs items of both classes")
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)  # of equal scores

    def area(weight: np.ndarray) -> np.ndarray:  # [draws, n], in the order of the scores
        up = np.add.reduceat(weight * y[order], starts, axis=1)
        down = np.add.reduceat(weight * ~y[order], starts, axis=1)
        below = np.cumsum(down, axis=1) - 0.5 * down
        with np.errstate(invalid="ignore"):  # a draw of clusters may hold one class only
            return (up * below).sum(1) / (up.sum(1) * down.sum(1))

    rng = np.random.default_rng(seed)
    if clusters is not None:
        number, count = _numbered(clusters, len(y))
        found = _over_counts(lambda w: area(w[:, number[order]]), count, draws, rng, len(y))
    else:
        ups, downs = np.flatnonzero(y[order]), np.flatnonzero(~y[order])
        parts = []
        for some in _steps(draws, len(y)):
            weight = np.zeros((some, len(y)))
            for where in (ups, downs):
                k = len(where)
                weight[:, where] = rng.multinomial(k, np.full(k, 1 / k), some)
            parts.append(area(weight))
        found = np.concatenate(parts)
    value = auc(y, scores)
    return Interval(value, *_limits(value, found, np.zeros(0), level), len(y))


def _check_level(level: float, draws: int) -> None:
    if not 0 < level < 1 or draws < 1:
        raise InputError(f"an interval needs 0 < level < 1 and draws > 0, not {level} and {draws}")


def _numbered(clusters: ArrayLike | None, n: int) -> tuple[np.ndarray, int]:
    """The number of each row's cluster, int [n], and how many there are."""
    if clusters is None:
        return np.arange(n), n
    clusters = np.asarray(clusters)
    if clusters.shape != (n,):
        raise InputError(f"clusters need one entry for each of the {n} items")
    names, number = np.unique(clusters, return_inverse=True)
    return number, len(names)


def _steps(draws: int, size: int) -> list[int]:
    """`draws` in parts, so that no part holds more than `AT_ONCE` numbers."""
    step = max(1, AT_ONCE // max(size, 1))
    return [min(step, draws - start) for start in range(0, draws, step)]


def _over_counts(
    statistic: Callable[[np.ndarray], np.ndarray],
    count: int,
    draws: int,
    rng: np.random.Generator,
    size: int = 0,
) -> np.ndarray:
    """statistic(how often each of `count` was drawn, [some, count]) of all draws."""
    even = np.full(count, 1 / count)
    parts = _steps(draws, max(count, size))
    return np.concatenate([statistic(rng.multinomial(count, even, n) * 1.0) for n in parts])


def _limits(
    value: float, found: np.ndarray, without: np.ndarray, level: float
) -> tuple[float, float]:
    """The interval from the draws, corrected by the values without each of the items (BCa)."""
    from scipy.special import ndtr, ndtri

    found = found[np.isfinite(found)]
    if not len(found) or not np.isfinite(value):
        return float("nan"), float("nan")
    cuts = np.array([0.5 - level / 2, 0.5 + level / 2])
    off = without.mean() - without if 1 < len(without) <= EXACT else np.zeros(1)
    spread = float((off * off).sum()) ** 1.5
    below = float(((found < value).mean() + (found <= value).mean()) / 2)
    if spread > 0 and np.isfinite(spread) and 0 < below < 1:
        skew, bias = float((off**3).sum()) / (6 * spread), ndtri(below)
        z = bias + ndtri(cuts)
        cuts = ndtr(bias + z / (1 - skew * z))
    low, high = np.quantile(found, np.clip(cuts, 0, 1))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTests:
    """Two arms compared by each of F features.

    statistic  t, float64 [F]: positive where the first arm has more
    p          [F], of the t test of that feature alone, two-sided
    q          [F], Benjamini-Hochberg over all F: the false discovery rate if this feature and all
               with a smaller q are called different
    effect     [F], Cohen's d: the mean difference over the standard deviation, of the differences
               of pairs or, unpaired, pooled over the arms
    adjusted   [F], p for the whole family: how often the largest statistic of all features is as
               large when items change arms at random (Westfall and Young's max-T)
    family_p   the smallest of `adjusted`: the alarm. Where the arms do not differ it is below 0.05
               in 5 of 100 studies at most, however many features there are
    """

    statistic: np.ndarray
    p: np.ndarray
    q: np.ndarray
    effect: np.ndarray
    adjusted: np.ndarray
    family_p: float


def paired_tests(difference: ArrayLike, *, permutations: int = 1000, seed: int = 0) -> FeatureTests:
    """Tests whether the differences [N, F] of N pairs have mean zero.

    p is of the paired t test; the permutations flip the signs of whole pairs. A feature that never
    differs has p 1. Raises `InputError` for fewer than 5 pairs or numbers that are not finite.
    """
    x = _checked(difference, "pairs")
    n = len(x)
    unit, used = _unit_columns(x)
    rng = np.random.default_rng(seed)
    flips = rng.integers(0, 2, (permutations, n)) * 2.0 - 1.0
    r, adjusted = np.zeros(x.shape[1]), np.ones(x.shape[1])
    r[used], adjusted[used] = _max_tests(np.ones(n) / n**0.5, flips / n**0.5, unit)
    t = _t_of(r, n - 1)
    return _with_p(t, np.full(len(t), n - 1.0), t / n**0.5, adjusted)


def unpaired_tests(
    a: ArrayLike, b: ArrayLike, *, permutations: int = 1000, seed: int = 0
) -> FeatureTests:
    """Tests whether a [N, F] and b [M, F] have the same means.

    p is of Welch's t test. The permutations deal the items to the arms anew and compare
    correlations of the features with the arm, which are equivalent to t with pooled variance. A
    feature that is the same everywhere has p 1. Raises `InputError` for fewer than 5 items of an
    arm or numbers that are not finite.
    """
    a, b = _checked(a, "items of the first arm"), _checked(b, "items of the second arm")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"the arms have {a.shape[1]} and {b.shape[1]} features: they must agree")
    n, m = len(a), len(b)
    x = np.concatenate([a, b])
    scale = np.abs(x).max(0, initial=0.0)
    x -= x.mean(0)
    x[:, np.abs(x).max(0, initial=0.0) < 1e-12 * scale] = 0.0  # constant, but for rounding
    unit, used = _unit_columns(x)
    arm = np.repeat([1 / n, -1 / m], [n, m]) / (1 / n + 1 / m) ** 0.5
    rng = np.random.default_rng(seed)
    dealt = rng.permuted(np.broadcast_to(arm, (permutations, n + m)), axis=1)
    r, adjusted = np.zeros(x.shape[1]), np.ones(x.shape[1])
    r[used], adjusted[used] = _max_tests(arm, dealt, unit)
    pooled = _t_of(r, n + m - 2)
    return _with_p(*_welch(x[:n], x[n:], pooled), pooled * (1 / n + 1 / m) ** 0.5, adjusted)


def _checked(x: ArrayLike, what: str) -> np.ndarray:
    x = np.array(x, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise InputError(f"feature tests need an array [items, features], not {list(x.shape)}")
    if len(x) < FEWEST:
        raise InputError(f"feature tests need at least {FEWEST} {what}, not {len(x)}")
    if not np.isfinite(x).all():
        raise InputError("feature tests need finite numbers")
    return x


def _unit_columns(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of x that are not zero, with norm 1 each, and which they are."""
    scale = np.abs(x).max(0)
    used = np.flatnonzero(scale > 0)
    kept = x[:, used] / scale[used]  # squares of very small numbers would vanish
    return kept / np.linalg.norm(kept, axis=0), used


def _max_tests(
    own: np.ndarray, drawn: np.ndarray, unit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations `own` [N] @ unit [N, U], and how often the largest of all is as large under the
    weights `drawn` [P, N], the true ones counted once more."""
    largest = np.zeros(len(drawn))
    step = max(1, AT_ONCE // max(1, len(drawn)))
    for start in range(0, unit.shape[1], step):
        some = np.abs(drawn @ unit[:, start : start + step])
        np.maximum(largest, some.max(1), out=largest)
    found = own @ unit
    # a tie counts as reached, whatever the last bits say
    reached = np.sort(largest * (1 + 1e-9))
    above = len(reached) - np.searchsorted(reached, np.abs(found), "left")
    return found, (1 + above) / (1 + len(reached))


def _t_of(r: np.ndarray, df: int) -> np.ndarray:
    """t of correlations r."""
    square = np.minimum(r * r, LARGEST)
    return np.sign(r) * np.sqrt(df * square / (1 - square))


def _welch(a: np.ndarray, b: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Welch's t [F] and its degrees of freedom; `pooled` t where neither arm varies."""
    n, m = len(a), len(b)
    of_a, of_b = a.var(0, ddof=1) / n, b.var(0, ddof=1) / m
    both = of_a + of_b
    difference = a.mean(0) - b.mean(0)
    varies = both > (1 - LARGEST) * difference**2 / (n + m)
    safe = np.where(varies, both, 1.0)
    t = np.where(varies, difference / np.sqrt(safe), pooled)
    share_a, share_b = of_a / safe, of_b / safe
    slack = share_a**2 / (n - 1) + share_b**2 / (m - 1)
    return t, np.where(varies, 1 / np.where(varies, slack, 1.0), n + m - 2.0)


def _with_p(
    t: np.ndarray, df: np.ndarray, effect: np.ndarray, adjusted: np.ndarray
) -> FeatureTests:
    from scipy import special, stats

    p = np.where(t == 0, 1.0, 2 * special.stdtr(df, -np.abs(t)))
    q = stats.false_discovery_control(p)
    return FeatureTests(t, p, q, effect, adjusted, float(adjusted.min()))
