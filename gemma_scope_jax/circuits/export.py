"""Graphs as the JSON that graph viewers read: Anthropic's, circuit-tracer's, Neuronpedia's.

    FOLDER/SLUG.json            metadata, qParams, nodes, links
    FOLDER/graph-metadata.json  {"graphs": [the metadata of every graph in the folder]}

`circuit_tracer.frontend.local_server.serve(FOLDER)` shows such a folder; Neuronpedia takes one file
of at most 100 MB. What a graph was made from is read from `about`: "model", "coders" (names),
"generation" and "pruning" (settings), "prompt".

Viewers know a node by its `node_id` and what it is by its `feature_type`; they draw it at `layer`
and `ctx_idx` and fetch a feature's examples by `feature`, the Cantor number of (layer, feature).

Source: circuit-tracer 0.5, frontend/graph_models.py and frontend/assets/attribution_graph;
Neuronpedia, apps/webapp/app/api/graph/graph-schema.json and app/[modelId]/graph/utils.ts.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_scope_jax.circuits import prune
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.locks import in_turn
from gemma_scope_jax.storage.paths import AnyPath, folder_path
from gemma_scope_jax.storage.strict_json import field, finite, read_json

if TYPE_CHECKING:
    from gemma_scope_jax.circuits.graph import Graph, Nodes

INDEX = "graph-metadata.json"
LINKS = 1_000_000  # about 100 MB: no viewer takes more
TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error"}
TYPES |= {"neuron": TYPES["feature"], "token": "embedding"}  # no viewer has a type for neurons
UNNAMED = 1_000_000  # targets without a token get ids from here on, above every vocabulary


def node_ids(graph: "Graph") -> tuple[list[str], list[str]]:
    """The ids of the sources and of the targets in viewers' JSON; no two nodes share one.

    layer_feature_position of features, E_token_position of tokens, L+1_token_position of logits.
    Errors are layer_-1_position, and no feature is -1: 0_layer_position, which circuit-tracer 0.5
    writes, is also a feature of layer 0 (it has changed to the same since). To both viewers an id
    is a key without meaning, but circuit-tracer's tools split ids at _ into whole numbers
    (utils/decode_url_features.py), so that a word in them would not do.
    """
    sources = [_source_id(*row) for row in _rows(graph.sources)]
    finals = graph.targets[graph.selected :]
    named = [
        f"{graph.layers + 1}_{_vocabulary(kind, feature, i)}_{position}"
        for i, (kind, _, position, feature) in enumerate(_rows(finals))
    ]
    return sources, sources[: graph.selected] + named


def graph_document(
    graph: "Graph",
    slug: str = "graph",
    *,
    scan: str | None = None,
    features: str | None = None,
    pinned: Iterable[str] = (),
    supernodes: Mapping[str, Sequence[str]] | None = None,
    description: str = "",
) -> dict[str, Any]:
    """The graph as JSON data for viewers.

    slug         the graph's name
    scan         what viewers find features by: on Neuronpedia a model ("gemma-3-1b"), for
                 circuit-tracer a Hugging Face repository; default: the model
    features     where feature files are (`gemma-scope cards --export anthropic-json`): a URL
    pinned       ids of the nodes to show in the subgraph, of `node_ids`
    supernodes   label -> ids of its members, which are pinned, too

    Raises `InputError` for more links than a viewer takes and for unknown ids.
    """
    count = sum(int(np.count_nonzero(row)) for row in graph.effects)
    if count > LINKS:
        said = f"{count:,} links are more than the {LINKS:,} that viewers can take"
        raise InputError(f"{slug}: {said}; graph.prune() first, or save as .npz")
    sources, targets = node_ids(graph)
    groups = {label: list(ids) for label, ids in (supernodes or {}).items()}
    wanted = list(dict.fromkeys([*pinned, *(i for ids in groups.values() for i in ids)]))
    known = dict.fromkeys([*sources, *targets])
    for unknown in (i for i in wanted if i not in known):
        raise InputError(f"{slug}: there is no node {unknown!r}{nearest(unknown, known)}")
    return {
        "metadata": _metadata(graph, slug, scan, features, description),
        "qParams": {
            "pinnedIds": wanted,
            "supernodes": [[label, *ids] for label, ids in groups.items()],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [*_source_nodes(graph, sources), *_final_nodes(graph, targets)],
        "links": list(_links(graph, sources, targets)),
    }


def export_graph(
    graph: "Graph",
    folder: str | os.PathLike,
    slug: str,
    *,
    features: str | os.PathLike | None = None,
    **options: Any,
) -> None:
    """Write `folder`/`slug`.json and enter it in the folder's index; a graph of this slug is
    replaced. Options are those of `graph_document`.

    features: a URL, or a folder of feature files within `folder`, which circuit-tracer's server
    then shows. Raises `InputError` for a slug that is no file name, a folder elsewhere, and if a
    file cannot be written or the index is not one.
    """
    if not re.fullmatch(r"\w[\w.-]*", slug) or f"{slug}.json" == INDEX:
        raise InputError(f"slug {slug!r}: letters, digits, dots, dashes and underscores only")
    place = folder_path(folder)
    if features is not None and "://" not in os.fspath(features):
        options = {"scan": _served(features, place), **options}
        features = None
    document = graph_document(graph, slug, features=features, **options)  # type: ignore[arg-type]
    with in_turn(place):
        index = read_json(place / INDEX) if (place / INDEX).exists() else {"graphs": []}
        others = field(index, "graphs", list, place / INDEX)
        others = [g for g in others if not (isinstance(g, dict) and g.get("slug") == slug)]
        write_text(place / f"{slug}.json", as_text(document))
        index = {**index, "graphs": [*others, document["metadata"]]}
        write_text(place / INDEX, as_text(index))


def _served(features: str | os.PathLike, folder: AnyPath) -> str:
    """How circuit-tracer's viewer finds a folder of feature files within the graphs' folder."""
    inside, outside = Path(folder_path(features)).resolve(), Path(folder).resolve()
    if not inside.is_relative_to(outside):
        raise InputError(f"{features}: the viewer sees only what is in the graphs' folder {folder}")
    if not any(inside.glob("[0-9]*.json")):
        advice = "`gemma-scope cards --export anthropic-json` writes them"
        raise InputError(f"{features}: holds no feature files, one a feature; {advice}")
    # its server has this folder under /data, and a scan that begins with ./ is taken as a path
    return f"./data/{inside.relative_to(outside).as_posix()}"


def as_text(document: Any) -> str:
    """JSON as compact as it gets."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _rows(nodes: "Nodes") -> Iterator[tuple[str, int, int, int]]:
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.feature)
    return zip(*(column.tolist() for column in columns))


def _source_id(kind: str, layer: int, position: int, feature: int) -> str:
    if kind == "token":
        return f"E_{feature}_{position}"
    return f"{layer}_{-1 if kind == 'error' else feature}_{position}"


def _vocabulary(kind: str, feature: int, i: int) -> int:
    return feature if kind == "logit" else UNNAMED + i


def _metadata(
    graph: "Graph", slug: str, scan: str | None, features: str | None, description: str
) -> dict[str, Any]:
    about = graph.about
    pruning, coders = about.get("pruning") or {}, about.get("coders") or []
    found = {
        "slug": slug,
        "scan": scan or str(about.get("model") or "unknown"),
        "transcoder_list": [str(coder) for coder in coders],
        "prompt_tokens": list(graph.tokens),
        "prompt": str(about.get("prompt") or "".join(graph.tokens)),
        "schema_version": 1,
        "info": {"generator": {"name": "gemma_scope_jax"}, "description": description},
        "generation_settings": about.get("generation") or {},
    }
    if pruning:
        found["pruning_settings"] = pruning
    # Neuronpedia wants a number, not null; viewers then hide what is beyond it
    if isinstance(pruning.get("node_threshold"), float | int):
        found["node_threshold"] = pruning["node_threshold"]
    if features:
        found["feature_details"] = {"feature_json_base_url": features}
    return found


def _source_nodes(graph: "Graph", ids: list[str]) -> Iterator[dict[str, Any]]:
    nodes = graph.sources
    shares = graph.cumulative
    if shares is None:
        shares = prune.cumulative(graph.influence())
    labels, activations = nodes.label.tolist(), nodes.activation.tolist()
    for i, (kind, layer, position, feature) in enumerate(_rows(nodes)):
        is_feature = kind in ("feature", "neuron")
        number = position if kind == "token" else _cantor(layer, feature) if is_feature else -1
        end = f"{feature}-{0 if is_feature else position}"
        yield {
            "node_id": ids[i],
            "feature": number,
            # what is merged over layers or positions is drawn at the first
            "layer": "E" if kind == "token" else str(max(layer, 0)),
            "ctx_idx": max(position, 0),
            "feature_type": TYPES[kind],
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{'E' if kind == 'token' else layer}_{end}",
            "clerp": labels[i] or _merged(kind, layer, position, graph.tokens),
            "influence": finite(float(shares[i])),
            "activation": finite(float(activations[i])) if is_feature else None,
            **({"is_neuron": True} if kind == "neuron" else {}),
        }


def _final_nodes(graph: "Graph", ids: list[str]) -> Iterator[dict[str, Any]]:
    nodes, n = graph.targets[graph.selected :], graph.selected
    weights, labels = graph.weights[n:].tolist(), nodes.label.tolist()
    for i, (kind, _, position, feature) in enumerate(_rows(nodes)):
        number = _vocabulary(kind, feature, i)
        yield {
            "node_id": ids[n + i],
            "feature": number,
            "layer": str(graph.layers + 1),
            "ctx_idx": max(position, 0),
            "feature_type": "logit",
            "token_prob": weights[i],
            "is_target_logit": i == 0,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"L_{number}-{position}",
            # viewers read the token and the probability from this text
            "clerp": f'Output "{labels[i] or f"#{feature}"}" (p={weights[i]:.3f})',
            "influence": None,
            "activation": None,
        }


def _links(graph: "Graph", sources: list[str], targets: list[str]) -> Iterator[dict[str, Any]]:
    for row, target in zip(graph.effects, targets):
        columns = np.flatnonzero(row)
        for column, weight in zip(columns.tolist(), row[columns]):
            # the shortest decimals that give this float32 back
            yield {"source": sources[column], "target": target, "weight": float(str(weight))}


def _merged(kind: str, layer: int, position: int, tokens: list[str]) -> str:
    """What viewers cannot say of an error, if it has no layer or no position."""
    if kind != "error" or (layer >= 0 and position >= 0):
        return ""
    at = f"at {tokens[position]!r}" if position >= 0 else "at all positions"
    return f"Err: {f'layer {layer}' if layer >= 0 else 'all layers'} {at}"


def _cantor(layer: int, feature: int) -> int:
    """The number of a pair, also the name of its feature file."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
