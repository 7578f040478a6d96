"""What runs on TPUs, compiled for them by the real TPU compiler, from abstract weights.

The figures as JSON: PYTHONPATH=tests/support python tests/model/test_tpu_compile.py 1b
"""

import json
import math
import os
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import gemma_scope_jax as gs
from gemma_scope_jax.model.config import Model, abstract_params, preset
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from tpu import BYTES, ENVIRONMENT, collectives, compiled, figures, no_libtpu, used

# size: topology, mesh (data, model), batch, layers captured (an SAE reads the last), SAE width, HBM
PROGRAMS = {
    "1b": ("v5e:2x4", (2, 4), 32, (12, 13), 16_384, 16e9),
    "27b": ("v5p:2x2x4", (4, 4), 16, (60, 61), 262_144, 95e9),
}
TOKENS, TOP_FEATURES = 1024, 64
pytestmark = pytest.mark.skipif(no_libtpu, reason="libtpu is built for Linux on x86-64 only")


# -------------------------------------------------------------------------------------------------
# In the process with the TPU compiler


def compile_for_tpu(size: str):
    """Forward, two captures and the strongest features of an SAE, compiled for a TPU pod slice."""
    from jax.experimental import topologies

    topology, (data, model), batch, layers, width, _ = PROGRAMS[size]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(data, model, devices)
    config = preset(f"gemma-3-{size}")

    def array(*shape, axes=(), dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    weights, shardings = abstract_params(config), param_shardings(config, mesh)
    place = lambda w, sharding: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
    gemma = Model(jax.tree.map(place, weights, shardings), config)
    sae = gs.SparseCoder(
        w_enc=array(config.d_model, width, axes=(None, "model")),
        b_enc=array(width, axes=("model",)),
        threshold=array(width, axes=("model",)),
        w_dec=array(width, config.d_model, axes=("model",)),
        b_dec=array(config.d_model),
        layer=layers[-1],
    )
    tokens = array(batch, TOKENS, axes=("data",), dtype=jnp.int32)

    @jax.jit
    def program(gemma, sae, tokens):
        reads = [gs.capture("resid_post", layers), gs.features(sae, k=TOP_FEATURES)]
        return gs.forward(gemma, tokens, reads)

    return program.lower(gemma, sae, tokens).compile()


def figures_of(compiled) -> dict:
    """`tpu.figures`, how the logits lie and how many Pallas kernels there are."""
    return figures(compiled) | {
        "logits": list(compiled.output_shardings.logits.spec),
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', compiled.as_text())),
    }


# -------------------------------------------------------------------------------------------------
# In the test's process


def check_gathers(found: list[list], config, model: int) -> int:
    """Assert that no collective moves a weight stack; how many gathers of a layer's weight pass.

    L stays a dimension of its own in every stack. An all-gather is at most one layer's largest
    weight; the one exception is unembedding, for which a chip needs its rows of the table whole.
    """
    blocks = abstract_params(config).blocks
    sizes = [math.prod(w.shape) * w.dtype.itemsize for w in (blocks.w_q, blocks.w_gate)]
    passed = 0
    for operation, arrays, count in found:
        shapes = [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]
        size = max(math.prod(s) * BYTES[dtype] for (dtype, _), s in zip(arrays, shapes))
        assert not any(config.layers in s for s in shapes), (operation, arrays)
        assert size < max(sizes), (operation, arrays)
        if operation == "all-gather" and (config.vocab // model, config.d_model) not in shapes:
            assert size <= max(sizes) // config.layers, (operation, arrays)
            passed += count * any(dtype == "bf16" for dtype, _ in arrays)
    return passed


@pytest.mark.parametrize("size", ["1b", pytest.param("27b", marks=pytest.mark.slow)])
def test_the_forward_pass_fits_and_gathers_no_stack(size):
    """With captures and an SAE."""
    _, (_, model), _, layers, _, room = PROGRAMS[size]
    found = compiled(size, __file__)
    assert used(found["hbm"]) <= room
    assert check_gathers(found["collectives"], preset(f"gemma-3-{size}"), model) > 0
    assert found["logits"] == ["data", None, "model"]  # each chip works on its rows only
    assert found["kernels"] >= len(layers)  # the splash kernel, whatever layers are cut out


def test_a_gathered_stack_would_be_seen():
    config = preset("gemma-3-1b")
    mesh = make_mesh(2, 4)
    row = NamedSharding(mesh, PartitionSpec(None, "data"))
    stack = jax.ShapeDtypeStruct((config.layers, 64, 64), jnp.float32, sharding=row)

    @jax.jit
    def gathered(stack):
        return jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, PartitionSpec()))

    found = collectives(gathered.lower(stack).compile().as_text())
    assert found == [["all-gather", (("f32", "26,32,64"), ("f32", "26,64,64")), 1]]
    with pytest.raises(AssertionError, match="all-gather"):
        check_gathers(found, config, 4)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(figures_of(compile_for_tpu(sys.argv[1]))))
