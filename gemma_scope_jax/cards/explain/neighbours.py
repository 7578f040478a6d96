"""Features that are easily mistaken for another: whose windows make hard negatives."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.cards.explain.examples import Corpus
from gemma_scope_jax.coders.sparse_coder import float32
from gemma_scope_jax.errors import InputError

ROWS = 256  # features at a time
LARGEST = 1 << 29  # bytes of co-occurrence counts
ENTRIES = 1 << 16  # firings looked at together


@jax.jit
def _cosines(w_dec: jax.Array, rows: jax.Array) -> jax.Array:
    """[n, F]: cosines of decoder rows with all of w_dec [F, D]; -2 with themselves."""
    w = float32(w_dec)
    w = w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-30)
    cosines = w[rows] @ w.T
    own = jnp.arange(w.shape[0], dtype=rows.dtype)[None, :] == rows[:, None]
    return jnp.where(own, -2.0, cosines)


def decoder_neighbours(w_dec: Any, features: Sequence[int], k: int = 5) -> dict[int, list[int]]:
    """For each of `features` the k others whose rows of w_dec [F, D] point most the same way."""
    found: dict[int, list[int]] = {}
    k = min(k, w_dec.shape[0] - 1)
    for start in range(0, len(features), ROWS):
        some = np.array(features[start : start + ROWS], np.int32)
        padded = np.pad(some, (0, min(ROWS, len(features)) - len(some)))
        cosines = np.asarray(_cosines(jnp.asarray(w_dec), jnp.asarray(padded)))[: len(some)]
        best = np.argsort(-cosines, axis=-1, kind="stable")[:, :k]
        found |= dict(zip(some.tolist(), best.tolist()))
    return found


def cooccurring(corpus: Corpus, features: Sequence[int], k: int = 5) -> dict[int, list[int]]:
    """For each of `features` the k others active on most of the same tokens, by the cosine of
    their indicators: n(both) / sqrt(n(one) n(other)). One pass over the store."""
    fired = corpus.store.fired(coder=corpus.coder, layer=corpus.layer).astype(np.float64)
    if len(features) * len(fired) * 8 > LARGEST:
        raise InputError(
            f"neighbours of {len(features)} features: take fewer, or --neighbours decoder"
        )
    number = np.full(len(fired), -1, np.int64)
    number[np.asarray(features, np.int64)] = np.arange(len(features))
    both = np.zeros((len(features), len(fired)), np.int64)
    for segment in corpus.store.segments():
        offsets, ids, _ = segment.by_token(coder=corpus.coder, layer=corpus.layer)
        counts = np.diff(offsets)
        token = np.repeat(np.arange(len(counts)), counts)
        entries = np.flatnonzero(number[ids] >= 0)
        for start in range(0, len(entries), ENTRIES):
            some = entries[start : start + ENTRIES]
            beside = counts[token[some]]  # features on the same token
            before = np.cumsum(beside) - beside
            step = np.arange(beside.sum()) - np.repeat(before, beside)
            others = ids[np.repeat(offsets[token[some]], beside) + step]
            np.add.at(both, (np.repeat(number[ids[some]], beside), others), 1)
    cosines = both / np.sqrt(np.maximum(fired[None, :] * fired[np.asarray(features)][:, None], 1))
    cosines[np.arange(len(features)), np.asarray(features)] = -1
    best = np.argsort(-cosines, axis=-1, kind="stable")[:, :k]
    return {f: [g for g in some if both[i, g] > 0]
            for i, (f, some) in enumerate(zip(features, best.tolist()))}  # fmt: skip
