"""The ends of a graph's edges in the linear model: what sources write, where targets begin.

A graph names its nodes; what they are in the residual stream comes from the coders and from the
prompt, for those nodes alone that an edge touches.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.graph import Graph
from gemma_scope_jax.circuits.head_paths import Writers
from gemma_scope_jax.circuits.interventions import power_of_two
from gemma_scope_jax.circuits.linear import Frozen, TargetRows
from gemma_scope_jax.circuits.neurons import graph_coders, neurons_of
from gemma_scope_jax.circuits.prompts import checked_prompt
from gemma_scope_jax.circuits.sources import (
    Active,
    active_features,
    encoder_rows,
    laid_out,
    read_prompt,
    slot_features,
    stacked_skips,
    what_is_written,
    writes_to,
    written_rows,
)
from gemma_scope_jax.circuits.targets import (
    Resolver,
    Target,
    Term,
    checked_targets,
    feature_vectors,
)
from gemma_scope_jax.circuits.validate import target_terms
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model


def checked_edges(graph: Graph, edges: Any) -> np.ndarray:
    """Edges as int64 [E, 2], rows and columns within the graph. Raises `InputError`."""
    try:
        found = np.atleast_1d(np.asarray(edges))
    except ValueError:  # rows of several lengths
        found = np.zeros(0)
    if found.shape != (len(found), 2) or not len(found) or found.dtype.kind not in "iu":
        raise InputError("edges must be pairs of whole numbers, (row, column) of the effects")
    for k, (name, most) in enumerate(zip(("row", "column"), graph.effects.shape)):
        column = found[:, k]
        if (bad := column[(column < 0) | (column >= most)]).size:
            raise InputError(f"{name} {bad[0]} is not in the graph: it has 0 to {most - 1}")
    return found.astype(np.int64)


class EdgeEnds:
    """The prompt of a graph, and the ends of some of its edges."""

    def __init__(
        self,
        model: Model,
        coders: CoderSet | Coder | Iterable[Coder] | None,
        graph: Graph,
        pairs: np.ndarray,
        targets: Any,
    ) -> None:
        used = graph.targets[pairs[:, 0]], graph.sources[pairs[:, 1]]
        for nodes in used:
            if (nodes.kind == "neuron").any():
                raise InputError("the edges of neurons cannot be split over heads")
        self.model, self.graph = model, graph
        self.coders: CoderSet = graph_coders(model.config, coders, model)
        neurons = neurons_of(self.coders) is not None
        if neurons and any((nodes.kind == "feature").any() for nodes in used):
            raise InputError("the graph has features: give the coders that it was made with")
        if graph.layers != model.config.layers:
            name = model.config.name
            raise InputError(f"the graph has {graph.layers} layers, and {name} does not")
        merged = (used[1].kind == "error") & ((used[1].layer < 0) | (used[1].position < 0))
        if merged.any():
            raise InputError("merged errors have no place: give the graph before merge_errors")
        self.prompt = read_prompt(model, checked_prompt(model.config, graph.ids))
        self.resolver = Resolver(model, self.coders, self.prompt, None)
        self.linear: tuple[Model, Frozen, Any] = (
            model, self.prompt.frozen, stacked_skips(self.coders)
        )  # fmt: skip
        self._resolve(np.unique(pairs[:, 0]), targets)

    # --- Targets -----------------------------------------------------------------------------

    def _resolve(self, numbers: np.ndarray, given: Any) -> None:
        """Look up rows of the graph: their stage and position [n, Q], their vector [n, Q, D]."""
        n, finals = self.graph.selected, len(self.graph.targets) - self.graph.selected
        asked: list[Any] | None = None
        if given is not None:
            several = isinstance(given, Iterable) and not isinstance(given, Target | str)
            asked = [*given] if several else [given]
            if len(asked) != finals:
                raise InputError(f"{len(asked)} targets for a graph with {finals}")
        some = [self._target(i, asked) for i in numbers[numbers >= n]]
        most = max([1] + [len(target.terms) for target in some])
        shape = len(numbers), power_of_two(most)  # few programs
        self.numbers, self.stage = numbers, np.full(shape, -1, np.int32)
        self.position = np.zeros(shape, np.int32)
        self.vector = np.zeros((*shape, self.model.config.d_model), np.float32)
        own = int((numbers < n).sum())
        if own:
            table = self._active(self.graph.targets[numbers[:own]])
            encoder, _ = encoder_rows(self.coders, table)
            self.stage[:own, 0], self.position[:own, 0] = 2 * table.layer, table.position
            self.vector[:own, 0] = feature_vectors(self.model, self.prompt, table, encoder)
        if some:
            found = self.resolver.resolve(some)
            Q = found.stage.shape[1]
            self.stage[own:, :Q], self.position[own:, :Q] = found.stage, found.position
            self.vector[own:, :Q] = found.vector
        self.position = np.where(self.stage < 0, self.position[:, :1], self.position)

    def _target(self, i: int, asked: list[Any] | None) -> Target:
        """What a row after those of the features stands for."""
        label = str(self.graph.targets.label[i])
        if terms := target_terms(self.graph, i):
            return Target(tuple(Term(**term) for term in terms), label)
        if asked is None:
            raise InputError(
                f"row {i}, {label!r}, is a direction, which a graph does not hold: give the "
                "targets that `attribute` was given"
            )
        given = [asked[i - self.graph.selected]], self.model.config, self.coders
        return (checked_targets(*given, len(self.graph.ids), None) or [])[0]

    def rows(self, numbers: np.ndarray, room: int) -> TargetRows:
        """Rows of the graph as rows of the linear model, filled up to `room`."""
        at = np.searchsorted(self.numbers, numbers)
        more = (0, room - len(at))
        fill = lambda a, value: np.pad(a[at], (more, *((0, 0),) * (a.ndim - 1)), **value)
        stage = fill(self.stage, {"constant_values": -1})
        return TargetRows(stage, fill(self.position, {"mode": "edge"}), fill(self.vector, {}))

    # --- Sources -----------------------------------------------------------------------------

    def writers(self, columns: np.ndarray, room: int) -> Writers:
        """What sources of the graph write, filled up to `room`."""
        nodes, c = self.graph.sources[columns], self.model.config
        rows = np.zeros((c.layers + 1, room, c.d_model), np.float32)
        tokens, errors = (np.flatnonzero(nodes.kind == kind) for kind in ("token", "error"))
        rows[0, tokens] = np.asarray(self.prompt.frozen.embed)[nodes.position[tokens]]
        if len(errors):
            layer, position = nodes.layer[errors], nodes.position[errors]
            rows[layer + 1, errors] = self.errors[layer, position]
        features = np.flatnonzero(nodes.kind == "feature")
        for source in np.unique(nodes.layer[features]).tolist():
            mine = features[nodes.layer[features] == source]
            coder, ids = self.coders.at(source), np.zeros(room, np.int32)
            ids[mine] = nodes.feature[mine]
            for layer in coder.layers:
                if writes_to(coder, source, layer):
                    places = np.int32(coder.source(source)), np.int32(coder.source(layer))
                    found = np.asarray(written_rows(coder, *places, ids))[mine]
                    rows[layer + 1, mine] = found * nodes.activation[mine, None]
        position = np.pad(nodes.position, (0, room - len(columns)), mode="edge")
        return Writers(position.astype(np.int32), rows)

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """What is left of every MLP output: [L, T, D]; nothing beside the neurons."""
        if neurons_of(self.coders) is not None:
            return np.zeros(self.prompt.mlp_out.shape, np.float32)
        active = active_features(self.coders, self.prompt)
        layout = laid_out(active)
        whole, L = jnp.zeros_like(self.prompt.mlp_out), self.model.config.layers
        for n, source in enumerate(layout.layer.tolist()):
            coder = self.coders.at(source)
            ids, strength = slot_features(active, layout, n)
            for layer in range(source, L):
                if writes_to(coder, source, layer):
                    places = np.int32(coder.source(source)), np.int32(coder.source(layer))
                    given = written_rows(coder, *places, ids), strength, layout.positions[n]
                    whole = _add(whole, *given, np.int32(layer))
        nothing = active[:0]
        written = what_is_written(self.coders, self.prompt, nothing, laid_out(nothing), whole=whole)
        return np.asarray(written.error)

    def _active(self, nodes) -> Active:
        return Active(nodes.layer, nodes.position, nodes.feature, nodes.activation)


@jax.jit
def _add(whole, rows, strength, positions, layer):
    """`whole` [L, T, D] with what a block's features write to a layer."""
    return whole.at[layer, positions].add((rows * strength[..., None]).sum(1))
