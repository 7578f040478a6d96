"""Which nodes and edges of a graph carry a given share of the influence.

Nodes first; then the edges among them, by the influence of their target times their share of its
input; then features that nothing enters, and features and errors that nothing leaves, until none
is left. No list of all edges is made and nothing is sorted: the least score to keep is found digit
by digit, from four histograms of the scores' bits.

Source: circuit-tracer, graph.py (prune_graph).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gemma_scope_jax.circuits.influence import FLOOR, blocks, influence, influence_of_rows, row_sums

DIGIT = 16  # bits of a score that one histogram tells apart
# Sums that ought to equal the share, ten times 0.1 for one, may fall short of it by rounding.
SLACK = 1e-12


@dataclasses.dataclass(frozen=True)
class KeptPart:
    """What pruning leaves: rows and columns as indices of the old ones, in their order.

    effects     float32 [rows, columns], cut edges zero
    dropped     float64 [rows]: the sum of the effects that are not in it
    cumulative  float64 [columns]: as in `Graph.cumulative`
    """

    rows: np.ndarray
    columns: np.ndarray
    effects: np.ndarray
    dropped: np.ndarray
    cumulative: np.ndarray


def prune(
    effects: np.ndarray,
    *,
    layer: np.ndarray,
    selected: int,
    tokens: np.ndarray,
    weights: np.ndarray,
    node_threshold: float,
    edge_threshold: float,
) -> KeptPart:
    """Prune effects [R, C] whose first `selected` rows and columns are the same features.

    layer, weights [R]; tokens [C]: whether a column is a token: those, and the rows after the
    selected, are always kept. Thresholds are shares of influence, 0 to 1.
    """
    node = np.where(np.arange(len(effects)) < selected, np.arange(len(effects)), -1)
    found = influence(effects, layer=layer, node=node, weights=weights)
    columns = np.flatnonzero((found >= least_kept(lambda: [found], node_threshold)) | tokens)
    features = columns[columns < selected]
    rows = np.concatenate([features, np.arange(selected, len(effects))])
    kept = effects[np.ix_(rows, columns)]
    n = len(features)
    _cut_edges(kept, n, layer[rows], weights[rows], edge_threshold)
    row, column = _connected(kept, n, tokens[columns])
    if not (row.all() and column.all()):
        rows, columns, kept = rows[row], columns[column], kept[np.ix_(row, column)]
    dropped = np.array([effects[r].sum(dtype=np.float64) for r in rows])
    dropped -= kept.sum(axis=1, dtype=np.float64)
    return KeptPart(rows, columns, kept, dropped, cumulative(found)[columns])


def cumulative(found: np.ndarray) -> np.ndarray:
    """Of each node, the share of all influence that it and the nodes before it have, the largest
    first: float64 [C]; NaN if none has any."""
    order = np.argsort(-found, kind="stable")
    shares = np.empty(len(found))
    total = np.cumsum(found[order])
    with np.errstate(invalid="ignore"):
        shares[order] = total / total[-1:]
    return shares


def least_kept(parts: Callable[[], Iterable[np.ndarray]], share: float) -> float:
    """The largest score t such that the scores >= t sum to the `share` of the sum of all.

    parts() gives the scores, float64 and not negative, in arrays of any shape, the same each time.
    A share of 1 keeps all scores but zeros; infinity if all are zero. Ties at t are all kept, and
    a sum that falls short of the share by 1e-12 reaches it.
    """
    if share >= 1:
        return float(np.nextafter(0.0, 1.0))
    prefix, above, goal = 0, 0.0, 0.0
    for shift in range(64 - DIGIT, -1, -DIGIT):
        sums = np.zeros(1 << DIGIT)
        for part in parts():
            scores = part.reshape(-1)
            bits = scores.view(np.uint64)  # of floats >= 0 the bits are in the floats' order
            if shift < 64 - DIGIT:
                inside = bits >> np.uint64(shift + DIGIT) == np.uint64(prefix)
                scores, bits = scores[inside], bits[inside]
            digit = (bits >> np.uint64(shift)) & np.uint64((1 << DIGIT) - 1)
            sums += np.bincount(digit.astype(np.int64), weights=scores, minlength=len(sums))
        if shift == 64 - DIGIT:
            goal = share * sums.sum() * (1 - SLACK)
        present = np.flatnonzero(sums)[::-1]
        if not len(present):
            return np.inf
        reached = above + np.cumsum(sums[present])
        at = min(int(np.searchsorted(reached, goal)), len(present) - 1)
        above = float(reached[at - 1]) if at else above
        prefix = prefix << DIGIT | int(present[at])
    return float(np.uint64(prefix).view(np.float64))


def _cut_edges(
    kept: np.ndarray, n: int, layer: np.ndarray, weights: np.ndarray, share: float
) -> None:
    """Set to zero the effects that are not among the largest with the `share` of all scores."""
    node = np.where(np.arange(len(kept)) < n, np.arange(len(kept)), -1)
    found = influence(kept, layer=layer, node=node, weights=weights)
    passed = influence_of_rows(found, node, weights)
    sums = np.maximum(row_sums(kept), FLOOR)

    def scored() -> Iterator[tuple[slice, np.ndarray]]:
        for rows, block in blocks(kept):
            np.abs(block, out=block)
            block /= sums[rows, None]
            block *= passed[rows, None]
            yield rows, block

    least = least_kept(lambda: (block for _, block in scored()), share)
    for rows, block in scored():
        kept[rows][block < least] = 0


def _connected(kept: np.ndarray, n: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows and columns stay (bool) when features without incoming edges, and features and
    errors without outgoing ones, are removed until there are none."""
    edges = lambda some, axis: np.count_nonzero(some, axis=axis)
    inputs = np.concatenate([edges(b, 1) for _, b in blocks(kept)] or [np.zeros(0, int)])
    outputs = sum((edges(b, 0) for _, b in blocks(kept)), np.zeros(len(tokens), int))
    row, column = np.ones(len(kept), bool), np.ones(len(tokens), bool)
    while True:
        gone = column & ~tokens & (outputs == 0)
        gone[:n] |= column[:n] & (inputs[:n] == 0)
        if not gone.any():
            return row, column
        features = np.flatnonzero(gone[:n])
        column[gone], row[features] = False, False
        for rows, block in blocks(kept):
            inputs[rows] -= edges(block[:, gone], 1)
        for r in features:
            outputs -= kept[r] != 0
