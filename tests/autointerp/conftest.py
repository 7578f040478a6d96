"""A corpus of planted features, a tiny judge, and endpoints that are asked again at once."""

import pytest

from gemma_scope_jax.autointerp.examples import Sampling, open_corpus
from gemma_scope_jax.autointerp.judges import chat_client
from judges import judge_of
from planted_store import PlantedStore, Tok


@pytest.fixture(scope="session")
def corpus():
    return open_corpus(PlantedStore(), Tok(), Sampling())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chat_client, "FIRST_PAUSE", 0.02)


@pytest.fixture(scope="session")
def judge():
    return judge_of("gemma-3-270m")
