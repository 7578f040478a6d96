"""Graphs computed, pruned and written by circuit-tracer and by us, and read by each other."""

import importlib
import json
import urllib.parse

import numpy as np
import pytest

import gemma_scope_jax as gs
import graphs
from gemma_scope_jax.circuits import influence
from graphs import random_graph

pytestmark = [
    pytest.mark.peers,
    # what the peers warn about on import and in their own code is not ours to mend
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def doubles():
    """circuit-tracer's float32 would decide ties by rounding."""
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theirs(graph):
    """Our graph as circuit-tracer's, on the square matrix of all nodes."""
    import torch
    from circuit_tracer import graph as peer
    from circuit_tracer.attribution.targets import LogitTarget
    from circuit_tracer.utils.tl_nnsight_mapping import UnifiedConfig

    n, nodes = graph.selected, graph.sources
    columns = (nodes.layer[:n], nodes.position[:n], nodes.feature[:n])
    asked = graph.targets[n:]
    config = UnifiedConfig(graph.layers, 8, 4, 2, 16, 300, "tiny", "tiny", "Gemma3ForCausalLM")
    return peer.Graph(
        input_string="".join(graph.tokens),
        input_tokens=torch.tensor(graph.ids),
        active_features=torch.tensor(np.stack(columns, axis=1)),
        adjacency_matrix=torch.tensor(graphs.square(graph)[0]),
        cfg=config,
        selected_features=torch.arange(n),
        activation_values=torch.tensor(nodes.activation[:n]),
        logit_targets=[
            LogitTarget(str(text), int(i)) for text, i in zip(asked.label, asked.feature)
        ],
        logit_probabilities=torch.tensor(graph.weights[n:], dtype=torch.float64),
        scan="acme/tiny",
    )


def graph_of(seed):
    return random_graph(seed, features=40, layers=6, density=0.4)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_the_same(seed):
    from circuit_tracer.graph import compute_graph_scores

    graph = graph_of(seed)
    found = graph.scores()
    want = compute_graph_scores(theirs(graph))
    np.testing.assert_allclose((found.replacement, found.completeness), want, rtol=1e-12)


@pytest.mark.parametrize("shares", [(0.8, 0.98), (0.5, 0.5), (0.95, 0.8), (0.999, 0.999)])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_nodes_and_edges_are_kept(seed, shares):
    from circuit_tracer.graph import prune_graph

    graph = graph_of(seed)
    want = prune_graph(theirs(graph), *shares)
    found, size = graph.prune(*shares), len(graph.sources)
    keep, edges = want.node_mask.numpy(), want.edge_mask.numpy()
    columns = np.flatnonzero(keep[:size])
    rows = np.concatenate([columns[columns < graph.selected], np.arange(size, len(keep))])
    effects = np.where(edges, graphs.square(graph)[0], 0)[np.ix_(rows, columns)]
    np.testing.assert_array_equal(found.effects, effects)
    cumulative = want.cumulative_scores.numpy()[columns]
    assert found.cumulative is not None
    some = graph.influence()[columns] > 0  # equal zeros come in any order
    np.testing.assert_allclose(found.cumulative[some], cumulative[some], rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_partial_influence_is_the_same(seed):
    import torch
    from circuit_tracer.graph import compute_partial_influences

    graph, rng = graph_of(seed), np.random.default_rng(seed)
    n, size = graph.selected, len(graph.sources)
    order = np.concatenate([np.arange(n, n + 3), rng.permutation(n)[:15]])
    square, _ = graphs.square(graph)
    place = np.where(order < n, order, size + order - n)
    want = compute_partial_influences(
        torch.tensor(square[place]), torch.tensor(graph.weights[n:].astype(float)),
        torch.tensor(place), device="cpu",
    )  # fmt: skip
    node = np.where(order < n, order, -1)
    found = influence.partial_influence(
        graph.effects[order], graph.targets.layer[order], node, graph.weights[order]
    )
    np.testing.assert_allclose(found, want.numpy()[:size], rtol=1e-12)


class Texts:
    """A tokenizer that knows the texts of a graph's tokens."""

    def __init__(self, graph):
        self.texts = dict(zip(graph.ids.tolist(), graph.tokens))

    def decode(self, token):
        return self.texts[int(token)]


def written(graph, folder, monkeypatch):
    # its package has a function of the module's name
    peer = importlib.import_module("circuit_tracer.utils.create_graph_files")
    made = type("AutoTokenizer", (), {"from_pretrained": lambda name: Texts(graph)})
    monkeypatch.setattr(peer, "AutoTokenizer", made)
    peer.create_graph_files(theirs(graph), "theirs", str(folder), None, 0.9, 0.95)
    return folder / "theirs.json"


def test_their_files_are_read(tmp_path, monkeypatch):
    graph = graph_of(1)
    graph.sources.feature[: graph.selected] += 10  # no feature has an error's id
    graph.targets.feature[: graph.selected] += 10
    found, want = gs.load_graph(written(graph, tmp_path, monkeypatch)), graph.prune(0.9, 0.95)
    skip = {"targets", "value", "bias", "rest", "cumulative", "about", "weights", "ids"}
    graphs.same_graph(found, want, skip=skip)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_allclose(found.weights, want.weights, rtol=1e-6)
    np.testing.assert_allclose(found.cumulative, want.cumulative, rtol=1e-12)
    assert found.targets.label.tolist() == want.targets.label.tolist()
    assert found.about["pruning"] == {"node_threshold": 0.9}


def test_an_id_of_two_nodes_is_told_apart_by_order(tmp_path, monkeypatch, caplog):
    """0_{layer}_{position} of an error is also a feature of layer 0, in circuit-tracer's files."""
    graph = random_graph(2, features=40, layers=6, width=6, density=0.9)
    path = written(graph, tmp_path, monkeypatch)
    ids = [node["node_id"] for node in json.loads(path.read_text())["nodes"]]
    assert len(set(ids)) < len(ids)
    found, want = gs.load_graph(path), graph.prune(0.9, 0.95)
    assert found.effects.shape == want.effects.shape
    shared = (found.effects != want.effects).any(axis=0)
    assert shared.any() == ("taken as the feature's" in caplog.text)
    layer0 = (want.sources.layer == 0) & (want.sources.kind == "feature")
    assert not (shared & (want.sources.kind != "error") & ~layer0).any()


def test_our_files_are_those_of_their_models(tmp_path):
    from circuit_tracer.frontend import graph_models as models

    graph = graph_of(3).prune()
    ids, _ = gs.node_ids(graph)
    options = {"pinned": ids[:2], "supernodes": {"a group": ids[:2]}}
    gs.export_graph(graph, tmp_path, "ours", **options)
    raw = json.loads((tmp_path / "ours.json").read_text())
    read = models.Model.model_validate(raw)
    dumped = read.model_dump()
    for key, value in dumped["metadata"].items():
        assert raw["metadata"][key] == value
    assert dumped["qParams"] == raw["qParams"] and dumped["links"] == raw["links"]
    for node, mine in zip(dumped["nodes"], raw["nodes"], strict=True):
        assert node == mine


def test_nodes_are_written_as_they_write_them(tmp_path, monkeypatch):
    """Except for the ids of errors."""
    graph = graph_of(1)
    graph.sources.feature[: graph.selected] += 10
    graph.targets.feature[: graph.selected] += 10
    theirs_ = json.loads(written(graph, tmp_path, monkeypatch).read_text())
    ours = gs.graph_document(graph.prune(0.9, 0.95))
    assert len(theirs_["links"]) == len(ours["links"])
    for want, node in zip(theirs_["nodes"], ours["nodes"], strict=True):
        if node["feature_type"].endswith("error"):
            assert node["node_id"] == f"{node['layer']}_-1_{node['ctx_idx']}"
            node["node_id"], node["jsNodeId"] = want["node_id"], want["jsNodeId"]
        for key, value in want.items():
            if isinstance(value, float):
                assert node[key] == pytest.approx(value, rel=1e-9), key
            else:
                assert node[key] == value, key
    assert ours["metadata"]["prompt_tokens"] == theirs_["metadata"]["prompt_tokens"]


def test_their_index_and_ours_are_one(tmp_path, monkeypatch):
    graph = graph_of(1)
    written(graph, tmp_path, monkeypatch)
    gs.export_graph(graph.prune(), tmp_path, "ours")
    written(graph, tmp_path, monkeypatch)
    index = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert [entry["slug"] for entry in index["graphs"]] == ["ours", "theirs"]


def test_their_tools_split_our_ids():
    """A pinned error, merged or not, must not break what reads features from a page's address."""
    from circuit_tracer.utils.decode_url_features import decode_url_features

    for graph in (graph_of(0), graph_of(0).merge_errors("all")):
        sources, targets = gs.node_ids(graph)
        assert len({*sources, *targets[graph.selected :]}) == len(sources) + 3
        query = urllib.parse.urlencode({"pinnedIds": ",".join([*sources, *targets])})
        groups = urllib.parse.quote(json.dumps([["all", *sources[: graph.selected]]]))
        found, single = decode_url_features(f"http://x/?{query}&supernodes={groups}")
        assert len(single) == len(sources) + len(targets)
        assert len(found["all"]) == graph.selected
