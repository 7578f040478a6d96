"""Supernodes, and the scores of a few pinned features."""

import dataclasses

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of, near, sums
from gemma_scope_jax.circuits.supernodes import edge_similarity
from graphs import influence, normalised, random_graph, square


def folded_scores(graph, pinned):
    """circuit-tracer's, on the square matrix: columns of features that are not pinned are added to
    the error of their layer and position, rows and columns set to zero."""
    matrix, weights = square(graph)
    nodes, n = graph.sources, graph.selected
    where = {
        (int(l), int(p)): i
        for i, (k, l, p) in enumerate(zip(nodes.kind, nodes.layer, nodes.position))
        if k == "error"
    }
    errors = list(where.values())
    for i in set(range(n)) - set(pinned):
        at = where[int(nodes.layer[i]), int(nodes.position[i])]
        matrix[:, at] += matrix[:, i]
        matrix[i], matrix[:, i] = 0, 0
    shares = normalised(matrix)
    found = influence(shares, weights)
    tokens = found[np.flatnonzero(nodes.kind == "token")].sum()
    passed = found + weights
    kept = 1 - shares[:, errors].sum(1)
    return tokens / (tokens + found[errors].sum()), (kept * passed).sum() / passed.sum()


@pytest.mark.parametrize("seed", range(4))
def test_subgraph_scores_are_circuit_tracers(seed):
    graph = random_graph(seed, features=25)
    for pinned in ([], [3, 9, 17], range(25)):
        got = gs.subgraph_scores(graph, pinned)
        near(np.array([got.replacement, got.completeness]), np.array(folded_scores(graph, pinned)))
    whole = graph.scores()
    assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(whole))


def test_a_subgraph_still_adds_up(model):
    """Also where the errors were pruned away, and with ids of viewers as names."""
    graph = gs.attribute(model, coders_of("clt"), IDS).prune(0.9)
    pinned = list(range(0, graph.selected, 3))
    part = gs.subgraph(graph, [*pinned, len(graph.sources) - 1])
    near(sums(part), graph.value[[*pinned, *range(graph.selected, len(graph.targets))]])
    assert part.selected == len(pinned) and part.scores().completeness < 1
    ids = gs.node_ids(graph)[0]
    named = gs.subgraph(graph, [ids[i] for i in pinned])
    assert np.array_equal(named.effects, part.effects)
    bare = dataclasses.replace(
        graph,
        sources=graph.sources[graph.sources.kind != "error"],
        effects=graph.effects[:, graph.sources.kind != "error"],
    )
    added = gs.subgraph(bare, pinned)
    assert (added.sources.kind == "error").any() and added.scores().error_share > 0


def planted():
    """A graph of three pairs: features of a pair get and hand on the same, one layer apart."""
    graph = random_graph(0, features=6, layers=8, tokens=3, logits=3, draw=lambda r, s: np.ones(s))
    n, effects = 6, np.zeros_like(graph.effects)
    tokens = np.flatnonzero(graph.sources.kind == "token")
    for i in range(n):
        effects[i, tokens[i % 3]] = 1 + 0.1 * i
        effects[n + i % 3, i] = 1
    layer = np.array([0, 0, 0, 3, 3, 3], np.int32)

    def placed(nodes):
        own = np.arange(10, 16, dtype=np.int32)
        layers = np.concatenate([layer, nodes.layer[n:]])
        features = np.concatenate([own, nodes.feature[n:]])
        return dataclasses.replace(nodes, layer=layers, feature=features)

    return dataclasses.replace(
        graph, effects=effects, sources=placed(graph.sources), targets=placed(graph.targets)
    )


def members(found):
    return sorted(sorted(group.members) for group in found.groups)


def test_features_with_the_same_edges_are_one():
    graph = planted()
    assert members(gs.find_supernodes(graph)) == [[0, 3], [1, 4], [2, 5]]
    assert members(gs.find_supernodes(graph, layers=2)) == [[i] for i in range(6)]
    assert members(gs.find_supernodes(graph, similarity=0)) == [list(range(6))]
    near(np.diag(edge_similarity(graph, np.arange(6))), np.ones(6))
    found = gs.find_supernodes(graph, most=2, labels={(0, int(graph.sources.feature[0])): "first"})
    assert len(found) <= 2 and found.influence[0] >= found.influence[-1]


def test_shares_do_not_depend_on_the_size_of_the_weights():
    """A target may be all but impossible."""
    graph = planted()
    tiny = dataclasses.replace(graph, weights=graph.weights * np.float32(1e-12))
    found, want = (gs.find_supernodes(g).influence for g in (tiny, graph))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_examples_join_and_separate():
    graph = planted()
    key = lambda i: (int(graph.sources.layer[i]), int(graph.sources.feature[i]))
    vector = np.eye(2)
    examples = {key(i): vector[int(i in (0, 4))] for i in range(5)}
    found = gs.find_supernodes(graph, examples=examples, weights={"edges": 0})
    assert members(found) == [[0, 4], [1, 2, 3], [5]]
    assert members(gs.find_supernodes(graph, examples=examples)) != members(found)


def test_positions_may_keep_features_apart():
    graph = planted()
    nodes, same = graph.sources, graph.sources.feature.copy()
    same[:3], layer = same[0], nodes.layer.copy()
    at = np.array([0, 1, 2, 0, 1, 2], np.int32)
    position = np.concatenate([at, nodes.position[6:]])
    ids = np.array([7, 7, 8], np.int32)
    sources = dataclasses.replace(nodes, feature=same, layer=layer, position=position)
    graph = dataclasses.replace(graph, sources=sources, ids=ids)
    assert [0, 1, 2] in [m[:3] for m in members(gs.find_supernodes(graph, layers=0))]
    by_token = members(gs.find_supernodes(graph, layers=0, together="token"))
    assert [0, 1] in by_token and [2] in by_token
    by_place = members(gs.find_supernodes(graph, layers=3, together="position"))
    assert by_place == [[0, 3], [1, 4], [2, 5]]


def test_labels_tell_what_members_share():
    graph = planted()
    nodes = graph.sources
    names = ["the Texas state", "a", "", "Texas, city", "a", ""]
    labels = {(int(nodes.layer[i]), int(nodes.feature[i])): name for i, name in enumerate(names)}
    found = gs.find_supernodes(graph, labels=labels)
    got = {group.members: group.label for group in found.groups}
    leader = next(m[0] for m in got if 2 in m)
    by_first = {min(m): label for m, label in got.items()}
    assert by_first[0] == "texas" and by_first[1] == "a"
    assert by_first[2] == f"{nodes.layer[leader]}/{nodes.feature[leader]}"
    same = gs.find_supernodes(graph, labels=dict.fromkeys(labels, "one"))
    assert sorted(same.columns()) == ["one", "one (2)", "one (3)"]


def test_effects_between_groups_are_sums():
    graph = random_graph(1, features=30)
    found = gs.find_supernodes(graph, similarity=0.2, most=20)
    effects, n = found.effects(), graph.selected
    tokens = np.flatnonzero(graph.sources.kind == "token")
    for r, target in enumerate(found.groups):
        for c, source in enumerate(found.groups):
            some = graph.effects[list(target.members)][:, list(source.members)]
            assert effects[r, c] == pytest.approx(some.sum())
    near(effects[len(found) :, len(found) :], graph.effects[n:][:, tokens])
    text = str(found)
    assert f"{len(found)} supernodes" in text and str(found.scores()) in text


def test_decoders_count(model):
    """Features with one decoder row are one, though they have nothing else in common."""
    coders = gs.CoderSet(c.replace(w_dec=c.w_dec.at[1].set(c.w_dec[0])) for c in coders_of("plain"))
    graph = gs.attribute(model, coders, IDS, max_feature_nodes=300)
    options = {"layers": 0, "similarity": 0.99, "weights": {"edges": 0}, "most": 500}
    found = gs.find_supernodes(graph, coders, **options)
    where = {i: n for n, group in enumerate(found.groups) for i in group.members}
    nodes, pairs = graph.sources, 0
    for i in where:
        for j in where:
            if nodes.layer[i] == nodes.layer[j] and {nodes.feature[i], nodes.feature[j]} <= {0, 1}:
                assert where[i] == where[j]
                pairs += i != j
    assert pairs and len(found) < graph.selected
    document = gs.graph_document(graph, supernodes=found.node_ids())
    assert len(document["qParams"]["supernodes"]) == len(found)
    assert gs.graph_page(graph, groups=found.columns())
    for group in found.groups:
        pairs = [(int(nodes.layer[i]), int(nodes.feature[i])) for i in group.members]
        assert found.features()[group.label] == sorted(set(pairs))


BAD = {
    "unknown id": (lambda g: gs.subgraph(g, ["0_0_99"]), "no node"),
    "a column": (lambda g: gs.subgraph(g, [10**6]), "columns 0 to"),
    "one text": (lambda g: gs.subgraph(g, "0_0_1"), "list of nodes"),
    "similarity": (lambda g: gs.find_supernodes(g, similarity=2), "from 0 to 1"),
    "together": (lambda g: gs.find_supernodes(g, together="here"), "anywhere, token, position"),
    "most": (lambda g: gs.find_supernodes(g, most=0), "most"),
    "layers": (lambda g: gs.find_supernodes(g, layers=-1), "layers"),
    "weights": (lambda g: gs.find_supernodes(g, weights={"edge": 1}), "edge=1"),
    "examples": (
        lambda g: gs.find_supernodes(
            g, examples={(int(g.sources.layer[0]), int(g.sources.feature[0])): np.zeros((2, 2))}
        ),
        r"\[n\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, message = BAD[what]
    with pytest.raises(gs.InputError, match=message) as error:
        call(random_graph(0))
    assert "\n" not in str(error.value)
