"""The strongest sources of a graph, and graphs and results as one line."""

import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.errors import InputError
from graphs import random_graph


def test_the_strongest_sources_are_those_of_most_influence():
    graph = random_graph(1, features=30)
    found, whole = graph.strongest(7), graph.influence()
    assert len(found) == 7 and (found.nodes.kind == "feature").all()
    np.testing.assert_allclose(found.influence, whole[found.columns] / graph.weights.sum())
    assert (np.diff(found.influence) <= 0).all()
    assert found.influence[0] == whole[:30].max() / graph.weights.sum()
    rest = np.delete(whole[:30], found.columns)
    assert rest.max() <= whole[found.columns[-1]]
    first, second = str(found).splitlines()[:2]
    layer, feature = found.nodes.layer[0], found.nodes.feature[0]
    assert first.split() == ["node", "influence", "activation"]
    assert second.startswith(f"feature {layer}/{feature} at {found.nodes.position[0]}")
    assert f"{found.influence[0]:.2%}" in second


def test_they_are_edits_for_interventions():
    found = random_graph(1, features=30).strongest(3)
    for n, edit in enumerate(found.edits(2)):
        names = ("layer", "position", "feature")
        assert edit == (*(getattr(found.nodes, name)[n] for name in names), 2.0)
        assert gs.Intervention(*edit).feature == found.nodes.feature[n]
    errors = random_graph(1).strongest(99, kinds=["error", "token"])
    assert set(errors.nodes.kind.tolist()) == {"error", "token"}
    with pytest.raises(InputError, match="an intervention sets features, not errors, tokens"):
        errors.edits()
    for wrong in ({"count": 0}, {"kinds": ["head"]}):
        with pytest.raises(InputError, match=r"count|kinds of nodes are feature, .*not head"):
            random_graph(1).strongest(**wrong)


def test_tables_of_nodes_are_one_line():
    graph = random_graph(1, features=30, logits=2)
    assert repr(graph.targets) == "Nodes(30 x feature, 2 x logit)"
