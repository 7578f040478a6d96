"""The area under the ROC curve: how well scores tell two classes apart, whatever their scale.

Probes and explanations are both scored by it, and neither room knows the other.
"""

import numpy as np


def auc(y: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in which the positive has the larger score
    [N]; ties count half. Positive is y [N] > 0. NaN with only one class, or if a score is NaN."""
    y = np.asarray(y) > 0
    low, high = np.sort(scores[~y]), scores[y]
    if not len(low) or not len(high) or np.isnan(scores).any():
        return float("nan")
    above = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(above / 2 / (len(low) * len(high)))
