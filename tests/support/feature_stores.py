"""A feature store of coders of every kind over random letters, and how it is read by hand."""

from pathlib import Path

import numpy as np

from coders import random_coder

SETTINGS = dict(batch_size=2, context_size=32, slots=24, shard_tokens=300, values="float32")


CODERS = {
    "a": random_coder(threshold=1.0),
    "b": random_coder(seed=1, threshold=1.0),  # the same place again
    "c": random_coder(seed=2, layer=2, threshold=1.0),
    "t": random_coder(40, seed=3, layer=0, threshold=1.0, reads="mlp_in", writes="mlp_out"),
    "x": random_coder(16, seed=4, layers=(0, 2, 3), threshold=0.8),
}


LISTS = [("a", 1), ("b", 1), ("c", 2), ("t", 0), ("x", 0), ("x", 2), ("x", 3)]


def dense(store, name, layer):
    """float32 [tokens, F] of a store."""
    whole = np.zeros((len(store), store.width(name)), np.float32)
    for segment in store.segments():
        offsets, ids, values = segment.by_token(name, layer)
        for t in range(len(segment)):
            some = slice(offsets[t], offsets[t + 1])
            assert (np.diff(ids[some]) > 0).all()
            whole[segment.start + t, ids[some]] = values[some]
    return whole


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def other(**changes):
    return SETTINGS | changes
