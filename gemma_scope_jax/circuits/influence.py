"""How much every source of a graph has to do with what was asked about.

The absolute effects on a target, divided by their sum, are shares: A. The influence of a source is
the sum over all paths from it to the final targets of the product of the shares along the path,
times the weight of the target where it ends: v = w A + w A A + w A A A + ...

A feature's row touches only sources of lower layers. So one sweep from the final targets down the
layers adds up all paths, whatever their length, and reads every row once.

Source: circuit-tracer, graph.py (compute_node_influence, compute_graph_scores,
compute_partial_influences), which multiplies by A until the product is zero.
"""

from collections.abc import Iterator

import numpy as np

from gemma_scope_jax.errors import InputError

FLOOR = 1e-10  # the least sum that a row is divided by
PARTIAL_FLOOR = 1e-8  # the same while a graph grows, as in circuit-tracer
BLOCK = 1 << 18  # numbers of a matrix held as float64 at a time: they stay in the cache


def influence(
    effects: np.ndarray,
    *,
    layer: np.ndarray,
    node: np.ndarray,
    weights: np.ndarray,
    rest: np.ndarray | None = None,
    floor: float = FLOOR,
) -> np.ndarray:
    """The influence of every column of effects [R, C]: float64 [C].

    Of each row: its layer; its own column, or -1 if it has none (final targets); its weight, 0 for
    features; and `rest`, an effect on it that has no column. Rows without a column come first, then
    those of the highest layer. Raises `InputError` for effects that are not finite, or on a layer
    from the same or a higher one, and for negative weights.
    """
    if (weights < 0).any():
        raise InputError("graph: weights are negative, which influence cannot start from")
    found = np.zeros(effects.shape[1])
    for rows in _sweep(layer, node):
        carried = influence_of_rows(found, node[rows], weights[rows])
        active = np.flatnonzero(carried)
        later = node[(layer >= layer[rows[0]]) & (node >= 0)] if node[rows[0]] >= 0 else node[:0]
        for start in range(0, len(active), step(effects)):
            some = active[start : start + step(effects)]
            block = effects[rows[some]].astype(np.float64)
            if block[:, later].any():
                number = layer[rows[0]]
                raise InputError(f"graph: layer {number} has effects from its own or a higher one")
            np.abs(block, out=block)
            with np.errstate(invalid="ignore"):  # infinities are refused below
                sums = block.sum(axis=1)
                sums += 0 if rest is None else np.abs(rest[rows[some]])
                found += (carried[some] / np.maximum(sums, floor)) @ block
    if not np.isfinite(found).all():
        raise InputError("graph: effects or weights hold NaN or infinities")
    return found


def partial_influence(
    effects: np.ndarray, row_layer: np.ndarray, row_node: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """`influence` of a graph that still grows: float64 [C], by which the next features are chosen.

    effects [at least r, C], of which the first r rows are known, in any order; row_layer, row_node
    and weights [r] as in `influence`. Features without a row pass nothing on.
    """
    known = effects[: len(row_node)]
    return influence(known, layer=row_layer, node=row_node, weights=weights, floor=PARTIAL_FLOOR)


def influence_of_rows(found: np.ndarray, node: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What each row passes on to its sources: its weight, and the influence of its own column."""
    return weights + np.where(node >= 0, found[node], 0.0)


def row_sums(effects: np.ndarray, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
    """The sums of absolute effects, float64 [R]; of all columns, or of some."""
    parts = [np.abs(b[:, columns]).sum(axis=1) for _, b in blocks(effects)]
    return np.concatenate(parts or [np.zeros(0)])


def scores(
    effects: np.ndarray,
    found: np.ndarray,
    node: np.ndarray,
    weights: np.ndarray,
    kind: np.ndarray,
    rest: np.ndarray | None = None,
) -> tuple[float, float]:
    """Replacement and completeness of a graph whose columns are of the `kind` and have the
    influence `found`; NaN where nothing has any. `rest` [R], as in `influence`, counts as errors.

    replacement   the influence of tokens, as a share of that of tokens and errors
    completeness  of what each node gets, the share that errors do not give, averaged over all
                  nodes by their influence; nodes that get nothing, tokens and errors, count as 1
    """
    more = np.zeros(len(effects)) if rest is None else np.abs(rest.astype(np.float64))
    passed = influence_of_rows(found, node, weights)
    each = passed / np.maximum(row_sums(effects) + more, FLOOR)
    tokens = found[kind == "token"].sum()
    errors = found[kind == "error"].sum() + each @ more
    whole = passed.sum() + tokens + errors
    lost = each @ (row_sums(effects, kind == "error") + more)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(tokens / (tokens + errors)), float(1 - lost / whole)


def step(effects: np.ndarray) -> int:
    """How many rows are held as float64 at a time."""
    return max(1, BLOCK // max(effects.shape[1], 1))


def blocks(effects: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive rows and a float64 copy of each such block."""
    for start in range(0, len(effects), step(effects)):
        rows = slice(start, start + step(effects))
        yield rows, effects[rows].astype(np.float64)


def _sweep(layer: np.ndarray, node: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of rows that pass nothing to each other, in the order in which they are done."""
    final = np.flatnonzero(node < 0)
    if len(final):
        yield final
    inner = np.flatnonzero(node >= 0)
    for number in np.unique(layer[inner])[::-1]:
        yield inner[layer[inner] == number]
