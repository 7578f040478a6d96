"""A shard of sparse features: Parquet files, and a JSON file that is written last and lists them.

    shard-000012.json                                       documents, segments, files, checksums
    tokens/000012-0000.parquet                              a row for each token of segment 0
    features/coder=NAME/layer=9/000012-0000.parquet         a row for each activation

Tokens come in segments, which never cut a piece of a document. Columns:

    tokens    row int64, document int64, position int32 (in its piece, `<bos>` is 0), offset int32
              (in the document's tokens, -1 for `<bos>`), token int32, counted bool
    features  feature int32, row int64, value float32; sorted by feature, then by row

`row` identifies a token of the store: shard * 2 ** 32 + its place in the shard. Activations are
stored once, by feature: sorted like this, ids and rows take one and a half bytes together.
Transposing a segment to read it by token is as fast as reading a second copy would be. Programs
that support Hive partitions (DuckDB, polars, pandas) get coder and layer from the path.

A shard exists once its JSON does. Measured alternatives: docs/trials.md.
"""

import collections
import contextlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store import tables
from gemma_scope_jax.extraction.store.codec import Entries, joined, kept_values, turned
from gemma_scope_jax.extraction.store.tables import DELTA, DICTIONARY, SPLIT, AnyPath, FileSum
from gemma_scope_jax.storage.atomic import WholeFile
from gemma_scope_jax.storage.locks import remove_leftovers
from gemma_scope_jax.storage.paths import is_remote
from gemma_scope_jax.storage.strict_json import field, legible, parse_json

SEGMENT = 1 << 16  # tokens after which a segment ends, at the end of the batch
_MOST = 1 << 40


class FeatureList(NamedTuple):
    """The stored features of one layer of a coder."""

    coder: str
    layer: int
    width: int

    @property
    def folder(self) -> str:
        return f"features/coder={quote(self.coder, safe='')}/layer={self.layer}"


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.json"


def first_row(shard: int) -> int:
    """The `row` of a shard's first token."""
    return shard << 32


def segment_files(
    folder: AnyPath, lists: Sequence[FeatureList], shard: int, segment: int
) -> list[AnyPath]:
    """The paths of a segment's files: its tokens, and each list of features."""
    name = f"{shard:06d}-{segment:04d}.parquet"
    return [folder / part / name for part in ("tokens", *(some.folder for some in lists))]


# --- Writing -------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard: `add` batch after batch, then `close`. After an error nothing remains.

    lists   the lists of entries that `add` gets, in this order
    values  "float16" or "float32"
    pool    threads that encode and compress, at most `ahead` segments behind
    Lets `OSError` through.
    """

    def __init__(
        self,
        folder: AnyPath,
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
        self._written: list[AnyPath] = []
        self._held: list[tuple] = []
        self._waiting = 0
        self._coding: collections.deque = collections.deque()
        for path in segment_files(folder, lists, shard, 0):
            if not is_remote(folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(Path(path.parent))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, *_) -> None:
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Delete what has been written."""
        for job in (job for jobs in self._coding for job in jobs):
            job.cancel()
        self._coding.clear()
        for path in self._written:
            with contextlib.suppress(Exception):
                path.unlink(missing_ok=True)

    def add(
        self,
        tokens: np.ndarray,
        counted: np.ndarray,
        pieces: np.ndarray,
        entries: Sequence[Entries],
    ) -> None:
        """Add a batch: tokens int32 [n], counted bool [n], pieces int64 [p, 3] (document, offset in
        it, length with `<bos>`), and the entries of every list.
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

    def _write(self, path: AnyPath, data: bytes | memoryview) -> None:
        with WholeFile(path) as file:
            file.write(data)
        self._written.append(path)

    def _flush(self) -> None:
        """Have the held batches encoded as a segment, and write those that are ready."""
        held, self._held, self._waiting = self._held, [], 0
        jobs: list[Future] = [self._pool.submit(_tokens, held, self._row)]
        for c, some in enumerate(self.lists):
            entries = [h[3][c] for h in held]
            jobs.append(self._pool.submit(_features, entries, some.width, self.values, self._row))
        self._row += sum(len(h[0]) for h in held)
        self._coding.append(jobs)
        self._store(self._ahead)

    def _store(self, left: int) -> None:
        """Write the oldest segments until `left` are still being encoded."""
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
            counts = {"tokens": tokens, "counted": counted, "entries": about[1:]}
            self._segments.append({**counts, "files": sums})


def _tokens(held: list[tuple], row: int) -> tuple[tuple[int, int], Any, FileSum]:
    """(tokens, those counted), and the file of a segment's tokens, the first of which is `row`."""
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
    return (len(tokens), int(counted.sum())), *tables.encoded(columns, ("row", "document"))


def _features(parts: list[Entries], width: int, kind: str, row: int) -> tuple[int, Any, FileSum]:
    """The number of activations of a list in the segment that begins at `row`, and their file."""
    entries = joined(parts)
    index = turned(entries._replace(values=kept_values(entries.values, kind)), width)
    features = np.repeat(np.arange(width, dtype=np.int32), np.diff(index.offsets))
    columns = {
        "feature": (features, DELTA),
        "row": (index.ids + np.int64(row), DELTA),
        "value": (index.values, SPLIT),
    }
    return len(features), *tables.encoded(columns, ("feature", "row"))


def _with_checksum(about: dict[str, Any]) -> bytes:
    text = json.dumps(about, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(text.encode())},"shard":{text}}}\n'.encode()


# --- Reading -------------------------------------------------------------------------------------


class Shard:
    """A shard's JSON, checked: `footer`, and the total `bytes` of it and its files.

    Raises `InputError` for a missing, foreign, incomplete or damaged file.
    """

    def __init__(self, folder: AnyPath, number: int):
        self.folder, self.number = folder, number
        self.path = path = folder / shard_name(number)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path}: is missing; extract again to replace it") from None
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
        """Raise `InputError` unless every field that is used has a valid type and size."""
        footer, path = self.footer, self.path
        whole = lambda value: type(value) is int and 0 <= value <= _MOST
        field(footer, "version", int, path, least=1, most=1)
        field(footer, "shard", int, path, least=self.number, most=self.number)
        field(footer, "store", str, path)
        lists = field(footer, "lists", int, path, least=1, most=_MOST)
        for document in field(footer, "documents", list, path):
            match document:
                case [number, str(), tokens] if whole(number) and whole(tokens):
                    continue
            raise InputError(f"a document is {str(document)[:60]}, not [number, place, tokens]")
        for segment in field(footer, "segments", list, path):
            tokens = field(segment, "tokens", int, path, least=1, most=_MOST)
            field(segment, "counted", int, path, least=0, most=tokens)
            entries, files = (field(segment, key, list, path) for key in ("entries", "files"))
            sums = [s for s in files if isinstance(s, list) and len(s) == 3 and all(map(whole, s))]
            if not all(map(whole, entries)) or len(entries) != lists:
                raise InputError(f"entries are {str(entries)[:60]}")
            if len(sums) != len(files) or len(sums) != lists + 1:
                raise InputError(f"files are {str(files)[:60]}")

    def files(self, segment: int, lists: Sequence[FeatureList]) -> list[tuple[AnyPath, FileSum]]:
        """The paths and sums of a segment's files: of its tokens, and of each list."""
        sums = [FileSum(*some) for some in self.footer["segments"][segment]["files"]]
        paths = segment_files(self.folder, lists, self.number, segment)
        if len(sums) != len(paths):
            raise InputError(f"{self.path}: has {len(sums) - 1} feature lists, not {len(lists)}")
        return list(zip(paths, sums))

    def verify(self, lists: Sequence[FeatureList]) -> None:
        """Read everything. Raises `InputError` naming the first damaged file."""
        for segment in range(len(self.footer["segments"])):
            for path, there in self.files(segment, lists):
                tables.check_sum(path, there)
