"""TopK coders are exact wherever features are computed, and stay so wherever they are rebuilt."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.coders import active_features
from gemma_scope_jax.coders.coder import CoderInfo, as_jump_relu, largest, weights_identity
from gemma_scope_jax.coders.interop.circuit_tracer import save_circuit_tracer
from gemma_scope_jax.coders.interop.saelens import save_saelens
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.results import coder_config
from gemma_scope_jax.inspection.inspect_text import _heat
from gemma_scope_jax.kernels import active, xla
from gemma_scope_jax.model.sharding import make_mesh

D, F, K = 32, 48, 5
X = np.random.default_rng(1).standard_normal((70, D)).astype(np.float32)


TINY = CoderInfo(model_name="acme/tiny")


def topk(layer=2, k=K, **changes):
    coder = random_coder(layer=layer, threshold=0.0, k=k, info=TINY)
    return coder.replace(**changes)


def crosscoder(k=K, **changes):
    coder = random_coder(seed=4, layers=(1, 3), threshold=0.0, k=k, info=TINY)
    return coder.replace(**changes)


def by_hand(z, k):
    """relu(z) [n, F] at the k largest of each row, of equals the first."""
    chosen = np.argsort(-z, 1, kind="stable")[:, :k]
    f = np.zeros_like(z)
    np.put_along_axis(f, chosen, np.maximum(np.take_along_axis(z, chosen, 1), 0), 1)
    return f


def test_exactly_k_are_kept():
    """The first of equals, and none that is not positive."""
    z = np.array([[1, 3, 3, 3, 2], [-1, -2, 4, -3, 0], [0, 0, 0, 0, 0]], np.float32)
    f = np.asarray(largest(jnp.maximum(z, 0), 2))
    np.testing.assert_array_equal(f, [[0, 3, 3, 0, 0], [0, 0, 4, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(np.asarray(largest(jnp.ones((1, 5)), 2)), [[1, 1, 0, 0, 0]])
    coder = topk()
    z = np.asarray(coder.pre_activations(X))
    np.testing.assert_array_equal(coder.encode(X), by_hand(z, K))
    shaped = np.asarray(jax.jit(SparseCoder.encode)(coder, X.reshape(7, 10, D)))
    np.testing.assert_array_equal(shaped.reshape(70, F), by_hand(z, K))
    slope = jax.grad(lambda x: coder.encode(x).sum())(X)
    np.testing.assert_allclose(
        slope, (by_hand(z, K) > 0) @ np.asarray(coder.w_enc).T, rtol=1e-4, atol=1e-4
    )
    huge = np.asarray(coder.encode(1e4 * X))
    assert (huge > 0).sum(1).max() == K


def test_several_layers_share_their_k_and_are_not_encoded_alone():
    coder, x = crosscoder(), np.stack([X, 3 * X])
    z = np.moveaxis(np.asarray(coder.pre_activations(x)), 0, 1).reshape(70, -1)
    f = np.moveaxis(np.asarray(coder.encode(x)), 0, 1).reshape(70, -1)
    np.testing.assert_array_equal(f, by_hand(z, K))
    for use in (
        lambda: coder.encode_layer(0, X),
        lambda: gs.splice(coder),
        lambda: gs.features(coder),
        lambda: gs.edit(coder, gs.clamp, 0, 0.0),
        lambda: active_features.grouped({"a": coder}),
    ):
        with pytest.raises(InputError, match="5 largest .*over all of its layers.*as_jump_relu"):
            use()


@pytest.mark.parametrize("make", [topk, crosscoder])
def test_files_keep_k_and_no_reader_of_thresholds_takes_them(make, tmp_path):
    coder = make()
    gs.save_coder(coder, tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert "threshold" not in load_file(file)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architecture"], config["k"]) == ("topk", K)
    again = gs.load_coder(tmp_path / "a")
    assert again.k == K and jax.tree.all(jax.tree.map(jnp.array_equal, again, coder))
    gs.save_coder(again.replace(k=None), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architecture"] == "jump_relu" and "k" not in config
    x = X if make is topk else np.stack([X, X])
    assert (np.asarray(gs.load_coder(tmp_path / "b").encode(x)) > 0).sum() > 2 * 70 * K


@pytest.mark.parametrize("k", [0, -1, 2.0, True, 97, 2**39, "5"])
def test_k_that_is_none(k, tmp_path):
    for coder in (topk(k=k), crosscoder(k=k)):
        with pytest.raises(InputError, match="k"):
            gs.save_coder(coder, tmp_path / "a")
    with pytest.raises(InputError, match="has no thresholds"):
        gs.save_coder(topk(threshold=jnp.ones(F)), tmp_path / "a")
    gs.save_coder(topk(), tmp_path / "b")
    file = tmp_path / "b" / "config.json"
    for change in ({"k": k}, {"k": None}, {"architecture": "jump_relu"}):
        file.write_text(json.dumps({**json.loads(file.read_text()), "k": K, **change}))
        with pytest.raises(InputError, match="k"):
            gs.load_coder(tmp_path / "b")


def test_saelens_has_the_same_coder_both_ways(tmp_path):
    coder = topk()
    save_saelens(coder, tmp_path / "s")
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert (config["architecture"], config["k"]) == ("topk", K)
    assert "threshold" not in load_file(tmp_path / "s" / "sae_weights.safetensors")
    np.testing.assert_array_equal(gs.load_coder(tmp_path / "s").encode(X), coder.encode(X))
    # Rescaled by the norms of its decoder rows, by which its features then compete.
    config["rescale_acts_by_decoder_norm"] = True
    (tmp_path / "s" / "cfg.json").write_text(json.dumps(config))
    norms = np.linalg.norm(np.asarray(coder.w_dec), axis=1)
    f = by_hand(np.asarray(coder.pre_activations(X)) * norms, K)
    again = gs.load_coder(tmp_path / "s")
    np.testing.assert_allclose(again.encode(X), f, rtol=1e-4, atol=1e-4)
    y = (f / norms) @ np.asarray(coder.w_dec) + np.asarray(coder.b_dec)
    np.testing.assert_allclose(again.reconstruct(X), y, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="SAELens has no TopK transcoder"):
        save_saelens(coder.replace(reads="mlp_in", writes="mlp_out"), tmp_path / "t")
    with pytest.raises(InputError, match="circuit-tracer.*no TopK.*as_jump_relu"):
        save_circuit_tracer([topk(0, reads="mlp_in", writes="mlp_out")], tmp_path / "t")


@pytest.mark.parametrize("make", [topk, crosscoder])
def test_on_request_it_becomes_the_nearest_jumprelu(make):
    coder = make()
    x = X if make is topk else np.stack([X, X])
    jump = as_jump_relu(coder, x)
    assert jump.k is None and jump.info.l0 == K
    axes = -1 if make is topk else (0, -1)
    assert (np.asarray(jump.encode(x)) > 0).sum(axes).mean() == pytest.approx(K, abs=0.02)
    with pytest.raises(InputError, match="thresholds of its own"):
        as_jump_relu(jump, x)
    with pytest.raises(InputError, match="no activations"):
        as_jump_relu(coder, x[..., :0, :])
    # Where fewer than k are positive, those are all: no threshold is below 0.
    low = as_jump_relu(coder.replace(b_enc=coder.b_enc - 12), x)
    assert (np.asarray(low.threshold) == 0).all()


def test_identities_and_results_tell_topk_from_jumprelu():
    identities = {
        weights_identity(c)
        for make in (topk, crosscoder)
        for c in (make(), make(k=4), make(k=None))
    }
    assert len(identities) == 6
    assert (coder_config(topk())["architecture"], coder_config(topk())["k"]) == ("topk", K)
    assert "k" not in coder_config(topk(k=None))


# Inside the model


TOKENS = np.random.default_rng(0).integers(5, 290, (2, 16)).astype(np.int32)


def test_features_and_splices_inside_the_model_are_those_of_encode(model):
    coder, narrow = topk(), topk(k=2)
    reads = gs.run(model, TOKENS, [gs.capture("resid_post", 2), gs.features(coder)]).reads
    x = np.asarray(reads["resid_post"], np.float32)
    f = np.array(coder.encode(x))
    f[:, 0] = 0
    np.testing.assert_allclose(reads["features"], f, rtol=1e-4, atol=1e-4)
    reads = gs.run(
        model, TOKENS, [gs.splice(narrow, error=False), gs.capture("resid_post", 2)]
    ).reads  # another k is another program
    want = np.asarray(narrow.reconstruct(x))
    got = np.asarray(reads["resid_post"])[:, 1:]
    np.testing.assert_allclose(got, want[:, 1:], rtol=1e-3, atol=1e-3)
    ids = np.array([3, 40, 7])
    heat = _heat(coder, jnp.asarray(x[0]), jnp.ones(16, bool), ids)
    want = np.asarray(coder.encode(x[0]))[:, ids].T
    np.testing.assert_allclose(heat, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels, mesh", [("cpu", None), ("xla", None), ("xla", (2, 4))])
def test_extraction_lists_the_k_features_of_each_token(model, kernels, mesh, monkeypatch):
    using = active.backend() if kernels == "cpu" else xla  # XLA's where there is no compiler
    grid = None if mesh is None else make_mesh(*mesh)
    coders = {"a": topk(), "b": topk(k=None, layer=1)}
    groups = active_features.grouped(coders)
    assert [g.k for g in groups] == [K, None]
    assert active_features.slots_for([topk(k=70)]) == 96
    x = jnp.asarray(X[:64]).reshape(8, 8, D)
    segments = jnp.ones((8, 8), jnp.int32)
    group = groups[0]
    weights = active_features.encoders(group, coders, grid)
    w = jax.tree.map(lambda a: a[0], weights)
    how = active_features.Search(slots=48, k=group.k, using=using, precision="highest")
    run = jax.jit(
        lambda x, w: active_features._active(
            x, _Here(), w, segments > 0, first=0, how=how, mesh=grid
        )
    )
    monkeypatch.setattr(
        active_features, "token_mask", lambda ctx, x, first: jnp.ones((8, 8, 1), bool)
    )
    found = run(x, w)
    [(name, _)] = group.members
    want = np.asarray(coders[name].encode(X[:64]))
    parts = found.count.shape[-1]
    f = np.zeros((64, F), np.float32)
    slots = found.values.shape[-1] // parts
    for n in range(64):
        for part in range(parts):
            count = int(found.count[n, part])
            places = slice(part * slots, part * slots + count)
            ids = np.asarray(found.features[n, places], int) + part * (F // parts)
            f[n, ids] = found.values[n, places]
    np.testing.assert_allclose(f, want, rtol=1e-4, atol=1e-4)


class _Here:
    """A context that nothing is asked of."""


def test_evaluation_measures_the_topk_function(model):
    from gemma_scope_jax.evaluation.evaluate import evaluate

    coder = topk()
    batch = (TOKENS, np.ones_like(TOKENS))
    assert 0 < evaluate(model, coder, [batch], delta_loss=False).l0 <= K
    with pytest.raises(InputError, match="over all of its layers"):
        evaluate(model, dataclasses.replace(crosscoder()), [batch])
