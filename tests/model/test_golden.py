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

import gemma_scope_jax as gs
from golden.parity import assert_sites_agree, our_forward
from golden.weights import KEPT, SITES, checksum, random_params

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers.npz"


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


@pytest.mark.parametrize("name", gs.PRESETS)
def test_shrunken_model_agrees_with_transformers(name):
    expected = golden(name)
    assert expected["ids"].shape[1] > model(name).config.window
    logits, sites = our_forward(model(name), expected["ids"])
    assert np.abs(logits[:, -KEPT:] - expected["logits"]).max() < 1e-4
    assert_sites_agree({site: sites[site][:, :, -KEPT:] for site in SITES}, expected)


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
    logits, sites = our_forward(real_model(), expected["ids"])
    assert np.abs(logits[..., ::256] - expected["logits"]).max() < 1e-4
    assert_sites_agree({site: sites[site][:, :, -1] for site in SITES}, expected)


@pytest.mark.real
def test_greedy_generation_of_the_real_270m_agrees_with_transformers():
    expected = golden("real")
    made = gs.generate(real_model(), expected["ids"], 64, stop_tokens=())
    np.testing.assert_array_equal(np.asarray(made.tokens), expected["generated"])
