"""Opening safetensors files: nothing is read before it is asked for, and errors are one line."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.strict_json import parse_json

MOST_HEADER = 100_000_000  # bytes; the library's own limit


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Yield `safe_open(path)` for numpy (bfloat16 through ml_dtypes); the file is memory-mapped.

    `f.keys()`, `f.get_slice(name).get_shape() / .get_dtype()` read the header only, and
    `f.get_slice(name)[a:b]` touches only the pages of those rows.
    Raises `InputError` for a missing, truncated or foreign file. The library refuses tensors that
    overlap, leave gaps, end before the file does, or whose shape and bytes disagree; of a name that
    occurs twice it would take the last.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        file = safe_open(os.fspath(path), framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({reason(error)}); download it again"
        ) from error
    with file as opened:
        status = os.stat(path)
        _check_header(os.fspath(path), status.st_size, status.st_mtime_ns)
        try:
            yield opened
        except SafetensorError as error:
            raise InputError(f"{path}: {reason(error)}; download it again") from error


@functools.lru_cache(maxsize=256)  # a model's file is opened for each of its tensors
def _check_header(path: str, size: int, changed: int) -> None:
    """Refuse a header that says something twice; the library has checked all else."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parse_json(file.read(min(length, MOST_HEADER)), f"{path}: header")
