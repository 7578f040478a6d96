"""Which features differ most between two arms, and whether another sample would say the same.

Features are ranked by the size of Cohen's d, which for arms of given sizes is the order of t with
pooled variance. Unlike Welch's t it stays bounded where a feature fires in few texts.
"""

import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import PooledArms
from gemma_scope_jax.behaviour.statistics import FeatureTests, paired_tests, unpaired_tests

SPLITS = 100  # random halves


def tests_of(arms: PooledArms, permutations: int, seed: int = 0) -> FeatureTests:
    """The tests of arm a less arm b, for each column of `arms.values`."""
    tests = paired_tests if arms.paired else unpaired_tests
    return tests(*observations(arms), permutations=permutations, seed=seed)


def observations(arms: PooledArms) -> list[np.ndarray]:
    """Independent rows, float64 [n, F]: the differences of pairs, or the rows of each arm; with
    units their means."""
    if arms.paired:
        rows = [(arms.a.astype(np.float64) - arms.b, arms.item[arms.y])]
    else:
        rows = [(arms.values[y].astype(np.float64), arms.item[y]) for y in (arms.y, ~arms.y)]
    return [_means(x, item) if arms.grouped else x for x, item in rows]


def _means(x: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The mean of the rows of x [N, F] of each item."""
    _, at, counts = np.unique(item, return_inverse=True, return_counts=True)
    total = np.zeros((len(counts), x.shape[1]))
    np.add.at(total, at, x)
    return total / counts[:, None]


def ranked(tests: FeatureTests) -> np.ndarray:
    """The columns that differ at all, by |d|; ties by number."""
    order = np.argsort(-np.abs(tests.effect), kind="stable")
    return order[tests.effect[order] != 0]


def stability(
    arms: PooledArms, k: int, left_out: np.ndarray, *, splits: int = SPLITS, seed: int = 0
) -> np.ndarray:
    """For each column, the share of random halves of the texts (of the pairs, where there are
    pairs) in which it is among the k that differ most, without those `left_out`, bool [F]."""
    rng = np.random.default_rng([seed, 3])
    rows = observations(arms)
    size = (_paired_sizes if arms.paired else _unpaired_sizes)(splits, rng, *rows)
    size[:, left_out] = 0.0
    k = min(k, size.shape[1])
    top = np.argpartition(-size, k - 1, axis=1)[:, :k]
    hits = np.zeros(size.shape[1])
    np.add.at(hits, top[np.take_along_axis(size, top, 1) > 0], 1)
    return hits / splits


def _halves(count: int, splits: int, rng: np.random.Generator) -> np.ndarray:
    """[splits, count]: 1 for the members of each half."""
    member = np.arange(count) < (count + 1) // 2
    return rng.permuted(np.broadcast_to(member, (splits, count)), axis=1).astype(np.float64)


def _paired_sizes(splits: int, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """mean^2 / mean of squares of the differences x [n, F] in each half, float64 [splits, F]: as d
    is."""
    half = _halves(len(x), splits, rng)
    mean, square = half @ x, half @ (x * x)
    return mean**2 / np.where(square > 0, square, 1.0)


def _unpaired_sizes(
    splits: int, rng: np.random.Generator, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """The squared difference of means over the variance of all, [splits, F]: as d is."""
    middle = np.concatenate([a, b]).mean(0)
    a, b = a - middle, b - middle  # so that nothing cancels
    of_a, of_b = _halves(len(a), splits, rng), _halves(len(b), splits, rng)
    n, m = of_a[0].sum(), of_b[0].sum()
    sum_a, sum_b = of_a @ a, of_b @ b
    mean = (sum_a + sum_b) / (n + m)
    variance = (of_a @ (a * a) + of_b @ (b * b)) / (n + m) - mean**2
    apart = (sum_a / n - sum_b / m) ** 2
    floor = 1e-12 * np.maximum(np.abs(a).max(0), np.abs(b).max(0)) ** 2
    return np.where(variance > floor, apart / np.maximum(variance, 1e-300), 0.0)
