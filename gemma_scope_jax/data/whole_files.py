"""Reads files that fit into memory, compressed or not: tables of examples, labels of features."""

import gzip
import io
import zlib
from pathlib import Path

from gemma_scope_jax.data.document_files import decompressed
from gemma_scope_jax.errors import InputError, reason

MOST = 1 << 30  # bytes, decompressed: a small file may hold an endless text


def read_whole(path: Path) -> bytes:
    """The content of a plain, .gz or .zst file. Raises `InputError` for one that is broken, cannot
    be read, or holds more than `MOST` bytes."""
    try:
        opened = decompressed if path.suffix.lower() in (".gz", ".zst") else io.FileIO
        with opened(path) as file:
            data = file.read(MOST + 1)
    except InputError:
        raise
    except Exception as error:
        is_broken = isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error))
        if is_broken or "zst" in type(error).__module__:
            raise InputError(f"{path}: broken or truncated file ({reason(error)})") from error
        if not isinstance(error, OSError):
            raise
        raise InputError(f"{path}: cannot be read ({error.strerror or reason(error)})") from error
    if len(data) > MOST:
        raise InputError(f"{path}: too large: over {MOST >> 30} GiB, decompressed")
    return data
