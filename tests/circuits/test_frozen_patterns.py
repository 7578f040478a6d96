"""Attention patterns that are computed anew from what is frozen, where a prompt is filled up."""

import numpy as np

from attribution import IDS
from gemma_scope_jax.circuits.linear import pattern_of
from gemma_scope_jax.circuits.sources import read_prompt


def test_tokens_beyond_the_prompt_attend_to_nothing(model):
    """Else what sources write is multiplied there by the norms of empty outputs, a thousand at each
    layer, and overflows in 18: no edge of such a prompt could be split over heads."""
    prompt = read_prompt(model, IDS[:9])
    every = lambda x, axis: x
    room = prompt.mlp_in.shape[1]
    assert room > 9
    sums = np.zeros((model.config.heads, room))
    sums[:, :9] = 1
    for layer in range(model.config.layers):
        pattern = pattern_of(model.config, prompt.frozen, layer, every, every)
        np.testing.assert_allclose(pattern.reshape(-1, room, room).sum(-1), sums, atol=1e-5)
