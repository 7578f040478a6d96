"""A batch of tokens as the text of an extraction: its documents, and of its tokens those in use."""

import jax
import jax.numpy as jnp
import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model

TEXTS = ["abc", "a longer text of letters", "middle one", "another of them"]
D, F = 32, 48


def test_a_batch_is_extracted_as_it_would_be_encoded(tmp_path):
    model = tiny_model(PRESETS["gemma-3-270m"], layers=2)
    k = jax.random.split(jax.random.key(0), 2)
    normal = lambda key, *shape: jax.random.normal(key, shape) / D**0.5
    coder = SparseCoder(
        normal(k[0], D, F), jnp.zeros(F), jnp.full(F, 0.2), normal(k[1], F, D), jnp.zeros(D),
        layer=1, first=2,
    )  # fmt: skip
    batch = gs.tokens(TEXTS, Letters())
    batch = batch.replace(mask=batch.mask & (batch.tokens % 3 > 0))
    options = dict(batch_size=2, context_size=32, seed=None, values="float32")
    store = gs.extract(model, {"sae": coder}, Letters(), batch, tmp_path, **options)

    x = gs.run(model, batch, [gs.capture("resid_post", 1)]).reads["resid_post"]
    f = np.asarray(gs.encode(coder, x, batch))
    f = np.where(np.asarray(batch.counted(coder.first))[..., None], f, 0)[batch.segments > 0]
    found = np.zeros((len(store), F), np.float32)
    for feature in range(F):
        rows, values = store.feature(feature, "sae", 1)
        found[rows, feature] = values
    assert (found > 0).sum() > 100
    np.testing.assert_allclose(found, f, rtol=1e-4, atol=1e-4)
