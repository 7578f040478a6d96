"""How well answers agree with the truth: the figures that delphi and SAEBench report."""

from collections.abc import Sequence

import numpy as np


def binary_metrics(
    truth: Sequence[float], said: Sequence[float], confidence: Sequence[float] | None = None
) -> dict[str, float | int | None]:
    """accuracy, balanced_accuracy, f1 (of the positives), auc (with confidences) and n.

    truth, said: 0 or 1 for each example. Undefined figures are None: all of them without examples,
    balanced accuracy and AUC without both classes, F1 without positives in either.
    """
    t, s = np.asarray(truth, np.float64) > 0.5, np.asarray(said, np.float64) > 0.5
    n = len(t)
    if n == 0:
        return {"accuracy": None, "balanced_accuracy": None, "f1": None, "n": 0}
    tp, fn, fp = int((t & s).sum()), int((t & ~s).sum()), int((~t & s).sum())
    tn = n - tp - fn - fp
    balanced = 0.5 * (tp / (tp + fn) + tn / (tn + fp)) if tp + fn and tn + fp else None
    f1 = 2 * tp / (2 * tp + fn + fp) if tp + fn + fp else None
    found = {"accuracy": (tp + tn) / n, "balanced_accuracy": balanced, "f1": f1, "n": n}
    if confidence is not None:
        from scipy.stats import rankdata

        p, u = tp + fn, None  # AUC, by the Mann-Whitney U statistic
        if p and n - p:
            u = rankdata(np.asarray(confidence, np.float64))[t].sum() - p * (p + 1) / 2
        found["auc"] = None if u is None else float(u / (p * (n - p)))
    return found


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation of a and b [n] in float64; None if either is constant."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else None
