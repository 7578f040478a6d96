"""A shard of sparse features: Parquet files, and JSON that is written last and knows them all.

    shard-000012.json                                       documents, segments, files, checksums
    tokens/000012-0000.parquet                              a row for each token of segment 0
    features/coder=NAME/layer=9/000012-0000.parquet         a row for each activation

Tokens come in segments, which never cut a piece of a document. Columns:

    tokens    row int64, document int64, position int32 (in its piece, `<bos>` is 0), offset int32
              (in the document's tokens, -1 for `<bos>`), token int32, counted bool
    features  feature int32, row int64, value float32; by feature, and of each by row

`row` names a token of the store: shard * 2 ** 32 + its place in the shard. Activations are kept
once, by feature: sorted so, ids and rows take a byte and a half together; to read them by token is
to turn the matrix of a segment, which takes no longer than to read a second copy of them would. The
coder and the layer are read off the path by whatever knows Hive's partitions (DuckDB, polars,
pandas).

A shard is there when its JSON is. Measured alternatives: docs/trials.md.
"""

import collections
import contextlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.codec import Entries, joined, kept_values, turned
from gemma_scope_jax.extraction.store.tables import (
    DELTA,
    DICTIONARY,
    SPLIT,
    FileSum,
    check_sum,
    encoded,
)
from gemma_scope_jax.storage.atomic import WholeFile
from gemma_scope_jax.storage.locks import remove_leftovers
from gemma_scope_jax.storage.paths import is_remote
from gemma_scope_jax.storage.strict_json import field, legible, parse_json

SEGMENT = 1 << 16  # tokens after which a segment ends, at the end of the batch
_MOST = 1 << 40
_SHIFT = 32  # of the shard's number in `row`


class FeatureList(NamedTuple):
    """What is stored of one layer of a coder."""

    coder: str
    layer: int
    width: int

    @property
    def folder(self) -> str:
        return f"features/coder={quote(self.coder, safe='')}/layer={self.layer}"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.json"


def first_row(shard: int) -> int:
    """What `row` is of a shard's first token."""
    return shard << _SHIFT


def segment_files(folder: Any, lists: Sequence[FeatureList], shard: int, segment: int) -> list[Any]:
    """Where the files of a segment are: its tokens, and every list of features."""
    name = f"{shard:06d}-{segment:04d}.parquet"
    return [folder / of / name for of in ("tokens", *(some.folder for some in lists))]


# -------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes one shard: `add` batch after batch, then `close`. Left by an error, nothing stays.

    lists   what entries are given to `add`, in this order
    values  "float16" or "float32"
    pool    threads that encode and compress; `ahead` segments wait for them at the most
    Lets `OSError` through.
    """

    def __init__(
        self,
        folder: Any,
        shard: int,
        lists: Sequence[FeatureList],
        values: str,
        pool: ThreadPoolExecutor,
        ahead: int = 1,
    ):
        self.folder, self.shard, self.lists, self.values = folder, shard, lists, values
        self._pool, self._ahead = pool, ahead
        self._row = first_row(shard)
        self._segments: list[dict] = []
        self._written: list[Any] = []
        self._held: list[tuple] = []
        self._waiting = 0
        self._coding: collections.deque = collections.deque()
        for path in segment_files(folder, lists, shard, 0):
            if not is_remote(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(path.parent)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind."""
        for job in (job for jobs in self._coding for job in jobs):
            job.cancel()
        self._coding.clear()
        for path in self._written:
            with contextlib.suppress(Exception):
                path.unlink(missing_ok=True)

    def add(self, tokens, counted, pieces, entries: Sequence[Entries]) -> None:
        """A batch.

        tokens int32 [n], counted bool [n], pieces int64 [p, 3] (document, offset in it, length with
        `<bos>`), and the entries of every list.
        """
        self._held.append((tokens, counted, pieces, entries))
        self._waiting += len(tokens)
        if self._waiting >= SEGMENT:
            self._flush()

    def close(self, **about: Any) -> None:
        """Write the rest and the shard's JSON, with `about` in it."""
        try:
            if self._held:
                self._flush()
            self._store(0)
            lists = {"shard": self.shard, "lists": len(self.lists)}
            about = {"version": 1, **lists, **about, "segments": self._segments}
            self._write(self.folder / shard_name(self.shard), _with_checksum(legible(about)))
        except BaseException:
            self.discard()
            raise

    def _write(self, path: Any, data: Any) -> None:
        with WholeFile(path) as file:
            file.write(data)
        self._written.append(path)

    def _flush(self) -> None:
        """Have what is held encoded as a segment, and write those that have been."""
        held, self._held, self._waiting = self._held, [], 0
        jobs: list[Any] = [self._pool.submit(_tokens, held, self._row)]
        for c, some in enumerate(self.lists):
            entries = [h[3][c] for h in held]
            jobs.append(self._pool.submit(_features, entries, some.width, self.values, self._row))
        self._row += sum(len(h[0]) for h in held)
        self._coding.append(jobs)
        self._store(self._ahead)

    def _store(self, left: int) -> None:
        """Write the oldest segments until `left` are being encoded."""
        while len(self._coding) > left:
            jobs = self._coding.popleft()
            about, sums = [], []
            paths = segment_files(self.folder, self.lists, self.shard, len(self._segments))
            for path, job in zip(paths, jobs, strict=True):
                said, data, total = job.result()
                self._write(path, data)
                about.append(said)
                sums.append(list(total))
            tokens, counted = about[0]
            self._segments.append(
                {"tokens": tokens, "counted": counted, "entries": about[1:], "files": sums}
            )


def _tokens(held: list[tuple], row: int) -> tuple[tuple[int, int], Any, FileSum]:
    """(tokens, how many count), and the file of a segment's tokens, of which `row` is the first."""
    tokens, counted, pieces = (np.concatenate([h[i] for h in held]) for i in range(3))
    documents, offsets, lengths = pieces.astype(np.int64).T
    positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = np.where(positions > 0, np.repeat(offsets, lengths) + positions - 1, -1)
    columns = {
        "row": (np.arange(row, row + len(tokens)), DELTA),
        "document": (np.repeat(documents, lengths), DICTIONARY),
        "position": (positions.astype(np.int32), DELTA),
        "offset": (at.astype(np.int32), DELTA),
        "token": (tokens.astype(np.int32), SPLIT),
        "counted": (counted, "PLAIN"),
    }
    return (len(tokens), int(counted.sum())), *encoded(columns, ("row", "document"))


def _features(parts: list[Entries], width: int, kind: str, row: int) -> tuple[int, Any, FileSum]:
    """How many activations a list has in a segment, whose first token is `row`, and their file."""
    entries = joined(parts)
    index = turned(entries._replace(values=kept_values(entries.values, kind)), width)
    features = np.repeat(np.arange(width, dtype=np.int32), np.diff(index.offsets))
    columns = {
        "feature": (features, DELTA),
        "row": (index.ids + np.int64(row), DELTA),
        "value": (index.values, SPLIT),
    }
    return len(features), *encoded(columns, ("feature", "row"))


def _with_checksum(about: dict[str, Any]) -> bytes:
    text = json.dumps(about, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(text.encode())},"shard":{text}}}\n'.encode()


# -------------------------------------------------------------------------------------------------
# Reading


class Shard:
    """What a shard's JSON says, checked: `footer`, and how many `bytes` it has with its files.

    Raises `InputError` for a file that is none, is not whole, or has a byte flipped.
    """

    def __init__(self, folder: Any, number: int):
        self.folder, self.number = folder, number
        self.path = path = folder / shard_name(number)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path}: is missing; extract again to make it anew") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            whole = parse_json(data, path)
            self.footer: dict[str, Any] = field(whole, "shard", dict, path)
            if data != _with_checksum(self.footer):
                raise InputError("its checksum")
            self._check()
        except (InputError, UnicodeEncodeError) as error:
            why = str(error).removeprefix(f"{path}: ")
            raise InputError(f"{path}: damaged ({why}); delete it and extract again") from error
        files = (size for s in self.footer["segments"] for size, _, _ in s["files"])
        self.bytes = len(data) + sum(files)

    def _check(self) -> None:
        """Raise `InputError` unless all that is read of the JSON has its type and size."""
        footer, path = self.footer, self.path
        whole = lambda value: type(value) is int and 0 <= value <= _MOST
        field(footer, "version", int, path, least=1, most=1)
        field(footer, "shard", int, path, least=self.number, most=self.number)
        field(footer, "store", str, path)
        lists = field(footer, "lists", int, path, least=1, most=_MOST)
        for document in field(footer, "documents", list, path):
            if not (isinstance(document, list) and len(document) == 3):
                raise InputError(f"a document is {str(document)[:60]}")
            number, where, tokens = document
            if not (whole(number) and isinstance(where, str) and whole(tokens)):
                raise InputError("documents are not [number, place, tokens]")
        for segment in field(footer, "segments", list, path):
            tokens = field(segment, "tokens", int, path, least=1, most=_MOST)
            field(segment, "counted", int, path, least=0, most=tokens)
            entries, files = (field(segment, key, list, path) for key in ("entries", "files"))
            sums = [s for s in files if isinstance(s, list) and len(s) == 3 and all(map(whole, s))]
            if not all(map(whole, entries)) or len(entries) != lists:
                raise InputError(f"entries are {str(entries)[:60]}")
            if len(sums) != len(files) or len(sums) != lists + 1:
                raise InputError(f"files are {str(files)[:60]}")

    def files(self, segment: int, lists: Sequence[FeatureList]) -> list[tuple[Any, FileSum]]:
        """A segment's files, of its tokens and of every list: where they are, and their sums."""
        sums = [FileSum(*some) for some in self.footer["segments"][segment]["files"]]
        paths = segment_files(self.folder, lists, self.number, segment)
        if len(sums) != len(paths):
            raise InputError(
                f"{self.path}: is of {len(sums) - 1} lists of features, not {len(lists)}"
            )
        return list(zip(paths, sums))

    def verify(self, lists: Sequence[FeatureList]) -> None:
        """Read everything. Raises `InputError` naming the first file that is damaged."""
        for segment in range(len(self.footer["segments"])):
            for path, there in self.files(segment, lists):
                check_sum(path, there)
