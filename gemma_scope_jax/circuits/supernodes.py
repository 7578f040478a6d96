"""Supernodes: the features of a graph that stand for one thing, found by what they are and do.

    pruned = gs.label_graph(graph.prune(), details)
    groups = gs.find_supernodes(pruned, coders)
    print(groups)                                     # what is in them, and their scores
    gs.export_graph(pruned, folder, "dallas", supernodes=groups.node_ids())
    gs.graph_page(pruned, groups=groups.columns())

Two features are alike if they write similar directions, get and hand on influence along similar
edges, and are active on similar examples, as far as that is known; a feature at several positions
is alike to itself. Clusters of average linkage hold features of neighbouring layers only.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from gemma_scope_jax.circuits.export import node_ids
from gemma_scope_jax.circuits.graph import Graph, GraphScores, Nodes
from gemma_scope_jax.circuits.influence import FLOOR, row_sums
from gemma_scope_jax.circuits.sources import written_directions
from gemma_scope_jax.circuits.subgraph import subgraph
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.circuits.words import node_name
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.storage.strict_json import finite

Together = Literal["anywhere", "token", "position"]
APART = 1e9  # the distance of features that no cluster may hold both
MOST = 5000  # features that are compared with one another
WORDS = 3  # words of a label
STOP = {"a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on"}
STOP |= {"or", "that", "the", "to", "with"}  # words that tell nothing


@dataclasses.dataclass(frozen=True)
class Supernode:
    """Features that stand for one thing: its label, and their columns in the graph."""

    label: str
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Supernodes:
    """The supernodes of a graph, those of most influence first; it prints as a table.

    graph       the graph that they were found in
    groups      each has a label of its own; single features are groups of one
    influence   float64 [groups]: the share of all influence that their members have
    """

    graph: Graph
    groups: tuple[Supernode, ...]
    influence: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        table = self.graph.sources
        rows = []
        for group, share in zip(self.groups, self.influence):
            names = [node_name(table[i]) for i in group.members[:3]]
            more = f" and {len(group.members) - 3} more" if len(group.members) > 3 else ""
            rows.append((group.label, "; ".join(names) + more, f"{share:.1%}"))
        found = text_table(("supernode", "features", "influence"), rows)
        return f"{len(self)} supernodes: {self.scores()}\n{found}"

    def as_dict(self) -> dict[str, Any]:
        """JSON data: the groups by node ids, and the scores of their features; None for what is not
        defined."""
        groups = [
            {"label": label, "nodes": ids, "influence": float(share)}
            for (label, ids), share in zip(self.node_ids().items(), self.influence)
        ]
        return {"groups": groups, "scores": finite(dataclasses.asdict(self.scores()))}

    def columns(self) -> dict[str, list[int]]:
        """label -> columns of `graph.effects`: the `groups` of `graph_page`."""
        return {group.label: list(group.members) for group in self.groups}

    def features(self) -> dict[str, list[tuple[int, int]]]:
        """label -> (layer, feature) of the members, each once: what `mediate` changes."""
        nodes = self.graph.sources
        pairs = lambda some: sorted({(int(nodes.layer[i]), int(nodes.feature[i])) for i in some})
        return {group.label: pairs(group.members) for group in self.groups}

    def largest(self, count: int) -> dict[str, list[int]]:
        """`columns` of the groups of several features, the `count` of most influence."""
        several = [group for group in self.groups if len(group.members) > 1][:count]
        return {group.label: list(group.members) for group in several}

    def node_ids(self) -> dict[str, list[str]]:
        """label -> ids of the members: the `supernodes` of `export_graph`."""
        ids = node_ids(self.graph)[0]
        return {group.label: [ids[i] for i in group.members] for group in self.groups}

    def subgraph(self) -> Graph:
        """The graph of the members, with all other features folded into errors."""
        return subgraph(self.graph, [i for group in self.groups for i in group.members])

    def scores(self) -> GraphScores:
        """Replacement and completeness of `subgraph`."""
        return self.subgraph().scores()

    def effects(self) -> np.ndarray:
        """The sums of the members' direct effects, float64 [groups + finals, groups + tokens].

        Rows are the groups and then the graph's final targets; columns the groups and then its
        tokens. Effects among the members of one group are on its own column.
        """
        n, tokens = self.graph.selected, np.flatnonzero(self.graph.sources.kind == "token")
        finals = range(n, len(self.graph.targets))
        rows = [*(group.members for group in self.groups), *([row] for row in finals)]
        columns = [*(group.members for group in self.groups), *([i] for i in tokens)]
        whole = self.graph.effects.astype(np.float64)
        across = np.stack([whole[:, list(some)].sum(1) for some in columns], axis=1)
        return np.stack([across[list(some)].sum(0) for some in rows])


def find_supernodes(
    graph: Graph,
    coders: CoderSet | Coder | Iterable[Coder] | None = None,
    *,
    most: int = 100,
    similarity: float = 0.3,
    layers: int = 4,
    together: Together = "anywhere",
    examples: Mapping[tuple[int, int], np.ndarray] | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Supernodes:
    """Group the features of a graph; prune it first.

    coders      those of the graph, whose decoder rows are compared; default: edges alone
    most        group only this many features, those of most influence
    similarity  how alike the features of two groups must be on average to become one, 0 to 1
    layers      how many layers apart the members of a group may be at most
    together    members may be "anywhere", at equal tokens of the prompt, or at one position
    examples    more about features, by (layer, feature): vectors that are similar where their
                examples are, such as counts of the tokens on which they are active
    labels      what features are called, by (layer, feature), before the graph's own labels
    weights     what "decoder", "edges" and "examples" count in the mean similarity; default: 1 each

    Raises `InputError` for numbers and names that cannot be.
    """
    whole_number("layers", layers, 0)
    if whole_number("most", most, 1) > MOST:
        raise InputError(f"most={most}: at most {MOST:,} features can be compared with one another")
    if together not in get_args(Together) or not 0 <= similarity <= 1:
        known = ", ".join(get_args(Together))
        raise InputError(f"together={together!r} is one of {known}; similarity is from 0 to 1")
    influence = graph.influence()
    chosen = np.argsort(-influence[: graph.selected], kind="stable")[:most]
    chosen = np.sort(chosen)
    nodes = graph.sources[chosen]
    parts = {"edges": edge_similarity(graph, chosen, anywhere=together != "position")}
    if coders is not None:
        rows = written_directions(CoderSet(coders), nodes)
        parts["decoder"] = _cosines(rows * np.sign(nodes.activation)[:, None])
    if examples is not None:
        parts["examples"] = _of_examples(nodes, examples)
    alike = _mean(parts, weights or {})
    same = _equal(nodes.layer, nodes.feature)
    alike[same] = 1.0
    alike[~_allowed(graph, nodes, layers, together)] = -APART
    whole = float(influence.sum()) or 1.0
    found = []
    for number in np.unique(member := _clusters(alike, similarity)):
        some = chosen[member == number]
        some = some[np.argsort(-influence[some], kind="stable")]
        found.append((float(influence[some].sum()) / whole, tuple(some.tolist())))
    found.sort(key=lambda group: (-group[0], group[1]))
    names = _names(graph.sources, influence, [members for _, members in found], labels or {})
    groups = tuple(Supernode(name, members) for name, (_, members) in zip(names, found))
    return Supernodes(graph, groups, np.array([share for share, _ in found]))


# --- How alike features are ----------------------------------------------------------------------


def edge_similarity(graph: Graph, columns: np.ndarray, *, anywhere: bool = True) -> np.ndarray:
    """How similar the edges of features are: [n, n], -1 to 1.

    The mean of two cosines: of what enters the features, and of what they hand on, as signed parts
    of the influence. anywhere: edges of the same feature or token at other positions are the same.
    """
    effects = graph.effects.astype(np.float64)
    parts = effects / np.maximum(row_sums(graph.effects), FLOOR)[:, None]
    passed = graph.weights.astype(np.float64)
    passed[: graph.selected] += graph.influence()[: graph.selected]
    inputs, outputs = parts[columns], (parts * passed[:, None])[:, columns].T
    if anywhere:
        inputs, outputs = _summed(inputs, graph.sources), _summed(outputs, graph.targets)
    return (_cosines(inputs) + _cosines(outputs)) / 2


def _summed(profiles: np.ndarray, nodes: Nodes) -> np.ndarray:
    """Profiles over nodes [n, nodes], with those that differ in position only added."""
    _, kind = np.unique(nodes.kind, return_inverse=True)
    keys = np.stack([kind, nodes.layer, nodes.feature], axis=1)
    keys, group = np.unique(keys, axis=0, return_inverse=True)
    found = np.zeros((len(profiles), len(keys)))
    for column, where in enumerate(group.reshape(-1)):
        found[:, where] += profiles[:, column]
    return found


def _cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return rows @ rows.T


def _of_examples(nodes: Nodes, examples: Mapping[tuple[int, int], np.ndarray]) -> np.ndarray:
    """Cosines of examples' vectors, NaN where a feature has none."""
    keys = list(zip(nodes.layer.tolist(), nodes.feature.tolist()))
    given = [np.asarray(examples[key], np.float64) for key in keys if key in examples]
    if len({vector.shape for vector in given}) > 1 or any(v.ndim != 1 for v in given):
        raise InputError("the vectors of examples must all be [n], of one length")
    there = np.array([key in examples for key in keys])
    found = np.full((len(keys), len(keys)), np.nan)
    if given:
        found[np.ix_(there, there)] = _cosines(np.stack(given))
    return found


def _mean(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The weighted mean of similarities, without those that are NaN."""
    names = ("decoder", "edges", "examples")
    for name, value in weights.items():
        if name not in names or not (np.isfinite(value) and value >= 0):
            raise InputError(f"weights: {name}={value}; give numbers of {', '.join(names)}")
    total = np.zeros_like(parts["edges"])
    count = np.full_like(total, 1e-30)
    for name, part in parts.items():
        known = np.isfinite(part)
        total += weights.get(name, 1.0) * np.where(known, part, 0.0)
        count += weights.get(name, 1.0) * known
    return total / count


def _equal(*columns: np.ndarray) -> np.ndarray:
    return np.all([column[:, None] == column[None] for column in columns], axis=0)


def _allowed(graph: Graph, nodes: Nodes, layers: int, together: Together) -> np.ndarray:
    """Which pairs of features may be in one group."""
    near = np.abs(nodes.layer[:, None] - nodes.layer[None]) <= layers
    if together == "position":
        near &= _equal(nodes.position)
    elif together == "token":
        near &= _equal(graph.ids[nodes.position])
    return near


def _clusters(alike: np.ndarray, least: float) -> np.ndarray:
    """Numbers of clusters [n]. Average linkage: one pair that is apart keeps two clusters apart."""
    if len(alike) < 2:
        return np.zeros(len(alike), int)
    from scipy.cluster.hierarchy import fcluster, linkage

    upper = np.triu_indices(len(alike), 1)
    distance = np.maximum(1 - alike[upper], 0.0)
    return fcluster(linkage(distance, "average"), 1 - least, "distance")


# --- Labels --------------------------------------------------------------------------------------


def _names(
    nodes: Nodes,
    influence: np.ndarray,
    groups: Sequence[tuple[int, ...]],
    labels: Mapping[tuple[int, int], str],
) -> list[str]:
    """A label for each group, no two alike: the words that most of its members have in theirs, by
    influence; else that of the member of most influence, the first."""
    found: list[str] = []
    for members in groups:
        keys = [(int(nodes.layer[i]), int(nodes.feature[i])) for i in members]
        texts = [labels.get(key) or str(nodes.label[i]) for key, i in zip(keys, members)]
        name = _common(texts, influence[list(members)])
        name = name or next(filter(None, texts), f"{keys[0][0]}/{keys[0][1]}")
        unique, count = name, 1
        while unique in found:
            unique, count = f"{name} ({count + 1})", count + 1
        found.append(unique)
    return found


def _common(texts: Sequence[str], influence: np.ndarray) -> str:
    """The words in the labels of several members, with over half of the influence of all."""
    share: dict[str, float] = {}
    count: dict[str, int] = {}
    for text, part in zip(texts, influence.tolist()):
        for word in set(re.findall(r"[^\W\d_]{2,}", text.lower())) - STOP:
            share[word], count[word] = share.get(word, 0.0) + part, count.get(word, 0) + 1
    half = 0.5 * float(influence.sum())
    words = sorted(word for word in share if share[word] > half and count[word] > 1)
    return ", ".join(sorted(words, key=lambda word: -share[word])[:WORDS])
