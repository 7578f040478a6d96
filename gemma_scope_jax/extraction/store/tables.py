"""Parquet files of a feature store: written in memory, opened with every byte under a checksum.

Parquet's own checksums cover the data of its pages. The shard's JSON (see `shards.py`) has the
file's size and the checksums of the footer and, for `verify`, of the whole file.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

AnyPath = Path | epath.Path  # local or in a bucket
DELTA, SPLIT, DICTIONARY = "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT", "dictionary"
GROUP = 1 << 17  # rows per row group, all of which are read for one feature
_TAIL = 8  # bytes of the footer's length and the magic
_LEVEL = 1  # of zstd; higher levels save little


class FileSum(NamedTuple):
    """A file's entry in a shard's JSON: its size, its crc32, and the crc32 of its footer."""

    bytes: int
    crc: int
    footer: int


def encoded(
    columns: Mapping[str, tuple[np.ndarray, str]], statistics: Sequence[str]
) -> tuple[memoryview, FileSum]:
    """Columns, each an array and its encoding, as the bytes of a Parquet file, and its sums."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    out = pa.BufferOutputStream()
    kinds = {name: kind for name, (_, kind) in columns.items()}
    how: dict[str, Any] = {  # pyarrow's types lack lists of columns
        "use_dictionary": [name for name, kind in kinds.items() if kind == DICTIONARY],
        "column_encoding": {name: kind for name, kind in kinds.items() if kind != DICTIONARY},
        "write_statistics": list(statistics),
    }
    parquet.write_table(
        pa.table({name: pa.array(array) for name, (array, _) in columns.items()}),
        out,
        row_group_size=GROUP,
        compression="zstd",
        compression_level=_LEVEL,
        write_page_checksum=True,
        store_schema=False,
        **how,
    )
    data = memoryview(out.getvalue())
    return data, FileSum(len(data), zlib.crc32(data), zlib.crc32(data[_footer_at(data[-_TAIL:]) :]))


def _footer_at(tail: bytes | memoryview) -> int:
    """Where a footer begins, counted from the file's end (negative)."""
    return -_TAIL - int.from_bytes(tail[:4], "little")


@contextlib.contextmanager
def opened(path: AnyPath, there: FileSum) -> Iterator["ParquetFile"]:
    """Open the file at `path` for reading. Raises `InputError` if it, or what the block reads, is
    not what was written."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) != there.bytes:
                raise damaged(path, f"it has {file.tell()} bytes, not {there.bytes}")
            file.seek(-_TAIL, os.SEEK_END)
            at = max(_footer_at(file.read(_TAIL)), -there.bytes)
            file.seek(at, os.SEEK_END)
            if zlib.crc32(file.read()) != there.footer:
                raise damaged(path, "its footer")
            file.seek(0)
            yield parquet.ParquetFile(file, page_checksum_verification=True)
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; {again(path)}") from None
    except OSError as error:
        if error.errno is None:  # pyarrow's
            raise damaged(path, str(error).partition("\n")[0]) from error
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pa.ArrowException as error:
        raise damaged(path, str(error).partition("\n")[0]) from error


def check_sum(path: AnyPath, there: FileSum) -> None:
    """Read every byte of a file. Raises `InputError` if it is not what was written."""
    with opened(path, there), path.open("rb") as file:
        crc = 0
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    if crc != there.crc:
        raise damaged(path, "its data")


def damaged(path: AnyPath, what: str) -> InputError:
    return InputError(f"{path}: damaged ({what}); {again(path)}")


def again(path: AnyPath) -> str:
    """How to replace the shard to which the file at `path` belongs."""
    name = os.path.basename(os.fspath(path)).partition("-")[0]
    return f"delete {f'shard-{name}.json' if name.isdigit() else 'it'} and extract again"
