"""The files of an activation store: shards in the safetensors format, and a manifest.

A shard's file holds one site: `values` [layers, rows, D], and for int8 `scale` [layers, rows], each
contiguous, so that reading a row touches its pages and no others. A file appears under its name
when it is complete and on the disk, and not before.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import WholeFile, is_remote

MANIFEST = "manifest.json"
FORMAT = {"format": "gemma_scope_jax activations", "version": 1}
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8)}
_CHUNK = 512  # rows summed at a time: they stay in the cache
_CODES = {"bfloat16": "BF16", "int8": "I8", "float32": "F32"}
_KEYS = {"model", "sites", "dtype", "first", "shard_rows", "data", "rows", "shards", "position",
         "skip", "sums"}  # fmt: skip


def local_folder(folder: str | os.PathLike) -> Path:
    """The folder's path. Raises `InputError` for buckets, which cannot be memory-mapped."""
    text = os.fspath(folder)
    if is_remote(text):
        raise InputError(f"{text}: activations are memory-mapped; copy them to a local disk")
    return Path(text).expanduser().absolute()


def shard_name(number: int, site: str) -> str:
    return f"{number:05d}.{site}.safetensors"


def row_bytes(sites: Mapping[str, Mapping], dtype: str) -> int:
    """Bytes on disk of a token."""
    scale = 4 if dtype == "int8" else 0
    size = DTYPES[dtype].itemsize
    return sum(len(s["layers"]) * (s["width"] * size + scale) for s in sites.values())


# --- writing -------------------------------------------------------------------------------------


def shard_buffers(manifest: dict, rows: int) -> dict[str, dict[str, np.ndarray]]:
    """Room for a shard: {site: {tensor: [layers, rows, ...]}}."""
    dtype, buffers = DTYPES[manifest["dtype"]], {}
    for site, held in manifest["sites"].items():
        layers = len(held["layers"])
        scale = {"scale": np.empty((layers, rows), np.float32)} if dtype == np.int8 else {}
        buffers[site] = scale | {"values": np.empty((layers, rows, held["width"]), dtype)}
    return buffers


def write_shard(path: Path, manifest: dict, buffers, rows: int, position, skip: int) -> None:
    """Write a shard's files, then the manifest that knows them."""
    number, entries = len(manifest["shards"]), {}
    for site, tensors in buffers.items():
        held = {name: buffer[:, :rows] for name, buffer in tensors.items()}
        file = path / shard_name(number, site)
        entries[site] = replace_file(file, tensor_chunks(held))
        sums = manifest["sums"][site]
        for layer, (total, squares) in enumerate(_sums(**held)):
            sums["sum"][layer] = (np.array(sums["sum"][layer]) + total).tolist()
            sums["squared_norm"][layer] += squares
    manifest["shards"].append({"rows": rows, "files": entries})
    manifest |= {"rows": manifest["rows"] + rows, "position": position, "skip": skip}
    write_manifest(path, manifest)


def _sums(values: np.ndarray, scale: np.ndarray | None = None) -> Iterator[tuple]:
    """Of each layer: the sum [D] and the sum of squared norms, float64, of what is stored."""
    for layer, x in enumerate(values):
        total, squares = np.zeros(x.shape[1]), 0.0
        for start in range(0, len(x), _CHUNK):
            part = x[start : start + _CHUNK].astype(np.float32)  # faster than at once to float64
            part = part.astype(np.float64)
            if scale is not None:
                part *= scale[layer, start : start + _CHUNK, None]
            total += part.sum(0)
            squares += float(np.einsum("nd,nd->", part, part))
        yield total, squares


def replace_file(path: Path, chunks: Iterator[Any]) -> dict[str, Any]:
    """Write a file so that it appears complete; its size and checksum. Lets `OSError` through."""
    crc = size = 0
    with WholeFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return {"bytes": size, "crc32": crc}


def tensor_chunks(tensors: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """The bytes of a safetensors file, tensor by tensor in the order given."""
    header, end = {}, 0
    for name, array in tensors.items():
        start, end = end, end + array.nbytes
        code, shape = _CODES[array.dtype.name], list(array.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in tensors.values():
        for part in array:  # a layer at a time: the rows of a buffer not full are not contiguous
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    replace_file(folder / MANIFEST, iter([json.dumps(manifest, indent=1).encode() + b"\n"]))


# --- reading -------------------------------------------------------------------------------------


def read_activations_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store. Raises `InputError` for folders without and foreign ones."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no activations ({MANIFEST} is missing)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write the store again") from error
    if not isinstance(manifest, dict) or not FORMAT.items() <= manifest.items():
        raise InputError(f"{path}: not a manifest of activations of version {FORMAT['version']}")
    if missing := _KEYS - set(manifest):
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}; write the store again")
    return manifest


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `InputError` unless every shard is there with its size."""
    for number, shard in enumerate(manifest["shards"]):
        for site, entry in shard["files"].items():
            path = folder / shard_name(number, site)
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(
                    f"{path}: {found} where {entry['bytes']} bytes are expected; copy it again, or "
                    "write the store again"
                )


def checksum(path: Path) -> int:
    """crc32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard's file, memory-mapped. Raises `InputError` for a foreign file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= 4096:  # ours has two short entries
                raise ValueError("not a shard's header")
            header = json.loads(file.read(length))
        whole = np.memmap(path, np.uint8, "r", offset=8 + length)
        return {name: _tensor(whole, **entry) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a complete shard of activations ({error})") from error


def _tensor(whole: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    kinds = {"BF16": DTYPES["bfloat16"], "I8": DTYPES["int8"], "F32": np.dtype(np.float32)}
    kind, (start, stop) = kinds[dtype], data_offsets
    if stop - start != math.prod(shape) * kind.itemsize or stop > len(whole):
        raise ValueError("shape and size differ")
    return np.asarray(whole)[start:stop].view(kind).reshape(shape)
