"""Features of what was captured, without the tokens that a coder was not trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model

TEXTS = ["abc", "a longer text of letters", "middle one"]
D, F = 32, 48


@pytest.fixture(scope="module")
def model():
    return tiny_model(PRESETS["gemma-3-270m"], layers=3)


def coders():
    k = jax.random.split(jax.random.key(0), 2)
    normal = lambda key, *shape: jax.random.normal(key, shape) / D**0.5
    one = SparseCoder(
        normal(k[0], D, F), jnp.zeros(F), jnp.full(F, 0.2), normal(k[1], F, D), jnp.zeros(D),
        layer=2, first=3,
    )  # fmt: skip
    two = MultiLayerCoder(
        normal(k[0], 2, D, F), jnp.zeros((2, F)), jnp.full((2, F), 0.2), normal(k[1], 3, F, D),
        jnp.zeros((2, D)), layers=(0, 2),
    )  # fmt: skip
    return {"sae": one, "crosscoder": two}


@pytest.mark.parametrize("kind", ["sae", "crosscoder"])
@pytest.mark.parametrize("first", [None, 0, 5])
def test_encoding_what_was_captured_is_reading_the_features(model, kind, first):
    coder, batch = coders()[kind], gs.tokens(TEXTS, Letters())
    layers = coder.layers if kind == "crosscoder" else coder.layer
    reads = [gs.capture(coder.reads, layers), gs.features(coder, first=first)]
    out = gs.run(model, batch, reads)
    x, want = out.reads["resid_post"], out.reads["features"]
    np.testing.assert_allclose(gs.encode(coder, x, batch, first=first), want, atol=1e-5)
    tokens = np.asarray(batch.tokens)[1:2]  # the longest text alone, as an array
    alone = gs.encode(coder, x[..., 1:2, :, :], tokens, first=first)
    np.testing.assert_allclose(alone, want[..., 1:2, :, :], atol=1e-5)
    assert (np.asarray(coder.encode(x))[..., 0, :] > 0).any()  # it would count <bos>


def test_the_mean_over_what_is_counted_is_the_evaluations(model):
    coder, batch = coders()["sae"], gs.tokens(TEXTS, Letters())
    mask = batch.mask & (batch.tokens % 3 > 0)
    batch = batch.replace(mask=mask)
    x = gs.run(model, batch, [gs.capture("resid_post", 2)]).reads["resid_post"]
    f = np.asarray(gs.encode(coder, x, batch))
    counted = np.asarray(batch.counted(coder.first))
    figures = gs.evaluate(model, coder, batch, delta_loss=False)
    assert figures.all.tokens == counted.sum() < mask.sum()
    np.testing.assert_allclose((f > 0).sum(-1)[counted].mean(), figures.l0, rtol=1e-6)
    everything = (np.asarray(coder.encode(x)) > 0).sum(-1).mean()
    assert abs(everything - figures.l0) > 0.1


def test_activations_of_another_batch_are_refused(model):
    coder, batch = coders()["sae"], gs.tokens(TEXTS, Letters())
    for x in (jnp.ones((3, 9, D)), jnp.ones((25, D))):
        with pytest.raises(InputError, match=r"not of a batch of 3 x 25 tokens: give \[\.\.\., 3,"):
            gs.encode(coder, x, batch)
    with pytest.raises(InputError, match="not text"):
        gs.encode(coder, jnp.ones((3, 25, D)), TEXTS)
