"""The replacement model: reconstructions of many coders in place at once, as `splice` of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.errors import InputError

MLP = {"reads": "mlp_in", "writes": "mlp_out"}
IDS = np.random.default_rng(0).integers(2, 300, (2, 9)).astype(np.int32)
EVERY = [random_coder(24, layer=i, seed=i, threshold=0.2, skip=i > 1, **MLP) for i in range(4)]
SETS = {
    "a transcoder a layer": EVERY,
    "two sites": [EVERY[2], random_coder(24, layer=0, threshold=0.2), EVERY[0]],
    "a clt": [random_coder(24, layers=(0, 1, 2, 3), threshold=0.2, skip=True, **MLP)],
}


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("kind", SETS)
def test_values_and_gradients_are_those_of_each_splice(model, kind, error):
    coders = SETS[kind]

    def run(place):
        """Logits, and the gradient of their squares in all decoders."""

        def squares(w_dec):
            used = [coder.replace(w_dec=w) for coder, w in zip(coders, w_dec)]
            logits = gs.forward(model, IDS, place(used)).logits
            return jnp.square(logits).sum(), logits

        gradient, logits = jax.jit(jax.grad(squares, has_aux=True))(
            [jnp.asarray(coder.w_dec) for coder in coders]
        )
        return np.asarray(logits), gradient

    ours, gradient = run(lambda used: gs.replacement(used, error=error))
    theirs, expected = run(lambda used: [gs.splice(coder, error=error) for coder in used])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradient, expected):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(np.abs(b).max()))
    plain = gs.run(model, IDS).logits
    if error:
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    else:
        assert np.abs(np.asarray(ours - plain)).max() > 0.1


def test_the_layer_is_data(model):
    """The same program serves a transcoder of any layer, and <bos> is left alone from any first."""
    traced = []

    @jax.jit
    def logits(intercepts):
        traced.append(1)
        return gs.forward(model, IDS, intercepts).logits

    transcoders = [EVERY[0], EVERY[1], EVERY[1].replace(layer=3)]
    found = [logits(gs.replacement([coder])) for coder in transcoders]
    assert len(traced) == 1
    for got, coder in zip(found, transcoders):
        want = gs.run(model, IDS, [gs.splice(coder, error=False)]).logits
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    late = gs.run(model, IDS, list(gs.replacement(EVERY, first=20))).logits
    np.testing.assert_allclose(late, gs.run(model, IDS).logits, rtol=1e-5, atol=1e-5)


def test_two_coders_for_one_place_are_one_line():
    clt = SETS["a clt"][0]
    for coders, words in (
        ([EVERY[1], EVERY[1]], "two coders write mlp_out of layer 1"),
        ([EVERY[3], clt], "two coders write mlp_out of layer 3"),
        (["a name"], "expected one coder"),
    ):
        with pytest.raises(InputError, match=words):
            gs.replacement(coders)
