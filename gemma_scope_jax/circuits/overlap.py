"""What two graphs of one prompt agree on, if they are made with different dictionaries.

    print(gs.graph_overlap(transcoder_graph, clt_graph))

Their features have nothing in common, so what both graphs say about the same things is compared:
how much of the influence each token, layer and position has, what tokens do to the targets, and
the routes from token to token that the strongest paths take. Where two dictionaries disagree, at
least one of them does not tell how the model computes; an intervention says which.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, GraphScores
from gemma_scope_jax.circuits.shared_nodes import SharedNodes
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.circuits.validate import rank_correlation
from gemma_scope_jax.circuits.words import Path, strongest_paths
from gemma_scope_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GraphOverlap:
    """What two graphs of one prompt say about the same things; it prints as a table.

    places      float64 [2, L, T]: the share of the features' influence at each layer and position
    tokens      float64 [2, T]: the share of the influence of tokens and errors that a token has
    effects     float64 [2, K, T]: what each token does to each of the K targets that both graphs
                ask for, along all paths; `targets` are their labels
    errors      the share of the influence that errors have, in each graph
    scores      the graphs' `GraphScores`
    routes      {positions: (share in the first graph, in the second)}: the sequences of positions
                that the strongest paths from tokens to targets take, and the parts they have in
                the strength of these paths
    place_correlation, token_correlation, effect_correlation
                rank correlations (Spearman) of the two graphs' places, tokens and effects; NaN
                where one of them is constant
    common_routes  the share of the paths' strength that runs along the same routes, 0 to 1
    """

    places: np.ndarray
    tokens: np.ndarray
    effects: np.ndarray
    targets: list[str]
    errors: tuple[float, float]
    scores: tuple[GraphScores, GraphScores]
    routes: dict[tuple[int, ...], tuple[float, float]]
    place_correlation: float
    token_correlation: float
    effect_correlation: float
    common_routes: float
    texts: list[str]

    def __str__(self) -> str:
        """Scores, correlations, the tokens of most influence and the strongest routes."""
        lines = [f"a: {self.scores[0]}", f"b: {self.scores[1]}"]
        lines.append(
            f"rank correlation: places {self.place_correlation:.3f}, tokens "
            f"{self.token_correlation:.3f}, effects on targets {self.effect_correlation:.3f}; "
            f"common routes {self.common_routes:.3f}"
        )
        best = np.argsort(-self.tokens.max(0), kind="stable")[:10]
        name = lambda t: f"{self.texts[t]!r} at {t}"
        rows = [(name(t), "", *(f"{share:.3f}" for share in self.tokens[:, t])) for t in best]
        lines.append(text_table(("token", "", "a", "b"), rows))
        strongest = sorted(self.routes.items(), key=lambda item: -max(item[1]))[:10]
        rows = [
            (" > ".join(repr(self.texts[t]) for t in route), "", *(f"{s:.3f}" for s in shares))
            for route, shares in strongest
        ]
        return "\n".join([*lines, text_table(("route", "", "a", "b"), rows)])


def graph_overlap(a: Graph, b: Graph, *, paths: int = 200) -> GraphOverlap:
    """How far two graphs of one prompt agree, whatever dictionaries they are made with.

    Prune large graphs first: the strongest paths are looked for among all edges that there are.

    paths: the routes are those of this many strongest paths of each graph.

    Raises `InputError` for graphs of different prompts, or without a common target.
    """
    if a.layers != b.layers or not np.array_equal(a.ids, b.ids):
        raise InputError("an overlap is one of two graphs of the same prompt and model")
    rows = _common_targets(a, b)
    found = [graph.influence() for graph in (a, b)]
    places = np.stack([_places(graph, flow) for graph, flow in zip((a, b), found)])
    tokens = np.stack([_tokens(graph, flow) for graph, flow in zip((a, b), found)])
    effects = np.stack([token_effects(graph)[some] for graph, some in zip((a, b), rows)])
    both = [_routes(strongest_paths(graph, paths)) for graph in (a, b)]
    shares = {r: (both[0].get(r, 0.0), both[1].get(r, 0.0)) for r in {**both[0], **both[1]}}
    scores = a.scores(), b.scores()
    return GraphOverlap(
        places, tokens, effects, a.targets.label[a.selected + rows[0]].tolist(),
        (scores[0].error_share, scores[1].error_share), scores, shares,
        rank_correlation(*places), rank_correlation(*tokens), rank_correlation(*effects),
        sum(min(pair) for pair in shares.values()), list(a.tokens),
    )  # fmt: skip


def _places(graph: Graph, found: np.ndarray) -> np.ndarray:
    n, nodes = graph.selected, graph.sources
    shares = np.zeros((graph.layers, len(graph.ids)))
    np.add.at(shares, (nodes.layer[:n], nodes.position[:n]), found[:n])
    return shares / max(shares.sum(), 1e-30)


def _tokens(graph: Graph, found: np.ndarray) -> np.ndarray:
    kind, shares = graph.sources.kind, np.zeros(len(graph.ids))
    mine = kind == "token"
    shares[graph.sources.position[mine]] = found[mine]
    return shares / max(shares.sum() + found[kind == "error"].sum(), 1e-30)


def _common_targets(a: Graph, b: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The places of common targets among the final targets of each graph."""
    shared = SharedNodes("start")
    in_a, in_b = (shared.numbers(graph)[0][graph.selected :] for graph in (a, b))
    _, first, second = np.intersect1d(in_a, in_b, return_indices=True)
    if not len(first):
        raise InputError("the two graphs ask for different targets: there is nothing to compare")
    order = np.argsort(first)
    return first[order], second[order]


def _routes(paths: Iterable[Path]) -> dict[tuple[int, ...], float]:
    """The positions that paths from tokens go through, each once where a path stays, and the part
    of these paths' influence on each such route."""
    found: dict[tuple[int, ...], float] = {}
    for path in paths:
        if path.nodes.kind[0] == "token":
            at = [*path.nodes.position.tolist(), int(path.target.position[0])]
            route = tuple(p for i, p in enumerate(at) if i == 0 or p != at[i - 1])
            found[route] = found.get(route, 0.0) + path.share
    total = sum(found.values()) or 1.0
    return {route: share / total for route, share in found.items()}


def token_effects(graph: Graph) -> np.ndarray:
    """What every token does to every final target along all paths, float64 [finals, T]: signed, in
    units of the target. A feature hands on what reaches it in proportion to its activation.
    """
    n, nodes = graph.selected, graph.sources
    total = graph.effects[n:].astype(np.float64)
    active = nodes.activation[:n].astype(np.float64)
    for j in np.argsort(-nodes.layer[:n], kind="stable"):
        # the highest layer first: what reaches j is complete before it is handed on
        if active[j] and total[:, j].any():
            total += (total[:, j] / active[j])[:, None] * graph.effects[j]
    found = np.zeros((len(total), len(graph.ids)))
    tokens = nodes.kind == "token"
    found[:, nodes.position[tokens]] = total[:, tokens]
    return found
