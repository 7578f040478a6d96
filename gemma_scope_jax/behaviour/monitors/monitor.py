"""Monitors: one number a token that says whether a behaviour is under way, with a known error rate.

    monitor = gs.fit_monitor(model, tokenizer, positives, negatives, layer=12)
    gs.generate(model, ids[None], 64, [monitor.read(), monitor.alarm()], halt="alarm")

A monitor is a probe on raw activations, or a few features of a coder with weights. It reads each
token as it is generated; a text's score is the largest of its tokens. The tokens of a prompt count
in that, while `halt` asks the generated ones alone: measure on texts like those that are written.
Probes on raw activations beat features in all published tables of detection: measure both.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import Arms, arms
from gemma_scope_jax.behaviour.measure import like_lengths
from gemma_scope_jax.behaviour.monitors.quality import MonitorQuality, first_alarms, measured
from gemma_scope_jax.behaviour.steering.spec import Reading, When
from gemma_scope_jax.coders.coder import along_last, float32, jump_relu
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import padded
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.intercept import Intercept, read, token_mask, tokenwise
from gemma_scope_jax.model.run import run

if TYPE_CHECKING:
    from gemma_scope_jax.model.tokenizer import Tokenizer

TOKENS = 2048  # of a batch whose scores are read


class Direction(NamedTuple):
    """A probe's direction: x @ w + b is above `threshold` where the monitor fires."""

    site: str
    layer: int
    w: np.ndarray  # float32 [D]
    b: float
    threshold: float


@dataclasses.dataclass(frozen=True, eq=False)
class Monitor:
    """A score a token, and when it is an alarm; made by `gs.fit_monitor` or `gs.load_monitor`.

    site, layer   where it reads
    w, b          the score is x @ w + b; w is float32 [D], or [k] on features
    threshold     a token with a larger score is an alarm
    features      () for a probe; else the k features that are read, and `encoder`: their columns
                  of the coder (w_enc [D, k], b_enc [k], threshold [k])
    first         tokens before this position never fire
    calibration   (slope, offset): sigmoid(slope * score + offset) is the probability that a text of
                  this largest score is a positive, where both are equally many
    quality       figures on the texts that had no say; None before they are measured
    made          JSON: how it was made, and the model's identity
    """

    site: str
    layer: int
    w: np.ndarray
    b: float
    threshold: float
    features: tuple[int, ...] = ()
    encoder: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    first: int = 1
    calibration: tuple[float, float] = (1.0, 0.0)
    quality: MonitorQuality | None = None
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, name: str = "monitor") -> Intercept:
        """The score of every token: `reads[name]` is float32 [B, T]."""
        return read(self.site, self.layer, _score, self._weights(), name=name)

    def alarm(self, name: str = "alarm") -> Intercept:
        """Whether each token is an alarm: `reads[name]` is bool [B, T], for `generate(halt=name)`.

        The threshold is data: another one compiles nothing."""
        data = self._weights(), np.float32(self.threshold)
        return read(self.site, self.layer, _alarm, *data, name=name, first=self.first)

    def probability(self, scores: Any) -> np.ndarray:
        """The calibrated probability of texts with these largest scores, float64, any shape."""
        slope, offset = self.calibration
        return 1.0 / (1.0 + np.exp(-np.clip(slope * np.asarray(scores, float) + offset, -700, 700)))

    def direction(self) -> Direction:
        """Where it reads, w, b and threshold. Raises `InputError` for a monitor of features, whose
        score is not linear in the activation."""
        if self.features:
            raise InputError("a monitor of features has no direction: its score is not linear")
        return Direction(self.site, self.layer, self.w, self.b, self.threshold)

    def when(self) -> When:
        """The condition of a steering step that acts where this monitor fires. Raises `InputError`
        as `direction` does."""
        site, layer, w, b, threshold = self.direction()
        return When(Reading(vector=w, bias=b, site=site, layer=layer), above=threshold)

    def at(self, threshold: float) -> "Monitor":
        """The same monitor with another threshold; its figures, which no longer hold, are gone."""
        return dataclasses.replace(self, threshold=float(threshold), quality=None)

    def _weights(self) -> tuple:
        return (np.asarray(self.w, np.float32), np.float32(self.b), self.encoder)

    def __repr__(self) -> str:
        what = f"{len(self.features)} features" if self.features else "a probe"
        area = f", AUC {self.quality.auc}" if self.quality else ""
        return f"Monitor({what} at {self.site} of layer {self.layer}{area})"


@tokenwise
def _score(x, ctx, weights):
    w, b, encoder = weights
    dot = lambda a, m: jnp.matmul(float32(a), m, precision=jax.lax.Precision.HIGHEST)
    if encoder is not None:
        w_enc, b_enc, threshold = encoder
        z = dot(x, w_enc)
        x = jump_relu(z + along_last(b_enc, z), along_last(threshold, z))
    return dot(x, w) + b


@tokenwise
def _alarm(x, ctx, weights, threshold, *, first):
    score = _score(x, ctx, weights)
    return (score > threshold) & token_mask(ctx, score, first)


def measure_monitor(
    monitor: Monitor,
    model: Model,
    tokenizer: "Tokenizer",
    positives: Sequence[Any],
    negatives: Sequence[Any],
) -> MonitorQuality:
    """Its figures on other texts, such as some from elsewhere: where a probe is used is seldom
    where it was fitted."""
    both = both_scores(monitor, model, arms(tokenizer, positives, negatives, paired=False))
    alarms = [first_alarms(scores, monitor.threshold) for scores in both]
    high, low = (largest(scores) for scores in both)
    return measured(high, low, monitor.threshold, monitor.probability, alarms[0])


def token_scores(monitor: Monitor, model: Model, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The scores of the tokens of each text (ids [n]) from `monitor.first` on, float64 [n - first].

    A text with no such token has the score of its last token."""
    found: list[np.ndarray] = [np.zeros(0)] * len(texts)
    item, stop = monitor.read(), monitor.layer + 1
    for which, rows, width in like_lengths(model, texts, TOKENS, 1):
        batch = padded([texts[i] for i in which], rows, width)
        out = run(model, batch.tokens, item, segments=batch.segments, stop_at_layer=stop, pad=False)
        scores = np.asarray(out.reads["monitor"], np.float64)
        for row, i in enumerate(which):
            n = len(texts[i])
            found[i] = scores[row, min(monitor.first, n - 1) : n]
    return found


def largest(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The largest score of each text."""
    return np.array([s.max() for s in scores])


def both_scores(monitor: Monitor, model: Model, texts: Arms) -> tuple[list, list]:
    scores = token_scores(monitor, model, [*texts.a, *texts.b])
    return scores[: len(texts.a)], scores[len(texts.a) :]
