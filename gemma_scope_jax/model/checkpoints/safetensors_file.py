"""Opening safetensors files: nothing is read before it is asked for, and errors are one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open

from gemma_scope_jax.errors import InputError


@contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    """Yield `safe_open(path)` for numpy (bfloat16 through ml_dtypes); the file is memory-mapped.

    `f.keys()`, `f.get_slice(name).get_shape() / .get_dtype()` read the header only, and
    `f.get_slice(name)[a:b]` touches only the pages of those rows.
    Raises `InputError` for a missing, truncated or foreign file.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        file = safe_open(os.fspath(path), framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from error
    with file as opened:
        try:
            yield opened
        except SafetensorError as error:
            raise InputError(f"{path}: {error}; download it again") from error
