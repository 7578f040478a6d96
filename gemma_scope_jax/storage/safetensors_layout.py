"""The layout of a safetensors file on the disk, from names, dtypes and shapes alone.

The bytes are those of the safetensors library. This module needs only the standard library: the
catalogue lists sizes without numpy.
"""

import json
import math
from collections.abc import Mapping

# Each dtype's name and size in the format, in the order in which the library writes tensors.
CODES = {
    "int64": ("I64", 8),
    "float32": ("F32", 4),
    "uint32": ("U32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint16": ("U16", 2),
    "int8": ("I8", 1),
}


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file with tensors of (dtype, shape), and where in the file each
    begins and ends, in the file's order. A seekable file may be written in any order."""
    kinds, header, end = list(CODES), {}, 0
    for name in sorted(tensors, key=lambda name: (kinds.index(tensors[name][0]), name)):
        dtype, shape = tensors[name]
        code, size = CODES[dtype]
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    about = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(about | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    places = {n: tuple(len(head) + at for at in x["data_offsets"]) for n, x in header.items()}
    return head, places


def file_size(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """The size in bytes of a safetensors file with tensors of (dtype, shape), without metadata."""
    return max(end for _, end in lay_out(tensors)[1].values())
