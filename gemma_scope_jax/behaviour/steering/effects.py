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

from gemma_scope_jax.behaviour.steering.spec import Reading
from gemma_scope_jax.circuits.edit_rows import columns
from gemma_scope_jax.coders.coder import Coder, by_layer, float32, jump_relu
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import padded
from gemma_scope_jax.model.buckets import bucket
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.intercept import Context, read, tokenwise
from gemma_scope_jax.model.run import run
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
    """The mean of a reading over the tokens of a continuation, as the unchanged model reads them:
    a feature's activation (with its coder), or a probe's score."""

    reading: Reading
    coder: Coder | None = None

    def __call__(self, model: Model, tokenizer: Tokenizer, written: Continuations) -> np.ndarray:
        line, site, layer = self._line()
        values = np.zeros(len(written.tokens))
        texts = [np.concatenate(pair) for pair in zip(written.prompts, written.tokens)]
        width = bucket(max(map(len, texts)), 2**31)
        B = min(max(1, 2048 // width), len(texts))
        item = read(site, layer, read_line, line, name="reading")
        for start in range(0, len(texts), B):
            batch = padded(texts[start : start + B], B, width)
            out = run(model, batch, item, stop_at_layer=layer + 1, logits="none", pad=False)
            found = np.asarray(out.reads["reading"])
            for r, text in enumerate(texts[start : start + B]):
                own = found[r, len(written.prompts[start + r]) : len(text)]
                values[start + r] = own.mean() if own.size else 0.0
        return values

    def _line(self) -> tuple[tuple, str, int]:
        r = self.reading
        if r.feature is None:
            vector = jnp.asarray(r.vector, jnp.float32)
            return (vector, jnp.float32(r.bias), jnp.float32(-jnp.inf)), r.site, int(r.layer or 0)
        if self.coder is None:
            raise InputError("an effect by a feature needs its coder")
        by_layer(self.coder)
        i = self.coder.source(r.layer)
        found = columns(self.coder, jnp.full(1, i, jnp.int32), jnp.asarray([r.feature], jnp.int32))
        return tuple(a[0] for a in found), self.coder.reads, self.coder.layers[i]


@tokenwise
def read_line(x, ctx: Context, line):
    """x . v + bias [B, T], or a feature's activation if it has a threshold."""
    vector, bias, threshold = line
    z = jnp.einsum("btd,d->bt", float32(x), vector, precision="highest") + bias
    return jnp.where(jnp.isfinite(threshold), jump_relu(z, threshold.reshape(1, 1)), z)
