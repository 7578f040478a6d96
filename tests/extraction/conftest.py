"""Documents, and the features that coders of every kind have on them."""

import numpy as np
import pytest

from feature_stores import CODERS, SETTINGS
from gemma_scope_jax.extraction.extract import extract
from letters import Letters


@pytest.fixture(scope="session")
def documents():
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + i) for i in rng.integers(0, 26, n)) for n in rng.integers(0, 90, 40)]
    return texts + ["", "z"]


@pytest.fixture(scope="session")
def store(model, documents, tmp_path_factory):
    return extract(model, CODERS, Letters(), documents, tmp_path_factory.mktemp("s"), **SETTINGS)
