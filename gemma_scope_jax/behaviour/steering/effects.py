"""What steering did to a text, as one number for each continuation.

An effect is called with the unchanged model, the tokenizer and what was written. None of them sees
which arm a text is from.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.monitors.monitor import Monitor, token_scores
from gemma_scope_jax.behaviour.steering.spec import Reading
from gemma_scope_jax.circuits.edit_rows import columns
from gemma_scope_jax.coders.coder import Coder, by_layer
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Continuations:
    """Continuations: their prompts as ids and texts, and what was written, as ids and text."""

    prompts: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    texts: tuple[str, ...]
    prompt_texts: tuple[str, ...]


Effect = Callable[[Model, Tokenizer, Continuations], Any]  # -> one number a continuation


def repetition(ids: np.ndarray) -> float:
    """The share of trigrams that occurred before: 0 for fresh text, near 1 for a loop."""
    grams = (
        [tuple(g) for g in np.lib.stride_tricks.sliding_window_view(ids, 3)] if len(ids) > 2 else []
    )
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@dataclasses.dataclass(frozen=True)
class WordShare:
    """The share of a continuation's words that are among `words`, compared without case.

    A word with a final * matches every word that begins so: "cook*".
    """

    words: tuple[str, ...]

    def __post_init__(self):
        if not self.words or not all(isinstance(w, str) and w.strip() for w in self.words):
            raise InputError("an effect by words needs at least one word")

    def __call__(self, model: Model, tokenizer: Tokenizer, written: Continuations) -> np.ndarray:
        return np.array([self.of_text(text) for text in written.texts])

    def of_text(self, text: str) -> float:
        """The share in one text; 0 for a text without words."""
        said = re.findall(r"\w+(?:'\w+)?", text.lower())
        return sum(map(self.has, said)) / len(said) if said else 0.0

    def has(self, word: str) -> bool:
        """Whether a lower-case word is among them."""
        plain = (w.lower().strip() for w in self.words)
        return any(word.startswith(w[:-1]) if w.endswith("*") else word == w for w in plain)


@dataclasses.dataclass(frozen=True, eq=False)
class ReadingMean:
    """The mean score over the tokens of a continuation, as the unchanged model reads them: of a
    feature (with its coder), a direction, or a monitor."""

    reading: Reading | Monitor
    coder: Coder | None = None

    def __call__(self, model: Model, tokenizer: Tokenizer, written: Continuations) -> np.ndarray:
        texts = [np.concatenate(pair) for pair in zip(written.prompts, written.tokens)]
        scores = token_scores(dataclasses.replace(self._monitor(), first=0), model, texts)
        own = [s[len(p) :] for s, p in zip(scores, written.prompts)]
        return np.array([s.mean() if s.size else 0.0 for s in own])

    def _monitor(self) -> Monitor:
        r = self.reading
        if isinstance(r, Monitor):
            return r
        if r.feature is None:
            w = np.asarray(r.vector, np.float32)
            return Monitor(r.site, int(r.layer or 0), w, r.bias, np.inf)
        if self.coder is None:
            raise InputError("an effect by a feature needs its coder")
        by_layer(self.coder)
        i = self.coder.source(r.layer)
        found = columns(self.coder, jnp.full(1, i, jnp.int32), jnp.asarray([r.feature], jnp.int32))
        vector, bias, threshold = (np.asarray(a, np.float32) for a in found)
        place = self.coder.reads, self.coder.layers[i]
        encoder = vector.T, bias, threshold
        return Monitor(*place, np.ones(1, np.float32), 0.0, np.inf, (r.feature,), encoder)
