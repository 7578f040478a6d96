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
    options = {"permutations": permutations, "seed": seed}
    if arms.paired:
        return paired_tests(arms.a.astype(np.float64) - arms.b, **options)
    return unpaired_tests(arms.a, arms.b, **options)


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
    sizes = _paired_sizes if arms.paired else _unpaired_sizes
    size = sizes(arms, splits, rng)
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


def _paired_sizes(arms: PooledArms, splits: int, rng: np.random.Generator) -> np.ndarray:
    """mean^2 / mean of squares of the differences in each half, float64 [splits, F]: as d is."""
    x = arms.a.astype(np.float64) - arms.b
    half = _halves(len(x), splits, rng)
    mean, square = half @ x, half @ (x * x)
    return mean**2 / np.where(square > 0, square, 1.0)


def _unpaired_sizes(arms: PooledArms, splits: int, rng: np.random.Generator) -> np.ndarray:
    """The squared difference of means over the variance of all, [splits, F]: as d is."""
    a, b = arms.a.astype(np.float64), arms.b.astype(np.float64)
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
