"""Reads graphs: our .npz, and the JSON of viewers, written by us or by circuit-tracer.

The JSON has no value, bias and rest, which are NaN then. circuit-tracer 0.5 gives an error and a
feature of layer 0 the same id if their numbers agree; of two links of such ids the first is the
feature's.

Source: circuit-tracer 0.5, frontend/graph_models.py and utils/create_graph_files.py.
"""

import logging
import os
import re
from typing import Any

import numpy as np

from gemma_scope_jax.circuits.export import TYPES, UNNAMED
from gemma_scope_jax.circuits.files import ARRAYS, COLUMNS, read_arrays, suffix_of
from gemma_scope_jax.circuits.graph import KINDS, Graph, Nodes
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.storage.strict_json import field, read_json

LOG = logging.getLogger(__name__)
KIND_OF = {text: kind for kind, text in TYPES.items() if kind != "neuron"} | {"logit": "logit"}
ORDER = ("feature", "error", "token", "logit")  # of nodes in a graph
CELLS = 1 << 29  # the most numbers that effects may have: 2 GiB
MOST = (1 << 31) - 1  # of int32


def load_graph(path: str | os.PathLike) -> Graph:
    """Read a graph that `Graph.save` wrote, or a viewer's JSON.

    Raises `InputError` for a file that is missing, truncated, of something else, or contradicts
    itself.
    """
    where = os.fspath(path)
    if suffix_of(path) == ".json":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: refused
            graph = _from_document(read_json(folder_path(path)), where)
    else:
        graph = _from_arrays(path, where)
    check_graph(graph, where)
    return graph


def check_graph(graph: Graph, where: str) -> None:
    """Raise `InputError` if the parts of a graph contradict each other."""
    sources, targets, n = graph.sources, graph.targets, graph.selected
    shape = (len(targets), len(sources))
    if graph.effects.shape != shape:
        raise InputError(f"{where}: effects are {graph.effects.shape}, expected {shape}")
    for name in ("value", "bias", "rest", "weights"):
        if getattr(graph, name).shape != shape[:1]:
            raise InputError(f"{where}: {name} is not one number for each of {shape[0]} targets")
    if graph.ids.shape != (len(graph.tokens),):
        raise InputError(f"{where}: {graph.ids.shape} ids for {len(graph.tokens)} tokens")
    if graph.cumulative is not None and graph.cumulative.shape != shape[1:]:
        raise InputError(f"{where}: cumulative is not one number for each of {shape[1]} sources")
    if not 0 <= n <= min(shape):
        raise InputError(f"{where}: {n} selected features of {shape[1]} sources")
    for name in ("kind", "layer", "position", "feature"):
        if not np.array_equal(getattr(sources, name)[:n], getattr(targets, name)[:n]):
            raise InputError(f"{where}: the first {n} sources and targets differ in {name}")
    kinds = (sources.kind[:n], ("feature", "neuron")), (sources.kind[n:], ("error", "token"))
    if not all(np.isin(*kind).all() for kind in (*kinds, (targets.kind, KINDS))):
        raise InputError(f"{where}: nodes of kinds that do not belong there")
    for nodes in (sources, targets):
        for name, most in (("layer", graph.layers), ("position", len(graph.tokens) - 1)):
            column = getattr(nodes, name)
            if len(column) and not (column.min() >= -1 and column.max() <= most):
                raise InputError(f"{where}: a node's {name} is not within -1 to {most}")
    if not all(np.isfinite(row).all() for row in (graph.weights, *graph.effects)):
        raise InputError(f"{where}: effects or weights hold NaN or infinities")


def _from_arrays(path: str | os.PathLike, where: str) -> Graph:
    header, arrays = read_arrays(path)
    for name, dtype in ARRAYS.items():
        if name not in arrays or arrays[name].dtype != dtype:
            raise InputError(f"{where}: lacks {name} as {np.dtype(dtype)}")
    cumulative = arrays.get("cumulative")
    return Graph(
        sources=_table(header, arrays, "source", where),
        targets=_table(header, arrays, "target", where),
        tokens=_texts(header, "tokens", where),
        selected=field(header, "selected", int, where),
        layers=field(header, "layers", int, where, least=0, most=MOST),
        about=field(header, "about", dict, where),
        cumulative=None if cumulative is None else cumulative.astype(np.float64),
        **{name: arrays[name] for name in ARRAYS},
    )


def _table(header: dict[str, Any], arrays: dict[str, np.ndarray], which: str, where: str) -> Nodes:
    names = {"kind": None, **COLUMNS}
    for name, dtype in names.items():
        column = arrays.get(f"{which}_{name}")
        if column is None or column.ndim != 1 or dtype not in (None, column.dtype):
            raise InputError(f"{where}: lacks {which}_{name}, or it has another type")
    columns = {name: arrays[f"{which}_{name}"] for name in names}
    columns["label"] = np.array(_texts(header, f"{which}_labels", where), dtype=str)
    if len({len(column) for column in columns.values()}) > 1:
        raise InputError(f"{where}: the columns of its {which}s differ in length")
    return Nodes(**columns)


def _texts(header: Any, key: str, where: str) -> list[str]:
    texts = field(header, key, list, where)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: {key} is not a list of texts")
    return texts


# ---- the JSON of viewers -----------------------------------------------------------------------


def _from_document(document: Any, where: str) -> Graph:
    metadata = field(document, "metadata", dict, where)
    tokens = _texts(metadata, "prompt_tokens", f"{where}: metadata")
    entries = field(document, "nodes", list, where)
    rows = [_node(entry, f"{where}: node {i}") for i, entry in enumerate(entries)]
    order = sorted(range(len(rows)), key=lambda i: rows[i]["order"])
    rows, count = [rows[i] for i in order], {kind: 0 for kind in ORDER}
    for row in rows:
        count[row["group"]] += 1
    n, finals = count["feature"], count["logit"]
    if not finals:
        raise InputError(f"{where}: no node is a logit")
    sources, targets = rows[:-finals], rows[:n] + rows[-finals:]
    if len(sources) * len(targets) > CELLS:
        raise InputError(f"{where}: {len(rows):,} nodes are too many")
    effects = np.zeros((len(targets), len(sources)), np.float32)
    _fill(effects, field(document, "links", list, where), (sources, targets), where)
    unknown = np.full(len(targets), np.nan, np.float32)
    ids = np.full(len(tokens), -1, np.int32)
    for row in rows[n:]:
        if row["kind"] == "token" and 0 <= row["position"] < len(tokens):
            ids[row["position"]] = row["feature"]
    shares = np.array([row["influence"] for row in sources], np.float64)
    return Graph(
        sources=_nodes(sources),
        targets=_nodes(targets),
        effects=effects,
        value=unknown,
        bias=unknown.copy(),
        rest=unknown.copy(),
        weights=np.array([0.0] * n + [row["weight"] for row in rows[-finals:]], np.float32),
        ids=ids,
        tokens=tokens,
        selected=n,
        layers=max(rows[-1]["layer"], 0),
        about=_about(metadata),
        cumulative=None if np.isnan(shares).any() else shares,
    )


def _node(entry: Any, where: str) -> dict[str, Any]:
    """What a node of the JSON says: the columns of `Nodes`, and its place among the others."""
    node_id, text = field(entry, "node_id", str, where), field(entry, "feature_type", str, where)
    if text not in KIND_OF:
        raise InputError(f"{where}: {text!r} is not a type of node that is read here")
    kind, label = KIND_OF[text], field(entry, "clerp", str, where, default="")
    position = field(entry, "ctx_idx", int, where, least=0, most=MOST)
    weight = field(entry, "token_prob", float, where, default=0.0)
    numbers = re.fullmatch(r"(E|-?\d{1,9})_(-?\d{1,9})_(-?\d{1,9})", node_id)
    if not numbers:
        raise InputError(f"{where}: the node_id {node_id[:40]!r} is not LAYER_FEATURE_POSITION")
    layer = -1 if numbers[1] == "E" else int(numbers[1])
    feature = int(numbers[2])
    if kind != "error" and (feature < 0 or (layer < 0) != (kind == "token")):
        raise InputError(f"{where}: the node_id {node_id!r} is not that of a {kind}")
    if kind == "error":
        # layer_-1_position, with -1 for what is merged; or 0_layer_position (circuit-tracer 0.5)
        ours = feature == -1
        layer = layer if ours else _whole(entry.get("layer"), where)
        position, feature, label = int(numbers[3]) if ours else position, -1, ""
    if kind == "logit":
        said = re.fullmatch(r'Output "(.*)" \(p=[^()]*\)', label, re.DOTALL)
        label, layer = said[1] if said else label, layer - 1
        kind = "direction" if feature >= UNNAMED else kind
    group = "logit" if kind == "direction" else kind
    place = (layer, position, feature) if group in ("feature", "error") else (position,)
    return {
        "id": node_id,
        "kind": "neuron" if entry.get("is_neuron") is True else kind,
        "layer": layer,
        "position": position,
        "feature": -1 if kind == "direction" else feature,
        "activation": field(entry, "activation", float, where, default=_inactive(kind)),
        "label": label,
        "influence": field(entry, "influence", float, where, default=np.nan),
        "weight": weight,
        "group": group,
        "order": (ORDER.index(group), *(place if group != "logit" else ())),
    }


def _inactive(kind: str) -> float:
    return np.nan if kind in ("feature", "logit", "direction") else 1.0


def _whole(value: Any, where: str) -> int:
    """A layer, which viewers write as a text or as a number."""
    if re.fullmatch(r"\d{1,9}", str(value)) and not isinstance(value, bool):
        return int(value)
    raise InputError(f"{where}: layer is {str(value)[:40]!r}, not a whole number")


def _nodes(rows: list[dict[str, Any]]) -> Nodes:
    columns = {name: np.array([r[name] for r in rows], t) for name, t in COLUMNS.items()}
    texts = {name: np.array([r[name] for r in rows], str) for name in ("kind", "label")}
    return Nodes(**columns, **texts)


def _fill(
    effects: np.ndarray, links: list[Any], nodes: tuple[list[dict], list[dict]], where: str
) -> None:
    """Enter the links into the effects."""
    columns: dict[str, list[int]] = {}
    for column, row in enumerate(nodes[0]):
        columns.setdefault(row["id"], []).append(column)
    targets = {row["id"]: r for r, row in enumerate(nodes[1])}
    shared = [found for found in columns.values() if len(found) > 1]
    kinds = [[nodes[0][column]["group"] for column in found] for found in shared]
    if len(targets) < len(nodes[1]) or any(k != ["feature", "error"] for k in kinds):
        raise InputError(f"{where}: two nodes have the same node_id")
    entered = np.zeros(effects.shape, bool)
    for i, link in enumerate(links):
        at = f"{where}: link {i}"
        source, target = field(link, "source", str, at), field(link, "target", str, at)
        if source not in columns or target not in targets:
            raise InputError(f"{at}: {source[:40]!r} -> {target[:40]!r} is not between its nodes")
        row = targets[target]
        free = [column for column in columns[source] if not entered[row, column]]
        if not free:
            raise InputError(f"{at}: {source} -> {target} occurs twice")
        entered[row, free[0]] = True
        effects[row, free[0]] = field(link, "weight", float, at)
    unclear = sum(int((entered[:, one] & ~entered[:, other]).sum()) for one, other in shared)
    if unclear:
        said = "links are of a feature or of an error of the same id; taken as the feature's"
        LOG.warning("%s: %d %s", where, unclear, said)


def _about(metadata: dict[str, Any]) -> dict[str, Any]:
    """What the metadata says of how the graph was made, as `Graph.about` has it."""
    about = {"model": metadata.get("scan"), "coders": metadata.get("transcoder_list")}
    about |= {"prompt": metadata.get("prompt"), "generation": metadata.get("generation_settings")}
    about["pruning"] = metadata.get("pruning_settings")
    if not about["pruning"] and isinstance(metadata.get("node_threshold"), float | int):
        about["pruning"] = {"node_threshold": metadata["node_threshold"]}
    return {key: value for key, value in about.items() if value}
