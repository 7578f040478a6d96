"""The graph by brute force, which other tests lean on: its sums, and its values in the model."""

import numpy as np
import pytest

import gemma_scope_jax as gs
from circuit_sets import IDS, SETS, features_of
from reference_graph import reference_graph


@pytest.mark.parametrize("kind", SETS)
def test_a_value_is_the_sum_of_its_effects(model, graphs, kind):
    graph = graphs(kind)
    total = graph.effects.sum(1) + graph.rest + graph.bias
    np.testing.assert_allclose(total, graph.value, atol=1e-5)
    np.testing.assert_allclose(graph.rest, 0, atol=1e-5)
    n = graph.selected
    logits = np.asarray(gs.run(model, IDS[None]).logits[0, -1])
    wanted = logits[graph.targets.feature[n:]] - logits.mean()
    np.testing.assert_allclose(graph.value[n:], wanted, atol=1e-5)
    np.testing.assert_allclose(graph.value[:n], graph.sources.activation[:n], atol=1e-5)
    later = graph.targets.layer[:, None] > graph.sources.layer[None, :]
    assert n > 100 and not graph.effects[~later].any()


def test_features_that_are_not_selected_count_to_the_rest(model, graphs):
    whole = graphs("clt")
    columns = np.arange(0, whole.selected, 3)
    part = reference_graph(model, SETS["clt"], IDS, features=features_of(whole)[columns])
    assert part.selected == len(columns)
    rows = np.concatenate([columns, np.arange(whole.selected, len(whole.targets))])
    mine = np.concatenate([columns, np.arange(whole.selected, len(whole.sources))])
    np.testing.assert_allclose(part.effects, whole.effects[rows][:, mine], atol=1e-5)
    np.testing.assert_allclose(part.effects.sum(1) + part.rest + part.bias, part.value, atol=1e-5)
    assert np.abs(part.rest).max() > 0.1
