"""A shard of sparse features as a file: compressed blocks, each with its checksum, and a footer
that knows them, so that a reader fetches what it needs and a flipped byte is found and named.

    magic | blocks ... | footer, zlib JSON | its bytes, its crc32, uint32 each | magic

Tokens come in segments, which never cut a piece of a document. Of every coder's layer a segment
holds its features by token, and the same again by feature, in blocks of neighbouring features:

    tokens int32 [n], piece_lengths, piece_documents, piece_offsets int32 [pieces], counted bool [n]
    {c}.count    how many features a token has [n]
    {c}.feature  their ids, of each token ascending, as differences [e], in `token_parts`
    {c}.value    their activations [e], float16 times 2 ** `exponent`, or float32, likewise
    {c}.fired    how many tokens a feature has [F]
    {c}.rows, {c}.values   by feature: tokens (differences) and activations [e], in `parts`

A block is its array's bytes, all first bytes before all second ones, each of these planes through
zlib if that makes it smaller (looking for runs alone: what repeats in these planes is bytes, not
strings of them, and zlib then takes half the time for 6 % fewer bytes). The file appears under its
name when it is whole, and not before.
"""

import collections
import functools
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.codec import (
    Entries,
    by_feature,
    differences,
    expand,
    inflate,
    joined,
    parts_of,
    size_of,
    squeeze,
    store_values,
)
from gemma_scope_jax.storage.atomic import WholeFile
from gemma_scope_jax.storage.strict_json import field, parse_json

MAGIC = b"GSJFEAT1"
SEGMENT = 1 << 16  # tokens after which a segment ends, at the end of the batch
_FOOTER = 1 << 28  # bytes that a footer has at the most
_MOST = 1 << 40
_DTYPES = ("<i4", "|u1", "<u2", "<u4", "<f2", "<f4")
_TAIL = 16  # bytes of the footer's size and checksum, and the magic


# -------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes one shard: `add` batch after batch, then `close`. Left by an error, nothing stays.

    widths  features of every coder's layer, in the order of the entries given to `add`
    values  "float16" or "float32"
    pool    threads that code and compress; `ahead` segments wait for them at the most
    Lets `OSError` through.
    """

    def __init__(
        self,
        path: Any,
        widths: Sequence[int],
        values: str,
        pool: ThreadPoolExecutor,
        ahead: int = 1,
    ):
        self.path, self.widths, self.values = path, widths, values
        self._pool, self._ahead = pool, ahead
        self._whole = WholeFile(path)
        self._at = 0
        self._segments: list[dict] = []
        self._held: list[tuple] = []
        self._waiting = 0
        self._coding: collections.deque = collections.deque()
        try:
            self._write(MAGIC)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Leave nothing behind."""
        for job in (job for _, jobs in self._coding for job in jobs):
            job.cancel()
        self._coding.clear()
        self._whole.discard()

    def add(self, tokens, counted, pieces, entries: Sequence[Entries]) -> None:
        """A batch.

        tokens int32 [n], counted bool [n], pieces int32 [p, 3] (document in the shard,
        offset in it, length with `<bos>`), and the entries of every coder's layer.
        """
        self._held.append((tokens, counted, pieces, entries))
        self._waiting += len(tokens)
        if self._waiting >= SEGMENT:
            self._flush()

    def close(self, **about: Any) -> dict[str, Any]:
        """Write the rest and the footer, with `about` in it; returns the footer."""
        try:
            return self._close(about)
        except BaseException:
            self.discard()
            raise

    def _close(self, about: dict[str, Any]) -> dict[str, Any]:
        if self._held:
            self._flush()
        self._store(0)
        lists = {"lists": len(self.widths)}
        footer = {"version": 1, **about, **lists, "segments": self._segments}
        data = zlib.compress(json.dumps(footer, separators=(",", ":")).encode(), 6)
        self._write(data)
        self._write(len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little"))
        self._write(MAGIC)
        self._whole.commit()
        return footer

    def _write(self, data: Any) -> None:
        self._whole.file.write(data)
        self._at += len(data)

    def _flush(self) -> None:
        """Have what is held coded as a segment, and write those that have been."""
        held, self._held, self._waiting = self._held, [], 0
        jobs = [self._pool.submit(_tokens_coded, held)]
        for c, width in enumerate(self.widths):
            jobs.append(self._pool.submit(_coded, held, c, width, self.values))
        self._coding.append((held, jobs))
        self._store(self._ahead)

    def _store(self, left: int) -> None:
        """Write the oldest segments until `left` are being coded."""
        while len(self._coding) > left:
            held, jobs = self._coding.popleft()
            blocks, about = {}, []
            for job in jobs:
                said, some = job.result()
                about.append(said)
                for name, dtype, parts, crc in some:
                    blocks[name] = [self._at, size_of(parts), crc, dtype]
                    for part in parts:
                        self._write(part)
            self._segments.append({**about[0], "blocks": blocks, "coders": about[1:]})


CodedBlock = tuple[str, str, list[Any], int]  # name, dtype, buffers, their crc32


def _tokens_coded(held: list[tuple]) -> tuple[dict, list[CodedBlock]]:
    """What the footer says of a segment, and the blocks of its tokens."""
    tokens, counted, pieces = (np.concatenate([h[i] for h in held]) for i in range(3))
    arrays = {
        "tokens": tokens.astype(np.int32),
        "piece_documents": pieces[:, 0].astype(np.int32),
        "piece_offsets": pieces[:, 1].astype(np.int32),
        "piece_lengths": pieces[:, 2].astype(np.int32),
        "counted": np.packbits(counted),
    }
    return {"tokens": len(tokens), "counted": int(counted.sum())}, _blocks("", arrays)


def _coded(held: list[tuple], c: int, width: int, kind: str) -> tuple[dict, list[CodedBlock]]:
    """What the footer says of a coder's layer in a segment, and its blocks."""
    entries = joined([h[3][c] for h in held])
    values, exponent = store_values(entries.values, kind)
    index = by_feature(entries._replace(values=values), width)
    counts = np.diff(entries.offsets)
    small = np.uint16 if counts.size == 0 or counts.max() < 1 << 16 else np.uint32
    token_parts, parts = parts_of(entries.offsets), parts_of(index.offsets)
    arrays = {"count": counts.astype(small), "fired": np.diff(index.offsets).astype(np.uint32)}
    arrays |= _in_parts(entries._replace(values=values), token_parts, "feature", "value")
    arrays |= _in_parts(index, parts, "rows", "values")
    about = {
        "entries": len(values),
        "exponent": exponent,
        "token_parts": token_parts,
        "parts": parts,
    }
    return about, _blocks(f"{c}.", arrays)


def _in_parts(entries: Entries, ends: list[int], ids: str, values: str) -> dict[str, np.ndarray]:
    """The ids of `entries` as differences, and their values, cut at `ends`."""
    arrays = {}
    for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends)):
        some = entries.offsets[start : stop + 1]
        arrays[f"{ids}.{number}"] = differences(entries.ids[some[0] : some[-1]], some - some[0])
        arrays[f"{values}.{number}"] = entries.values[some[0] : some[-1]]
    return arrays


def _blocks(prefix: str, arrays: dict[str, np.ndarray]) -> list[CodedBlock]:
    squeezed = ((name, array.dtype.str, squeeze(array)) for name, array in arrays.items())
    crc = lambda parts: functools.reduce(lambda before, part: zlib.crc32(part, before), parts, 0)
    return [(prefix + name, dtype, parts, crc(parts)) for name, dtype, parts in squeezed]


# -------------------------------------------------------------------------------------------------
# Names


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.features"


# -------------------------------------------------------------------------------------------------
# Reading


class Shard:
    """A shard's file, opened: its footer, and its blocks as arrays.

    Raises `InputError` for a file that is no shard, is not whole, or has a byte flipped.
    """

    def __init__(self, path: Any):
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, os.SEEK_END)
                self.footer = self._read_footer(file)
        except FileNotFoundError:
            raise InputError(f"{path}: is missing; extract again to make it anew") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error

    def _read_footer(self, file: BinaryIO) -> dict[str, Any]:
        if self.size < len(MAGIC) + _TAIL:
            raise self._damaged("it is too short")
        file.seek(self.size - _TAIL)
        tail = file.read(_TAIL)
        length, crc = (int.from_bytes(tail[i : i + 4], "little") for i in (0, 4))
        if tail[8:] != MAGIC or length > self.size - len(MAGIC) - _TAIL:
            raise self._damaged("its end is not that of a shard of features")
        file.seek(self.size - _TAIL - length)
        data = file.read(length)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            raise self._damaged("it does not begin as a shard of features")
        if zlib.crc32(data) != crc:
            raise self._damaged("its footer")
        try:
            footer = parse_json(inflate(data, _FOOTER), self.path, mend_text=True)
            version = field(footer, "version", int, self.path)
            if version == 1:
                self._check_footer(footer)
        except (zlib.error, ValueError) as error:
            why = str(error).removeprefix(f"{self.path}: ")
            raise self._damaged(f"its footer: {why}") from error
        if version != 1:
            raise InputError(f"{self.path}: version {version} is not known, 1 is")
        return footer

    def _check_footer(self, footer: dict[str, Any]) -> None:
        """Raise `InputError` unless what is read of a footer has its type and size."""
        path = self.path
        whole = lambda value, most=_MOST: type(value) is int and 0 <= value <= most
        lists = field(footer, "lists", int, path, least=1, most=_MOST)
        field(footer, "shard", int, path, least=0, most=_MOST)
        documents = field(footer, "documents", list, path)
        if not all(
            isinstance(d, list)
            and len(d) == 3
            and whole(d[0])
            and isinstance(d[1], str)
            and whole(d[2])
            for d in documents
        ):
            raise InputError("documents are not [number, place, tokens]")
        for segment in field(footer, "segments", list, path):
            tokens = field(segment, "tokens", int, path, least=1, most=_MOST)
            field(segment, "counted", int, path, least=0, most=tokens)
            for block in field(segment, "blocks", dict, path).values():
                if not isinstance(block, list) or len(block) != 4:
                    raise InputError(f"a block is {str(block)[:60]}")
                at, length, crc, dtype = block
                if not (whole(at) and whole(length, self.size - at) and whole(crc)):
                    raise InputError("a block lies outside of the file")
                if dtype not in _DTYPES:
                    raise InputError(f"a block's dtype is {dtype!r}")
            coders = field(segment, "coders", list, path, least=lists, most=lists)
            for coder in coders:
                field(coder, "entries", int, path, least=0, most=_MOST)
                field(coder, "exponent", int, path, least=-1000, most=1000)
                for key in ("token_parts", "parts"):
                    ends = field(coder, key, list, path, least=1)
                    if not all(map(whole, ends)) or ends != sorted(set(ends)):
                        raise InputError(f"{key} {ends} do not ascend")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged ({what}); delete it and extract again")

    def blocks(self, segment: int, names: Sequence[str]) -> list[np.ndarray]:
        """Some arrays of a segment, by their names."""
        entries, found = self.footer["segments"][segment]["blocks"], []
        if missing := [name for name in names if name not in entries]:
            raise self._damaged(f"segment {segment} has no block {missing[0]}")
        everything = self._bytes([entries[name] for name in names])
        for name, data in zip(names, everything, strict=True):
            at, _, crc, dtype = entries[name]
            if zlib.crc32(data) != crc:
                raise self._damaged(f"block {name} of segment {segment}, byte {at} on")
            try:
                found.append(expand(data, dtype))
            except (zlib.error, ValueError) as error:
                what = f"block {name} of segment {segment} cannot be expanded: {error}"
                raise self._damaged(what) from error
        return found

    def _bytes(self, places: Sequence[Sequence[Any]]) -> list[bytes]:
        """What stands at `places`: (byte, length, ...) each."""
        found = []
        try:
            with self.path.open("rb") as file:
                for at, length, *_ in places:
                    file.seek(at)
                    found.append(file.read(length))
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        return found

    def verify(self) -> None:
        """Read everything. Raises `InputError` naming the first block that is damaged."""
        end = len(MAGIC)
        for number, segment in enumerate(self.footer["segments"]):
            for name, (at, length, _, _) in segment["blocks"].items():
                if at != end:
                    raise self._damaged(f"bytes {end} to {at}, which no block owns")
                self.blocks(number, [name])
                end = at + length

    def fired(self, coder: int, width: int) -> np.ndarray:
        """int64 [F]: on how many tokens of the shard each feature is active."""
        total = np.zeros(width, np.int64)
        for segment in range(len(self.footer["segments"])):
            fired = self.blocks(segment, [f"{coder}.fired"])[0]
            if fired.shape != (width,):
                raise self._damaged(f"segment {segment} is of {len(fired)} features, not {width}")
            total += fired
        return total
