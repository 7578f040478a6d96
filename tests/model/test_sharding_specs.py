"""Partition specs divide on every preset and mesh, and place batches and weights as they say."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS, abstract_params
from gemma_scope_jax.model.sharding import make_mesh, param_shardings, shard_batch
from tiny import tiny


def param_specs(*arguments):
    return jax.tree.map(lambda sharding: sharding.spec, param_shardings(*arguments))


MESHES = [(1, 1), (1, 8), (8, 1), (2, 4), (4, 2), (3, 2), (1, 5)]


@pytest.mark.parametrize("fsdp", [True, False])
@pytest.mark.parametrize("data, model", MESHES)
@pytest.mark.parametrize("name", [*PRESETS, "tiny"])
def test_every_sharded_axis_divides(name, data, model, fsdp):
    config = tiny(PRESETS["gemma-3-4b"]) if name == "tiny" else PRESETS[name]
    mesh = make_mesh(data, model)
    specs, shapes = param_specs(config, mesh, fsdp), abstract_params(config)
    assert jax.tree.structure(specs) == jax.tree.structure(shapes)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(specs)
    ):
        assert len(spec) <= leaf.ndim
        for size, axis in zip(leaf.shape, spec):
            assert axis is None or size % mesh.shape[axis] == 0
        if "norm" in path[-1].name:
            assert spec == P()
        elif path[0].name == "blocks":
            assert spec[0] is None  # the layer axis is scanned over
        assert fsdp or "data" not in spec


def test_what_is_sharded_on_a_mesh_of_two_by_four():
    specs = param_specs(PRESETS["gemma-3-4b"], make_mesh(2, 4))
    assert specs.embed == P("model", "data")
    assert specs.blocks.w_q == P(None, "data", "model", None)
    assert specs.blocks.w_k == specs.blocks.w_v == P(None, "data", "model", None)
    assert specs.blocks.w_o == P(None, "model", None, "data")
    assert specs.blocks.w_gate == specs.blocks.w_up == P(None, "data", "model")
    assert specs.blocks.w_down == P(None, "model", "data")


def test_heads_that_do_not_divide():
    small = param_specs(PRESETS["gemma-3-270m"], make_mesh(1, 8))  # 4 query heads, 1 kv head
    assert small.blocks.w_q == P(None, None, None, "model")
    assert small.blocks.w_o == P(None, None, "model", None)
    assert small.blocks.w_k == P(None, None, None, None)


def test_mesh_takes_the_rest_of_the_devices():
    mesh = make_mesh(data=2)
    assert dict(mesh.shape) == {"data": 2, "model": len(jax.devices()) // 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(devices=jax.devices()[:3]).devices.shape == (1, 3)


@pytest.mark.parametrize(
    "data, model, message",
    [(3, None, "does not divide"), (4, 4, "more than 8"), (0, 1, "at least 1"), (1, 0, "at least")],
)
def test_meshes_that_cannot_be_had(data, model, message):
    with pytest.raises(InputError, match=message):
        make_mesh(data, model)


def test_batch_is_split_over_data():
    mesh = make_mesh(4, 2)
    batch = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = shard_batch(mesh, batch)
    np.testing.assert_array_equal(placed, batch)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
    with pytest.raises(InputError, match="multiple"):
        shard_batch(mesh, batch[:6])
    with pytest.raises(InputError, match="batch of shape"):
        shard_batch(mesh, np.float32(1))


def test_weights_are_spread_over_all_devices():
    config, mesh = tiny(PRESETS["gemma-3-4b"]), make_mesh(2, 4)
    params = jax.tree.map(
        lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), abstract_params(config)
    )
    placed = jax.device_put(params, param_shardings(config, mesh))
    for name in ("w_q", "w_gate", "w_down"):
        weight = getattr(placed.blocks, name)
        assert weight.addressable_shards[0].data.size * 8 == weight.size
        np.testing.assert_array_equal(weight, getattr(params.blocks, name))
