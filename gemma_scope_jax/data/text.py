"""Text in, packed token batches out: deterministic, shuffled by document, resumable by skipping.

A corpus is a set of UTF-8 text files whose documents are separated by a line holding one form feed.
Rows are filled document after document; every piece of a document starts with <bos>, and segment
ids keep the pieces apart, so no token sees another document.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import flax.struct
import numpy as np

from gemma_scope_jax.errors import InputError

SEPARATOR = "\n\f\n"


@flax.struct.dataclass
class TokenBatch:
    """Packed rows: tokens and segment ids, int32 [B, T]; segment 0 is padding."""

    tokens: np.ndarray
    segments: np.ndarray


def text_files(patterns: Sequence[str]) -> list[str]:
    """The files that the glob patterns name (`~` is expanded), sorted; `InputError` if none."""
    found = sorted(f for p in patterns for f in glob.glob(os.path.expanduser(p)))
    if not found:
        raise InputError(f"no text files match {' '.join(patterns)}")
    return found


def read_documents(patterns: Sequence[str]) -> list[str]:
    """All non-empty documents of the files, in file order. Raises `InputError` for bad files."""
    documents = []
    for path in text_files(patterns):
        try:
            with open(path, encoding="utf-8") as file:
                parts = file.read().split(SEPARATOR)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
        documents += [part for part in parts if part.strip()]
    if not documents:
        raise InputError(f"no text in {' '.join(patterns)}")
    return documents


def shuffled(documents: Sequence[str], seed: int) -> Iterator[str]:
    """The documents, again and again, in another order each time round."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(documents))
        yield from (documents[int(i)] for i in order)
        epoch += 1


def pack(
    documents: Iterable[str], encode: Callable[[str], np.ndarray], batch: int, length: int, bos: int
) -> Iterator[TokenBatch]:
    """Batches of `batch` rows of `length` tokens; the last one is padded with segment 0.

    `encode` maps a document to token ids without <bos>. A document that would get
    fewer than 8 tokens at the end of a row starts in the next: they would see next to nothing.
    """
    if batch < 1 or length < 2:
        raise InputError(f"rows must hold <bos> and a token: batch {batch}, length {length}")
    tokens = np.zeros((batch, length), np.int32)
    segments = np.zeros((batch, length), np.int32)
    row, column, piece = 0, 0, 1
    for document in documents:
        ids = encode(document)
        while len(ids):
            room = length - column - 1
            if column and room < min(8, len(ids)):
                row, column, piece = row + 1, 0, 1
                if row == batch:
                    yield TokenBatch(tokens.copy(), segments.copy())
                    tokens[:], segments[:], row = 0, 0, 0
                continue
            part, ids = ids[:room], ids[room:]
            stop = column + 1 + len(part)
            tokens[row, column], tokens[row, column + 1 : stop] = bos, part
            segments[row, column:stop] = piece
            column, piece = stop, piece + 1
    if segments.any():
        yield TokenBatch(tokens, segments)
