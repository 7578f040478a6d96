"""Attribution on several devices equals that on one."""

import jax
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of, key, near
from gemma_scope_jax.circuits import linear
from gemma_scope_jax.model.config import Model


@pytest.mark.parametrize(("kind", "shape"), [("affine", (8, 1)), ("clt", (2, 4))])
def test_eight_devices_equal_one(model, monkeypatch, kind, shape):
    mesh, coders = gs.make_mesh(*shape), coders_of(kind)
    placed = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    given = {"max_feature_nodes": 40, "batch_size": 8}
    one = gs.attribute(model, coders, IDS, **given)
    found, effects = [], linear.effects
    keep = lambda *given, size: found.append(effects(*given, size=size)) or found[-1]
    monkeypatch.setattr(linear, "effects", keep)
    many = gs.attribute(Model(placed, model.config), coders, IDS, **given)
    assert found[0].slots.sharding.shard_shape(found[0].slots.shape)[0] == 64
    assert found[0].slots.shape[0] == 64 * shape[0]
    assert key(one.sources) == key(many.sources)
    near(many.effects, one.effects, 1e-5)
    near(many.value, one.value, 1e-5)


def test_neurons_of_a_mesh_equal_those_of_one_device(model):
    mesh = gs.make_mesh(2, 4)
    placed = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    given = {"max_feature_nodes": 40, "max_candidates": 200}
    one = gs.attribute(model, None, IDS, **given)
    many = gs.attribute(Model(placed, model.config), None, IDS, **given)
    assert key(one.sources) == key(many.sources)
    near(many.effects, one.effects, 1e-5)
    near(many.value, one.value, 1e-5)
