"""What cards take from weights alone: draws, neighbours in blocks, coders of several layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.cards.examples import chance
from gemma_scope_jax.coders.directions import most_similar, to_residual, written
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.errors import InputError


def test_the_draw_is_even_and_depends_on_the_seed():
    features, rows = np.divmod(np.arange(200_000), 400)
    drawn = chance(features, rows, 0)
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert abs(counts - 10_000).max() < 500 and len(np.unique(drawn)) == len(drawn)
    assert abs(np.corrcoef(drawn, chance(features, rows, 1))[0, 1]) < 0.01
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.01


def test_neighbours_in_blocks_are_the_same(monkeypatch):
    """The last block of rows overlaps the one before."""
    rows = jax.random.normal(jax.random.key(0), (23, 8))
    whole = most_similar(rows, None, 5, "")
    few = most_similar(rows, rows[:3], 5, "")
    monkeypatch.setattr("gemma_scope_jax.coders.directions.BLOCK", 10)
    for a, b in zip(whole, most_similar(rows, None, 5, "")):
        np.testing.assert_array_equal(a, b)
    assert (few[0][:, 3:] == -1).all() and sorted(few[0][0, :3].tolist()) == [0, 1, 2]


def test_several_layers():
    """A CLT's writes add up from its layer on; a crosscoder's last one counts."""
    X, D, width = 3, 6, 5
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape)
    clt = MultiLayerCoder(
        draw(0, X, D, width),
        jnp.zeros((X, width)),
        jnp.ones((X, width)),
        draw(1, 6, width, D),
        jnp.zeros((X, D)),
        layers=(2, 3, 7),
        reads="mlp_in",
        writes="mlp_out",
    )
    full = np.asarray(clt.full_decoder(), np.float64)  # [X, F, X, D]
    some = jnp.arange(2, dtype=jnp.int32)
    np.testing.assert_allclose(written(clt, 3), full[1][:, 1:].reshape(width, -1), rtol=1e-6)
    rows = to_residual(None, clt, 3, some)
    np.testing.assert_allclose(rows, full[1][:2].sum(1), rtol=1e-5, atol=1e-6)
    crosscoder = clt.replace(reads="resid_post", writes="resid_post")
    rows = to_residual(None, crosscoder, 2, some)
    np.testing.assert_allclose(rows, full[0][:2, 2], rtol=1e-6)
    with pytest.raises(InputError, match="features of 2, 3, 7"):
        written(clt, 4)
