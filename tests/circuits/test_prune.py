"""Pruning keeps what sorting all nodes and all edges would keep."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_scope_jax as gs
from assertions import one_line
from gemma_scope_jax.circuits import influence, prune
from graphs import pruned, random_graph, same_graph, square, threshold

THRESHOLDS = [(0.8, 0.98), (0.5, 0.5), (0.95, 0.8), (1.0, 1.0), (1.0, 0.9), (0.3, 1.0), (0.0, 0.0)]


def balanced(graph):
    rows = graph.effects.sum(axis=1, dtype=float) + graph.rest + graph.bias
    np.testing.assert_allclose(rows, graph.value, rtol=1e-5, atol=1e-4)


def agrees(graph, node_share, edge_share):
    found = graph.prune(node_share, edge_share)
    keep, edges, cumulative = pruned(graph, node_share, edge_share)
    size, n = len(graph.sources), graph.selected
    columns = np.flatnonzero(keep[:size])
    rows = np.concatenate([columns[columns < n], np.arange(size, len(keep))])
    want = np.where(edges, square(graph)[0], 0)[np.ix_(rows, columns)]
    np.testing.assert_array_equal(found.effects, want)
    np.testing.assert_array_equal(found.sources.feature, graph.sources.feature[columns])
    assert found.selected == (columns < n).sum()
    assert found.cumulative is not None
    np.testing.assert_allclose(found.cumulative, cumulative[columns], rtol=1e-9)
    np.testing.assert_array_equal(
        found.targets.feature[: found.selected], found.sources.feature[: found.selected]
    )
    balanced(found)


@pytest.mark.law
@pytest.mark.parametrize("shares", THRESHOLDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_kept_part_is_that_of_sorting(seed, shares):
    agrees(random_graph(seed, features=40, layers=6, density=0.4), *shares)


@pytest.mark.parametrize("shares", THRESHOLDS)
@pytest.mark.parametrize("seed", range(3))
def test_ties_are_kept_together(seed, shares):
    """Effects of few sizes: most scores have equals."""
    draw = lambda rng, shape: rng.choice([-2.0, -1.0, 1.0, 2.0], shape)
    agrees(random_graph(seed, features=24, draw=draw, density=0.5), *shares)


def test_blocks_change_nothing(monkeypatch):
    graph = random_graph(5, features=40)
    want = graph.prune(0.8, 0.9)
    monkeypatch.setattr(influence, "BLOCK", 1)
    same_graph(graph.prune(0.8, 0.9), want, skip={"cumulative"})


def test_pruning_says_what_it_did_and_leaves_the_graph_alone():
    graph = random_graph(6)
    before = dataclasses.replace(graph, effects=graph.effects.copy())
    found = graph.prune(0.7, 0.9)
    assert found.about["pruning"] == {"node_threshold": 0.7, "edge_threshold": 0.9}
    assert found.about["model"] == "acme/tiny" and found.tokens == graph.tokens
    same_graph(graph, before)
    assert (found.sources.kind == "token").sum() == 5
    assert (found.targets.kind == "logit").sum() == 3


def test_everything_that_matters_stays_at_one():
    """Also the least effect; what has no influence has no links."""
    graph = random_graph(7, features=30, density=1.0)
    effects = graph.effects.copy()
    effects[-1, 0] = 1e-30
    found = dataclasses.replace(graph, effects=effects).prune(1.0, 1.0)
    matters = graph.influence() > 0
    assert len(found.sources) == matters.sum()
    assert np.count_nonzero(found.effects) == np.count_nonzero(
        effects[np.concatenate([matters[:30], [True] * 3])][:, matters]
    )


def test_a_graph_of_nothing_keeps_tokens_and_targets():
    graph = random_graph(8)
    found = dataclasses.replace(graph, effects=graph.effects * 0).prune()
    assert (len(found.sources), len(found.targets), found.selected) == (5, 3, 0)


def test_a_chain_that_loses_its_end_goes():
    """Layer 0 -> 1 -> 2, which enters nothing: all three go, one after the other."""
    graph = random_graph(9, features=3, layers=3, density=0)
    effects = graph.effects.copy()
    layer = np.array([0, 1, 2], np.int32)
    place = {"layer": layer}
    n, token = 3, len(graph.sources) - 1
    effects[1, 0] = effects[2, 1] = effects[0, token] = 1.0
    effects[n:, token] = 1.0
    sources, targets = (
        dataclasses.replace(t, layer=np.concatenate([place["layer"], t.layer[n:]]))
        for t in (graph.sources, graph.targets)
    )
    graph = dataclasses.replace(graph, sources=sources, targets=targets, effects=effects)
    kept = prune._connected(effects.copy(), n, sources.kind == "token")
    assert kept[0].tolist() == [False] * 3 + [True] * 3
    assert kept[1].sum() == (sources.kind == "token").sum()
    assert graph.prune().selected == 0


# ---- the threshold


def found_threshold(values, share, parts=3):
    values = np.asarray(values, float)
    return prune.least_kept(lambda: np.array_split(values, parts), share)


@pytest.mark.law
@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([0.0, 0.1, 0.2, 0.3, 1 / 3, 1e-300, 5e-324]),
            st.floats(0, 1e6, allow_subnormal=True),
        ),
        min_size=1,
        max_size=60,
    ),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.9, 0.98, 0.999, 1.0]),
)
def test_the_threshold_is_that_of_sorting(values, share):
    values = np.array(values)
    least = found_threshold(values, share)
    if not values.any():
        assert (values >= least).sum() == 0
        return
    np.testing.assert_array_equal(values >= least, values >= threshold(values, share))


@pytest.mark.parametrize(
    ("values", "share", "kept"),
    [
        ([0.1] * 10, 0.8, 10),  # all are equal: none or all
        ([0.4, 0.4, 0.1, 0.1], 0.8, 2),
        ([0.7, 0.1, 0.1, 0.1], 0.7, 1),
        ([3, 2, 2, 1], 0.5, 3),
        ([1, 0, 0], 1.0, 1),
        ([1, 1e-17, 0], 1.0, 2),  # which a sum does not notice
        ([1, 1 - 1e-16, 1e-3], 0.4, 1),
        ([2, 1], 0.0, 1),
    ],
)
def test_thresholds_by_hand(values, share, kept):
    assert (np.array(values, float) >= found_threshold(values, share)).sum() == kept


def test_cumulative_shares_are_of_the_largest_first():
    np.testing.assert_allclose(prune.cumulative(np.array([1.0, 5, 0, 2])), [1, 5 / 8, 1, 7 / 8])
    assert np.isnan(prune.cumulative(np.zeros(2))).all()


# ---- errors


@pytest.mark.parametrize(("by", "count"), [("layer", 4), ("position", 5), ("all", 1)])
def test_merged_errors_sum_up(by, count):
    graph = random_graph(10)
    found = graph.merge_errors(by)
    errors = found.sources.kind == "error"
    assert errors.sum() == count and found.selected == graph.selected
    assert (found.sources.layer[errors] == -1).all() == (by != "layer")
    assert (found.sources.position[errors] == -1).all() == (by != "position")
    for column in np.flatnonzero(errors):
        node, one = found.sources, graph.sources
        of = one.kind == "error"
        of &= (node.layer[column] == -1) | (one.layer == node.layer[column])
        of &= (node.position[column] == -1) | (one.position == node.position[column])
        want = graph.effects[:, of].sum(axis=1, dtype=float)
        np.testing.assert_allclose(found.effects[:, column], want, rtol=1e-6)
    np.testing.assert_array_equal(
        found.effects[:, ~errors], graph.effects[:, graph.sources.kind != "error"]
    )
    balanced(found)
    balanced(found.prune())
    assert math.isfinite(found.scores().replacement)


def test_errors_merge_where_there_are_none():
    graph = random_graph(11).prune(0.1, 0.5)
    keep = graph.sources.kind != "error"
    bare = dataclasses.replace(
        graph, sources=graph.sources[keep], effects=graph.effects[:, keep], cumulative=None
    )
    same_graph(bare.merge_errors("layer"), bare)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda g: g.prune(1.1), "node_threshold is 1.1, expected 0 to 1"),
        (lambda g: g.prune(-0.1), "node_threshold"),
        (lambda g: g.prune(0.5, float("nan")), "edge_threshold is nan"),
        (lambda g: g.merge_errors("token"), "layer, position or all, not 'token'"),
    ],
)
def test_wrong_arguments_are_refused(use, said):
    with pytest.raises(gs.InputError, match=said) as caught:
        use(random_graph())
    one_line(caught)
