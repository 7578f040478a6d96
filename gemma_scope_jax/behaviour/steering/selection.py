"""Which features can steer: what writing one does to the next token, from one pass each.

A feature that fires on a concept need not be one that writes it. Two scores are taken from the
distribution over the next token of a neutral prompt, with the feature's direction added:

    output_score  how much more probable and higher ranked the feature's own top tokens become:
                  the mean over them of p (1 - rank / V), less the same without steering
    confidence    how much more the model commits itself: token confidence is the mean of -log p
                  over the k likeliest tokens, large where one of them has taken all; less the
                  same without steering

Sources: Arad et al. 2025 (2505.20063), whose output score this follows; Xu et al. 2025 (2510.03659)
for the change of token
confidence, which is that of Fu et al. 2025 (DeepConf).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.steering.place import steering
from gemma_scope_jax.behaviour.steering.spec import Reading, adding
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.directions import TO_LOGITS, extreme_logits
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress

NEUTRAL = "In my experience,"
ROWS = 32  # features run together


@dataclasses.dataclass(frozen=True, eq=False)
class OutputScores:
    """For each of `features` int [n]: `output_score` and `confidence` float64 [n], see the module,
    and the ids of its top tokens, int [n, k]."""

    features: np.ndarray
    output_score: np.ndarray
    confidence: np.ndarray
    top_tokens: np.ndarray

    def best(self, count: int, by: str = "output_score") -> list[int]:
        """The features with the largest scores, the best first."""
        if by not in ("output_score", "confidence"):
            raise InputError(f"by is {by!r}, expected output_score or confidence")
        order = np.argsort(-getattr(self, by), kind="stable")[:count]
        return self.features[order].tolist()

    def table(self, tokenizer: Tokenizer, count: int = 20) -> list[list[Any]]:
        """The features with the largest output scores; the first row names the columns."""
        rows: list[list[Any]] = [["feature", "output score", "confidence", "raises"]]
        for n in np.argsort(-self.output_score, kind="stable")[:count].tolist():
            words = " ".join(tokenizer.decode_tokens(self.top_tokens[n, :5]))
            scores = (f"{self.output_score[n]:.4f}", f"{self.confidence[n]:+.3f}")
            rows.append([int(self.features[n]), *scores, words])
        return rows

    def __repr__(self) -> str:
        """One line without arrays."""
        return f"OutputScores({len(self.features)} features, the best {self.best(1)[0]})"


def output_scores(
    model: Model,
    coder: Coder,
    tokenizer: Tokenizer,
    features: Sequence[int] | np.ndarray,
    *,
    strength: float = 0.5,
    prompt: str = NEUTRAL,
    tokens: int = 20,
) -> OutputScores:
    """Score features of a coder that writes to the residual stream; see the module.

    strength  in norms of each token's own activation
    prompt    a neutral text; the next token after it is looked at
    tokens    k: a feature's top tokens, and the likeliest tokens that confidence is taken over
    Other features compile nothing. Raises `InputError` for features that do not exist.
    """
    if coder.writes not in TO_LOGITS:
        raise InputError(f"{coder.writes}: output scores need a coder that writes to the residual")
    ids = np.asarray(features)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise InputError("features must be a list of numbers, at least one")
    if ids.min() < 0 or ids.max() >= coder.width:
        raise InputError(f"features are numbers from 0 to {coder.width - 1}")
    parts = extreme_logits(model, coder, tokenizer, ids, k=tokens)
    top = np.concatenate([part[0] for part in parts])
    text = tokenizer.encode(prompt)[None]
    clean = run(model, text, logits="last", pad=False).logits[0, -1]
    before = _ranked(clean)
    scores, sure = np.zeros(len(ids)), np.zeros(len(ids))
    progress = Progress(len(ids), "features", what="steering with each feature")
    for start in range(0, len(ids), ROWS):
        some = ids[start : start + ROWS]
        filled = np.pad(some, (0, ROWS - len(some)), mode="edge")
        specs = [adding(Reading(feature=int(f)), strength) for f in filled]
        items = steering(model, specs, coder)
        out = run(model, np.repeat(text, ROWS, 0), items, logits="last", pad=False).logits[:, -1]
        rows = np.pad(top[start : start + ROWS], ((0, ROWS - len(some)), (0, 0)), mode="edge")
        found = np.asarray(_scored(out, clean, before, jnp.asarray(rows), k=tokens))[:, : len(some)]
        scores[start : start + len(some)], sure[start : start + len(some)] = found
        progress.at(start + len(some))
    return OutputScores(ids, scores, sure, top)


@jax.jit
def _ranked(logits):
    """p (1 - rank / V) of every token after the neutral prompt, logits [V]."""
    order = jnp.argsort(-logits)
    rank = jnp.zeros(len(order)).at[order].set(jnp.arange(len(order), dtype=jnp.float32))
    return jax.nn.softmax(logits) * (1.0 - rank / len(order))


@partial(jax.jit, static_argnames="k")
def _scored(logits, clean, before, top, *, k: int):
    """Output scores and changes of confidence [2, B] of logits [B, V], own tokens `top` [B, k]."""

    def row(pair):
        logits, ids = pair
        own = logits[ids]
        ahead = jax.lax.map(lambda a: (logits > a).sum(), own)
        return (jax.nn.softmax(logits)[ids] * (1.0 - ahead / len(logits))).mean()

    after = jax.lax.map(row, (logits, top))
    sure = lambda a: (jax.nn.logsumexp(a, -1, keepdims=True) - jax.lax.top_k(a, k)[0]).mean(-1)
    return jnp.stack([after - before[top].mean(-1), sure(logits) - sure(clean[None])])
