"""Fitting a monitor: half of the texts for the weights, a quarter for threshold and calibration.

The last quarter is only measured: the figures that are saved with a monitor are of texts that
neither its weights nor its threshold have seen.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import Arms, arms
from gemma_scope_jax.behaviour.monitors.monitor import (
    Monitor,
    both_scores,
    largest,
    measure_monitor,
)
from gemma_scope_jax.behaviour.steering.vectors import check_place
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.probing.logistic import fit_logistic
from gemma_scope_jax.probing.pooling import pool, typical_scale
from gemma_scope_jax.probing.probing import choose_strength, rank

if TYPE_CHECKING:
    from gemma_scope_jax.model.tokenizer import Tokenizer

LEAST = 20  # texts of each side


def fit_monitor(
    model: Model,
    tokenizer: "Tokenizer",
    positives: Sequence[Any],
    negatives: Sequence[Any],
    *,
    site: str = "resid_post",
    layer: int | None = None,
    coder: SparseCoder | None = None,
    features: int | Sequence[int] = 5,
    how: Literal["mean", "last"] = "mean",
    false_alarms: float = 0.05,
    seed: int = 0,
) -> Monitor:
    """A monitor that tells `positives` from `negatives`: texts, chats or ids, as for `gs.arms`.

    site, layer   of a probe on raw activations
    coder         read its features instead, where it reads
    features      which, or how many: those whose means differ most in standard deviations, one
                  that rises in the positives among them
    how           what the weights are fitted on: the mean over a text's tokens, or its last token
    false_alarms  the threshold is passed by at most this share of the negatives set aside for it
    seed          of the split

    The result's `quality` comes from texts that neither weights nor threshold have seen; texts that
    occur twice are on one side. Raises `InputError` for fewer than 20 texts on a side, or a place
    that does not exist.
    """
    if coder is None and layer is None:
        raise InputError("give the layer of a probe, or a coder")
    if not 0 <= false_alarms < 1:
        raise InputError(f"false_alarms is a share of the negatives below 1, not {false_alarms}")
    if how not in ("mean", "last"):
        raise InputError(f"how is {how!r}, expected mean or last")
    texts = arms(tokenizer, positives, negatives, paired=False, name="monitor")
    if min(len(texts.a), len(texts.b)) < LEAST:
        count = f"{len(texts.a)} positives and {len(texts.b)} negatives"
        raise InputError(f"a monitor needs {LEAST} texts on each side, not {count}")
    fitting, rest = texts.halves(seed)
    setting, test = rest.halves(seed)
    if coder is not None:
        place, first = (coder.reads, coder.layer), coder.first
    else:
        place, first = (site, -1 if layer is None else layer), 1
    check_place(model, *place)
    x, chosen, encoder = _design(model, coder, features, place, fitting, how, first)
    w, b = _probe(x, len(fitting.a))
    made = {
        "model": model_identity(model),
        "coder": "" if coder is None else coder.info.path,
        "positives": len(texts.a),
        "negatives": len(texts.b),
        "fitted on": "the mean of a text's tokens" if how == "mean" else "the last token of a text",
        "false_alarms": false_alarms,
        "seed": seed,
    }
    found = Monitor(*place, w, b, np.inf, chosen, encoder, first, made=made)
    high, low = (largest(s) for s in both_scores(found, model, setting))
    threshold = _above(np.quantile(low, 1 - false_alarms, method="higher"), [*high, *low])
    found = dataclasses.replace(found, threshold=threshold, calibration=_platt(high, low))
    quality = measure_monitor(found, model, tokenizer, test.a, test.b)
    return dataclasses.replace(found, quality=quality)


def _design(
    model, coder, features, place, fitting: Arms, how, first
) -> tuple[np.ndarray, Any, Any]:
    """What weights are fitted on, float64 [N, K], positives first; the features chosen and their
    columns of the encoder."""
    coders = () if coder is None else (coder,)
    token = "mean" if how == "mean" else -1
    places = (place,) if coder is None else ()
    pooled = pool(model, coders, [*fitting.a, *fitting.b], how=token, first=first, places=places)
    if coder is None:
        return pooled.raw[place].astype(np.float64), (), None
    if coder.k is not None:
        raise InputError("a TopK coder's features depend on each other: convert it, as_jump_relu")
    y = np.arange(len(fitting.a) + len(fitting.b)) < len(fitting.a)
    values, columns = pooled.features[0]
    if isinstance(features, (int, np.integer)):
        if not 1 <= features <= len(columns):
            raise InputError(f"features is {features}: {len(columns)} are active on the texts")
        spread = np.sqrt((values[y].var(0) + values[~y].var(0)) / 2)
        order = rank(values / np.maximum(spread, 1e-6 * spread.max()), y)
        # a text's largest score is no news where a single feature falls with the behaviour
        rises = values[y].mean(0) > values[~y].mean(0)
        first = next((j for j in order if rises[j]), order[0])
        order = np.concatenate([[first], order[order != first]])
        chosen = columns[order[:features]]
    else:
        chosen = np.asarray(features)
        if not chosen.size or chosen.min() < 0 or chosen.max() >= coder.width:
            raise InputError(f"features must be numbers below {coder.width}, not {features!r:.60}")
    x = np.zeros((len(y), len(chosen)))
    known = {int(c): n for n, c in enumerate(columns)}
    for n, feature in enumerate(chosen.tolist()):
        if feature in known:
            x[:, n] = values[:, known[feature]]
    parts = (coder.w_enc[:, chosen], coder.b_enc[chosen], coder.threshold[chosen])
    return x, tuple(chosen.tolist()), tuple(np.asarray(a, np.float32) for a in parts)


def _probe(x: np.ndarray, positives: int) -> tuple[np.ndarray, float]:
    """w float32 [K] and b of a logistic probe on x [N, K], whose first rows are the positives."""
    y = (np.arange(len(x)) < positives).astype(np.int64)
    if not x.any():
        raise InputError("none of the features is active on any of the texts")
    scale = typical_scale(x)
    fitted = fit_logistic((x * scale)[None], y[None], choose_strength(x * scale, y))
    return (fitted.w[0, 0] * scale).astype(np.float32), float(fitted.b[0, 0])


def _above(score: float, scores: Sequence[float]) -> float:
    """A threshold that `score` does not pass: halfway to the next larger one of the scores, and at
    least a ten-thousandth above it, since another batch computes it with another rounding."""
    larger = [s for s in scores if s > score]
    half = (min(larger) - score) / 2 if larger else 0.0
    return float(score + max(half, 1e-4 * abs(score)))


def _platt(high: np.ndarray, low: np.ndarray) -> tuple[float, float]:
    """Slope and offset of a logistic curve of the scores, both sides with the same weight (Platt
    1999, whose softened targets keep it finite where the sides do not overlap)."""
    x, scale = np.concatenate([high, low]), max(float(np.std([*high, *low])), 1e-9)
    soft = (len(high) + 1) / (len(high) + 2), 1 / (len(low) + 2)
    target = np.repeat(soft, [len(high), len(low)])
    weight = np.repeat([0.5 / len(high), 0.5 / len(low)], [len(high), len(low)])
    twice = np.concatenate([x, x])[:, None] / scale
    y = np.repeat([1, 0], len(x))
    weights = np.concatenate([weight * target, weight * (1 - target)])
    fitted = fit_logistic(twice[None], y[None], 1e6, weights[None, None])
    return float(fitted.w[0, 0, 0]) / scale, float(fitted.b[0, 0])
