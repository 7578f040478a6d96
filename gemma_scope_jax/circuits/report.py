"""What a graph says, as text and as JSON data: targets, scores, paths, and whether it holds."""

import dataclasses
from typing import Any

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, GraphScores
from gemma_scope_jax.circuits.supernodes import Supernodes
from gemma_scope_jax.circuits.validate import Validation
from gemma_scope_jax.circuits.words import Path, node_name, strongest_paths
from gemma_scope_jax.errors import shown
from gemma_scope_jax.storage.strict_json import finite


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """What `report_graph` returns; printed, some lines and a table.

    prompt        the text, without `<bos>`
    targets       (name, value, weight) of what is explained
    nodes         "features", or "neurons" of a graph without coders
    features      of these: explained, active
    shown         nodes and links of the pruned graph
    scores, scores_shown  of the graph and of the pruned one
    scores_rest   of the graph, features that were not explained counting as errors, see
                  `Graph.scores`; None if all were
    paths         the strongest paths through features
    groups        supernodes, if they were looked for
    validation    predicted against measured, or None
    """

    prompt: str
    targets: list[tuple[str, float, float]]
    nodes: str
    features: tuple[int, int]
    shown: tuple[int, int]
    scores: GraphScores
    scores_shown: GraphScores
    scores_rest: GraphScores | None
    paths: list[Path]
    groups: Supernodes | None
    validation: Validation | None

    def as_dict(self) -> dict[str, Any]:
        """JSON data; None for what is not defined."""
        names = ("scores", "scores_rest", "scores_shown")
        named = [(name, getattr(self, name)) for name in names]
        return {
            "prompt": self.prompt,
            "targets": [dict(zip(("target", "value", "weight"), t)) for t in self.targets],
            "features": dict(zip(("explained", "active"), self.features)),
            "shown": dict(zip(("nodes", "links"), self.shown)),
            **{name: finite(scores and dataclasses.asdict(scores)) for name, scores in named},
            "paths": [{"path": str(p), "share": p.share, "effect": p.effect} for p in self.paths],
            "supernodes": None if self.groups is None else self.groups.as_dict(),
            "validation": None if self.validation is None else self.validation.as_dict(),
        }

    def tables(self) -> dict[str, list[list[Any]]]:
        """The figures as tables for the page: heading -> rows, the first of which names them."""
        names = ["graph", "replacement", "completeness", "errors"]
        rows = [
            [name, *(round(v, 3) for v in dataclasses.astuple(scores))]
            for name, scores in (
                ("whole", self.scores),
                (f"whole, unexplained {self.nodes} as errors", self.scores_rest),
                ("shown", self.scores_shown),
            )
            if scores is not None
        ]
        if self.groups is not None:
            scores = dataclasses.astuple(self.groups.scores())
            rows.append([f"{len(self.groups)} supernodes", *(round(v, 3) for v in scores)])
        found: dict[str, list[list[Any]]] = {"Scores": [names, *rows]}
        if self.validation is not None:
            title = "Predicted and measured changes when features are ablated"
            found[title] = self.validation.rows()
        return found

    def __str__(self) -> str:
        explained, active = self.features
        boxes, links = self.shown
        best = ", ".join(
            f"{name} {weight:.1%}" if 0 < weight < 1 else f"{name} {value:+.2f}"
            for name, value, weight in self.targets
        )
        rest = []
        if self.scores_rest is not None:
            rest = [f"          {self.scores_rest}, if unexplained {self.nodes} count as errors"]
        grouped = []
        if self.groups is not None:
            grouped = [f"grouped   {len(self.groups)} supernodes: {self.groups.scores()}"]
        lines = [
            f"prompt    {shown(self.prompt)}",
            f"targets   {best}",
            f"{self.nodes:<9} {explained:,} explained of {active:,} active; "
            f"{boxes:,} nodes and {links:,} links shown",
            f"scores    {self.scores}",
            *rest,
            f"as shown  {self.scores_shown}",
            *grouped,
            f"paths     the strongest through {self.nodes}:",
            *(f"  {path}" for path in self.paths),
        ]
        if self.validation is not None:
            count = len(self.validation.ablated)
            lines += [
                "",
                f"predicted and measured when {count} {self.nodes} are ablated, one at a time",
            ]
            lines.append(str(self.validation))
        return "\n".join(lines)


def report_graph(
    graph: Graph,
    pruned: Graph,
    *,
    paths: int = 10,
    groups: Supernodes | None = None,
    validation: Validation | None = None,
) -> GraphReport:
    """The report of a graph; `pruned` is the part that is shown, with labels."""
    n = graph.selected
    final = range(n, len(graph.targets))
    given = graph.value.tolist(), graph.weights.tolist()
    return GraphReport(
        prompt="".join(graph.tokens[1:]),
        targets=[(node_name(graph.targets[r]), *(column[r] for column in given)) for r in final],
        nodes="neurons" if (graph.sources.kind[:n] == "neuron").any() else "features",
        features=(n, int(graph.about.get("active_features", n))),
        shown=(len(pruned.sources), int(np.count_nonzero(pruned.effects))),
        scores=graph.scores(),
        scores_shown=pruned.scores(),
        scores_rest=graph.scores(rest=True) if graph.rest.any() else None,
        paths=strongest_paths(pruned, paths, direct=False) if paths else [],
        groups=groups,
        validation=validation,
    )
