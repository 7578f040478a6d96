"""Parity with transformers, from numbers that it computed (tests/golden/transformers.npz).

The file is written by `make golden`, which needs torch; these tests do not. Tolerances: logits
within 1e-4, sites within 2e-5 of the site's largest value, generated tokens equal.
"""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.weights import SITES, checksum, random_params

import gemma_scope_jax as gs

GOLDEN = Path(__file__).parent / "golden" / "transformers.npz"
EVERYTHING = [gs.capture(site) for site in SITES]


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(name + "/")}


@cache
def model(name: str) -> gs.Model:
    about = json.loads(str(golden(name)["about"]))
    config = gs.GemmaConfig(**about["config"])
    params = random_params(config, about["seed"])
    drawn = checksum(params)
    assert abs(drawn / about["checksum"] - 1) < 1e-9, "numpy draws other weights: `make golden`"
    return gs.Model(jax.tree.map(jnp.asarray, params), config)


def assert_sites_agree(reads, expected, largest=None) -> None:
    """Within 2e-5 of each layer's largest value, of `expected` or as given by site."""
    for site in SITES:
        ours, theirs = np.asarray(reads[site]), expected[site]
        assert ours.shape == theirs.shape
        for layer in range(len(theirs)):
            top = np.abs(theirs[layer] if largest is None else largest[site][layer]).max()
            error = np.abs(ours[layer] - theirs[layer]).max() / top
            assert error < 2e-5, (site, layer, error)


@pytest.mark.parametrize("name", gs.PRESETS)
def test_shrunken_model_agrees_with_transformers(name):
    expected = golden(name)
    assert expected["ids"].shape[1] > model(name).config.window
    out = gs.run(model(name), expected["ids"], EVERYTHING)
    assert np.abs(np.asarray(out.logits) - expected["logits"]).max() < 1e-4
    assert_sites_agree(out.reads, expected)


@pytest.mark.parametrize("name", gs.PRESETS)
def test_greedy_generation_agrees_with_transformers(name):
    expected = golden(name)
    made = gs.generate(model(name), expected["ids"][:, :10], 64, stop_tokens=())
    np.testing.assert_array_equal(np.asarray(made.tokens), expected["generated"])


@cache
def real_model() -> gs.Model:
    return gs.load_model("gemma-3-270m", dtype="float32")


@pytest.mark.real
def test_the_real_270m_agrees_with_transformers():
    expected = golden("real")
    out = gs.run(real_model(), expected["ids"], EVERYTHING)
    assert np.abs(np.asarray(out.logits)[..., ::256] - expected["logits"]).max() < 1e-4
    # Only the last token's values are kept in the file; a site's largest is another token's.
    last = {site: np.asarray(out.reads[site])[:, :, -1] for site in SITES}
    assert_sites_agree(last, expected, {site: np.asarray(out.reads[site]) for site in SITES})


@pytest.mark.real
def test_greedy_generation_of_the_real_270m_agrees_with_transformers():
    expected = golden("real")
    made = gs.generate(real_model(), expected["ids"], 64, stop_tokens=())
    np.testing.assert_array_equal(np.asarray(made.tokens), expected["generated"])
