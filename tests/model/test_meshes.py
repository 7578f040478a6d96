"""Meshes as users make them: Explicit axes, other names, a mesh that is set around our calls."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gemma_scope_jax as gs
from checkpoint_files import CONFIG, random_model
from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface
from gemma_scope_jax.model.sharding import mesh_under, our_mesh

IDS = np.random.default_rng(0).integers(2, 300, (2, 8)).astype(np.int32)
EXPLICIT = AxisType.Explicit


def mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    save_huggingface(random_model(), path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    """On the mesh that `make_mesh` makes, and what it computes there."""
    model = gs.load_model(folder, dtype="float32", mesh=gs.make_mesh(2, 4))
    return model, run(model, IDS)


def run(model, ids):
    out = gs.run(model, ids, [gs.capture("mlp_act", 1)])
    return out.logits, out.reads["mlp_act"]


def assert_equal(got, expected):
    """Values, and where each lies."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given, sizes",
    [
        (((2, 4), ("data", "model"), EXPLICIT), (2, 4)),
        (((4, 2), ("model", "data"), EXPLICIT), (2, 4)),
        (((8,), ("model",)), (1, 8)),
        (((8,), ("data",), EXPLICIT), (8, 1)),
        (((1, 2, 1, 4), ("replica", "data", "expert", "model")), (2, 4)),
        (((1,), ("x",)), (1, 1)),
    ],
)
def test_equal_meshes_become_ours(given, sizes):
    theirs = mesh(*given)
    made = our_mesh(theirs)
    assert dict(made.shape) == dict(zip(("data", "model"), sizes))
    assert set(made.axis_types) == {AxisType.Auto} and our_mesh(made) is made
    rows = theirs.devices.T if given[1][0] == "model" and sizes != (1, 8) else theirs.devices
    assert made.devices.tolist() == rows.reshape(sizes).tolist()


@pytest.mark.parametrize(
    "given, message",
    [
        (lambda: mesh((2, 4), ("fsdp", "tp")), r"axis 'fsdp': .*\('data', 'model'\)"),
        (lambda: mesh((2, 2, 2), ("data", "model", "seq")), "axis 'seq'"),
        (lambda: (2, 4), r"as gs.make_mesh\(2, 4\) makes one, not \(2, 4\)"),
    ],
)
def test_meshes_whose_meaning_would_be_a_guess_are_refused(folder, given, message):
    for use in (
        lambda m: gs.load_model(folder, mesh=m),
        lambda m: gs.param_shardings(CONFIG, m),
        lambda m: gs.shard_batch(m, IDS),
    ):
        with pytest.raises(gs.InputError, match=message):
            use(given())


def test_weights_and_activations_lie_alike_on_explicit_meshes(folder, ours):
    """The model on a mesh of `jax.make_mesh`, tokens on it, and both put there by hand."""
    theirs = mesh((2, 4), ("data", "model"), EXPLICIT)
    model = gs.load_model(folder, dtype="float32", mesh=theirs)
    assert_equal(model.params, ours[0].params)
    assert mesh_under(model.params.embed) == gs.make_mesh(2, 4)
    tokens = jax.device_put(IDS, NamedSharding(theirs, P("data")))
    assert_equal(run(model, tokens), ours[1])
    put = lambda x: jax.device_put(x, NamedSharding(theirs, x.sharding.spec))
    by_hand = model.replace(params=jax.tree.map(put, model.params))
    assert mesh_under(by_hand.params.embed) is None
    assert_equal(run(by_hand, tokens), ours[1])
    with pytest.raises(gs.InputError, match="weights are on a mesh with Explicit axes"):
        jax.eval_shape(gs.forward, by_hand, tokens)


@pytest.mark.parametrize("kind", [EXPLICIT, AxisType.Auto])
def test_a_mesh_that_is_set_changes_nothing(folder, ours, kind):
    alone = gs.load_model(folder, dtype="float32")
    expected = run(alone, IDS)
    tokens = gs.generate(ours[0], IDS, 3).tokens
    with jax.set_mesh(mesh((2, 4), ("data", "model"), kind)) as _:
        inside = gs.load_model(folder, dtype="float32")
        assert_equal(inside.params, alone.params)
        assert_equal(run(inside, IDS), expected)
        assert_equal(run(ours[0], IDS), ours[1])
        np.testing.assert_array_equal(gs.generate(ours[0], IDS, 3).tokens, tokens)
        assert not jax.sharding.get_abstract_mesh().empty


def test_devices_of_a_mesh_make_one():
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    assert gs.make_mesh(2, 2, devices) == Mesh(devices, ("data", "model"))
