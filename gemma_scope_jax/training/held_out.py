"""The share of a text or store that is held out of training, to measure saved coders on.

In text, a hash of the tokens decides for each block of `BLOCK` tokens of a document: always the
same choice, in every epoch, after an interruption, in streams, and for copies of a text. In a store
it is the last rows, from other documents than nearly all rows before them.
"""

import hashlib
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.model.batch import TokenBatch

BLOCK = 64  # tokens
KEPT = 8192  # the latest activations, at most, are measured on
SIDES = ("trained", "held out")


def held_out(ids: np.ndarray, share: float) -> np.ndarray:
    """Which tokens of a document, ids int [n] without <bos>, are held out: bool [n]."""
    found = np.zeros(len(ids), bool)
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK].astype("<i4")
        digest = hashlib.blake2b(block.tobytes(), digest_size=8).digest()
        found[start : start + BLOCK] = int.from_bytes(digest, "little") < share * 2**64
    return found


class SplitBatches(TokenBatches):
    """`TokenBatches` with `labels["split"]`: tokens to train on and those held out."""

    names = {"split": SIDES}

    def __init__(self, *args: Any, share: float, **options: Any):
        self._share = share
        super().__init__(*args, **options)

    def _encode(self, record: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        ids, mask, _ = super()._encode(record)
        return ids, mask, {"split": held_out(ids, self._share).astype(np.int32)}


def is_held_out(batch: TokenBatch) -> jax.Array:
    """bool [B, T]: the tokens of a batch that are held out; none without the label."""
    split = batch.labels.get("split")
    return split.where("held out") if split else batch.segments < 0


def held_rows(rows: int, share: float) -> int:
    """How many rows are held out, at the end of a store of this many rows."""
    return min(KEPT, int(np.ceil(share * rows)), rows - 1)
