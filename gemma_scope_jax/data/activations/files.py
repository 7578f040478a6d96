"""The files of an activation store: shards in the safetensors format, and a manifest.

A shard's file holds one site: `values` [layers, rows, D], and for int8 `scale` [layers, rows], each
contiguous, so reading a row touches only its pages. A file gets its name once it is complete.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import WholeFile
from gemma_scope_jax.storage.manifest import Format
from gemma_scope_jax.storage.paths import expanded, is_remote
from gemma_scope_jax.storage.safetensors_files import array_bytes, map_safetensors
from gemma_scope_jax.storage.safetensors_layout import lay_out
from gemma_scope_jax.storage.strict_json import field

MANIFEST = "manifest.json"
FORMAT = {"format": "gemma_scope_jax activations", "version": 1}
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8)}
_CHUNK = 512  # rows summed at a time: they stay in the CPU's cache
Buffers = dict[str, dict[str, np.ndarray]]  # site -> tensor -> [layers, rows, ...]
_KEYS = ("model", "sites", "dtype", "first", "shard_rows", "data", "rows", "shards", "position",
         "skip", "sums")  # fmt: skip


def local_folder(folder: str | os.PathLike) -> Path:
    """The folder's path. Raises `InputError` for buckets, which cannot be memory-mapped."""
    text = os.fspath(folder)
    if is_remote(text):
        raise InputError(f"{text}: activations are memory-mapped; copy them to a local disk")
    return expanded(text).absolute()


def shard_name(number: int, site: str) -> str:
    return f"{number:05d}.{site}.safetensors"


def row_bytes(sites: Mapping[str, Mapping], dtype: str) -> int:
    """Bytes on disk per token."""
    scale = 4 if dtype == "int8" else 0
    size = DTYPES[dtype].itemsize
    return sum(len(s["layers"]) * (s["width"] * size + scale) for s in sites.values())


# --- writing -------------------------------------------------------------------------------------


def shard_buffers(manifest: dict, rows: int) -> Buffers:
    """Buffers for a shard: {site: {tensor: [layers, rows, ...]}}."""
    dtype, buffers = DTYPES[manifest["dtype"]], {}
    for site, held in manifest["sites"].items():
        layers = len(held["layers"])
        scale = {"scale": np.empty((layers, rows), np.float32)} if dtype == np.int8 else {}
        buffers[site] = scale | {"values": np.empty((layers, rows, held["width"]), dtype)}
    return buffers


def write_shard(
    path: Path, manifest: dict, buffers: Buffers, rows: int, position: Any, skip: int
) -> None:
    """Write a shard's files, then the manifest that lists them."""
    number, entries = len(manifest["shards"]), {}
    for site, tensors in buffers.items():
        held = {name: buffer[:, :rows] for name, buffer in tensors.items()}
        sums, layers = manifest["sums"][site], manifest["sites"][site]["layers"]
        for i, (total, squares) in enumerate(_sums(**held)):
            if not np.isfinite(squares):
                why = "the model's activations are not finite: damaged, or its dtype overflows"
                raise InputError(f"{site} of layer {layers[i]}: {why}")
            sums["sum"][i] = (np.array(sums["sum"][i]) + total).tolist()
            sums["squared_norm"][i] += squares
        entries[site] = replace_file(path / shard_name(number, site), shard_chunks(held))
    manifest["shards"].append({"rows": rows, "files": entries})
    manifest |= {"rows": manifest["rows"] + rows, "position": position, "skip": skip}
    replace_file(path / MANIFEST, [json.dumps(manifest, indent=1).encode() + b"\n"])


def _sums(values: np.ndarray, scale: np.ndarray | None = None) -> Iterator[tuple]:
    """For each layer the sum [D] and the sum of squared norms, float64, of the stored values."""
    for layer, x in enumerate(values):
        total, squares = np.zeros(x.shape[1]), 0.0
        for start in range(0, len(x), _CHUNK):
            # in two steps, which is faster
            part = x[start : start + _CHUNK].astype(np.float32).astype(np.float64)
            if scale is not None:
                part *= scale[layer, start : start + _CHUNK, None]
            total += part.sum(0)
            squares += float(np.einsum("nd,nd->", part, part))
        yield total, squares


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int]:
    """Write a file atomically; returns its size and checksum. Lets `OSError` through."""
    crc = size = 0
    with WholeFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return {"bytes": size, "crc32": crc}


def shard_chunks(tensors: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The bytes of a shard's file."""
    header, places = lay_out({name: (a.dtype.name, a.shape) for name, a in tensors.items()})
    yield header
    for name in places:
        for part in tensors[name]:  # a layer: rows of a buffer that isn't full have gaps
            yield array_bytes(part)


# --- reading -------------------------------------------------------------------------------------


def read_activations_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store. Raises `InputError` for folders without one, or a foreign one."""
    path = folder / MANIFEST
    if not path.exists():
        raise InputError(f"{folder}: holds no activations ({MANIFEST} is missing)")
    return _FORMAT.read(path)


def _check_manifest(m: dict[str, Any], path: Path) -> None:
    """Raise `InputError` unless every field that is used has a valid type and size."""
    if (dtype := field(m, "dtype", str, path)) not in DTYPES:
        raise InputError(f"{path}: dtype is {dtype!r}, not {' or '.join(DTYPES)}")
    for key, least in (("first", 0), ("shard_rows", 1), ("rows", 0), ("skip", 0)):
        field(m, key, int, path, least=least)
    for key in ("name", "dtype", "weights"):
        field(field(m, "model", dict, path), key, str, path)
    field(m, "data", dict, path)
    field(m, "position", dict, path)
    sites, sums = field(m, "sites", dict, path, least=1), field(m, "sums", dict, path)
    for site in sites:
        if not site.isidentifier():  # it is part of file names
            raise InputError(f"{path}: {site!r} is not a site")
        held, where = field(sites, site, dict, path), f"{path}: {site}"
        width = field(held, "width", int, where, least=1)
        layers = field(held, "layers", list, where)
        if not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
            raise InputError(f"{where}: layers are {layers}, not whole numbers")
        for key, shape in (("sum", (len(layers), width)), ("squared_norm", (len(layers),))):
            numbers = field(field(sums, site, dict, path), key, list, where)
            try:
                found = np.asarray(numbers)
            except ValueError:  # lists of several lengths
                found = np.zeros(0)
            if found.dtype.kind not in "iuf" or found.shape != shape:
                raise InputError(f"{where}: {key} does not hold numbers {list(shape)}")
    rows = 0
    for shard in field(m, "shards", list, path):
        rows += field(shard, "rows", int, path, least=1)
        entries = field(shard, "files", dict, path)
        if set(entries) != set(sites):
            raise InputError(f"{path}: a shard holds {sorted(entries)}, not {sorted(sites)}")
        for site in entries:
            for key in ("bytes", "crc32"):
                field(entries[site], key, int, path, least=0)
    if rows != m["rows"]:
        raise InputError(f"{path}: its shards hold {rows} rows, not {m['rows']}")


_FORMAT = Format(
    "the manifest of activations", FORMAT, _check_manifest, "write the store again", _KEYS
)


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `InputError` unless every shard's file exists with its size."""
    for number, shard in enumerate(manifest["shards"]):
        for site, entry in shard["files"].items():
            path = folder / shard_name(number, site)
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                hint = "copy it again, or write the store again"
                raise InputError(f"{path}: {found}, not {entry['bytes']} bytes; {hint}")


def checksum(path: Path) -> int:
    """crc32 of a file. Raises `InputError` if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                crc = zlib.crc32(chunk, crc)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return crc


def map_shard(
    path: Path, manifest: Mapping[str, Any], site: str, rows: int
) -> dict[str, np.ndarray]:
    """The tensors of a shard's file, memory-mapped. Raises `InputError` for a foreign file."""
    held, dtype = manifest["sites"][site], manifest["dtype"]
    layers = len(held["layers"])
    scale = {"scale": ("float32", (layers, rows))} if dtype == "int8" else {}
    wanted = {"values": (dtype, (layers, rows, held["width"])), **scale}
    try:
        return map_safetensors(path, wanted)
    except (OSError, ValueError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: not a complete shard of activations ({why})") from error
