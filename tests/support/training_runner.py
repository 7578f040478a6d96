"""A tiny training run, and a program that makes it, for the tests that kill and resume it.

For each line it is sent, the program continues the run in a process of its own, of which it prints
the id and then how it ended: importing JAX every time would take longer than all the rest.
"""

import contextlib
import json
import os
import signal
import sys

import jax
import numpy as np
import pytest

import strict_jax  # noqa: F401
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.training import feeds, train
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig, TrainConfig
from letters import Letters
from tiny import tiny_model

PASSES = 18


def config(**options):
    """One coder in the sparse step; a checkpoint after every pass, if not told otherwise."""
    loss = LossConfig(l0_warmup=20, per_token=False, bandwidth=0.1, dead_after=3, dead_below=0.5)
    coder = CoderConfig(2, width=96, target_l0=8, threshold=None, loss=loss)
    common = dict(
        coders=(coder,),
        tokens=128 * PASSES,
        batch_size=4,
        context_size=32,
        buffer=512,
        train_batch_size=128,
        updates=3,
        optimizer=OptimizerConfig(3e-3, 10),
        checkpoint_every=0.0,
        model="tiny",
        sparse=2.0,
    )
    return TrainConfig(**common | options)


def documents():
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdef "), rng.integers(9, 90))) for _ in range(60)]


def run(folder, data=None, profile=None, **options):
    """The run in `folder`, from its beginning or from where it was left: the coder."""
    real, feeds.load_tokenizer = feeds.load_tokenizer, lambda source: Letters()
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    try:
        found = train.train(config(**options), folder, model, data or documents(), profile)
    finally:
        feeds.load_tokenizer = real
    [coder] = found.values()
    return coder


def same_bits(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@contextlib.contextmanager
def stopped(monkeypatch, feed, after, by=signal.SIGTERM):
    """Within this, the run gets a signal as its `after`th pass begins."""
    real, done = feed.step, 0

    def step(self, *args):
        nonlocal done
        done += 1
        if done == after:
            os.kill(os.getpid(), by)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(feed, "step", step)
        with pytest.raises(SystemExit, match="143"):
            yield


if __name__ == "__main__":
    import orbax.checkpoint  # noqa: F401  once for all children

    for _ in sys.stdin:
        child = os.fork()
        if not child:
            run(sys.argv[1], **json.loads(sys.argv[2]))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
