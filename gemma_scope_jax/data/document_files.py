"""The formats text files come in: where the documents of a file lie, and how to read one of them.

Plain files are scanned once, memory-mapped, for the byte offsets of their documents; ArrayRecord
files bring their own index. Compressed files are read line after line.
"""

import dataclasses
import glob
import gzip
import importlib
import io
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gemma_scope_jax.errors import InputError

SEPARATOR = "\n\f\n"
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_SPACE = re.compile(rb"\s*")


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as it lies in its source, not yet parsed.

    `where` names it in messages. `kind`: "text" (UTF-8 bytes), "json" (bytes), "either" of the two,
    "string" (a str) or "mapping" (a record of a dataset).
    """

    where: str
    value: Any
    kind: str


@dataclasses.dataclass(frozen=True)
class IndexedFile:
    """A file whose records 0 .. count - 1 can be read in any order; `size` in bytes."""

    path: Path
    size: int
    count: int
    read: Callable[[int], Record]


def text_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the glob patterns name (`~` is expanded), sorted, each once.

    Raises `InputError` if a pattern names none.
    """
    found: set[str] = set()
    for pattern in patterns:
        names = [f for f in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = {f for f in names if os.path.isfile(f)}
        if not files:
            raise InputError(f"no text files match {pattern}")
        found |= files
    return [_known(Path(name)) for name in sorted(found)]


def _known(path: Path) -> Path:
    """Refuse formats that would be read as something they are not."""
    if path.suffix in (".gz", ".zst") and not is_stream(path):
        raise InputError(f"{path}: compressed text must be JSON Lines, named .jsonl{path.suffix}")
    if path.suffix in (".json", ".parquet", ".arrow", ".tfrecord", ".zip", ".bz2", ".xz"):
        raise InputError(
            f"{path}: not a format that can be read; convert it to .jsonl (a JSON object a line)"
        )
    return path


def is_stream(path: Path) -> bool:
    """Whether a file can only be read from its beginning."""
    return path.name.endswith((".jsonl.gz", ".jsonl.zst"))


def indexed_file(path: Path) -> IndexedFile:
    """Find the documents of a .txt, .jsonl or ArrayRecord file. Raises `InputError`."""
    if _ARRAY_RECORD.search(path.name):
        return _array_record(path)
    json = path.suffix == ".jsonl"
    try:
        size = path.stat().st_size
        starts, stops = _scan(path, _lines if json else _texts) if size else (array("Q"),) * 2
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error

    def read(number: int) -> Record:
        start, stop = starts[number], stops[number]
        where = f"{path}, byte {start}"
        try:
            with open(path, "rb") as file:
                file.seek(start)
                value = file.read(stop - start)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error})") from error
        if len(value) < stop - start:
            raise InputError(f"{where}: the file has become shorter since it was opened")
        return Record(where, value, "json" if json else "text")

    return IndexedFile(path, size, len(starts), read)


def _scan(path: Path, find: Callable) -> tuple[array, array]:
    """Start and stop byte of each document that is not blank."""
    starts, stops = array("Q"), array("Q")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        for start, stop in find(bytes_):
            blank = _SPACE.match(bytes_, start, stop)
            if blank is None or blank.end() < stop:
                starts.append(start)
                stops.append(stop)
    return starts, stops


def _lines(text: mmap.mmap) -> Iterator[tuple[int, int]]:
    start = 0
    while (stop := text.find(b"\n", start)) >= 0:
        yield start, stop
        start = stop + 1
    yield start, len(text)


def _texts(text: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Documents between lines of a form feed; lines may end in either convention."""
    start = at = 0
    while (at := text.find(b"\f", at)) >= 0:
        before = 2 if text[max(0, at - 2) : at] == b"\r\n" else 1
        after = 2 if text[at + 1 : at + 3] == b"\r\n" else 1
        begins = at - before >= start and text[at - 1 : at] == b"\n"
        if begins and text[at + after : at + after + 1] == b"\n":
            yield start, at - before
            start = at + 1 + after
        at += 1
    yield start, len(text)


def _array_record(path: Path) -> IndexedFile:
    try:
        from grain.sources import ArrayRecordDataSource
    except ImportError:
        raise InputError(f"{path}: needs `pip install grain array_record`") from None
    try:
        source: Any = ArrayRecordDataSource([os.fspath(path)])
        count = len(source)
    except Exception as error:  # the C++ reader raises plain RuntimeErrors and ValueErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a complete ArrayRecord file ({reason})") from error

    def read(number: int) -> Record:
        return Record(f"{path}, record {number}", source[number], "either")

    return IndexedFile(path, path.stat().st_size, count, read)


def stream_records(path: Path) -> Iterator[Record]:
    """The documents of any supported file in order. Raises `InputError` for broken files."""
    if not is_stream(path):
        file = indexed_file(path)
        yield from map(file.read, range(file.count))
        return
    try:
        with decompressed(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield Record(f"{path}, line {number}", line, "json")
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError | EOFError | zlib.error) or "zst" in type(error).__module__:
            raise InputError(f"{path}: broken or truncated file ({error})") from error
        raise


def decompressed(path: Path) -> BinaryIO:
    """A .gz or .zst file, opened to be read in binary. Raises `InputError` without zstandard."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    try:
        return importlib.import_module("compression.zstd").open(path, "rb")  # Python 3.14
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise InputError(f"{path}: .zst needs Python 3.14 or `pip install zstandard`") from None
    # zstandard.open would stop silently after the first of several frames.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    _check_frames(path, zstandard)
    file = open(path, "rb")  # noqa: SIM115  (the reader closes it)
    raw = decompressor.stream_reader(file, read_across_frames=True, closefd=True)
    return io.BufferedReader(raw, 1 << 20)  # type: ignore[arg-type]


def _check_frames(path: Path, zstandard: Any) -> None:
    """Raise `InputError` for a .zst file that ends within a frame: its reader would only end early.

    Headers alone are read, those of frames and of the blocks in them (RFC 8878).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        while head := file.read(18):
            start = file.tell() - len(head)
            if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame to be skipped
                file.seek(start + 8 + int.from_bytes(head[4:8], "little"))
            else:
                checked = zstandard.get_frame_parameters(head).has_checksum
                file.seek(start + zstandard.frame_header_size(head))
                last = False
                while not last and len(block := file.read(3)) == 3:
                    last, kind = bool(block[0] & 1), block[0] >> 1 & 3
                    file.seek(1 if kind == 1 else int.from_bytes(block, "little") >> 3, 1)
                if not last:
                    break
                file.seek(4 * checked, 1)
        if head or file.tell() > size:
            raise InputError(f"{path}: broken or truncated file (it ends within a frame)")
