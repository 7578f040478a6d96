"""The formats of text files: where the documents of a file are, and how to read one of them.

Plain files are scanned once, memory-mapped, for the byte offsets of their documents; ArrayRecord
files have their own index. Compressed files are read line by line. The suffix, in upper or lower
case, decides the format; formats that cannot be read are refused.
"""

import codecs
import dataclasses
import gzip
import io
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gemma_scope_jax.errors import InputError, reason, shown
from gemma_scope_jax.storage.paths import is_remote, named_paths

SEPARATOR = "\n\f\n"
LONGEST = 1 << 28  # bytes of a line of JSON or a record; longer ones would fill the memory
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_RECORDS = (".array_record", ".arrayrecord")
_COMPRESSED = (".gz", ".zst")
_PLAIN = (".txt", ".text", ".md")  # whatever precedes them
_OTHERS = (
    ".7z", ".arrow", ".avro", ".br", ".bz2", ".csv", ".db", ".doc", ".docx", ".feather", ".gguf",
    ".json", ".lz4", ".npy", ".npz", ".orc", ".parquet", ".pdf", ".pickle", ".pkl", ".pt", ".rar",
    ".safetensors", ".sqlite", ".tar", ".tfrecord", ".tfrecords", ".tgz", ".tsv", ".xls", ".xlsx",
    ".xz", ".zip",
)  # fmt: skip
_SHARD = re.compile(r"-\d+-of-\d+$")
_SPACE = re.compile(rb"\s*")


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as stored in its source, not yet parsed.

    `where` names it in messages and stores. `kind`: "text" (UTF-8 bytes), "json" (bytes), "either"
    of the two, "string" (a str), "tokens" (ids and mask), "mapping" (a record of a dataset) or
    "long" (a line longer than `LONGEST`, which is not read).
    """

    where: str
    value: Any
    kind: str


@dataclasses.dataclass(frozen=True)
class IndexedFile:
    """A file whose records 0 to count - 1 can be read in any order."""

    count: int
    read: Callable[[int], Record]


def text_files(patterns: Sequence[str]) -> list[Path]:
    """The files that names and glob patterns match (`~` is expanded), sorted, each once.

    Raises `InputError` if a pattern matches none, or a file of a format that cannot be read.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        if is_remote(pattern):
            raise InputError(f"{pattern}: text is read from local files; copy it here first")
        paths = named_paths(pattern)
        files = [path for path in paths if os.path.isfile(path)]
        if not files and any(map(os.path.isdir, paths)):
            raise InputError(f"{pattern}: is a folder; name its files, such as {pattern}/*.jsonl")
        if not files:
            raise InputError(f"no text files match {pattern}")
        for path in files:  # one file may be spelled in several ways
            found.setdefault(os.path.abspath(path), path)
    paths = [Path(found[place]) for place in sorted(found)]
    for path in paths:
        kind_of(path)
    return paths


def kind_of(path: Path) -> str:
    """The format by a file's name: "text", "lines" (of JSON), "stream" (of lines, compressed) or
    "records". Raises `InputError` for other formats."""
    name = _SHARD.sub("", path.name.lower())
    suffixes = Path(name).suffixes or [""]
    last, before = suffixes[-1], suffixes[-2] if len(suffixes) > 1 else ""
    if last in _RECORDS:
        return "records"
    if last in _LINES:
        return "lines"
    if last in _COMPRESSED:
        if before in _LINES:
            return "stream"
        raise InputError(f"{path}: compressed text must be JSON Lines, named .jsonl{last}")
    if last in _OTHERS:
        raise InputError(f"{path}: unsupported format; convert it to .jsonl (a JSON object a line)")
    if last not in _PLAIN and {*_LINES, *_COMPRESSED, *_RECORDS} & set(suffixes):
        raise InputError(f"{path}: rename it so that it ends in its format, .txt or .jsonl")
    return "text"


def decoded(value: bytes, where: str | os.PathLike) -> str:
    """UTF-8 text without a byte order mark, with line feeds at line ends. Raises `InputError`."""
    try:
        text = value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """The text of a file with one document, without the final line break, or `InputError`."""
    return decoded(path.read_bytes(), path).removesuffix("\n")


def indexed_file(path: Path) -> IndexedFile:
    """Find the documents of a .txt, .jsonl or ArrayRecord file. Raises `InputError`."""
    kind = kind_of(path)
    if kind == "records":
        return _array_record(path)
    json, name = kind == "lines", shown(str(path))
    find = _lines if json else _texts
    try:
        starts, stops = _scan(path, find) if path.stat().st_size else (array("Q"), array("Q"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error

    def read(number: int) -> Record:
        start, stop = starts[number], stops[number]
        where = f"{name}, byte {start}"
        if json and stop - start > LONGEST:
            return Record(where, stop - start, "long")
        try:
            with open(path, "rb") as file:
                file.seek(start)
                value = file.read(stop - start)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error})") from error
        if len(value) < stop - start:
            raise InputError(f"{where}: the file has become shorter since it was opened")
        return Record(where, value, "json" if json else "text")

    return IndexedFile(len(starts), read)


def _scan(path: Path, find: Callable) -> tuple[array, array]:
    """Start and stop byte of each document that is not blank, without a byte order mark."""
    starts, stops = array("Q"), array("Q")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        mark = len(codecs.BOM_UTF8)
        for start, stop in find(bytes_, mark if bytes_[:mark] == codecs.BOM_UTF8 else 0):
            blank = _SPACE.match(bytes_, start, stop)
            if blank is None or blank.end() < stop:
                starts.append(start)
                stops.append(stop)
    return starts, stops


def _lines(text: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    while (stop := text.find(b"\n", start)) >= 0:
        yield start, stop
        start = stop + 1
    yield start, len(text)


def _texts(text: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Documents between lines of a form feed; lines may end in either convention."""
    at = start
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
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError:
        raise InputError(f"{path}: needs `pip install array-record`") from None
    try:
        source: Any = ArrayRecordDataSource([os.fspath(path)])
        count = len(source)
    except Exception as error:  # the C++ reader raises plain RuntimeErrors and ValueErrors
        raise InputError(f"{path}: not a complete ArrayRecord file ({reason(error)})") from error
    name = shown(str(path))

    def read(number: int) -> Record:
        content, where = source[number], f"{name}, record {number}"
        if len(content) > LONGEST:
            return Record(where, LONGEST, "long")
        return Record(where, content, "either")

    return IndexedFile(count, read)


def stream_records(path: Path, skip_long: bool = False) -> Iterator[Record]:
    """The documents of any supported file in order. Raises `InputError` for broken files and,
    unless `skip_long`, for the first line that is too long: compressed data may be endless.
    """
    if kind_of(path) != "stream":
        file = indexed_file(path)
        yield from map(file.read, range(file.count))
        return
    name = shown(str(path))
    try:
        with decompressed(path) as file:
            for number, line in enumerate(_bounded_lines(file), 1):
                where = f"{name}, line {number}"
                if number == 1 and line is not None:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line is None:
                    if not skip_long:
                        raise too_long(where)
                    yield Record(where, LONGEST, "long")
                elif line and not line.isspace():
                    yield Record(where, line, "json")
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError | EOFError | zlib.error) or "zst" in type(error).__module__:
            raise InputError(f"{path}: broken or truncated file ({error})") from error
        raise


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, which is skipped."""
    while line := file.readline(LONGEST + 1):
        if len(line) <= LONGEST or line.endswith(b"\n"):
            yield line
            continue
        yield None
        while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass


def too_long(where: str) -> InputError:
    """The error for a line or a record that is too long."""
    limit = f"{LONGEST >> 20} MiB"
    return InputError(f"{where}: a line or record of more than {limit}; is this JSON Lines?")


def decompressed(path: Path) -> BinaryIO:
    """A .gz or .zst file, opened for binary reading."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    import zstandard

    # zstandard.open would stop silently after the first of several frames.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    _check_frames(path, zstandard)
    file = open(path, "rb")  # noqa: SIM115  (the reader closes it)
    raw = decompressor.stream_reader(file, read_across_frames=True, closefd=True)
    return io.BufferedReader(raw, 1 << 20)  # type: ignore[arg-type]


def _check_frames(path: Path, zstandard: Any) -> None:
    """Raise `InputError` for a .zst file that ends within a frame, which its reader would not.

    Reads only the headers of frames and their blocks (RFC 8878).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        while head := file.read(18):
            start = file.tell() - len(head)
            if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a skippable frame
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
