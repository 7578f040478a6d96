"""Influence and scores, by the layers and by the plain formulas."""

import dataclasses
import math

import numpy as np
import pytest

import gemma_scope_jax as gs
import graphs
from assertions import one_line
from gemma_scope_jax.circuits import influence
from gemma_scope_jax.circuits.graph import Nodes
from graphs import random_graph


@pytest.mark.law
@pytest.mark.parametrize("seed", range(8))
def test_the_sweep_is_the_sum_of_all_powers(seed):
    graph = random_graph(seed, features=30, layers=7, density=(0.1, 0.9)[seed % 2])
    matrix, weights = graphs.square(graph)
    want = graphs.influence(graphs.normalised(matrix), weights)[: len(graph.sources)]
    np.testing.assert_allclose(graph.influence(), want, rtol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_the_formulas(seed):
    graph = random_graph(seed, features=25)
    found = graph.scores()
    replacement, completeness = graphs.scores(graph)
    assert math.isclose(found.replacement, replacement, rel_tol=1e-12)
    assert math.isclose(found.completeness, completeness, rel_tol=1e-12)
    assert math.isclose(found.error_share, 1 - replacement, rel_tol=1e-9)
    assert str(found).startswith(f"replacement {replacement:.3f}, completeness")


@pytest.mark.parametrize("seed", range(4))
def test_what_is_not_explained_counts_as_an_error_of_each_target(seed):
    graph = random_graph(seed, features=25)
    rng = np.random.default_rng(seed)
    graph = dataclasses.replace(graph, rest=rng.standard_normal(len(graph.targets)).astype("f4"))
    more = np.flatnonzero(graph.sources.kind == "error")[:1]
    as_error = dataclasses.replace(
        graph,
        sources=Nodes.joined(graph.sources, graph.sources[more]),
        effects=np.concatenate([graph.effects, graph.rest[:, None]], 1),
    )
    found, want = graph.scores(rest=True), as_error.scores()
    assert math.isclose(found.replacement, want.replacement, rel_tol=1e-12)
    assert math.isclose(found.completeness, want.completeness, rel_tol=1e-12)
    assert found.replacement < graph.scores().replacement


def test_all_influence_comes_from_tokens_and_errors():
    """Where every node has inputs, what starts at the logits ends at the sources without any."""
    graph = random_graph(1, density=1.0)
    ends = np.isin(graph.sources.kind, ("token", "error"))
    assert math.isclose(graph.influence()[ends].sum(), graph.weights.sum(), rel_tol=1e-6)


def test_blocks_of_rows_change_nothing(monkeypatch):
    graph = random_graph(2, features=40)
    want, scores = graph.influence(), graph.scores()
    monkeypatch.setattr(influence, "BLOCK", 1)
    np.testing.assert_allclose(graph.influence(), want, rtol=1e-13)
    assert math.isclose(graph.scores().completeness, scores.completeness, rel_tol=1e-13)


def test_a_graph_without_features_has_scores():
    graph = random_graph(3, features=0)
    np.testing.assert_allclose(
        graph.influence(), graph.weights @ graphs.normalised(graph.effects.astype(float))
    )
    assert 0 < graph.scores().replacement < 1
    nothing = dataclasses.replace(graph, effects=graph.effects * 0).scores()
    assert math.isnan(nothing.replacement) and nothing.completeness == 1


def partial(rows, weights, place, columns):
    """The iteration of circuit-tracer while a graph grows."""
    shares = graphs.normalised(rows, 1e-8)
    now, found = np.zeros(columns), np.zeros(columns)
    passed = weights.astype(float)
    while True:
        now = passed @ shares
        if not now.any():
            return found
        found += now
        passed = np.where(place >= 0, now[place], 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_partial_influence_is_that_of_the_rows_known(seed):
    """Logits first, then features in the order in which they were chosen, in a larger buffer."""
    graph, rng = random_graph(seed, features=30, layers=6), np.random.default_rng(seed)
    order = np.concatenate([np.arange(30, 33), rng.permutation(30)[:17]])
    node = np.where(order < 30, order, -1)
    buffer = np.full((64, len(graph.sources)), np.nan, np.float32)
    buffer[:20] = graph.effects[order]
    found = influence.partial_influence(
        buffer, graph.targets.layer[order], node, graph.weights[order]
    )
    want = partial(buffer[:20].astype(float), graph.weights[order], node, len(graph.sources))
    np.testing.assert_allclose(found, want, rtol=1e-12)


def spoiled(change):
    graph = random_graph(4, density=1.0)
    effects = graph.effects.copy()
    change(graph, effects)
    return dataclasses.replace(graph, effects=effects)


def put(row, column, value):
    return lambda graph, effects: effects.__setitem__((row, column), value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(-1, 0, np.nan), "NaN"),
        (put(-1, 0, np.inf), "NaN or infinities"),
        (put(11, 11, 1.0), "its own or a higher"),  # on itself
        (put(0, 11, 1.0), "its own or a higher"),
    ],
)
def test_effects_that_are_no_graph_are_refused(change, said):
    for use in (gs.Graph.influence, gs.Graph.scores, gs.Graph.prune):
        with pytest.raises(gs.InputError, match=said) as caught:
            use(spoiled(change))
        one_line(caught)


def test_negative_weights_are_refused():
    graph = random_graph(4)
    with pytest.raises(gs.InputError, match="weights are negative"):
        dataclasses.replace(graph, weights=-graph.weights).influence()
