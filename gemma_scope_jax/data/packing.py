"""Documents packed into rows of one length, piece by piece, each with its own <bos> and segment id.

The segment ids keep the pieces apart, so no token sees another document.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch, TokenLabels

_MIN_ROOM = 8  # tokens; a piece cut to fewer would have next to no context


@dataclasses.dataclass(frozen=True)
class Piece:
    """The tokens of a document without <bos>, and where to start in them.

    ids     int32 [n]
    mask    bool [n]: the tokens to use
    labels  {kind: int [n]}: the group of each token
    """

    epoch: int
    document: int
    ids: np.ndarray
    mask: np.ndarray
    offset: int = 0
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def fill_rows(
    pieces: Iterable[Piece],
    batch_size: int,
    context_size: int,
    bos: int,
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> Iterator[tuple[TokenBatch, Piece | None]]:
    """Batches [batch_size, context_size], each with the piece at whose offset the next one begins.

    A piece that would get fewer than 8 tokens at the end of a row starts in the next. The last
    batch may be padded; its piece is None. The mask is False on <bos> and padding.
    `names`: those of the groups, for each kind of label of the pieces; <bos> has no group.
    """
    if batch_size < 1 or context_size < 2:
        size = f"batch_size {batch_size}, context_size {context_size}"
        raise InputError(f"{size}: a sequence must hold <bos> and a token")
    names, shape = names or {}, (batch_size, context_size)

    def empty() -> TokenBatch:
        labels = {k: TokenLabels(np.full(shape, -1, np.int32), names[k]) for k in names}
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        return TokenBatch(tokens, segments, np.zeros(shape, bool), labels)

    batch, row, column, number = empty(), 0, 0, 1
    for piece in pieces:
        at, size = piece.offset, len(piece.ids)
        while at < size:
            room = context_size - column - 1
            if column and room < min(_MIN_ROOM, size - at):
                row, column, number = row + 1, 0, 1
                if row == batch_size:
                    yield batch, dataclasses.replace(piece, offset=at)
                    batch, row = empty(), 0
                continue
            part = slice(at, min(size, at + room))
            stop = column + 1 + part.stop - part.start
            text = slice(column + 1, stop)
            batch.tokens[row, column], batch.tokens[row, text] = bos, piece.ids[part]
            batch.segments[row, column:stop] = number
            batch.mask[row, text] = piece.mask[part]
            for kind, labels in batch.labels.items():
                labels.numbers[row, text] = piece.labels[kind][part]
            at, column, number = part.stop, stop, number + 1
    if batch.segments.any():
        yield batch, None
