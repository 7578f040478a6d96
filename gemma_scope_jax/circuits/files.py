"""Graphs as files: an .npz of arrays, with all texts and settings as JSON in one of them.

    header              uint8: JSON, UTF-8: format, version, selected, layers, tokens, about, kinds,
                        source_labels, target_labels
    source_X, target_X  X = kind (uint8: index into kinds), layer, position, feature, activation
    effects, value, bias, rest, weights, ids, cumulative (may be missing): as in `Graph`

A graph of few edges is compressed.
"""

import json
import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_scope_jax.circuits.export import as_text, graph_document
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.atomic import write_file, write_text
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.storage.strict_json import field, legible, parse_json

if TYPE_CHECKING:
    from gemma_scope_jax.circuits.graph import Graph

FORMAT, VERSION = "gemma_scope_jax graph", 1
SUFFIXES = (".npz", ".json")
COLUMNS = {"layer": np.int32, "position": np.int32, "feature": np.int32, "activation": np.float32}
ARRAYS = dict.fromkeys(("effects", "value", "bias", "rest", "weights"), np.float32)
ARRAYS |= {"ids": np.int32}
SPARSE = 0.1  # the share of edges below which compressing is worth its time (50 MB/s)
BROKEN = (OSError, EOFError, ValueError, KeyError, MemoryError, RuntimeError)
BROKEN += (zipfile.BadZipFile, zlib.error)  # what numpy raises for files that are not whole


def suffix_of(path: str | os.PathLike) -> str:
    """.npz or .json. Raises `InputError` for anything else."""
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{os.fspath(path)}: a graph is a file {' or '.join(SUFFIXES)}")
    return suffix


def save_graph(graph: "Graph", path: str | os.PathLike) -> None:
    """Write a graph as its suffix says; the file appears when it is complete."""
    if suffix_of(path) == ".json":
        name = os.path.splitext(os.path.basename(os.fspath(path)))[0]
        write_text(path, as_text(graph_document(graph, name)))
        return
    edges = sum(int(np.count_nonzero(row)) for row in graph.effects)
    write = np.savez_compressed if edges < SPARSE * graph.effects.size else np.savez
    arrays = _arrays(graph, os.fspath(path))
    write_file(path, lambda file: write(file, **arrays))


def _arrays(graph: "Graph", path: str) -> dict[str, Any]:
    """Every array of the file."""
    tables = {"source": graph.sources, "target": graph.targets}
    kinds = sorted({str(kind) for nodes in tables.values() for kind in np.unique(nodes.kind)})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "selected": graph.selected,
        "layers": graph.layers,
        "tokens": list(graph.tokens),
        "about": graph.about,
        "kinds": kinds,
        **{f"{which}_labels": nodes.label.tolist() for which, nodes in tables.items()},
    }
    try:
        text = json.dumps(legible(header), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: graph.about is not JSON data ({reason(error)})") from error
    arrays: dict[str, Any] = {"header": np.frombuffer(text.encode(), np.uint8)}
    for which, nodes in tables.items():
        arrays[f"{which}_kind"] = np.searchsorted(kinds, nodes.kind).astype(np.uint8)
        arrays |= {f"{which}_{c}": getattr(nodes, c).astype(t) for c, t in COLUMNS.items()}
    arrays |= {name: np.asarray(getattr(graph, name), t) for name, t in ARRAYS.items()}
    if graph.cumulative is not None:
        arrays["cumulative"] = graph.cumulative.astype(np.float64)
    return arrays


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of an .npz, with `source_kind` and `target_kind` as texts.

    Raises `InputError` for a file that is missing, truncated, or not a graph.
    """
    where, place = os.fspath(path), folder_path(path)
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{where}: no such file") from error
    except (AttributeError, TypeError, *BROKEN) as error:  # numpy reads other files, too
        raise InputError(f"{where}: not a whole .npz of a graph ({reason(error)})") from error
    if "header" not in arrays or arrays["header"].dtype != np.uint8:
        raise InputError(f"{where}: an .npz, but not of a graph: {sorted(arrays)[:5]}")
    header = parse_json(arrays.pop("header").tobytes(), f"{where}: header")
    if field(header, "format", str, where) != FORMAT or header.get("version") != VERSION:
        said = f"format {header['format']!r}, version {header.get('version')}"
        raise InputError(f"{where}: {said}; this program reads {FORMAT!r}, version {VERSION}")
    kinds = field(header, "kinds", list, where)
    for name in ("source_kind", "target_kind"):
        codes = arrays.get(name, np.zeros(0, np.uint8))
        if codes.dtype != np.uint8 or (len(codes) and codes.max() >= len(kinds)):
            raise InputError(f"{where}: {name} does not fit its {len(kinds)} kinds")
        arrays[name] = np.array(kinds, str)[codes]
    return header, arrays
