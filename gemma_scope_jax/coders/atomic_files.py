"""Writing a folder so that it holds either all of its new files, complete, or none of them.

safetensors files are streamed: a file needs no second copy of its tensors in memory, and tensors
may be produced chunk by chunk. The bytes are those of the safetensors library.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from gemma_scope_jax.buckets import is_remote
from gemma_scope_jax.errors import InputError, reason

# Each dtype's name and bytes in the format, in the order in which the library writes tensors.
_CODES = {
    "int64": ("I64", 8), "float32": ("F32", 4), "uint32": ("U32", 4), "bfloat16": ("BF16", 2),
    "float16": ("F16", 2), "uint16": ("U16", 2),
}  # fmt: skip


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


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Streamed]) -> None:
    """Write tensors to an open file in the safetensors format, widest dtype first, then by name."""
    header, places = lay_out({name: (t.dtype, t.shape) for name, t in tensors.items()})
    file.write(header)
    for name in places:
        for chunk in tensors[name].chunks:
            write_array(file, chunk)


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
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
    text = json.dumps(header, separators=(",", ":")).encode()
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


def write_json(file: BinaryIO, value: Any) -> None:
    """Write a JSON document to an open file."""
    file.write(json.dumps(value).encode())


def write_folder(folder: Any, writers: Mapping[str, Callable[[BinaryIO], None]]) -> None:
    """Create files in a folder (made if missing), each by its writer, and name them at the end.

    They are written under temporary names and renamed, in the order given, when all are complete.
    If anything fails no name changes and the temporary files go; what the system refuses (a full
    disk, no permission) raises `InputError`. In a bucket, where a file appears when it is complete,
    they are written one after the other.
    """
    if is_remote(folder):
        _write_remote(epath.Path(folder), writers)
        return
    folder = Path(folder)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            with open(temporary[name], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, folder / name)
        made = False
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            for path in temporary.values():
                path.unlink(missing_ok=True)
            if made:
                folder.rmdir()


def _write_remote(folder: epath.Path, writers: Mapping[str, Callable[[BinaryIO], None]]) -> None:
    for name, write in writers.items():
        try:
            opened: Any = (folder / name).open("wb")
            with opened as file:
                write(file)
        except (TypeError, InputError):
            raise
        except Exception as error:  # the clients raise types of their own
            raise InputError(f"{folder / name}: cannot be written ({reason(error)})") from error


def disk_error(path: str | os.PathLike, error: OSError) -> InputError:
    """What to tell the user when the system refuses to write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"{path}: no space left on the disk; free some, or choose another folder")
    return InputError(f"{path}: cannot be written ({error.strerror or error})")
