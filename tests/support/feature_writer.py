"""A tiny store of features, and a program that writes it, for the test that kills it.

For each line "FOLDER INDEX COUNT" it is sent, the program extracts that share in a process of its
own, with shards as long as fit the job, of which it prints the id and then how it ended: importing
JAX every time would take longer than all the rest.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.extraction.extract import extract
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model


def texts(count=900):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdef "), rng.integers(1, 90))) for _ in range(count)]


def write(folder, share=(0, 1), count=900, shard_tokens=500):
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    k = jax.random.split(jax.random.key(0), 2)
    coder = SparseCoder(
        jax.random.normal(k[0], (32, 48)),
        jnp.zeros(48),
        jnp.full(48, 3.0),
        jax.random.normal(k[1], (48, 32)),
        jnp.zeros(32),
        layer=2,
    )
    return extract(
        model,
        {"sae": coder},
        Letters(),
        texts(count),
        folder,
        batch_size=4,
        context_size=32,
        slots=32,
        shard_tokens=shard_tokens,
        share=share,
    )


if __name__ == "__main__":
    for line in sys.stdin:
        folder, index, count = line.split()
        child = os.fork()
        if not child:
            write(folder, (int(index), int(count)), shard_tokens=None)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
