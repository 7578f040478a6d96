"""Extraction killed at random moments, and by two processes at once: always the same bytes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import feature_writer
from feature_writer import texts, write
from gemma_scope_jax.extraction.store.shards import shard_name
from gemma_scope_jax.extraction.store.store import FeatureStore
from letters import Letters


def contents(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def shards_in(folder):
    return len(list(folder.glob("shard-*.json"))) if folder.exists() else 0


class Writer:
    """A process that writes shares of a store, each in a child that can be killed."""

    def __init__(self):
        program = [sys.executable, Path(feature_writer.__file__)]
        self.process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, folder, index=0, count=1):
        """The id of a child that has begun."""
        print(folder, index, count, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def ended(self):
        """How the child ended."""
        return int(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:
            self.process.stdin.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    store = write(tmp_path_factory.mktemp("whole"), shard_tokens=None)
    sizes = [sum(tokens for tokens, _ in shard["segments"]) for shard in store.shards]
    assert len(sizes) >= 16 and max(sizes) < len(store) / 12  # what a kill may cost
    assert store.counted == sum(len(Letters().encode(t, bos=False)) for t in texts())
    return store


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(whole, tmp_path, kills):
    folder, final = tmp_path / "killed", contents(whole.folder)
    rng, total, killed = random.Random(0), len(whole.shards), 0
    with Writer() as writer:
        while True:
            child = writer.start(folder)
            # after another shard or two, or at any moment of the start or the end
            wanted = shards_in(folder) + rng.choice((0, 1, 1, 2)) if killed < kills else 2 * total
            patience = time.monotonic() + 100
            while shards_in(folder) < wanted <= total:
                assert time.monotonic() < patience, "nothing is written"
                time.sleep(0.002)
            if wanted <= total:  # else it is left to finish
                time.sleep(rng.random() * rng.choice((0.01, 0.01, 0.1)))
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(child, signal.SIGKILL)
            ended = writer.ended()
            killed += ended == signal.SIGKILL
            # Whatever has a final name is whole.
            for name, data in contents(folder).items() if folder.exists() else ():
                assert Path(name).name.startswith(".") or data == final[name]
            if ended == 0:
                break
    assert killed >= kills
    write(folder, shard_tokens=None)  # removes what the killed left; changes nothing else
    assert contents(folder) == final
    FeatureStore(folder).verify()


def test_two_processes_write_the_store_of_one(whole, tmp_path):
    folder = tmp_path / "shared"
    with Writer() as one, Writer() as two:
        one.start(folder, 0, 2), two.start(folder, 1, 2)
        assert (one.ended(), two.ended()) == (0, 0)
    assert len(whole.shards) >= 4  # so that both had work
    assert contents(folder) == contents(whole.folder)
    assert (folder / shard_name(0)).exists() and FeatureStore(folder).complete
