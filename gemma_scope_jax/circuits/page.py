"""An attribution graph as one web page: it opens from a disk and sends no requests.

graph.html is the page and the graph_*.js its program. The graph is JSON inside it, one list a
column. Text reaches the page through `textContent` and the canvas only, so that no token or label
can become a part of it.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.circuits.graph import KINDS, Graph, Nodes
from gemma_scope_jax.circuits.words import FeatureDetails
from gemma_scope_jax.storage.strict_json import legible
from gemma_scope_jax.web.pages import inert_json, page_template

Head = tuple[int, int, int, float]  # layer, head, key position, contribution


def graph_page(
    graph: Graph,
    *,
    details: Mapping[tuple[int, int], FeatureDetails] | None = None,
    heads: Mapping[tuple[int, int], Sequence[Head]] | None = None,
    notes: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    title: str = "",
    most_links: int = 20_000,
) -> str:
    """The page of a graph, as HTML; prune a large graph first.

    details: more about features, by (layer, feature).
    heads: the attention heads that carry a link, by (row, column) of `graph.effects`: layer, head,
        key position and contribution; a negative head stands for the path through no head.
    notes: tables that stand under the graph: heading -> rows, the first of which names the columns.
    groups: features that are pinned together at first: name -> columns of `graph.effects`, such as
        `Supernodes.columns()`.
    title: the heading; else the prompt.
    most_links: how many links the page holds, the strongest ones; it says how many it leaves out.
    """
    data, place = _page_data(graph, details or {}, heads or {}, most_links)
    pinned = {name: place[np.asarray(some, int)] for name, some in (groups or {}).items()}
    data["groups"] = [[name, some[some >= 0].tolist()] for name, some in pinned.items()]
    data["title"] = title
    data["notes"] = [
        [heading, [[_cell(value) for value in row] for row in rows]]
        for heading, rows in (notes or {}).items()
    ]
    name = title or "".join(graph.tokens[1:])[-60:].strip() or "attribution graph"
    before, rest = page_template(__package__, "graph.html").split("{{title}}")
    middle, after = rest.split("{{data}}")
    return before + html.escape(legible(name)) + middle + inert_json(data) + after


def node_influence(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """The share of the answer that runs through each source [sources] and each target [targets]."""
    whole = max(float(graph.weights.sum()), 1e-30)
    through, n = graph.influence() / whole, graph.selected
    return through, np.concatenate([through[:n], graph.weights[n:] / whole])


def _page_data(
    graph: Graph,
    details: Mapping[tuple[int, int], FeatureDetails],
    heads: Mapping[tuple[int, int], Sequence[Head]],
    most_links: int,
) -> tuple[dict[str, Any], np.ndarray]:
    """Nodes are the sources and then what was asked about; links name nodes by their index. Also
    the index of each source, -1 if the page does not have it."""
    n = graph.selected
    through, reached = node_influence(graph)
    row, column, links = strongest_links(graph, reached, most_links)

    # nodes that nothing leads to or from would only fill the page; every token keeps its place
    kept = np.array(graph.sources.kind == "token")
    kept[column] = True
    kept[row[row < n]] = True
    place = np.cumsum(kept) - 1
    index = np.concatenate([place[:n], kept.sum() + np.arange(len(graph.targets) - n)])
    rows = np.flatnonzero(np.concatenate([kept[:n], np.ones(len(index) - n, bool)]))
    at = {pair: i for i, pair in enumerate(zip(row.tolist(), column.tolist()))}
    nodes, known = _nodes(graph.sources[kept], graph.targets[n:], details)
    nodes["influence"] = _rounded(np.concatenate([through[kept], reached[n:]]))
    data = {
        "about": _about(graph.about),
        "tokens": list(graph.tokens),
        "layers": graph.layers,
        "kinds": list(KINDS),
        "nodes": nodes,
        # of the nodes that have incoming links: value = the links + rest + bias
        "inputs": {
            "node": index[rows].tolist(),
            "value": _rounded(graph.value[rows]),
            "bias": _rounded(graph.bias[rows]),
            "rest": _rounded(graph.rest[rows]),
            "weight": _rounded(graph.weights[rows]),
            "total": _rounded(np.abs(graph.effects[rows]).sum(1)),
        },
        "links": {
            "target": index[row].tolist(),
            "source": place[column].tolist(),
            "weight": _rounded(graph.effects[row, column]),
            "all": links,
        },
        "heads": [
            [at[pair], [[*map(int, head[:3]), *_rounded([head[3]])] for head in some]]
            for pair, some in heads.items()
            if pair in at
        ],
        "details": [_details(details[key]) for key in known],
    }
    return data, np.where(kept, place, -1)


def _nodes(
    sources: Nodes, asked: Nodes, details: Mapping[tuple[int, int], FeatureDetails]
) -> tuple[dict[str, list[Any]], list[tuple[int, int]]]:
    """The columns of the table of nodes, and the (layer, feature) that `detail` counts through."""
    joined = lambda name: np.concatenate([getattr(sources, name), getattr(asked, name)]).tolist()
    kind, layer, feature = joined("kind"), joined("layer"), joined("feature")
    keys = [
        (at, f) if k in ("feature", "neuron") else None for k, at, f in zip(kind, layer, feature)
    ]
    known = list(dict.fromkeys(key for key in keys if key is not None and key in details))
    detail = {key: i for i, key in enumerate(known)}
    columns = {
        "kind": [KINDS.index(k) for k in kind],
        "layer": layer,
        "position": joined("position"),
        "feature": feature,
        "activation": _rounded(joined("activation")),
        "label": list(map(str, joined("label"))),
        "detail": [-1 if key is None else detail.get(key, -1) for key in keys],
    }
    return columns, known


def strongest_links(
    graph: Graph, reached: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows and columns of the `most` links that carry the most influence, and how many there are.

    In the order of the rows. `reached`: of each target, see `node_influence`.
    """
    row, column = np.nonzero(graph.effects)
    links = len(row)
    if links > most:
        total = np.abs(graph.effects).sum(1)  # not zero where a link is
        score = np.abs(graph.effects[row, column]) * (reached[row] / total[row])
        best = np.sort(np.argpartition(-score, most)[:most])
        row, column = row[best], column[best]
    return row, column, links


def _details(of: FeatureDetails) -> list[Any]:
    examples = [[list(tokens), _rounded(values)] for tokens, values in of.examples]
    return [list(of.raises), list(of.lowers), examples]


def _about(about: Mapping[str, Any]) -> list[list[str]]:
    """The facts that fit into a line."""
    lines = []
    for name, value in about.items():
        if isinstance(value, (list, tuple)) and all(
            isinstance(v, (str, int, float)) for v in value
        ):
            value = ", ".join(map(str, value[:6])) + (", ..." if len(value) > 6 else "")
        if value is not None and not isinstance(value, (Mapping, list, tuple)):
            lines.append([str(name), str(value)])
    return lines


def _cell(value: Any) -> Any:
    """A value of a table: numbers are set to the right, the rest is text."""
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return _rounded([value])[0]
    return str(value)


def _rounded(values: Iterable[Any]) -> list[Any]:
    """To four significant digits; what is no finite number becomes null."""
    some = [float(f"{float(value):.4g}") for value in values]
    return [
        None if not math.isfinite(v) else int(v) if v.is_integer() and abs(v) < 1e15 else v
        for v in some
    ]
