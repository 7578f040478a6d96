"""The graphs by brute force, made once for all tests that ask for them; fewer programs."""

import pytest

from circuit_sets import IDS, SETS
from gemma_scope_jax.circuits import linear
from reference_graph import reference_graph

PREFIXES = linear.prefixes


@pytest.fixture(scope="module", autouse=True)
def one_length(compile_once_for_all):
    """Rows run at a prompt's whole length: one program a graph where there would be four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "prefixes", lambda size: (size,))
        yield


@pytest.fixture
def cut_short(monkeypatch):
    """As users have it: rows that end early in a short prompt run without the tokens after them."""
    monkeypatch.setattr(linear, "prefixes", PREFIXES)


@pytest.fixture(scope="session")
def graphs(model):
    """`graphs(kind)`: that of the coders `circuit_sets.SETS[kind]` on `circuit_sets.IDS`."""
    made = {}

    def graph(kind):
        if kind not in made:
            made[kind] = reference_graph(model, SETS[kind], IDS)
        return made[kind]

    return graph
