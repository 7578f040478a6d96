"""The sources of a graph that have most to do with what was asked about."""

import dataclasses
from collections.abc import Collection

import numpy as np

from gemma_scope_jax.circuits.graph import KINDS, Graph, Nodes
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.circuits.words import node_name
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number


@dataclasses.dataclass(frozen=True)
class StrongestNodes:
    """What `Graph.strongest` returns; printed, a table.

    nodes      the sources, those of most influence first
    columns    int [n]: where they are in `graph.sources` and `graph.effects`
    influence  float64 [n]: of each, as a share of all that the targets start with
    """

    nodes: Nodes
    columns: np.ndarray
    influence: np.ndarray

    def __len__(self) -> int:
        return len(self.columns)

    def edits(self, value: float = 0.0) -> list[tuple[int, int, int, float]]:
        """(layer, position, feature, value) of each, as `intervene` and `edit_features` take them.
        Raises `InputError` if there are others than features or neurons among them."""
        nodes = self.nodes
        if others := set(nodes.kind.tolist()) - {"feature", "neuron"}:
            raise InputError(f"an intervention sets features, not {'s, '.join(sorted(others))}s")
        columns = nodes.layer.tolist(), nodes.position.tolist(), nodes.feature.tolist()
        return [(*place, float(value)) for place in zip(*columns)]

    def __str__(self) -> str:
        rows = [
            [node_name(self.nodes[i]), f"{share:.2%}", f"{self.nodes.activation[i]:.3g}"]
            for i, share in enumerate(self.influence)
        ]
        return text_table(["node", "influence", "activation"], rows, left=1)


def strongest_nodes(
    graph: Graph, count: int = 10, *, kinds: Collection[str] = ("feature", "neuron")
) -> StrongestNodes:
    """See `Graph.strongest`."""
    if unknown := set(kinds) - set(KINDS):
        raise InputError(f"kinds of nodes are {', '.join(KINDS)}, not {', '.join(sorted(unknown))}")
    found = graph.influence()
    some = np.flatnonzero(np.isin(graph.sources.kind, list(kinds)))
    order = some[np.argsort(-found[some], kind="stable")][: whole_number("count", count, 1)]
    whole = max(float(graph.weights.sum()), 1e-30)
    return StrongestNodes(graph.sources[order], order, found[order] / whole)
