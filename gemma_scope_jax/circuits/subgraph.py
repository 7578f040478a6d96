"""A few pinned features of a graph, and all others folded into the errors.

    gs.subgraph(graph, pinned).scores()     # how much of the answer the pinned features carry

Folding a feature adds what it writes to the error of its layer and position, and forgets what
enters it. A path through it then begins at an error. With all features pinned nothing changes;
with none, only what tokens do to the targets directly is explained.

Source: circuit-tracer, graph.py (compute_subgraph_scores).
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from gemma_scope_jax.circuits.export import node_ids
from gemma_scope_jax.circuits.graph import Graph, GraphScores, Nodes
from gemma_scope_jax.errors import InputError, nearest


def subgraph(graph: Graph, pinned: Iterable[int | str]) -> Graph:
    """The graph of the pinned features, in which every other one is a part of its layer's and
    position's error; errors that are missing are added.

    pinned: columns of `graph.effects`, or ids of `node_ids`; tokens, errors and targets among them
        stay in any case. Raises `InputError` for nodes that the graph does not have.
    """
    n, nodes = graph.selected, graph.sources
    kept = np.zeros(n, bool)
    kept[[column for column in _columns(graph, pinned) if column < n]] = True
    folded, errors = np.flatnonzero(~kept), np.flatnonzero(nodes.kind == "error")
    others = np.flatnonzero(nodes.kind[n:] != "error") + n
    place = lambda some: np.stack([nodes.layer[some], nodes.position[some]], axis=1)
    places, into = np.unique(
        np.concatenate([place(errors), place(folded)]), axis=0, return_inverse=True
    )
    rows = np.concatenate([np.flatnonzero(kept), np.arange(n, len(graph.targets))])
    summed = np.zeros((len(rows), len(places)))
    for column, where in zip(np.concatenate([errors, folded]), into.reshape(-1)):
        summed[:, where] += graph.effects[rows, column]
    m = len(places)
    table = Nodes(
        kind=np.full(m, "error"),
        layer=places[:, 0].astype(np.int32),
        position=places[:, 1].astype(np.int32),
        feature=np.full(m, -1, np.int32),
        activation=np.ones(m, np.float32),
        label=np.full(m, ""),
    )
    ours = rows[: int(kept.sum())]
    columns = [graph.effects[rows][:, ours], summed, graph.effects[rows][:, others]]
    return dataclasses.replace(
        graph,
        sources=Nodes.joined(nodes[ours], table, nodes[others]),
        targets=graph.targets[rows],
        effects=np.concatenate(columns, axis=1).astype(np.float32),
        value=graph.value[rows],
        bias=graph.bias[rows],
        rest=graph.rest[rows],
        weights=graph.weights[rows],
        selected=len(ours),
        about={**graph.about, "pinned": len(ours)},
        cumulative=None,
    )


def subgraph_scores(graph: Graph, pinned: Iterable[int | str]) -> GraphScores:
    """Replacement and completeness when every feature that is not pinned counts as an error.

    Prune the graph first, as circuit-tracer does. Raises `InputError`, see `subgraph`.
    """
    return subgraph(graph, pinned).scores()


def _columns(graph: Graph, pinned: Iterable[int | str]) -> list[int]:
    """The columns of pinned nodes."""
    if isinstance(pinned, str):
        raise InputError(f"pinned={pinned!r}: give a list of nodes")
    ids: dict[str, int] = {}
    found = []
    for node in pinned:
        if isinstance(node, str):
            if not ids:
                sources, targets = node_ids(graph)
                finals = dict.fromkeys(targets[graph.selected :], len(sources))
                ids = finals | {name: i for i, name in enumerate(sources)}
            if node not in ids:
                raise InputError(f"there is no node {node!r}{nearest(node, ids)}")
            found.append(ids[node])
        elif 0 <= int(node) < len(graph.sources):
            found.append(int(node))
        else:
            raise InputError(f"node {node}: the graph has columns 0 to {len(graph.sources) - 1}")
    return found
