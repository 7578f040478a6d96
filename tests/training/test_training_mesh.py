"""Training over meshes and over several processes equals training on one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import training_runner
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.model.config import PRESETS, Model
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from gemma_scope_jax.training import feeds, train
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig, TrainConfig
from tiny import tiny_model

LOSS = LossConfig(l0_warmup=20, per_token=False, bandwidth=0.1, dead_after=1, dead_below=0.5)
CODERS = (
    CoderConfig(2, width=96, target_l0=8, threshold=None, loss=LOSS),
    CoderConfig(
        (1, 2), "mlp_in", "mlp_out", width=64, target_l0=8, skip=True, threshold=None, loss=LOSS
    ),
)


def config(mesh, store="") -> TrainConfig:
    """A large epsilon: Adam would turn rounding errors of tiny gradients into whole steps."""
    return TrainConfig(
        coders=CODERS,
        tokens=128 * 9,
        batch_size=8,
        context_size=16,
        buffer=512,
        train_batch_size=128,
        updates=2,
        optimizer=OptimizerConfig(1e-3, 10, epsilon=1e-2),
        checkpoint_every=1e9,
        model="tiny",
        sparse=0,
        mesh=mesh,
        store=store,
    )


def run(folder, mesh, store=""):
    feeds.load_tokenizer = lambda source: training_runner.Letters()
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    if mesh != (1, 1):
        places = param_shardings(model.config, make_mesh(*mesh))
        put = lambda w, place: jax.make_array_from_callback(
            w.shape, place, lambda index: np.asarray(w)[index]
        )
        model = Model(jax.tree.map(put, model.params, places), model.config)
    train.train(config(mesh, store), folder, model, training_runner.documents())


def coders(folder: Path) -> list:
    found = sorted(path.parent for path in folder.glob("coders/**/config.json"))
    assert len(found) == len(CODERS)
    return [load_coder(path) for path in found]


def check_same(folder: Path, other: Path) -> None:
    """Within 1e-5 of the largest; what starts as a regression has rounding times its condition."""
    for a, b in zip(coders(folder), coders(other)):
        for (path, x), (_, y) in zip(*map(jax.tree.leaves_with_path, (a, b)), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            regression = a.w_skip is not None and path[0].name in ("b_dec", "w_skip")
            within = 3e-5 if regression else 1e-5
            np.testing.assert_allclose(x, y, atol=within * np.abs(x).max(), err_msg=f"{path}")


@pytest.fixture(scope="module", autouse=True)
def letters():
    tokenizer = feeds.load_tokenizer
    yield
    feeds.load_tokenizer = tokenizer


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store, and what one device makes of it."""
    folder = tmp_path_factory.mktemp("stored")
    feeds.load_tokenizer = lambda source: training_runner.Letters()
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    documents = training_runner.documents()
    train.store_activations(config((1, 1)), folder / "store", 2000, model=model, data=documents)
    run(folder / "one", (1, 1), str(folder / "store"))
    return folder


@pytest.mark.parametrize(
    "mesh", [(4, 2), *(pytest.param(m, marks=pytest.mark.slow) for m in ((2, 4), (8, 1)))]
)
def test_a_mesh_of_eight_devices_equals_one(stored, tmp_path, mesh):
    run(tmp_path, mesh, str(stored / "store"))
    check_same(stored / "one", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for coder in rows[-1]["coders"].values():
        assert coder["dead"] > 0  # revival is part of what is compared


def test_two_processes_equal_one(tmp_path):
    """The model on text, and all the rest, on the same mesh of eight devices."""
    run(tmp_path / "one", (4, 2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = dict(os.environ)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(process), str(tmp_path / "two")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    check_same(tmp_path / "one", tmp_path / "two")
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["tokens"] for line in lines]
    assert tokens == sorted(set(tokens))  # one process speaks for both


if __name__ == "__main__":
    from gemma_scope_jax.model.processes import join_processes

    jax.config.update("jax_num_cpu_devices", 4)
    join_processes(sys.argv[1], 2, int(sys.argv[2]))
    run(Path(sys.argv[3]), (4, 2))
