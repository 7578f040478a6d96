"""The graph by brute force, which other tests lean on: its sums, and its values in the model."""

import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from reference_graph import reference_graph

MLP = {"reads": "mlp_in", "writes": "mlp_out", "threshold": 0.2}
IDS = np.random.default_rng(0).integers(2, 300, 9).astype(np.int32)
SETS = {
    "plain": [random_coder(24, layer=i, seed=i, **MLP) for i in range(4)],
    "affine": [random_coder(24, layer=i, seed=i, skip=True, first=2, **MLP) for i in range(4)],
    "clt": [random_coder(24, layers=(0, 1, 2, 3), skip=True, **MLP)],
    "two layers": [random_coder(24, layer=i, seed=i, skip=i == 2, **MLP) for i in (0, 2)],
}


@pytest.mark.parametrize("skip_at_start", [True, False])
@pytest.mark.parametrize("kind", SETS)
def test_a_value_is_the_sum_of_its_effects(model, kind, skip_at_start):
    graph = reference_graph(model, SETS[kind], IDS, skip_at_start=skip_at_start)
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


def test_features_that_are_not_selected_count_to_the_rest(model):
    whole = reference_graph(model, SETS["clt"], IDS)
    columns = np.arange(0, whole.selected, 3)
    some = np.stack([getattr(whole.sources, k)[columns] for k in ("layer", "position", "feature")])
    part = reference_graph(model, SETS["clt"], IDS, features=some.T)
    assert part.selected == len(columns)
    rows = np.concatenate([columns, np.arange(whole.selected, len(whole.targets))])
    mine = np.concatenate([columns, np.arange(whole.selected, len(whole.sources))])
    np.testing.assert_allclose(part.effects, whole.effects[rows][:, mine], atol=1e-5)
    np.testing.assert_allclose(part.effects.sum(1) + part.rest + part.bias, part.value, atol=1e-5)
    assert np.abs(part.rest).max() > 0.1
