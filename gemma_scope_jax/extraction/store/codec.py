"""Active features as arrays, by token or by feature, and arrays as compressed bytes."""

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_scope_jax.errors import InputError

PART = 1 << 18  # entries after which a block ends, at the end of a token or a feature
VALUES = ("float16", "float32")
_LONGEST = 1 << 27  # bytes of a plane: a block has `PART` entries, or one list
_TRIED = 4096  # bytes that tell whether more are worth compressing


class Entries(NamedTuple):
    """Active features of n tokens: those of token i are offsets[i] to offsets[i + 1] of the rest.

    Or, by feature, the tokens of feature i: then `ids` are rows.
    """

    offsets: np.ndarray  # int64 [n + 1]
    ids: np.ndarray  # int32 [e]
    values: np.ndarray  # float32 [e]


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where lists of so many things each [n] begin, and where the last ends: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def joined(parts: Sequence[Entries]) -> Entries:
    """The entries of several runs of tokens as one."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    ids = np.concatenate([part.ids for part in parts])
    values = np.concatenate([part.values for part in parts])
    return Entries(offsets_of(counts), ids, values)


def by_feature(entries: Entries, width: int) -> Entries:
    """The same entries by feature: offsets [F + 1], and of each feature its tokens, ascending."""
    import scipy.sparse

    values = entries.values
    bits = values.view(f"u{values.itemsize}")  # SciPy knows no float16
    shape = (len(entries.offsets) - 1, width)
    found = scipy.sparse.csr_array((bits, entries.ids, entries.offsets), shape).tocsc()
    rows, offsets = found.indices.astype(np.int32, copy=False), found.indptr.astype(np.int64)
    return Entries(offsets, rows, found.data.view(values.dtype))


def parts_of(offsets: np.ndarray) -> list[int]:
    """Where lists [n + 1] are cut, each part of about `PART` entries; the last end is n."""
    count, total = len(offsets) - 1, int(offsets[-1])
    ends = np.searchsorted(offsets, np.arange(PART, total, PART), side="left")
    return np.unique(np.concatenate([ends, [count]])).tolist()


# -------------------------------------------------------------------------------------------------
# Arrays as bytes


def squeeze(array: np.ndarray) -> list[Any]:
    """The bytes of an array, those of like significance side by side, compressed: buffers to be
    written one after the other (to join megabytes holds up every other thread).

    Each plane of bytes is zlib's output, or itself where that is no smaller; a uint32 before it is
    twice its size, and one more if it is itself.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    planes = np.ascontiguousarray(flat.view(np.uint8).reshape(-1, flat.dtype.itemsize).T)
    return [part for plane in planes for part in _plane(plane)]


def _plane(plane: np.ndarray) -> list[Any]:
    noise = len(plane) > 4 * _TRIED and size_of(_deflate(plane[:_TRIED])) > 0.97 * _TRIED
    parts = [plane.data] if noise else _deflate(plane)
    if not noise and size_of(parts) >= len(plane):
        parts, noise = [plane.data], True
    return [(2 * size_of(parts) + noise).to_bytes(4, "little"), *parts]


def _deflate(plane: np.ndarray) -> list[Any]:
    coder = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return [coder.compress(plane.data), coder.flush()]


def size_of(parts: Sequence[Any]) -> int:
    return sum(map(len, parts))


def expand(data: bytes, dtype: str) -> np.ndarray:
    """The array [size] that `squeeze` was given."""
    kind, at, planes = np.dtype(dtype), 0, []
    for _ in range(kind.itemsize):
        size, plain = divmod(int.from_bytes(data[at : at + 4], "little"), 2)
        part = data[at + 4 : at + 4 + size]
        planes.append(np.frombuffer(part if plain else inflate(part, _LONGEST), np.uint8))
        at += 4 + size
    return np.ascontiguousarray(np.stack(planes).T).reshape(-1).view(kind)


def inflate(data: bytes, most: int) -> bytes:
    """What zlib compressed, if no more than `most` bytes. Raises `ValueError` or `zlib.error`."""
    expander = zlib.decompressobj()
    found = expander.decompress(data, most)
    if expander.unconsumed_tail:
        raise ValueError(f"it is more than {most:,} bytes")
    if not expander.eof:
        raise ValueError("it is cut short")
    return found


def differences(ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Ascending ids of each token as differences; a token's first id as it is. uint16 or uint32."""
    steps = np.diff(ids, prepend=ids.dtype.type(0))
    starts = offsets[:-1][offsets[:-1] < offsets[1:]]
    steps[starts] = ids[starts]
    return steps.astype(np.uint16 if steps.size == 0 or steps.max() < 1 << 16 else np.uint32)


def undo_differences(steps: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int32 ids from `differences`."""
    sums = offsets_of(steps)
    before = np.repeat(sums[offsets[:-1]], np.diff(offsets))
    return (sums[1:] - before).astype(np.int32)


def store_values(values: np.ndarray, kind: str) -> tuple[np.ndarray, int]:
    """Positive float32 values as they are stored, and the exponent of two to scale them by."""
    if kind == "float32":
        return values, 0
    largest = float(values.max()) if values.size else 0.0
    if not math.isfinite(largest):
        raise InputError("a feature's activation is not finite: a damaged coder, or a wrong one")
    exponent = math.frexp(largest)[1] - 15 if values.size else 0
    halves = np.ldexp(values, -exponent).astype(np.float16)
    return np.maximum(halves, np.float16(6e-8)), exponent  # what is active stays above zero


def expand_values(stored: np.ndarray, exponent: int) -> np.ndarray:
    """float32 values from `store_values`."""
    return stored if stored.dtype == np.float32 else np.ldexp(stored.astype(np.float32), exponent)
