"""The tiny model of 8 layers that small runs train on, and its tokenizer of letters."""

import pytest

from gemma_scope_jax.training import feeds
from letters import Letters
from tiny import tiny_model
from training_runs import MODEL


@pytest.fixture(scope="session")
def model():
    return tiny_model(MODEL)


@pytest.fixture(scope="module", autouse=True)
def letters():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeds, "load_tokenizer", lambda source: Letters())
        yield
