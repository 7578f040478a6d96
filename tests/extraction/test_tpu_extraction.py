"""The extraction program, compiled for TPUs by the real TPU compiler, from abstract weights.

The figures as JSON, after PYTHONPATH=tests/support:

    python tests/extraction/test_tpu_extraction.py 1b [DATA MODEL ROWS PRECISION]
"""

import json
import math
import os
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemma_scope_jax.coders.active_features import CoderStack, active_features
from gemma_scope_jax.coders.coder import Encoder
from gemma_scope_jax.kernels import xla
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model, abstract_params, preset
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from tpu import BYTES, ENVIRONMENT, compiled, figures, no_libtpu, used

pytestmark = pytest.mark.skipif(no_libtpu, reason="libtpu is built for Linux on x86-64 only")

# topology, mesh (data, model), rows of 1024, layers of resid_post, width, slots, HBM, peak flop/s
PROGRAMS = {
    "1b": ("v5e:2x4", (8, 1), 64, tuple(range(26)), 16_384, 240, 16e9, 197e12),
    "27b": ("v5p:2x2x4", (4, 4), 32, (15, 31, 40, 53), 262_144, 240, 95e9, 459e12),
}
LENGTH = 1024


def flops(name: str) -> float:
    """Matmul flops of a token, encoders in three passes of bfloat16 (precision "high") included."""
    _, _, _, layers, width, *_ = PROGRAMS[name]
    c = preset(f"gemma-3-{name}")
    weights = c.d_model * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.d_model * c.d_mlp
    trunk = 2 * (max(layers) + 1) * (weights + c.heads * c.head_dim * LENGTH)
    return trunk + 3 * 2 * len(layers) * c.d_model * width


# -------------------------------------------------------------------------------------------------
# In the process with the TPU compiler


def compile_for_tpu(name: str, mesh_shape=None, rows=None, precision: str = "high"):
    from jax.experimental import topologies

    topology, default, default_rows, layers, width, slots, *_ = PROGRAMS[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, config = make_mesh(*(mesh_shape or default), devices), preset(f"gemma-3-{name}")
    rows = rows or default_rows

    def array(*shape, axes=(), dtype=jnp.float32):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    place = lambda w, sharding: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
    params = jax.tree.map(place, abstract_params(config), param_shardings(config, mesh))
    x, d = len(layers), config.d_model
    weights = Encoder(
        array(x, d, width, axes=(None, None, "model")),
        array(x, width, axes=(None, "model")),
        array(x, width, axes=(None, "model")),
    )
    members = tuple((f"layer_{layer}", 0) for layer in layers)
    group = CoderStack("resid_post", layers, 1, members, width)
    kinds = (jnp.int32, jnp.int32, jnp.bool_)
    batch = TokenBatch(*(array(rows, LENGTH, axes=("data",), dtype=kind) for kind in kinds))
    lowered = active_features.lower(
        Model(params, config),
        (weights,),
        batch,
        groups=(group,),
        slots=slots,
        using=xla,
        precision=precision,
    )
    return lowered.compile()


# -------------------------------------------------------------------------------------------------
# In the test's process


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_extraction_fits_and_moves_no_activations_of_features(name):
    found, (_, (_, model), _, _, width, *_, room, _) = compiled(name, __file__), PROGRAMS[name]
    assert used(found["hbm"]) <= room
    for operation, arrays, _ in found["collectives"]:
        for dtype, dims in arrays:
            shape = [int(n) for n in dims.split(",") if n]
            # The model's own: a layer's weights, or tokens by D; never [tokens, F].
            assert width not in shape and width // model not in shape, (operation, arrays)
            assert math.prod(shape) * BYTES[dtype] < 4e9, (operation, arrays)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    name, *rest = sys.argv[1:]
    given = ((int(rest[0]), int(rest[1])), int(rest[2]), rest[3]) if rest else ()
    print(json.dumps(figures(compile_for_tpu(name, *given)) | {"flops_a_token": flops(name)}))
