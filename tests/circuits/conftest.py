"""The graphs by brute force, made once for all tests that ask for them."""

import pytest

from circuit_sets import IDS, SETS
from reference_graph import reference_graph


@pytest.fixture(scope="session")
def graphs(model):
    """`graphs(kind)`: that of the coders `circuit_sets.SETS[kind]` on `circuit_sets.IDS`."""
    made = {}

    def graph(kind):
        if kind not in made:
            made[kind] = reference_graph(model, SETS[kind], IDS)
        return made[kind]

    return graph
