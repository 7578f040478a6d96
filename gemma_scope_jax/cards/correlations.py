"""Which features are active together: Pearson's correlation of activations over typical tokens.

The product is sparse: a token with L0 active features adds L0^2 pairs, where dense blocks on the
device would add F^2 (6,700 times the work for F 4,096 and L0 50). Pairs that are never active
together are skipped: their correlation is negative, so it is never among the largest.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gemma_scope_jax.cards.card_files import Stage
from gemma_scope_jax.cards.examples import without_outliers
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.progress import tracked

ENTRIES = 1 << 26  # active features held at a time: 1.6 GB; larger stores are sampled
LEAST = 0.01  # most correlations are below this; they are not listed
PAIRS = 1 << 21  # pairs of features in a block, if all are active together


def correlate(
    store: FeatureStore, coder: str, layer: int, k: int, stage: Stage, entries: int = ENTRIES
) -> None:
    """Make `correlated_ids`, `_pearson` and `_cosine` [F, k]: the largest, at least `LEAST`. The
    cosine is that of the uncentred activations. Of a store with more than `entries` active
    features, evenly spaced segments are used."""
    fired = store.fired(coder, layer)
    width, segments = len(fired), store.segment_count
    count = max(1, int(segments * min(1.0, entries / max(int(fired.sum()), 1))))
    some = np.linspace(0, segments - 1, count).round().astype(int).tolist()
    by_row = _matrix(store, coder, layer, some, width)
    tokens, by_column = by_row.shape[0], by_row.tocsc()
    mean = np.asarray(by_column.sum(0)).ravel() / tokens
    squares = np.asarray(by_column.multiply(by_column).sum(0)).ravel()
    spread = np.sqrt(np.maximum(squares / tokens - mean * mean, 0.0))
    size = np.sqrt(squares)
    ids = stage.create("correlated_ids", (width, k), np.int32, -1)
    pearson = stage.create("correlated_pearson", (width, k), np.float32, 0)
    cosine = stage.create("correlated_cosine", (width, k), np.float32, 0)

    def block(start: int) -> None:
        stop = min(start + rows, width)
        product = (by_column[:, start:stop].T.tocsr() @ by_row).tocoo()
        i, j = product.row + start, product.col
        with np.errstate(divide="ignore", invalid="ignore"):
            r = (product.data / tokens - mean[i] * mean[j]) / (spread[i] * spread[j])
        kept = (i != j) & (r >= LEAST)
        i, j, r, inner = i[kept], j[kept], r[kept], product.data[kept]
        order = np.lexsort((j, -r, i))
        i, j, r, inner = i[order], j[order], r[order], inner[order]
        begins = np.searchsorted(i, np.arange(start, stop))
        rank = np.arange(len(i)) - begins[i - start]
        top = rank < k
        at = (i[top], rank[top])
        ids[at], pearson[at] = j[top], r[top]
        cosine[at] = inner[top] / (size[i[top]] * size[j[top]])

    rows = min(width, max(64, PAIRS // width))
    starts = range(0, width, rows)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tracked(pool.map(block, starts), "correlations", len(starts)):
            pass
    stage.facts["correlated_tokens"] = int(tokens)


def _matrix(store: FeatureStore, coder: str, layer: int, some: list[int], width: int) -> Any:
    """The activations [typical tokens, F] of some segments, a sparse float64 matrix."""
    from scipy import sparse

    parts: list[Any] = []
    for i in tracked(some, "activations"):
        segment = store.segment(i)
        offsets, features, values = segment.by_token(coder, layer)
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        mask = without_outliers(rows, values, segment.counted_by(coder))
        shape = (len(offsets) - 1, width)
        parts.append(sparse.csr_array((values.astype(np.float64), features, offsets), shape)[mask])
    return sparse.vstack(parts, format="csr")
