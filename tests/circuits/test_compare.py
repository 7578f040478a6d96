"""Graphs side by side: differences, means over prompts, and overlaps of dictionaries."""

import dataclasses

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of, near
from gemma_scope_jax.circuits.graph import Nodes
from gemma_scope_jax.circuits.overlap import token_effects
from gemma_scope_jax.circuits.validate import rank_correlation
from graphs import random_graph


def edges(graph, positions="start"):
    """{(target, source): effect} in plain Python."""
    found = {}
    length = len(graph.ids)

    def name(table, i, final):
        at = int(table.position[i])
        at = {"start": at, "end": at - length, "ignore": -1}[positions]
        return final, str(table.kind[i]), int(table.layer[i]), at, int(table.feature[i])

    for r, c in np.argwhere(graph.effects):
        pair = name(graph.targets, r, r >= graph.selected), name(graph.sources, c, False)
        found[pair] = found.get(pair, 0.0) + float(graph.effects[r, c])
    return found


def of_result(result, values):
    rows = list(zip(*(getattr(result.nodes, f).tolist() for f in FIELDS)))
    name = lambda i: (rows[i][0] == "logit", *rows[i])
    return {(name(t), name(s)): v for t, s, v in zip(result.target, result.source, values)}


FIELDS = ("kind", "layer", "position", "feature")


def shortened(graph, by=1):
    """The same graph without its first `by` tokens: all else moves to the left."""
    gone = lambda table: (table.position < by) & (table.position >= 0)
    left, right = ~gone(graph.sources), ~gone(graph.targets)
    n = graph.selected
    moved = lambda table: dataclasses.replace(table, position=table.position - by)
    return dataclasses.replace(
        graph,
        sources=moved(graph.sources[left]),
        targets=moved(graph.targets[right]),
        effects=graph.effects[right][:, left],
        value=graph.value[right],
        bias=graph.bias[right],
        rest=graph.rest[right],
        weights=graph.weights[right],
        ids=graph.ids[by:],
        tokens=graph.tokens[by:],
        selected=int(left[:n].sum()),
    )


@pytest.mark.parametrize("positions", ["start", "end", "ignore"])
def test_a_difference_holds_every_edge(positions):
    a = random_graph(0, features=40, width=3)
    b = shortened(random_graph(1, features=40, width=3))
    got = gs.graph_difference(a, b, positions=positions)
    want_a, want_b = edges(a, positions), edges(b, positions)
    for values, want in ((got.a, want_a), (got.b, want_b)):
        found = of_result(got, values)
        assert {k for k, v in found.items() if v} <= set(want) <= set(found)
        assert found == pytest.approx({k: want.get(k, 0.0) for k in found})
    assert (np.diff(np.abs(got.difference)) <= 0).all()
    assert set(want_a) & set(want_b) and f"{got.difference[0]:+.4g}" in str(got).splitlines()[2]


def test_a_difference_is_a_graph():
    a, b = random_graph(0, features=40, width=3), random_graph(1, features=40, width=3)
    same = (a - a).graph()
    assert not same.effects.any() and not same.value.any()
    got = (a - b).graph()
    n = got.selected
    assert [t.tolist() for t in (got.sources.layer[:n], got.sources.feature[:n])] == [
        t.tolist() for t in (got.targets.layer[:n], got.targets.feature[:n])
    ]
    want = edges(a)
    for pair, effect in edges(b).items():
        want[pair] = want.get(pair, 0.0) - effect
    assert edges(got) == pytest.approx({k: v for k, v in want.items() if v})
    near(got.value, got.effects.sum(1) + got.bias + got.rest)
    assert got.prune().scores() and gs.graph_page(got, title="a difference")
    longer = gs.graph_difference(a, shortened(b), positions="end").graph()
    assert len(longer.ids) == len(longer.tokens) == 5 and longer.tokens[-1] == " t4"
    assert edges(longer) == pytest.approx(
        edges(gs.graph_difference(a, dataclasses.replace(
            shortened(b), ids=b.ids, tokens=b.tokens,
            sources=dataclasses.replace(
                shortened(b).sources, position=shortened(b).sources.position + 1
            ),
            targets=dataclasses.replace(
                shortened(b).targets, position=shortened(b).targets.position + 1
            ),
        )).graph())
    )  # fmt: skip


def test_finals_match_by_token_order_or_mean():
    a = random_graph(0, logits=2)
    b = dataclasses.replace(a, targets=renamed(a, [" x", " y"], 500))
    assert len(gs.graph_difference(a, b).graph().targets) == a.selected + 4
    by_order = gs.graph_difference(a, b, finals="order")
    assert not by_order.difference.any() and '"w0 /  x' in by_order.table(10_000)
    many = [dataclasses.replace(a, targets=renamed(a, [f"{i}", "y"], i)) for i in range(9)]
    assert "0 / 1 / 2 / ..." in gs.aggregate_graphs(many, finals="order").nodes.label.tolist()
    mean = gs.graph_difference(a, b, finals="mean").graph()
    assert len(mean.targets) == a.selected + 1 and not mean.effects.any()


def renamed(graph, labels, feature):
    n = graph.selected
    finals = graph.targets[n:]
    finals = dataclasses.replace(finals, label=np.array(labels), feature=finals.feature + feature)
    return Nodes.joined(graph.targets[:n], finals)


def test_an_aggregate_is_a_mean_with_an_interval():
    graphs = [random_graph(seed, features=30, width=2, logits=2) for seed in range(12)]
    got = gs.aggregate_graphs(iter(graphs), finals="mean", most_edges=10**6)
    count = {}
    for graph in graphs:
        weights = np.ones(len(graph.targets))
        weights[graph.selected :] = graph.weights[graph.selected :]
        weights[graph.selected :] /= weights[graph.selected :].sum()
        scaled = dataclasses.replace(graph, effects=graph.effects * weights[:, None])
        one = {}
        for (target, source), effect in edges(scaled, "ignore").items():
            if target[0]:
                target = (False, "direction", graph.layers, -1, -1)
            one[target, source] = one.get((target, source), 0.0) + effect
        for pair, effect in one.items():
            count.setdefault(pair, []).append(effect)
    found = of_result(got, got.mean)
    assert found == pytest.approx({k: sum(v) / 12 for k, v in count.items()}, abs=1e-6)
    assert of_result(got, got.present) == {k: len(v) / 12 for k, v in count.items()}
    assert (got.low <= got.mean).all() and (got.mean <= got.high).all()
    assert got.edges == len(got) and "12 prompts" in str(got)
    again = gs.aggregate_graphs(graphs, finals="mean", most_edges=40, least_present=0.5)
    assert (again.present >= 0.5).all() and len(again) == 40
    columns = [list(of_result(got, got.low)).index(k) for k in of_result(again, again.low)]
    assert np.array_equal(again.low, got.low[columns])  # the same prompts are drawn


def test_influence_adds_up_over_the_edges():
    """Of each source's outgoing edges to its influence, whatever the units of the targets are."""
    graph = random_graph(2, features=30)
    options = {"positions": "start", "finals": "token", "measure": "influence"}
    got = gs.aggregate_graphs([graph], **options)
    sums = np.bincount(got.source, np.abs(got.mean), len(got.nodes))
    want = graph.influence() / graph.weights.sum()
    near(np.sort(sums[sums > 0]), np.sort(want[want > 0]))
    scaled = graph.effects * np.arange(1, len(graph.targets) + 1)[:, None].astype(np.float32)
    other = dataclasses.replace(graph, effects=scaled)
    assert np.abs(gs.graph_difference(graph, other, measure="influence").difference).max() < 1e-6


def test_intervals_cover_the_true_mean():
    """Of an edge whose effects are normal with mean 1: the share of 95 % intervals that hold it."""
    base = random_graph(0, features=20, logits=1)
    edge = tuple(np.argwhere(base.effects)[0])
    inside = 0
    for trial in range(40):
        rng = np.random.default_rng(trial)
        graphs = []
        for _ in range(30):
            effects = np.zeros_like(base.effects)
            effects[edge] = 1 + rng.standard_normal()
            graphs.append(dataclasses.replace(base, effects=effects))
        got = gs.aggregate_graphs(graphs, positions="start", seed=trial)
        inside += got.low[0] <= 1 <= got.high[0]
    assert 34 <= inside <= 40


def test_token_effects_run_along_all_paths(model):
    coders = coders_of("clt")
    graph = gs.attribute(model, coders, IDS)
    n, found = graph.selected, token_effects(graph)
    step = np.zeros((len(graph.targets), len(graph.sources)))
    step[:n] = graph.effects[:n] / graph.sources.activation[:n, None]
    total = graph.effects[n:].astype(np.float64)
    through = total[:, :n]
    while np.abs(through).max() > 1e-12:
        more = through @ step[:n]
        total, through = total + more, more[:, :n]
    near(found, total[:, graph.sources.kind == "token"])


def test_an_overlap_compares_dictionaries(model):
    targets = [7, 9]
    first, second = (
        gs.attribute(model, coders_of(k), IDS, targets).prune() for k in ("plain", "clt")
    )
    same = gs.graph_overlap(first, first)
    assert same.place_correlation == same.token_correlation == same.effect_correlation == 1
    assert same.common_routes == pytest.approx(1)
    got = gs.graph_overlap(first, second)
    near(got.places.sum((1, 2)), np.ones(2))
    tokens = [graph.scores().replacement for graph in (first, second)]
    near(got.tokens.sum(1), np.array(tokens))
    assert got.effects.shape == (2, 2, len(IDS)) and got.targets == ["7", "9"]
    assert -1 <= got.effect_correlation < 1 and 0 < got.common_routes < 1
    assert got.errors[1] == second.scores().error_share and "route" in str(got)


def test_rank_correlation():
    assert rank_correlation(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)
    assert rank_correlation(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 1, 2, 3]), np.array([1, 2, 2, 4])) == pytest.approx(5 / 6)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_parts_of_influence_do_not_depend_on_the_size_of_the_weights():
    """A target may be all but impossible."""
    graph = random_graph(0)
    tiny = dataclasses.replace(graph, weights=graph.weights * np.float32(1e-12))
    found = gs.graph_difference(tiny, graph, measure="influence")
    np.testing.assert_allclose(found.a, found.b, rtol=1e-4)


DEEP = random_graph(0, layers=3)
BAD = {
    "depth": (lambda g: g - DEEP, "4 layers, another of 3"),
    "positions": (lambda g: gs.graph_difference(g, g, positions="middle"), "choose one of start"),
    "measure": (
        lambda g: gs.graph_difference(g, g, measure="share"), "choose one of effect, influence",
    ),
    "finals": (lambda g: gs.graph_difference(g, g, finals="all"), "choose one of token"),
    "no positions": (lambda g: gs.graph_difference(g, g, positions="ignore").graph(), "positions"),
    "merged": (
        lambda g: gs.graph_difference(g.merge_errors("layer"), g, positions="end"), "merged",
    ),
    "no graphs": (lambda g: gs.aggregate_graphs([]), "no graphs"),
    "level": (lambda g: gs.aggregate_graphs([g], level=95), "shares from 0 to 1"),
    "resamples": (lambda g: gs.aggregate_graphs([g], resamples=0), "resamples"),
    "prompts": (lambda g: gs.graph_overlap(g, random_graph(1)), "same prompt"),
    "paths": (lambda g: gs.graph_overlap(g, g, paths=0), "count"),
    "targets": (
        lambda g: gs.graph_overlap(g, dataclasses.replace(g, targets=renamed(g, list("abc"), 500))),
        "different targets",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, message = BAD[what]
    with pytest.raises(gs.InputError, match=message) as error:
        call(random_graph(0))
    assert "\n" not in str(error.value)
