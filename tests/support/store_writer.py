"""A tiny store of activations, and a program that writes it, for the test that kills it.

For each line it is sent, the program writes the store in a process of its own, of which it prints
the id and then how it ended: importing JAX every time would take longer than all the rest.
"""

import os
import sys
import time

import numpy as np

from gemma_scope_jax.data.activations.store import write_activations
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model

SITES = {"resid_post": (0, 2), "mlp_out": (1,)}


def texts(count=60):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdef "), rng.integers(1, 90))) for _ in range(count)]


def make(length=32, **options):
    return TokenBatches(texts(), Letters(), 4, length, seed=3, **options)


def write(folder, tokens=5000, **options):
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    options = {"shard_rows": 37, **options}
    return write_activations(model, make(), SITES, folder, tokens, **options)


def slowly(batches, plain=TokenBatches.__next__):
    """So that who watches the store sees it grow, however busy the machine is."""
    time.sleep(0.03)
    return plain(batches)


if __name__ == "__main__":
    TokenBatches.__next__ = slowly
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            write(sys.argv[1], tokens=int(sys.argv[2]))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
