"""Edges by heads: they add up, equal brute force, and fit what the page shows."""

import dataclasses

import jax
import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of, near
from gemma_scope_jax.circuits.linear import chunk_of, room_for
from gemma_scope_jax.circuits.page import graph_page
from gemma_scope_jax.model.config import PRESETS, Model
from letters import Letters
from reference_heads import by_first_head, by_last_head, reference_edges, through_heads
from tiny import tiny, tiny_model

T = gs.Target
VECTOR = np.random.default_rng(0).standard_normal(32).astype(np.float32)
TARGETS = [
    T.logit(7),
    T.logit(9, 4) - T.logit(3),
    T.feature(2, 5, 6),
    T.direction(VECTOR, 1, 3),
    0.5 * T.feature(3, 2) + T.direction(VECTOR, 2, 8),
]


def some_edges(graph, most=12, seed=1):
    """Edges [E, 2] between nodes of each two kinds, `most` of each, in no order."""
    rng = np.random.default_rng(seed)
    row, column = np.nonzero(graph.effects)
    final = np.where(row >= graph.selected, row, -1)
    kinds = np.stack([final, np.unique(graph.sources.kind, return_inverse=True)[1][column]], 1)
    found = []
    for kind in np.unique(kinds, axis=0):
        mine = np.flatnonzero((kinds == kind).all(1))
        found.append(rng.permutation(mine)[:most])
    chosen = rng.permutation(np.concatenate(found))
    return np.stack([row, column], 1)[chosen]


def at(graph, edges):
    return graph.effects[edges[:, 0], edges[:, 1]]


@pytest.fixture(scope="module", params=["affine", "affine clt"])
def made(request, model):
    coders = coders_of(request.param)
    graph = gs.attribute(model, coders, IDS, TARGETS)
    return coders, graph, some_edges(graph)


def test_parts_add_up_to_the_edge(model, made):
    """Of features, errors and tokens on features, logits, directions and sums."""
    coders, graph, edges = made
    assert len(edges) > 128 and len(set(graph.sources.kind[edges[:, 1]])) == 3
    want, given = at(graph, edges), (model, coders, graph, edges)
    last = gs.edge_heads(*given, targets=TARGETS)
    first = gs.edge_heads(*given, by="first", targets=TARGETS)
    near(last.total, want, 1e-5)
    near(first.total, want, 1e-5)
    near(last.no_head, first.no_head, 1e-5)
    flows = gs.head_flows(*given, targets=TARGETS)
    for layer in range(4):
        one = gs.edge_heads_at(*given, layer, targets=TARGETS)
        near(one.total, want, 1e-5)
        near(one.contributions.sum((2, 3)), flows[:, layer], 1e-5)
        unseen = np.triu(np.ones((len(IDS), len(IDS)), bool), 1)
        assert (one.contributions[:, :, unseen] == 0).all()
    # a last head writes at the target; a first one reads at the source
    here = graph.sources.position[edges[:, 1]]
    assert np.array_equal(last.position, here)
    for given, before in zip(last.contributions, here):
        assert (given[..., :before] == 0).all()


def test_equals_zeroing_patterns(model, made):
    coders, graph, edges = made
    known = np.isin(graph.targets.kind[edges[:, 0]], ("feature", "logit"))
    known &= (edges[:, 0] < graph.selected) | (graph.targets.label[edges[:, 0]] == "7")
    edges = edges[known][:24]
    of, pattern = reference_edges(model, coders, IDS, graph, edges)
    near(of(pattern), at(graph, edges), 1e-5)
    given = model, coders, graph, edges
    last = gs.edge_heads(*given, targets=TARGETS)
    near(last.no_head, of(np.zeros_like(pattern)), 1e-5)
    near(last.contributions, by_last_head(of, pattern), 1e-4)
    first = gs.edge_heads(*given, by="first", targets=TARGETS)
    near(first.contributions, by_first_head(of, pattern), 1e-4)
    near(gs.head_flows(*given, targets=TARGETS), through_heads(of, pattern), 1e-4)


def test_parts_are_linear_in_targets(model):
    coders = coders_of("affine")
    a, b = T.logit(7), T.direction(VECTOR, 2, position=9)
    targets = [a, b, a - 2.0 * b]
    graph = gs.attribute(model, coders, IDS, targets, max_feature_nodes=1)
    columns = np.arange(0, len(graph.sources), 5)
    split = {
        by: [
            gs.edge_heads(
                model, coders, graph, [(graph.selected + n, c) for c in columns],
                by=by, targets=targets,
            ).contributions
            for n in range(3)
        ]
        for by in ("last", "first")
    }  # fmt: skip
    for one, other, both in split.values():
        near(both, one - 2.0 * other, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-27b"])
def test_long_prompts_run_in_chunks(name):
    length = 100
    assert chunk_of(room_for(length)) < length
    model = tiny_model(PRESETS[name])
    model = Model(model.params, dataclasses.replace(tiny(PRESETS[name]), context=256))
    coders, rng = coders_of("affine", 8, 6), np.random.default_rng(1)
    ids = np.concatenate([[2], rng.integers(3, 300, length - 1)]).astype(np.int32)
    graph = gs.attribute(model, coders, ids, max_feature_nodes=40, desired_logit_prob=0.1)
    edges = some_edges(graph)
    want, given = at(graph, edges), (model, coders, graph, edges)
    near(gs.edge_heads(*given).total, want, 1e-5)
    near(gs.edge_heads(*given, by="first").total, want, 1e-5)
    one = gs.edge_heads_at(*given, 3)
    near(one.total, want, 1e-5)
    near(one.contributions.sum((2, 3)), gs.head_flows(*given)[:, 3], 1e-5)


def test_links_of_a_pruned_graph_go_to_its_page(model, tmp_path):
    coders = coders_of("clt")
    graph = gs.attribute(model, coders, IDS).prune(0.7, 0.9)
    graph.save(tmp_path / "graph.npz")
    graph = gs.load_graph(tmp_path / "graph.npz")
    heads = gs.link_heads(model, coders, graph, most_links=40, most_heads=3)
    assert len(heads) == 40 and graph_page(graph, heads=heads) != graph_page(graph)
    whole = gs.link_heads(model, coders, graph, most_links=40, most_heads=10**6)
    for (row, column), parts in whole.items():
        np.testing.assert_allclose(
            sum(part[3] for part in parts), graph.effects[row, column], atol=1e-5
        )
        sizes = [abs(part[3]) for part in parts]
        assert sizes == sorted(sizes, reverse=True) and parts[:3] == heads[row, column]
        source, target = graph.sources[column], graph.targets[row]
        for layer, head, key, _ in parts:
            assert -1 <= layer <= target.layer[0] and (head < 0) == (layer < 0)
            assert source.position[0] <= key <= target.position[0]
    first = gs.link_heads(model, coders, graph, most_links=40, by="first")
    for (_, column), parts in first.items():
        assert {part[2] for part in parts} == {int(graph.sources.position[column])}


def test_other_edges_and_layers_compile_nothing(model, caplog):
    coders = coders_of("affine")
    graph = gs.attribute(model, coders, IDS)
    edges = some_edges(graph, 8)

    def all_of(edges, layer):
        given = model, coders, graph, edges
        for by in ("last", "first"):
            gs.edge_heads(*given, by=by)
        return gs.head_flows(*given), gs.edge_heads_at(*given, layer)

    for some in (edges, edges[:3]):  # of either size
        all_of(some, 1)
    with jax.log_compiles():
        caplog.clear()
        all_of(some_edges(graph, 5, seed=2), 2)
    assert not [r for r in caplog.records if "Compiling" in r.message]


def test_targets_given_as_text(model):
    """The graph keeps their ids: nothing has to be given again, but for directions."""
    coders, tokenizer = coders_of("affine"), Letters()
    asked = ["a", T.logit("b") - T.logit("c"), T.direction(VECTOR, 1, 3)]
    given = {"tokenizer": tokenizer, "max_feature_nodes": 20}
    graph = gs.attribute(model, coders, IDS, asked, **given)
    n = graph.selected
    edges = np.array(
        [(n + k, c) for k in range(3) for c in np.flatnonzero(graph.effects[n + k])[:9]]
    )
    last = gs.edge_heads(model, coders, graph, edges, targets=asked)
    near(last.total, at(graph, edges), 1e-5)
    near(gs.edge_heads(model, coders, graph, edges[:18]).total, at(graph, edges[:18]), 1e-5)
    about = {**graph.about, "targets": graph.about["targets"][:2]}  # not those of this graph
    short = dataclasses.replace(graph, about=about)
    logit = np.flatnonzero(short.targets.kind[n:] == "logit") + n
    near(gs.edge_heads(model, coders, short, [(logit[0], 0)]).total, at(graph, np.array([[n, 0]])))
    with pytest.raises(gs.InputError, match="is a direction, which"):
        gs.edge_heads(model, coders, short, [(n + 1, 0)])


def test_a_mesh_gives_the_same(model):
    coders = coders_of("affine clt")
    graph = gs.attribute(model, coders, IDS, TARGETS)
    placed = jax.device_put(model.params, gs.param_shardings(model.config, gs.make_mesh(2, 2)))
    edges, many = some_edges(graph, 3), Model(placed, model.config)
    for of in (
        lambda m: gs.edge_heads(m, coders, graph, edges, targets=TARGETS).contributions,
        lambda m: gs.edge_heads(m, coders, graph, edges, by="first", targets=TARGETS).contributions,
        lambda m: gs.head_flows(m, coders, graph, edges, targets=TARGETS),
        lambda m: gs.edge_heads_at(m, coders, graph, edges, 2, targets=TARGETS).contributions,
    ):
        near(of(many), of(model), 1e-5)


def test_graphs_of_neurons(model):
    """What no neuron ends is split; the rest is refused in one line."""
    graph = gs.attribute(model, None, IDS, [7, 9], max_candidates=60)
    n, nodes = graph.selected, graph.sources
    tokens = np.flatnonzero((nodes.kind != "neuron") & graph.effects[n:].any(0))
    edges = np.array([(n + k, c) for k in range(2) for c in tokens])
    near(gs.edge_heads(model, None, graph, edges).total, at(graph, edges), 1e-5)
    bad = {"the edges of neurons cannot": (graph, (n, 0))}
    bad["give the coders"] = (
        gs.attribute(model, coders_of("plain"), IDS, max_feature_nodes=5),
        (0, 0),
    )
    for message, (one, edge) in bad.items():
        with pytest.raises(gs.InputError, match=message) as error:
            gs.edge_heads(model, None, one, [edge])
        assert "\n" not in str(error.value)


def merged(model, coders, graph):
    errors = np.flatnonzero(graph.merge_errors("all").sources.kind == "error")
    return gs.edge_heads(model, coders, graph.merge_errors("all"), [(0, errors[0])])


BAD = {
    "no pairs": (lambda m, c, g: gs.edge_heads(m, c, g, [1, 2]), "pairs of whole numbers"),
    "nothing": (lambda m, c, g: gs.edge_heads(m, c, g, []), "pairs of whole numbers"),
    "fractions": (lambda m, c, g: gs.head_flows(m, c, g, [(0.5, 1)]), "pairs of whole numbers"),
    "ragged": (lambda m, c, g: gs.edge_heads(m, c, g, [(0, 1), (2,)]), "pairs of whole numbers"),
    "row": (lambda m, c, g: gs.edge_heads(m, c, g, [(len(g.targets), 0)]), "row .* 0 to"),
    "column": (lambda m, c, g: gs.edge_heads(m, c, g, [(0, -1)]), "column -1 is not in the graph"),
    "by": (lambda m, c, g: gs.edge_heads(m, c, g, [(0, 0)], by="middle"), "last or the first"),
    "layer": (lambda m, c, g: gs.edge_heads_at(m, c, g, [(0, 0)], 4), "layers 0 to 3"),
    "direction": (lambda m, c, g: gs.edge_heads(m, c, g, [(len(g.targets) - 1, 0)]), "direction"),
    "targets": (
        lambda m, c, g: gs.edge_heads(m, c, g, [(0, 0)], targets=[7]), "1 targets for a graph",
    ),
    "other coders": (
        lambda m, c, g: gs.edge_heads(
            m, coders_of("clt"), g, some_edges(g, 5), targets=TARGETS
        ), "was made with",
    ),
    "merged errors": (merged, "merge_errors"),
    "no links": (lambda m, c, g: gs.link_heads(m, c, g, most_links=0), "most_links"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(model, what):
    call, message = BAD[what]
    coders = coders_of("plain")
    graph = gs.attribute(model, coders, IDS, TARGETS, max_feature_nodes=30)
    with pytest.raises(gs.InputError, match=message) as error:
        call(model, coders, graph)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_real_model():
    """The packaged transcoders on the real 270M."""
    model, tok = gs.load_model("gemma-3-270m", dtype="float32"), gs.load_tokenizer("gemma-3-270m")
    coders = gs.load_coders("gemma-3-270m-transcoder-*")
    graph = gs.attribute(
        model, coders, tok.encode("The capital of France is"), max_feature_nodes=64
    )
    edges = some_edges(graph, 4)
    want, given = at(graph, edges), (model, coders, graph, edges)
    last = gs.edge_heads(*given)
    near(last.total, want, 1e-5)
    near(gs.edge_heads(*given, by="first").total, want, 1e-5)
    one, flows = gs.edge_heads_at(*given, 11), gs.head_flows(*given)
    near(one.total, want, 1e-5)
    near(one.contributions.sum((2, 3)), flows[:, 11], 1e-5)
    assert (np.abs(last.contributions).sum((1, 2, 3)) > 0).any()
