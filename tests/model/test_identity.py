"""Checksums of weights: what they must not see, and what they must."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.model import identity
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.identity import checksum, model_identity
from tiny import tiny_model


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_arrays_on_the_host_and_on_the_device_have_one(shape, monkeypatch):
    monkeypatch.setattr(identity, "CHUNK", 4)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = np.asarray(x)
    assert checksum(x) == checksum(jnp.asarray(x))
    half = jnp.asarray(x, jnp.bfloat16)
    assert checksum(half) == checksum(half.astype(jnp.float32)) == checksum(np.asarray(half))


def test_every_number_and_its_place_count():
    x = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    changed = [x.T.copy(), x[::-1].copy(), np.nextafter(x, np.inf), -x, x.reshape(5, 6)]
    for i in range(x.size):
        one = x.copy()
        one.flat[i] = np.nextafter(one.flat[i], np.inf)
        changed.append(one)
    assert len({checksum(jnp.asarray(a)) for a in [x, *changed]}) == 1 + len(changed)


def test_it_does_not_depend_on_how_weights_are_spread():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((8, 4)), jnp.float32)
    mesh = jax.make_mesh((len(jax.devices()),), ("model",))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("model")))
    assert checksum({"w": spread}) == checksum({"w": x})


def test_models_that_share_name_and_norms_are_told_apart():
    model = tiny_model(PRESETS["gemma-3-270m"], layers=3)
    blocks = model.params.blocks.replace(w_o=model.params.blocks.w_o * 1.01)
    tuned = model.replace(params=model.params.replace(blocks=blocks))
    one, other = model_identity(model), model_identity(tuned)
    assert one["name"] == other["name"] and one["weights"] != other["weights"]
    assert model_identity(tiny_model(PRESETS["gemma-3-270m"], layers=3)) == one


def test_a_models_weights_are_read_once(monkeypatch):
    model, asked = tiny_model(PRESETS["gemma-3-270m"], layers=3), []
    real = identity.checksum
    monkeypatch.setattr(identity, "checksum", lambda params: asked.append(0) or real(params))
    one = model_identity(model)
    assert model_identity(model) == one and len(asked) == 1
    known = len(identity._read)
    tuned = model.replace(params=model.params.replace(final_norm=model.params.final_norm + 1.0))
    assert model_identity(tuned)["weights"] != one["weights"] and len(asked) == 2
    del tuned
    assert len(identity._read) == known  # nothing is kept of what is gone


def test_a_name_that_is_not_utf8_is_the_same_when_read_again():
    """As of a model's folder: what a manifest says of it is compared on going on."""
    model = tiny_model(PRESETS["gemma-3-270m"], layers=3)
    odd = model.replace(config=dataclasses.replace(model.config, name="caf\udce9"))
    found = model_identity(odd)
    assert found["name"] == "caf\ufffd" and json.loads(json.dumps(found).encode()) == found
