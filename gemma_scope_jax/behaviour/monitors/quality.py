"""How good a monitor is on texts that it has not seen: errors, calibration, how soon it fires."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.statistics import Interval, auc_interval, bootstrap, share
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.strict_json import finite

BINS = 10  # of the reliability table
POINTS = 101  # of the ROC curve that is kept


@dataclasses.dataclass(frozen=True, eq=False)
class MonitorQuality:
    """Figures on positives and negatives, both counted as equally frequent.

    auc           area under the ROC curve of the texts' largest scores
    detected      share of positives with an alarm; `false_alarms`: of negatives
    roc           (false alarms, detected) at every threshold, float64 [P, 2], from (0, 0) to (1, 1)
    calibration_error  expected calibration error: the mean distance between predicted probability
                  and share of positives, over the bins of `reliability`
    reliability   rows (mean predicted probability, share of positives, texts), a tenth of the
                  texts each
    delay         tokens read until the first alarm, of positives that have one; None without any
    """

    auc: Interval
    detected: Interval
    false_alarms: Interval
    roc: np.ndarray
    calibration_error: float
    reliability: tuple[tuple[float, float, int], ...]
    delay: Interval | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; the ROC curve as about a hundred points."""
        some = np.unique(np.linspace(0, len(self.roc) - 1, POINTS).round().astype(int))
        return finite(
            {
                "auc": self.auc.as_dict(),
                "detected": self.detected.as_dict(),
                "false_alarms": self.false_alarms.as_dict(),
                "calibration_error": self.calibration_error,
                "reliability": [list(row) for row in self.reliability],
                "delay": None if self.delay is None else self.delay.as_dict(),
                "roc": self.roc[some].tolist(),
            }
        )

    def tables(self) -> dict[str, list[list[str]]]:
        """Rows by heading, for a report; the first row of each names the columns."""
        delay = "no alarm" if self.delay is None else str(self.delay)
        return {
            "Monitor on texts that it has not seen": [
                ["figure", "value"],
                ["area under the ROC curve", str(self.auc)],
                ["positives with an alarm", str(self.detected)],
                ["negatives with an alarm", str(self.false_alarms)],
                ["expected calibration error", f"{self.calibration_error:.3f}"],
                ["tokens until the first alarm, mean", delay],
            ],
            "Reliability": [
                ["predicted probability", "share of positives", "texts"],
                *([f"{p:.3f}", f"{s:.3f}", str(n)] for p, s, n in self.reliability),
            ],
        }


def first_alarms(scores: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """The number of tokens read until the first alarm of each text that has one."""
    return np.array([int(np.argmax(s > threshold)) + 1 for s in scores if (s > threshold).any()])


def measured(
    high: np.ndarray,
    low: np.ndarray,
    threshold: float,
    probability: Callable[[np.ndarray], np.ndarray],
    delays: np.ndarray,
) -> MonitorQuality:
    """The figures of the scores of positives and of negatives."""
    y, scores = np.repeat([1, 0], [len(high), len(low)]), np.concatenate([high, low])
    error, rows = calibration(y, probability(scores))
    hits, false = int((high > threshold).sum()), int((low > threshold).sum())
    return MonitorQuality(
        auc_interval(y, scores),
        share(hits, len(high)),
        share(false, len(low)),
        roc_curve(y, scores),
        error,
        rows,
        bootstrap(delays) if len(delays) else None,
    )


def roc_curve(y: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(share of negatives, share of positives) above each threshold, [P, 2]; equal scores are
    passed together."""
    order = np.argsort(-scores, kind="stable")
    up = np.cumsum(y[order] > 0) / max(int((y > 0).sum()), 1)
    down = np.cumsum(y[order] <= 0) / max(int((y <= 0).sum()), 1)
    last = np.append(np.diff(scores[order]) != 0, True)
    return np.concatenate([[[0.0, 0.0]], np.stack([down, up], 1)[last]])


def calibration(
    y: np.ndarray, predicted: np.ndarray, bins: int = BINS
) -> tuple[float, tuple[tuple[float, float, int], ...]]:
    """The expected calibration error and the rows (mean prediction, share of positives, texts).

    Both classes count as equally frequent, as the calibration assumes. The bins hold equally many
    texts (Nixon et al. 2019), since most predictions are near 0 or 1.
    """
    weight = np.where(y > 0, 0.5 / max((y > 0).sum(), 1), 0.5 / max((y <= 0).sum(), 1))
    error, rows = 0.0, []
    for some in np.array_split(np.argsort(predicted, kind="stable"), min(bins, len(y))):
        mass = weight[some].sum()
        expected = float(weight[some] @ predicted[some] / mass)
        seen = float(weight[some] @ (y[some] > 0) / mass)
        error += mass * abs(expected - seen)
        rows.append((expected, seen, len(some)))
    return float(error), tuple(rows)


def quality_from(content: Any, where: Any) -> MonitorQuality | None:
    """Figures from the JSON of `as_dict`; None from None. Raises `InputError` for anything else."""
    if content is None:
        return None
    try:
        delay = content["delay"]
        return MonitorQuality(
            _interval(content["auc"]),
            _interval(content["detected"]),
            _interval(content["false_alarms"]),
            np.asarray(content["roc"], np.float64).reshape(-1, 2),
            float(content["calibration_error"]),
            tuple((float(p), float(s), int(n)) for p, s, n in content["reliability"]),
            None if delay is None else _interval(delay),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: the figures of quality are malformed") from error


def _interval(content: Any) -> Interval:
    number = lambda key: float("nan") if content[key] is None else float(content[key])
    return Interval(number("value"), number("low"), number("high"), int(content["n"]))
