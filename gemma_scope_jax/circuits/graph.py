"""An attribution graph: the direct effect of every source on every target, on one prompt.

Sources are features, reconstruction errors and token embeddings; targets are the selected features
and what was asked about, such as the logits of the next token. `effects` is a rectangle, targets x
sources: only targets have rows, so that a graph of thousands of tokens needs no square matrix.

    targets[r].value = effects[r].sum() + rest[r] + bias[r]

All arrays are numpy arrays. The first n sources and the first n targets are the same n selected
features, in the same order (layer, position, feature).
"""

import dataclasses
import os
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma_scope_jax.circuits import influence, prune
from gemma_scope_jax.circuits.files import save_graph
from gemma_scope_jax.circuits.intervene import Freeze
from gemma_scope_jax.circuits.validate import Validation, validate
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.model.config import Model

if TYPE_CHECKING:
    from gemma_scope_jax.circuits.compare import GraphDifference
    from gemma_scope_jax.circuits.strongest import StrongestNodes

# Kinds of nodes. A "neuron" stands where a feature would, in graphs without coders.
KINDS = ("feature", "neuron", "error", "token", "logit", "direction")


@dataclasses.dataclass(frozen=True)
class Nodes:
    """A table of nodes, one array [n] a column; `nodes[index]` takes some of the rows.

    kind        str, one of `KINDS`
    layer       int32: of features and errors the model's layer; -1 for tokens; L for logits
                and what is made of them
    position    int32: the token's position in the prompt
    feature     int32: the feature's id; the vocabulary id of tokens and logits; -1 for errors
    activation  float32: of features their activation, of logits their value, else 1
    label       str: what a reader calls the node; "" where nothing is known
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    activation: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def __repr__(self) -> str:
        """One line without arrays."""
        kinds, counts = np.unique(self.kind, return_counts=True)
        held = ", ".join(f"{count:,} x {kind}" for kind, count in zip(kinds, counts))
        return f"Nodes({held})"

    def __getitem__(self, index: Any) -> "Nodes":
        index = np.atleast_1d(index) if not isinstance(index, slice) else index
        return Nodes(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    @staticmethod
    def joined(*tables: "Nodes") -> "Nodes":
        """One table of the rows of several."""
        names = [f.name for f in dataclasses.fields(Nodes)]
        return Nodes(*(np.concatenate([getattr(t, name) for t in tables]) for name in names))


@dataclasses.dataclass(frozen=True)
class Graph:
    """What `attribute` returns.

    sources, targets  the nodes; targets are the n selected features and then what was asked about
    effects  float32 [targets, sources]: direct effects, in units of the target's value
    value    float32 [targets]: of a feature its pre-activation, of a logit its distance from the
             mean logit
    bias     float32 [targets]: the part of the value that no source has: biases, and what the MLPs
             write at the first positions, where coders were not trained
    rest     float32 [targets]: the effect of the active features that were not selected
    weights  float32 [targets]: what influence starts from: probabilities of logits, 0 for features
    ids      int32 [T]: the prompt's tokens, `<bos>` first, and `tokens` their texts [T]
    selected the number n of selected features
    layers   the number of the model's layers
    about    what the graph was made from and how: JSON data
    cumulative  float64 [sources] or None: of each source the share of all influence that it and
             the sources with more of it have; as before pruning, if this is a pruned graph
    """

    sources: Nodes
    targets: Nodes
    effects: np.ndarray
    value: np.ndarray
    bias: np.ndarray
    rest: np.ndarray
    weights: np.ndarray
    ids: np.ndarray
    tokens: list[str]
    selected: int
    layers: int
    about: dict[str, Any]
    cumulative: np.ndarray | None = None

    def __repr__(self) -> str:
        """One line without arrays."""
        final = ", ".join(self.targets.label[self.selected :].tolist())
        size = f"{len(self.targets)} targets x {len(self.sources)} sources"
        return f"Graph({self.selected} features, {size}, of {shown(final)})"

    def influence(self) -> np.ndarray:
        """What every source has to do with the final targets: float64 [sources], at least 0.

        The sum over all paths to the final targets of the product of each step's share of its
        target's absolute effects, times the final target's weight. Raises `InputError` for effects
        that are not finite, or go to a layer from the same or a higher one.
        """
        return self._influence(None)

    def _influence(self, rest: np.ndarray | None) -> np.ndarray:
        layer, node = self.targets.layer, self._columns()
        return influence.influence(
            self.effects, layer=layer, node=node, weights=self.weights, rest=rest
        )

    def scores(self, *, rest: bool = False) -> "GraphScores":
        """How much of the influence the graph's features and tokens account for; with `rest`, as if
        on each target the features that were not selected were one more error.

        circuit-tracer counts what is in the graph only. A target's `rest` is a sum, in which
        effects of other signs cancel, so that the scores with it are still too high.
        """
        more = self.rest if rest else None
        found, kind = self._influence(more), self.sources.kind
        shares = influence.scores(self.effects, found, self._columns(), self.weights, kind, more)
        return GraphScores(*shares, 1 - shares[0])

    def strongest(
        self, count: int = 10, *, kinds: Collection[str] = ("feature", "neuron")
    ) -> "StrongestNodes":
        """The `count` sources with the most influence, of some of the kinds in `KINDS`: a table to
        print, and to make interventions of. Raises `InputError`."""
        from gemma_scope_jax.circuits.strongest import strongest_nodes

        return strongest_nodes(self, count, kinds=kinds)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> "Graph":
        """A graph of the nodes, and the edges among them, that have the most influence.

        node_threshold, edge_threshold: the shares of all influence that the kept ones have, 0 to 1;
        1 keeps all that have any. Tokens and final targets stay. Then features that nothing enters,
        and features and errors that nothing leaves, are removed until none is left. Cut edges are
        zero; what they and the removed sources contributed is in `rest`. Raises `InputError`.
        """
        thresholds = check_thresholds(node_threshold, edge_threshold)
        kept = prune.prune(
            self.effects,
            layer=self.targets.layer,
            selected=self.selected,
            tokens=self.sources.kind == "token",
            weights=self.weights,
            **thresholds,
        )
        return dataclasses.replace(
            self,
            sources=self.sources[kept.columns],
            targets=self.targets[kept.rows],
            effects=kept.effects,
            value=self.value[kept.rows],
            bias=self.bias[kept.rows],
            rest=(self.rest[kept.rows] + kept.dropped).astype(np.float32),
            weights=self.weights[kept.rows],
            selected=int((kept.columns < self.selected).sum()),
            about={**self.about, "pruning": thresholds},
            cumulative=kept.cumulative,
        )

    def merge_errors(self, by: Literal["layer", "position", "all"]) -> "Graph":
        """The same graph with one error node a layer, a position, or in all: the sums of theirs.

        What a merged node no longer has, its layer or its position, is -1. Effects of either sign
        cancel within a sum, so that influence and scores change.
        """
        if by not in ("layer", "position", "all"):
            raise InputError(f"errors are merged by layer, position or all, not {by!r}")
        kind = self.sources.kind
        errors, others = np.flatnonzero(kind == "error"), np.flatnonzero(kind != "error")
        nothing = np.full(len(errors), -1, np.int32)
        layer = self.sources.layer[errors] if by == "layer" else nothing
        position = self.sources.position[errors] if by == "position" else nothing
        _, first, group = np.unique(
            np.stack([layer, position]), axis=1, return_index=True, return_inverse=True
        )
        merged = np.zeros((len(self.effects), len(first)), np.float32)
        for row, effects in zip(merged, self.effects):
            row[:] = np.bincount(group.reshape(-1), effects[errors], len(first))
        n, nodes = self.selected, self.sources
        table = dataclasses.replace(
            nodes[errors[first]], layer=layer[first], position=position[first]
        )
        columns = [self.effects[:, others[:n]], merged, self.effects[:, others[n:]]]
        return dataclasses.replace(
            self,
            sources=Nodes.joined(nodes[others[:n]], table, nodes[others[n:]]),
            effects=np.concatenate(columns, axis=1),
            cumulative=None,
        )

    def __sub__(self, other: "Graph") -> "GraphDifference":
        """What differs between two graphs, edge by edge: see `graph_difference`."""
        from gemma_scope_jax.circuits.compare import graph_difference  # it imports this module

        return graph_difference(self, other)

    def validate(
        self,
        model: Model,
        coders: Coder | Iterable[Coder] | None,
        *,
        top: int = 32,
        modes: Sequence[Freeze] = ("direct", "attention", "nothing"),
        seed: int = 0,
        batch: int = 16,
    ) -> Validation:
        """Ablate the `top` features by influence, one at a time, and compare the changes of the
        final targets and of the features downstream with those that the graph predicts.

        model, coders  those that the graph was made with, None for neurons; `ids` is the prompt
        modes   what is frozen while measuring, see `intervene`. "direct" is the graph's own linear
                model, where direct effects are exact; "attention" and "nothing" are the real model;
                "replacement" shows what thresholds alone change
        seed    of the control: the same features write directions of random others of their
                layer, with the same norm
        batch   rows run together

        Raises `InputError` for a graph without features, logits or single features as targets, and
        for another model or coders.
        """
        return validate(self, model, coders, top=top, modes=modes, seed=seed, batch=batch)

    def save(self, path: str | os.PathLike) -> None:
        """Write the graph whole: .npz for programs, or .json as viewers read it (`graph_document`),
        which leaves out value, bias and rest. `load_graph` reads both.

        Raises `InputError` if the file cannot be written.
        """
        save_graph(self, path)

    def _columns(self) -> np.ndarray:
        """Of each target the column of the same node, -1 for final targets."""
        rows = np.arange(len(self.targets))
        return np.where(rows < self.selected, rows, -1)


@dataclasses.dataclass(frozen=True)
class GraphScores:
    """How much of a graph's influence its features and tokens account for, 0 to 1; NaN if nothing
    has any.

    replacement   of the influence of tokens and errors, the share of tokens
    completeness  of what the nodes get, the share that errors do not give, averaged by influence
    error_share   of the influence of tokens and errors, the share of errors

    Source: circuit-tracer, graph.py (compute_graph_scores).
    """

    replacement: float
    completeness: float
    error_share: float

    def __str__(self) -> str:
        return (
            f"replacement {self.replacement:.3f}, completeness {self.completeness:.3f}, "
            f"errors {self.error_share:.3f}"
        )


def check_thresholds(node_threshold: float, edge_threshold: float) -> dict[str, float]:
    """The arguments of `Graph.prune`, by name. Raises `InputError` unless they are shares."""
    thresholds = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    for name, threshold in thresholds.items():
        if not 0 <= threshold <= 1:
            raise InputError(f"{name} is {threshold}, expected 0 to 1")
    return thresholds
