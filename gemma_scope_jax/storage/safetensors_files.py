"""safetensors files: read lazily, written as a stream.

Reading loads nothing before it is requested, and errors are one line. Writing needs no second copy
of the tensors in memory, and tensors may be produced chunk by chunk; the bytes are those of the
safetensors library.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.safetensors_layout import CODES, lay_out
from gemma_scope_jax.storage.strict_json import parse_json


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Yield `safe_open(path)` for numpy (bfloat16 through ml_dtypes); the file is memory-mapped.

    `f.keys()`, `f.get_slice(name).get_shape() / .get_dtype()` read only the header, and
    `f.get_slice(name)[a:b]` reads only the pages of those rows. Raises `InputError` for a missing,
    truncated or foreign file. The library refuses tensors that overlap, leave gaps, end before the
    file does, or whose shape and bytes disagree; if a name occurs twice it would use the last.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        file = safe_open(os.fspath(path), framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        why = f"not a complete safetensors file ({reason(error)}); download it again"
        raise InputError(f"{path}: {why}") from error
    with file as opened:
        _header(path)
        try:
            yield opened
        except SafetensorError as error:
            raise InputError(f"{path}: {reason(error)}; download it again") from error


def _header(path: str | os.PathLike) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the entry of each, in a file that the library has accepted."""
    status = os.stat(path)
    return _read_header(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # a model's file is opened for each of its tensors
def _read_header(path: str, size: int, changed: int) -> tuple[int, dict[str, Any]]:
    """Refuses a header with duplicate keys; the library has checked everything else."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, parse_json(file.read(length), f"{path}: header")


def map_safetensors(
    path: str | os.PathLike, wanted: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, np.ndarray]:
    """The tensors of a local file, memory-mapped: exactly those of (dtype, shape) in `wanted`.

    Reading a row touches only its pages. Raises `InputError` as `open_safetensors`, and for a file
    that holds anything else.
    """
    with open_safetensors(path):
        start, header = _header(path)
    if set(header) != set(wanted):
        raise InputError(f"{path}: it holds {sorted(header)}, not {sorted(wanted)}")
    whole, found = np.asarray(np.memmap(path, np.uint8, "r", offset=start)), {}
    for name, (dtype, shape) in wanted.items():
        entry = header[name]
        if (entry["dtype"], entry["shape"]) != (CODES[dtype][0], list(shape)):
            said = f"{entry['dtype']} {entry['shape']}"
            raise InputError(f"{path}: {name} is {said}, not {dtype} {list(shape)}")
        found[name] = whole[slice(*entry["data_offsets"])].view(dtype).reshape(shape)
    return found


@dataclasses.dataclass(frozen=True)
class StreamedTensor:
    """A tensor to be written: its dtype's name, its shape, and its rows in order, in chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]

    @classmethod
    def whole(cls, array: Any) -> "StreamedTensor":
        """An array in memory or on a device; it is fetched when its turn comes."""
        return cls(str(array.dtype), tuple(array.shape), (np.asarray(a) for a in (array,)))


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to an open file in the safetensors format, widest dtype first, then by name."""
    shapes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    header, places = lay_out(shapes, metadata)
    file.write(header)
    for name in places:
        for chunk in tensors[name].chunks:
            file.write(array_bytes(chunk))


def array_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy if it already has that order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
