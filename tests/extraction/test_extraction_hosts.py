"""One mesh over two processes: the store is that of one process."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from feature_writer import write
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import hosts
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from tiny import tiny_model


def spread(model, mesh):
    """The model's weights on a mesh that may span processes."""
    put = lambda w, place: jax.make_array_from_callback(w.shape, place, lambda i: np.asarray(w)[i])
    return model.replace(
        params=jax.tree.map(put, model.params, param_shardings(model.config, mesh))
    )


def same(one, two):
    """Equal but for rounding, which is a mesh's own."""
    assert len(one) == len(two) and one.counted == two.counted
    assert [s["documents"] for s in one.shards] == [s["documents"] for s in two.shards]
    for a, b in zip(one.segments(), two.segments(), strict=True):
        assert (a.tokens == b.tokens).all() and (a.documents == b.documents).all()
        dense = np.zeros((2, len(a), one.width()), np.float32)
        for into, segment in zip(dense, (a, b)):
            offsets, ids, values = segment.by_token()
            into[np.repeat(np.arange(len(a)), np.diff(offsets)), ids] = values
        near = np.abs(dense[0] - dense[1]) <= 2e-3 * np.maximum(dense[0], 1.0)
        ties = (dense == 0).any(0) & (dense.max(0) < 3.0 + 1e-4)  # the threshold is 3
        assert (near | ties).all()


@pytest.mark.parametrize("count", [61, pytest.param(8, marks=pytest.mark.slow)])
def test_one_mesh_over_two_processes_gives_the_same_store(tmp_path, count):
    """Of 61 documents one process has more shards than the other; of 8 it has all."""
    one = write(tmp_path / "one", count=count)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = dict(os.environ)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(process), str(tmp_path / "two"), str(count)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    two = FeatureStore(tmp_path / "two")
    assert two.complete and len(two.shards) % 2 == 1  # one process has more to do
    two.verify()
    same(one, two)


def test_a_mesh_that_cuts_hosts_is_refused(monkeypatch):
    model = tiny_model(PRESETS["gemma-3-270m"], layers=2)
    model = spread(model, make_mesh(2, 4))
    hosts.check(model, 3)

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    class Mesh:
        devices = np.array([[Device(0), Device(1)], [Device(0), Device(1)]])

    monkeypatch.setattr(hosts, "mesh_under", lambda model: Mesh)
    with pytest.raises(InputError, match='axis "model" spans hosts'):
        hosts.check(model, 4)
    Mesh.devices = np.array([[Device(0)], [Device(0)], [Device(1)], [Device(1)]])
    hosts.check(model, 4)
    with pytest.raises(InputError, match="batch_size 3 does not split over the 2 mesh rows"):
        hosts.check(model, 3)


if __name__ == "__main__":
    import feature_writer
    from gemma_scope_jax.model.processes import join_processes

    jax.config.update("jax_num_cpu_devices", 4)
    join_processes(sys.argv[1], 2, int(sys.argv[2]))
    made = feature_writer.tiny_model
    feature_writer.tiny_model = lambda *a, **k: spread(made(*a, **k), make_mesh(4, 2))
    write(sys.argv[3], count=int(sys.argv[4]))
