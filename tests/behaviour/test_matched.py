"""Features of two models beside each other: rates counted by hand, and who is whose match."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.behaviour.contrasts.matched import compare_features
from gemma_scope_jax.errors import InputError
from planted_behaviour import CAUSE, behaviour_coder, behaviour_model, texts


@pytest.fixture(scope="module")
def two():
    """A model and one in which the token A says nothing; the coder, and it in another order, with
    the last 12 features turned into others."""
    model = behaviour_model()
    quiet = model.replace(params=model.params.replace(embed=model.params.embed.at[40, 1].set(0.0)))
    coder, rng = behaviour_coder(model), np.random.default_rng(0)
    order = rng.permutation(50)
    moved = lambda x, axis: jnp.take(x, np.append(order, np.arange(50, 62)), axis)
    rows = moved(coder.w_dec, 0).at[50:].set(rng.normal(size=(12, 32)).astype(np.float32))
    other = coder.replace(
        w_enc=moved(coder.w_enc, 1), threshold=moved(coder.threshold, 0), w_dec=rows
    )
    return model, coder, quiet, other, order


def test_features_are_matched_by_what_they_write(two):
    model, coder, quiet, other, order = two
    some = texts(np.random.default_rng(1), 20, 0.9)
    found = compare_features(model, coder, quiet, other, some)
    assert (found.feature_a < 50).all() and (order[found.feature_b] == found.feature_a).all()
    assert np.allclose(found.cosine, 1, atol=1e-5) and found.unmatched[0] > 5
    assert found.feature_a[0] == CAUSE and found.q[0] < 0.05 and found.family_p < 0.01
    assert found.rate_a[0] > 0.3 and found.rate_b[0] == 0
    assert (found.effect[1:] == 0).all() and (found.p[1:] == 1).all()
    f = [
        np.asarray(gs.run(model, ids[None], [gs.features(coder)]).reads["features"])[0, 1:]
        for ids in some
    ]
    rates = np.mean([(x > 0).mean(0) for x in f], 0)
    assert np.allclose(found.rate_a, rates[found.feature_a], atol=1e-6)
    assert json.loads(json.dumps(found.as_dict()))["features"][0]["feature_a"] == CAUSE
    assert f"{len(found)} pairs" in repr(found) and f"{found.rate_a[0]:.2%}" in str(found)


def test_one_coder_on_two_models_matches_itself(two):
    model, coder, quiet, _, _ = two
    found = compare_features(model, coder, quiet, coder, texts(np.random.default_rng(2), 10, 0.9))
    assert (found.feature_a == found.feature_b).all() and found.feature_a[0] == CAUSE
    assert found.unmatched == (0, 0)


def test_what_cannot_be_compared_is_refused(two):
    model, coder, quiet, other, _ = two
    some = texts(np.random.default_rng(3), 6)
    strange = random_coder(width=20, seed=5, layer=2)
    for changed, said in (
        ((model, coder, quiet, other, some[:4]), "4 texts: give at least 5"),
        ((model, coder, quiet, strange, some), "match with a cosine of 0.99"),
        ((model, coder, quiet, random_coder(layers=(0, 1)), some), "of one layer"),
        ((model, coder, quiet, random_coder(d=16), some), "for another model"),
    ):
        with pytest.raises(InputError) as error:
            compare_features(*changed, least=0.99)
        assert said in str(error.value)
