"""safetensors files as we write them: streamed.

A file needs no second copy of its tensors in memory, and tensors may be produced chunk by chunk.
The bytes are those of the safetensors library.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

# Each dtype's name and bytes in the format, in the order in which the library writes tensors.
_CODES = {
    "int64": ("I64", 8),
    "float32": ("F32", 4),
    "uint32": ("U32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint16": ("U16", 2),
}


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tensor to be written: its dtype's name, its shape, and its rows in order, in chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]

    @classmethod
    def whole(cls, array: Any) -> "Streamed":
        """An array in memory or on a device, from where it is brought when its turn comes."""
        return cls(str(array.dtype), tuple(array.shape), (np.asarray(a) for a in (array,)))


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Streamed], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to an open file in the safetensors format, widest dtype first, then by name."""
    shapes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    header, places = lay_out(shapes, metadata)
    file.write(header)
    for name in places:
        for chunk in tensors[name].chunks:
            write_array(file, chunk)


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file of tensors of (dtype, shape); of each, in the file's order,
    where in the file it begins and ends. A file that can be sought may be written in any order.
    """
    kinds, header, end = list(_CODES), {}, 0
    for name in sorted(tensors, key=lambda name: (kinds.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        code, size = _CODES[dtype]
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    about = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(about | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {
        name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for name, entry in header.items()
    }
    return len(text).to_bytes(8, "little") + text, places


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Write the bytes of an array, row after row."""
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
