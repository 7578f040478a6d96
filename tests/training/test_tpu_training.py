"""The training step, compiled for TPUs by the real TPU compiler, from abstract weights.

The figures as JSON: PYTHONPATH=tests/support python tests/training/test_tpu_training.py 1b_sae
"""

import json
import math
import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model, abstract_params, preset
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from gemma_scope_jax.training import feeds
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from gemma_scope_jax.training.state import init_state, make_plan, placement
from tpu import BYTES, ENVIRONMENT, compiled, figures, no_libtpu, used

pytestmark = pytest.mark.skipif(no_libtpu, reason="libtpu is built for Linux on x86-64 only")

CLT = CoderConfig(
    tuple(range(26)), "mlp_in", "mlp_out", width=10_080, target_l0=150, skip=True, threshold=None
)
# topology, mesh (data, features), model, coder, sequences of 1024 a pass, buffer, HBM
PROGRAMS = {
    "1b_sae": ("v5e:2x4", (2, 4), "1b", CoderConfig(13, width=65_536), 16, 131_072, 16e9),
    "27b_sae": ("v5p:2x2x4", (4, 4), "27b", CoderConfig(31, width=262_144), 16, 131_072, 95e9),
    "1b_clt": ("v5p:2x2x4", (1, 16), "1b", CLT, 8, 65_536, 95e9),
}
BATCH = 4096


# -------------------------------------------------------------------------------------------------
# In the process with the TPU compiler


def compile_for_tpu(name: str):
    """A model pass and one update, compiled for a TPU slice: (compiled, plan)."""
    from jax.experimental import topologies

    topology, shape, size, coder, rows, buffer, _ = PROGRAMS[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, config = make_mesh(*shape, devices), preset(f"gemma-3-{size}")
    plan = make_plan(
        TrainConfig(
            coders=(coder,),
            batch_size=rows,
            context_size=1024,
            buffer=buffer,
            train_batch_size=BATCH,
            tokens=10**9,
        ),
        config,
        mesh,
    )
    at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    places = placement(plan, config)
    state = jax.tree.map(at, jax.eval_shape(lambda: init_state(plan, config)), places)
    params = jax.tree.map(at, abstract_params(config), param_shardings(config, mesh))
    split = NamedSharding(mesh, PartitionSpec("data"))
    kinds = (jnp.int32, jnp.int32, jnp.bool_)
    batch = TokenBatch(*(jax.ShapeDtypeStruct((rows, 1024), d, sharding=split) for d in kinds))
    program = jax.jit(
        partial(feeds.train_step, plan=plan), donate_argnums=0, out_shardings=(places, None)
    )
    return program.lower(state, Model(params, config), batch).compile()


# -------------------------------------------------------------------------------------------------
# In the test's process


def features(name: str) -> int:
    """Of a coder's layer, on one chip."""
    _, (_, model), _, coder, *_ = PROGRAMS[name]
    return coder.width // model


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_training_step_fits_and_moves_no_coder(name):
    found, (_, (data, _), size, coder, *_, room) = compiled(name, __file__), PROGRAMS[name]
    assert used(found["hbm"]) <= room
    d, gradients = preset(f"gemma-3-{size}").d_model, 0
    for operation, arrays, count in found["collectives"]:
        shapes = [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]
        floats = [s for s, (dtype, _) in zip(shapes, arrays) if dtype == "f32"]
        # Features stay on their chip: only gradients of a chip's own go over the data axis.
        own = [s for s in floats if features(name) in s and d in s]
        assert not any(coder.width in s for s in floats if d in s), (operation, arrays)
        assert not own or (operation == "all-reduce" and data > 1), (operation, arrays)
        gradients += count * bool(own)
        # Nothing is larger than a layer of the model or a chip's gradient.
        largest = max(math.prod(s) * BYTES[t] for (t, _), s in zip(arrays, shapes))
        assert largest <= max(4 * features(name) * d, 4 * 16 * 1024 * d), (operation, arrays)
    assert bool(gradients) == (data > 1)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(figures(compile_for_tpu(sys.argv[1]))))
