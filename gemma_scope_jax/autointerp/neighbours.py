"""Finds features that are easily mistaken for another: their windows are hard negatives."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.autointerp.examples import Corpus
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.coders.directions import most_similar
from gemma_scope_jax.errors import InputError

LARGEST = 1 << 29  # bytes of co-occurrence counts


def decoder_neighbours(
    w_dec: jax.Array | np.ndarray, features: Sequence[int], k: int = 5
) -> dict[int, list[int]]:
    """For each of `features`, the k others whose rows of w_dec [F, D] have the largest cosine."""
    rows, what = float32(jnp.asarray(w_dec)), "looking for neighbours of the features"
    ids, _ = most_similar(rows, None, min(k, len(rows) - 1), what, features)
    return dict(zip(features, ids.tolist()))


def cooccurring(corpus: Corpus, features: Sequence[int], k: int = 5) -> dict[int, list[int]]:
    """For each of `features`, the k others most active on the same tokens, by the cosine of their
    indicators: n(both) / sqrt(n(one) n(other)). One pass over the store."""
    from scipy import sparse

    fired = corpus.store.fired(coder=corpus.coder, layer=corpus.layer).astype(np.float64)
    if len(features) * len(fired) * 8 > LARGEST:
        raise InputError(
            f"co-occurrence of {len(features)} features takes too much memory: explain fewer, or "
            "choose neighbours by their decoder rows"
        )
    both = np.zeros((len(features), len(fired)), np.int64)
    for segment in corpus.store.segments():
        offsets, ids, _ = segment.by_token(coder=corpus.coder, layer=corpus.layer)
        shape = (len(offsets) - 1, len(fired))
        active = sparse.csr_array((np.ones(len(ids), np.int64), ids, offsets), shape)
        together = (active[:, features].T @ active).tocoo()
        both[together.row, together.col] += together.data
    cosines = both / np.sqrt(np.maximum(fired[None, :] * fired[np.asarray(features)][:, None], 1))
    cosines[np.arange(len(features)), np.asarray(features)] = -1
    best = np.argsort(-cosines, axis=-1, kind="stable")[:, :k]
    return {
        f: [g for g in some if both[i, g] > 0]
        for i, (f, some) in enumerate(zip(features, best.tolist()))
    }
