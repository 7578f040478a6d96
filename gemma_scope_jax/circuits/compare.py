"""What differs between two graphs: two prompts, two targets, a model before and after training.

difference = graph_a - graph_b          # or gs.graph_difference, with options
print(difference)                       # the edges that differ most
gs.graph_page(difference.graph())
"""

import dataclasses

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.shared_nodes import (
    Finals,
    Measure,
    Positions,
    SharedNodes,
    edges_of,
    ends,
    node_names,
)
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.errors import InputError

SHOWN = 20  # edges of a printed table


@dataclasses.dataclass(frozen=True)
class GraphDifference:
    """The edges of two graphs side by side, those that differ most first; it prints as a table.

    nodes      every node that has a part in an edge, or is asked about: see `Nodes`; positions are
               negative if counted from the end, -1 if ignored
    target, source  int64 [E]: of each edge the rows of `nodes`
    a, b       float64 [E]: its effect in the first graph and in the second, 0 where it is not
    graphs     the two graphs
    positions, finals, measure  as given to `graph_difference`
    """

    nodes: Nodes
    target: np.ndarray
    source: np.ndarray
    a: np.ndarray
    b: np.ndarray
    graphs: tuple[Graph, Graph]
    positions: Positions
    finals: Finals
    measure: Measure

    @property
    def difference(self) -> np.ndarray:
        """a - b, float64 [E]."""
        return self.a - self.b

    def __len__(self) -> int:
        return len(self.target)

    def __str__(self) -> str:
        return self.table()

    def table(self, most: int = SHOWN) -> str:
        """The `most` edges with the largest differences, as text."""
        both = (self.a != 0) & (self.b != 0)
        names = (
            node_names(self.nodes, w[:most], self.positions) for w in (self.source, self.target)
        )
        rows = [
            (source, target, f"{a:.4g}", f"{b:.4g}", f"{a - b:+.4g}")
            for source, target, a, b in zip(*names, self.a, self.b)
        ]
        head = f"{len(self):,} edges, {int(both.sum()):,} of them in both graphs"
        return f"{head}\n{text_table(('source', 'target', 'a', 'b', 'a - b'), rows)}"

    def graph(self) -> Graph:
        """The differences as a graph, for `prune`, `graph_page` and files.

        Activations, values, biases and rests are differences, too; weights are means. Tokens that
        differ stand side by side ("a / b"). Raises `InputError` if positions were ignored.
        """
        if self.positions == "ignore":
            raise InputError("a graph has positions: compare with positions='start' or 'end'")
        return _difference_graph(
            *self.graphs, SharedNodes(self.positions, self.finals, self.measure)
        )


def graph_difference(
    a: Graph,
    b: Graph,
    *,
    positions: Positions = "start",
    finals: Finals = "token",
    measure: Measure = "effect",
) -> GraphDifference:
    """`a` - `b`, edge by edge; also written `a - b`. Prune graphs of many edges first.

    positions  nodes match at the same position from the "start" or from the "end"; "ignore": at
               any, and effects of equal nodes are added
    finals     what was asked about matches by "token" (or label), by its place in the "order" of
               targets, or as one, the "mean" by weights
    measure    by what edges count: the "effect", in units of the target, or the "influence": their
               part of it, with the effect's sign, by which features of any scale compare

    Raises `InputError` for graphs of models of different depth.
    """
    shared = SharedNodes(positions, finals, measure)
    (number_a, effect_a), (number_b, effect_b) = edges_of(a, shared), edges_of(b, shared)
    number = np.union1d(number_a, number_b)
    left, right = np.zeros(len(number)), np.zeros(len(number))
    left[np.searchsorted(number, number_a)] = effect_a
    right[np.searchsorted(number, number_b)] = effect_b
    order = np.argsort(-np.abs(left - right), kind="stable")
    target, source = ends(number[order])
    return GraphDifference(
        shared.nodes(),
        target,
        source,
        left[order],
        right[order],
        (a, b),
        positions,
        finals,
        measure,
    )


def _difference_graph(a: Graph, b: Graph, shared: SharedNodes) -> Graph:
    numbers = [shared.numbers(graph) for graph in (a, b)]
    nodes, longest = shared.nodes(), max(a, b, key=lambda graph: len(graph.ids))
    if shared.positions == "end":
        nodes = dataclasses.replace(nodes, position=nodes.position + len(longest.ids))
    selected = np.unique(np.concatenate([t[: g.selected] for (t, _), g in zip(numbers, (a, b))]))
    finals = np.unique(np.concatenate([t[g.selected :] for (t, _), g in zip(numbers, (a, b))]))
    others = np.setdiff1d(np.concatenate([s for _, s in numbers]), selected)
    place = lambda some: (nodes.feature[some], nodes.position[some], nodes.layer[some])
    selected = selected[np.lexsort(place(selected))]
    others = others[np.lexsort((*place(others), nodes.kind[others]))]
    rows, columns = np.concatenate([selected, finals]), np.concatenate([selected, others])
    row, column = _inverse(rows, len(nodes)), _inverse(columns, len(nodes))
    sides = []
    for graph, (targets, sources) in zip((a, b), numbers):
        at = row[targets], column[sources]
        sides.append(_moved(graph, at, shared.factors(graph), (len(rows), len(columns))))
    effects, value, bias, rest = ((x - y).astype(np.float32) for x, y in zip(*sides))
    weights = np.zeros(len(rows), np.float32)
    activation = np.zeros(len(nodes))
    for sign, graph, (targets, sources) in zip((1, -1), (a, b), numbers):
        np.add.at(weights, row[targets], 0.5 * graph.weights)
        activation[sources] += sign * graph.sources.activation
    nodes = dataclasses.replace(nodes, activation=activation.astype(np.float32))
    asked = dataclasses.replace(nodes[finals], activation=value[len(selected) :])
    texts = _token_pairs(a, b, shared.positions == "end")
    about = {"model": a.about.get("model"), "difference of": [_name(a), _name(b)]}
    about |= {"positions": shared.positions, "finals": shared.finals}
    targets = Nodes.joined(nodes[selected], asked)
    return Graph(
        nodes[columns], targets, effects, value, bias, rest, weights, longest.ids, texts,
        len(selected), a.layers, about,
    )  # fmt: skip


def _moved(
    graph: Graph, at: tuple[np.ndarray, np.ndarray], factors: np.ndarray, shape: tuple[int, int]
) -> list[np.ndarray]:
    """Effects, values, biases and rests with each row and column `at` another place, float64."""
    effects = np.zeros(shape)
    for row, factor, values in zip(at[0], factors, graph.effects):
        effects[row, at[1]] += factor * values
    columns = (graph.value, graph.bias, graph.rest)
    return [effects, *(np.bincount(at[0], factors * values, shape[0]) for values in columns)]


def _inverse(numbers: np.ndarray, size: int) -> np.ndarray:
    """Where each number stands in `numbers`."""
    found = np.full(size, -1)
    found[numbers] = np.arange(len(numbers))
    return found


def _name(graph: Graph) -> str:
    return str(graph.about.get("prompt") or "".join(graph.tokens))


def _token_pairs(a: Graph, b: Graph, from_end: bool) -> list[str]:
    """The prompts' tokens, where they differ both."""
    size = max(len(a.tokens), len(b.tokens))
    fill = lambda tokens: [""] * (size - len(tokens)) * from_end + list(tokens)
    padded = (fill(graph.tokens) + [""] * (size - len(graph.tokens)) for graph in (a, b))
    return [x if x == y or not y else f"{x} / {y}" if x else y for x, y, *_ in zip(*padded)]
