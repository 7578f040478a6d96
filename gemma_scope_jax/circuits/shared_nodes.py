"""The nodes of several graphs under common numbers, so that their edges can be put side by side.

A node is known by its kind, layer, position and feature. Prompts differ in length: positions may be
counted from the start or from the end, or be left out; then the effects of equal nodes are added.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.influence import FLOOR, row_sums
from gemma_scope_jax.circuits.words import node_name
from gemma_scope_jax.errors import InputError

Positions = Literal["start", "end", "ignore"]
Finals = Literal["token", "order", "mean"]
Measure = Literal["effect", "influence"]
Key = tuple[bool, str, int, int, int, str]  # final, kind, layer, position, feature, name
LABELS = 3  # of a node that graphs call differently
SHIFT = np.int64(32)  # an edge is one number: its target's above, its source's below


class SharedNodes:
    """Numbers for the nodes of all graphs that it is shown; see `edges_of`.

    positions  count them from the "start", from the "end" (the last token is -1), or "ignore" them
    finals     final targets of two graphs are the same if they ask for the same "token" (or have
               the same label), if they have the same place in the "order" of targets, or all of
               them are one: their "mean", by their weights
    measure    edges count by their "effect", in units of the target, or by their part of all
               "influence", with the effect's sign: features of any scale can be compared then
    """

    def __init__(
        self, positions: Positions, finals: Finals = "token", measure: Measure = "effect"
    ) -> None:
        given = {"positions": (positions, Positions), "finals": (finals, Finals)}
        given["measure"] = measure, Measure
        for name, (value, choices) in given.items():
            if value not in (known := get_args(choices)):
                raise InputError(f"{name}={value!r}: choose one of {', '.join(known)}")
        self.positions, self.finals, self.measure = positions, finals, measure
        self.layers = 0
        self.labels: dict[Key, str] = {}
        self._numbers: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a graph's targets and sources, int64. Raises `InputError` for a graph of
        another number of layers than those before."""
        if self.layers not in (0, graph.layers):
            said = f"one graph is of {self.layers} layers, another of {graph.layers}"
            raise InputError(f"{said}: only graphs of one model can be compared")
        self.layers = graph.layers
        n = graph.selected
        sources = self._add(self._keys(graph, graph.sources), graph.sources.label)
        finals = graph.targets[n:]
        keys = [self._final(key, i) for i, key in enumerate(self._keys(graph, finals))]
        labels = ["mean"] * len(keys) if self.finals == "mean" else finals.label
        return np.concatenate([sources[:n], self._add(keys, labels)]), sources

    def factors(self, graph: Graph) -> np.ndarray:
        """What the effects on each of a graph's targets are multiplied by, float64."""
        n, weights = graph.selected, graph.weights.astype(np.float64)
        if self.measure == "influence":
            passed = weights.copy()
            passed[:n] += graph.influence()[:n]
            sums = np.maximum(row_sums(graph.effects), FLOOR)
            return passed / sums / (weights.sum() or 1.0)
        factors = np.ones(len(graph.targets))
        if self.finals == "mean":
            weights = weights[n:] if weights.any() else factors[n:]
            factors[n:] = weights / weights.sum()
        return factors

    def nodes(self) -> Nodes:
        """All nodes in the order of their numbers."""
        ints = np.array([key[2:5] for key in self._numbers], np.int32).reshape(-1, 3)
        return Nodes(
            kind=np.array([key[1] for key in self._numbers], str),
            layer=ints[:, 0],
            position=ints[:, 1],
            feature=ints[:, 2],
            activation=np.ones(len(self), np.float32),
            label=np.array([self.labels[key] for key in self._numbers], str),
        )

    def _keys(self, graph: Graph, nodes: Nodes) -> Iterable[Key]:
        position = nodes.position
        if self.positions == "ignore":
            position = np.full(len(nodes), -1, np.int32)
        elif self.positions == "end":
            if (position < 0).any():
                raise InputError("errors merged over positions have none to count from the end")
            position = position - len(graph.ids)
        columns = (nodes.kind, nodes.layer, position, nodes.feature)
        for kind, *numbers in zip(*(column.tolist() for column in columns)):
            yield False, kind, *numbers, ""

    def _final(self, key: Key, i: int) -> Key:
        _, kind, layer, position, feature, _ = key
        if self.finals == "mean":
            return True, "direction", self.layers, -1, -1, ""
        if self.finals == "order":
            return True, "direction", self.layers, -1, -1, f"target {i}"
        return True, kind, layer, position, feature, ""

    def _add(self, keys: Iterable[Key], labels: Iterable[str]) -> np.ndarray:
        found = []
        for key, label in zip(keys, labels):
            if key[0] and key[1] == "direction" and self.finals == "token":
                key = (*key[:5], str(label))  # nothing else tells directions apart
            found.append(self._numbers.setdefault(key, len(self._numbers)))
            self.labels[key] = _label(self.labels.get(key, ""), str(label))
        return np.array(found, np.int64)


def _label(known: str, label: str) -> str:
    """A node's label; where graphs have asked for different things in its place, the first few."""
    parts = known.split(" / ") if known else []
    if not label or label in parts or parts[LABELS:]:
        return known
    return " / ".join([*parts, label if len(parts) < LABELS else "..."])


def edges_of(graph: Graph, shared: SharedNodes) -> tuple[np.ndarray, np.ndarray]:
    """The edges of a graph: their numbers (target << 32 | source), int64 [E], ascending, and their
    effects, float64 [E]; those of equal numbers are added."""
    targets, sources = shared.numbers(graph)
    factors = shared.factors(graph)
    row, column = np.nonzero(graph.effects)
    effect = graph.effects[row, column] * factors[row]
    number, where = np.unique(targets[row] << SHIFT | sources[column], return_inverse=True)
    return number, np.bincount(where, effect, len(number))


def ends(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The targets and the sources of edges."""
    return number >> SHIFT, number & np.int64(0xFFFFFFFF)


def node_names(nodes: Nodes, which: Iterable[int], positions: Positions) -> list[str]:
    """What a reader calls some of the nodes."""
    return [node_name(nodes[i], where=positions != "ignore") for i in which]
