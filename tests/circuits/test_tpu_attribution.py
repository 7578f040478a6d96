"""The program that finds rows, compiled for TPUs by the real TPU compiler, from abstract weights.

PYTHONPATH=tests/support python tests/circuits/test_tpu_attribution.py 4b
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest

import gemma_scope_jax as gs
from abstract_coders import abstract_transcoders
from gemma_scope_jax.circuits.estimate import abstract_inputs
from gemma_scope_jax.circuits.linear import effects
from tpu import ENVIRONMENT, compiled, figures, no_libtpu, used

pytestmark = pytest.mark.skipif(no_libtpu, reason="libtpu is built for Linux on x86-64 only")
# tokens, candidates, topology, mesh (data, model), HBM
PROGRAMS = {"4b": (6000, 65_536, "v5e:2x4", (4, 2), 16e9)}


def compile_for_tpu(name: str):
    from jax.experimental import topologies

    tokens, candidates, topology, shape, _ = PROGRAMS[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config, mesh = gs.preset(f"gemma-3-{name}"), gs.make_mesh(*shape, devices)
    coders = abstract_transcoders(config)
    options = {"dtype": jnp.bfloat16, "mesh": mesh, "rest": True}
    return effects.lower(*abstract_inputs(config, coders, tokens, candidates, **options)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_long_prompts_fit(name):
    found = compiled(name, __file__)
    assert used(found["hbm"]) <= PROGRAMS[name][-1]


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(figures(compile_for_tpu(sys.argv[1]))))
