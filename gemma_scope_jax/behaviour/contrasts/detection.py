"""How well the arms are told apart on texts that had no say: features beside their baselines.

Probes on raw activations beat features of coders in all published tables of detection, and a
feature may be no better than a random one. So all are fitted on the same texts, scored on the same
others, and always shown together.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import PooledArms
from gemma_scope_jax.behaviour.statistics import Interval, auc_interval
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.probing.logistic import fit_logistic
from gemma_scope_jax.probing.pooling import SiteLayer, typical_scale
from gemma_scope_jax.probing.probing import WIDTHS, choose_strength

DRAWS = 20  # of random features
SINGLE = 128  # texts from which on one part is held out to choose a penalty; fewer: five in turn
Scorer = Callable[[PooledArms], np.ndarray]  # float64 [N], larger for arm a


@dataclasses.dataclass(frozen=True)
class Detectors:
    """Functions fitted to tell arm a from arm b, by name, and those of random features."""

    scorers: dict[str, Scorer]
    random: list[Scorer]
    k: int

    def aucs(self, arms: PooledArms, level: float, seed: int) -> dict[str, Interval]:
        """The area under the ROC curve of each on these texts, with a bootstrap interval over texts
        (over pairs or units, where there are any). Of random features: the mean over the draws, and
        the range that holds `level` of them."""
        clusters = arms.item if arms.paired or arms.grouped else None
        options: dict[str, Any] = {"clusters": clusters, "level": level}
        found = {
            name: auc_interval(arms.y, scorer(arms), **options, seed=seed)
            for name, scorer in self.scorers.items()
        }
        areas = np.array([auc(arms.y, scorer(arms)) for scorer in self.random])
        if len(areas):
            low, high = np.quantile(areas, [0.5 - level / 2, 0.5 + level / 2])
            name = f"{self.k} random features"
            found[name] = Interval(float(areas.mean()), float(low), float(high), len(areas))
        return found


def fit_detectors(
    arms: PooledArms,
    chosen: Sequence[int] | np.ndarray,
    eligible: np.ndarray,
    place: SiteLayer,
    other: SiteLayer,
    *,
    seed: int = 0,
) -> Detectors:
    """Detectors fitted on these texts.

    chosen    columns of `arms.values`, the best first
    eligible  columns that random features are drawn from
    place, other  where the raw activations are probed
    """
    parts = _parts(arms, seed)
    raw = {f"raw probe, layer {layer}": (site, layer) for site, layer in (place, other)}
    scorers: dict[str, Scorer] = {name: _raw_probe(arms, at, parts) for name, at in raw.items()}
    scorers = {"raw probe": scorers.pop(f"raw probe, layer {place[1]}"), **scorers}
    x = arms.raw[place].astype(np.float64)
    apart = x[arms.y].mean(0) - x[~arms.y].mean(0)
    scorers["difference of means"] = lambda new: new.raw[place] @ apart
    chosen = np.asarray(chosen, np.int64)
    if not len(chosen):
        return Detectors(scorers, [], 0)
    best, k = int(chosen[0]), len(chosen)
    sign = float(np.sign(arms.a[:, best].mean() - arms.b[:, best].mean())) or 1.0
    scorers["best feature"] = lambda new: sign * new.values[:, best].astype(np.float64)
    top, c = _sparse_probe(arms, chosen, parts)
    scorers[f"top {k} features"] = top
    draw = np.random.default_rng([seed, 1])
    sets = [draw.permutation(eligible)[:k] for _ in range(DRAWS if len(eligible) >= k else 0)]
    return Detectors(scorers, _random_probes(arms, sets, c), k)


def _parts(arms: PooledArms, seed: int) -> list[np.ndarray]:
    """Rows to hold out in turn to choose a penalty: the same share of both arms, whole pairs."""
    items = np.unique(arms.item[arms.y]), np.unique(arms.item[~arms.y])
    draw, number = np.random.default_rng([seed, 2]), np.zeros(arms.item.max() + 1, int)
    for some in items[:1] if arms.paired else items:
        number[draw.permutation(some)] = np.arange(len(some)) % 5
    rows = number[arms.item]
    return [np.flatnonzero(rows == p) for p in range(1 if len(rows) >= SINGLE else 5)]


def _probe(x: np.ndarray, arms: PooledArms, parts: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """The direction [K] of a logistic probe on x [N, K], and its C."""
    y = arms.y.astype(np.int64)
    c = choose_strength(x, y, parts)
    return fit_logistic(x[None], y[None], c).w[0, 0], c


def _raw_probe(arms: PooledArms, place: SiteLayer, parts: list[np.ndarray]) -> Scorer:
    scale = typical_scale(arms.raw[place])
    w, _ = _probe(arms.raw[place] * scale, arms, parts)
    return lambda new: new.raw[place].astype(np.float64) @ (w * scale)


def _spread(x: np.ndarray) -> np.ndarray:
    """Standard deviations of the columns of x, 1 for those that do not vary: a penalty then means
    the same for features of any size."""
    spread = x.std(0, dtype=np.float64)
    return np.where(spread > 0, spread, 1.0)


def _scaled(arms: PooledArms, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """These columns over their spread, float64 [N, W], and the spread [k]; filled up with zeros, to
    which probes give no weight, so that few shapes are compiled."""
    spread = _spread(arms.values[:, columns])
    width = next((n for n in WIDTHS if n >= len(columns)), len(columns))
    x = arms.values[:, columns] / spread
    return np.pad(x, ((0, 0), (0, width - len(columns)))), spread


def _scorer(columns: np.ndarray, w: np.ndarray) -> Scorer:
    return lambda new: new.values[:, columns].astype(np.float64) @ w


def _sparse_probe(
    arms: PooledArms, columns: np.ndarray, parts: list[np.ndarray]
) -> tuple[Scorer, float]:
    x, spread = _scaled(arms, columns)
    w, c = _probe(x, arms, parts)
    return _scorer(columns, w[: len(columns)] / spread), c


def _random_probes(arms: PooledArms, sets: list[np.ndarray], c: float) -> list[Scorer]:
    """Probes on each set of columns, all of one size, with the penalty of the found features."""
    if not sets:
        return []
    scaled = [_scaled(arms, some) for some in sets]
    x = np.stack([x for x, _ in scaled])
    fitted = fit_logistic(x, np.broadcast_to(arms.y, x.shape[:2]), c).w[:, 0]
    return [
        _scorer(some, w[: len(some)] / spread) for some, w, (_, spread) in zip(sets, fitted, scaled)
    ]
