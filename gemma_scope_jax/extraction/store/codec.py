"""Active features as arrays, by token or by feature, and the rounding of stored values."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_scope_jax.errors import InputError

VALUES = ("float16", "float32")
_SMALLEST, _LARGEST, _INFINITE = 0x2000, 0x7F7FE000, 0x7F800000  # float32, as bits


class Entries(NamedTuple):
    """Active features of n tokens: those of token i are ids[offsets[i] : offsets[i + 1]].

    Or, by feature, the tokens of feature i: then `ids` are rows.
    """

    offsets: np.ndarray  # int64 [n + 1]
    ids: np.ndarray  # int32 [e]
    values: np.ndarray  # float32 [e]


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where consecutive lists of these lengths [n] begin, and the last ends: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def joined(parts: Sequence[Entries]) -> Entries:
    """The entries of several runs of tokens as one."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    ids = np.concatenate([part.ids for part in parts])
    values = np.concatenate([part.values for part in parts])
    return Entries(offsets_of(counts), ids, values)


def turned(entries: Entries, lists: int) -> Entries:
    """Entries by token as entries by feature, or the reverse; `lists` is the number of lists in the
    result, in each of which ids ascend."""
    import scipy.sparse

    shape = (len(entries.offsets) - 1, lists)
    found = scipy.sparse.csr_array((entries.values, entries.ids, entries.offsets), shape).tocsc()
    ids, offsets = found.indices.astype(np.int32, copy=False), found.indptr.astype(np.int64)
    return Entries(offsets, ids, found.data)


def kept_values(values: np.ndarray, kind: str) -> np.ndarray:
    """Positive float32 values as stored: unchanged, or for "float16" rounded to its 11 significant
    bits, but never to zero. Raises `InputError` for values that are not finite.
    """
    bits = values.view(np.uint32)
    if bits.size and bits.max() >= _INFINITE:
        raise InputError("a feature's activation is not finite: the coder is damaged or wrong")
    if kind == "float32":
        return values
    nearest = bits + (0x0FFF + (bits >> 13 & 1)) & 0xFFFFE000  # ties to even
    return np.clip(nearest, _SMALLEST, _LARGEST).astype(np.uint32).view(np.float32)
