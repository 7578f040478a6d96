"""How well answers agree with the truth: the figures that delphi and SAEBench report."""

import math
from collections.abc import Sequence

import numpy as np

from gemma_scope_jax.probing.logistic import auc


def binary_metrics(
    truth: Sequence[float], said: Sequence[float], confidence: Sequence[float] | None = None
) -> dict[str, float | int | None]:
    """accuracy, balanced_accuracy, f1 (of the positives), auc (with confidences) and n.

    truth, said: 0 or 1 of each example. What is undefined is None: everything without examples,
    balanced accuracy and auc without examples of both kinds, F1 without positives, said or true.
    """
    t, s = np.asarray(truth, np.float64) > 0.5, np.asarray(said, np.float64) > 0.5
    n = len(t)
    if n == 0:
        return {"accuracy": None, "balanced_accuracy": None, "f1": None, "n": 0}
    hit, missed, false = int((t & s).sum()), int((t & ~s).sum()), int((~t & s).sum())
    silent = n - hit - missed - false
    balanced = None
    if hit + missed and silent + false:
        balanced = 0.5 * (hit / (hit + missed) + silent / (silent + false))
    f1 = 2 * hit / (2 * hit + missed + false) if hit + missed + false else None
    found = {"accuracy": (hit + silent) / n, "balanced_accuracy": balanced, "f1": f1, "n": n}
    if confidence is not None:
        area = auc(t, np.asarray(confidence, np.float64))
        found["auc"] = None if math.isnan(area) else area
    return found


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation of a and b [n] in float64; None if one of them does not vary."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else None
