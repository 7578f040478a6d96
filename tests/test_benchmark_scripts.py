"""The benchmarks still run: our side of each, on small shapes, answers what the script asks of it.

Whether both sides agree, and how fast they are, is for `make bench`, which has the peers.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def answers(script, folder, questions, *options):
    """What our side of a benchmark answers to lines on its standard input."""
    command = [sys.executable, BENCHMARKS / script, "--role", "ours", "--folder", folder, *options]
    done = subprocess.run(
        [str(part) for part in command],
        input="\n".join(questions) + "\n",
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.splitlines()
    return [json.loads(line) for line in found[found.index("ready") + 1 :]]


def test_train_step(tmp_path):
    asked = [f"compare {tmp_path}/gradients.npz", "update sparse 0", "update dense 0"]
    first, *updates = answers("train_step.py", tmp_path, asked, "--width", 512, "--batch", 64)
    assert first["mse"] > 0 and first["l0"] > 0
    assert (tmp_path / "gradients.npz").exists() and (tmp_path / "weights.npz").exists()
    assert all(update["seconds"] > 0 and update["l0"] > 0 for update in updates)


@pytest.mark.real
@pytest.mark.slow
def test_extract(tmp_path):
    small = ("--tokens", 300, "--batch-size", 1, "--context-size", 64, "--coders", "sae")
    bytes_a_token, rate, alone = answers(
        "extract.py", tmp_path, ["prepare", "run", "device"], *small
    )
    assert bytes_a_token > 1 and rate > 0 and alone > 0


@pytest.mark.real
@pytest.mark.slow
def test_attribution(tmp_path):
    few = ("--features", 180)
    ((ids, _),) = answers("attribution.py", tmp_path, ["write"], "--role", "prepare", *few)
    asked = [f"attribute {','.join(map(str, ids))} {tmp_path}/ours.npz", "peak"]
    seconds, peak = answers("attribution.py", tmp_path, asked)
    assert seconds > 0 and peak > 0.5
    with np.load(tmp_path / "ours.npz") as graph:
        sources, targets = 180 + 18 * len(ids) + len(ids), 180 + 10
        assert 180 < len(graph["targets"]) <= targets
        assert graph["effects"].shape == (len(graph["targets"]), sources)
