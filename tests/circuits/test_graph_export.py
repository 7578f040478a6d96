"""The JSON of graph viewers: as its schema says, with an index, and read back only if it is one."""

import copy
import json
import re

import jsonschema
import numpy as np
import pytest

import gemma_scope_jax as gs
import graphs
from assertions import one_line
from gemma_scope_jax.circuits import export, load
from graphs import random_graph

TEXT, WHOLE, SHARE = {"type": "string"}, {"type": "integer"}, {"type": ["number", "null"]}
# What Neuronpedia and circuit-tracer's viewer read, written down from their sources. Stricter than
# both: no key beside those that one of them knows, and no fractions outside 0 to 1.
SCHEMA = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "additionalProperties": False,
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "transcoder_list", "prompt_tokens", "prompt"],
            "additionalProperties": False,
            "properties": {
                "slug": TEXT,
                "scan": TEXT,
                "transcoder_list": {"type": "array", "items": TEXT},
                "prompt_tokens": {"type": "array", "items": TEXT},
                "prompt": TEXT,
                "node_threshold": {"type": "number", "minimum": 0, "maximum": 1},
                "schema_version": {"const": 1},
                "feature_details": {
                    "type": "object",
                    "required": ["feature_json_base_url"],
                    "additionalProperties": False,
                    "properties": {"feature_json_base_url": TEXT},
                },
                "info": {"type": "object", "properties": {"description": TEXT}},
                "generation_settings": {"type": "object"},
                "pruning_settings": {"type": "object"},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "additionalProperties": False,
            "properties": {
                "pinnedIds": {"type": "array", "items": TEXT, "uniqueItems": True},
                "supernodes": {"type": "array", "items": {"type": "array", "items": TEXT}},
                "linkType": {"enum": ["both", "input", "output", "either"]},
                "clickedId": TEXT,
                "sg_pos": TEXT,
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type"]
                + ["jsNodeId", "clerp", "influence", "activation", "run_idx", "reverse_ctx_idx"],
                "additionalProperties": False,
                "properties": {
                    "node_id": {"type": "string", "pattern": r"^(E|-?\d+)_-?\d+_-?\d+$"},
                    "feature": {"type": "integer", "minimum": -1},
                    "layer": {"type": "string", "pattern": r"^(E|\d+)$"},
                    "ctx_idx": {"type": "integer", "minimum": 0},
                    "feature_type": {"enum": list(load.KIND_OF)},
                    "token_prob": {"type": "number"},
                    "is_target_logit": {"type": "boolean"},
                    "run_idx": {"const": 0},
                    "reverse_ctx_idx": {"const": 0},
                    "jsNodeId": TEXT,
                    "clerp": TEXT,
                    "influence": SHARE,
                    "activation": SHARE,
                    "is_neuron": {"const": True},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "additionalProperties": False,
                "properties": {"source": TEXT, "target": TEXT, "weight": {"type": "number"}},
            },
        },
    },
}


def fits(document):
    jsonschema.Draft7Validator(SCHEMA).validate(document)
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(ids)
    for link in document["links"]:
        assert link["source"] in ids and link["target"] in ids and link["weight"] != 0


@pytest.mark.parametrize(
    "graph",
    [
        random_graph(),
        random_graph(1, features=40, width=6),  # features whose numbers are those of layers
        random_graph(2).prune(),
        random_graph(3).merge_errors("layer"),
        random_graph(3).merge_errors("position"),
        random_graph(4, features=0).merge_errors("all"),
    ],
)
def test_graphs_are_as_viewers_read_them(graph):
    document = gs.graph_document(graph, "a")
    fits(json.loads(export.as_text(document)))
    sources, targets = gs.node_ids(graph)
    finals = targets[graph.selected :]
    assert [node["node_id"] for node in document["nodes"]] == sources + finals
    effects = {(link["source"], link["target"]): link["weight"] for link in document["links"]}
    assert len(effects) == np.count_nonzero(graph.effects)
    for r, c in zip(*np.nonzero(graph.effects)):
        assert np.float32(effects[sources[c], targets[r]]) == graph.effects[r, c]


def test_nodes_say_what_viewers_show():
    graph = random_graph(5).prune()
    document = gs.graph_document(graph, "a", features="https://x.org/f", description="d")
    kinds = [node["feature_type"] for node in document["nodes"]]
    feature, error, token, logit = (
        document["nodes"][kinds.index(kind)]
        for kind in ("cross layer transcoder", "mlp reconstruction error", "embedding", "logit")
    )
    at = f"{error['layer']}_-1", error["ctx_idx"]
    assert (error["node_id"], error["jsNodeId"]) == (f"{at[0]}_{at[1]}", f"{at[0]}-{at[1]}")
    layer, number, position = graph.sources[0].layer[0], graph.sources[0].feature[0], 0
    assert feature["feature"] == (layer + number) * (layer + number + 1) // 2 + number
    assert feature["jsNodeId"] == f"{layer}_{number}-0" and feature["layer"] == str(layer)
    assert feature["activation"] == graph.sources.activation[0]
    assert (token["layer"], token["feature"], token["node_id"][0]) == ("E", position, "E")
    p = graph.weights[graph.selected]
    assert logit["clerp"] == f'Output " "w0" (p={p:.3f})' and logit["is_target_logit"]
    assert logit["token_prob"] == pytest.approx(p) and logit["layer"] == "5"
    details = document["metadata"]["feature_details"]
    assert details == {"feature_json_base_url": "https://x.org/f"}
    assert document["metadata"]["node_threshold"] == 0.8


def test_cumulative_shares_are_found_where_there_are_none():
    graph = random_graph(6)
    shares = [n["influence"] for n in gs.graph_document(graph)["nodes"]][: len(graph.sources)]
    largest = int(graph.influence().argmax())
    assert shares[largest] == min(shares)
    assert "node_threshold" not in gs.graph_document(graph)["metadata"]


def test_groups_and_pins_are_entered():
    graph = random_graph(7)
    ids, targets = gs.node_ids(graph)
    document = gs.graph_document(graph, pinned=[targets[-1]], supernodes={"a": ids[:2], "b": []})
    assert document["qParams"]["pinnedIds"] == [targets[-1], *ids[:2]]
    assert document["qParams"]["supernodes"] == [["a", *ids[:2]], ["b"]]
    fits(document)
    with pytest.raises(gs.InputError, match="there is no node '9_9_99'"):
        gs.graph_document(graph, supernodes={"a": ["9_9_99"]})


def test_large_graphs_are_refused_with_a_hint(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "LINKS", 100)
    with pytest.raises(gs.InputError, match=r"links are more than the 100 .*graph.prune\(\) first"):
        random_graph(8).save(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


# ---- folders -----------------------------------------------------------------------------------


def test_a_folder_has_an_index_of_its_graphs(tmp_path):
    for slug, seed in (("a", 1), ("b", 2), ("a", 3)):
        gs.export_graph(random_graph(seed).prune(), tmp_path / "new", slug, description=str(seed))
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["a.json", "b.json", "graph-metadata.json"]
    index = json.loads((tmp_path / "new" / "graph-metadata.json").read_text())
    assert [g["slug"] for g in index["graphs"]] == ["b", "a"]
    assert [g["info"]["description"] for g in index["graphs"]] == ["2", "3"]
    assert gs.load_graph(tmp_path / "new" / "a.json").selected


def test_feature_files_in_the_folder_are_shown(tmp_path):
    folder = tmp_path / "graphs" / "features" / "set"
    folder.mkdir(parents=True)
    (folder / "12.json").write_text("{}")
    gs.export_graph(random_graph(), tmp_path / "graphs", "a", features=folder)
    document = json.loads((tmp_path / "graphs" / "a.json").read_text())
    assert document["metadata"]["scan"] == "./data/features/set"
    assert "feature_details" not in document["metadata"]


@pytest.mark.parametrize(
    ("slug", "options", "said"),
    [
        ("../a", {}, "letters, digits, dots"),
        ("", {}, "letters, digits, dots"),
        ("graph-metadata", {}, "letters, digits, dots"),
        ("a", {"features": "elsewhere"}, "sees only what is in the graphs' folder"),
        ("a", {"features": "graphs"}, "holds no feature files"),
        ("a", {"pinned": ["x"]}, "there is no node 'x'"),
    ],
)
def test_what_cannot_be_shown_is_refused(slug, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gs.InputError, match=said) as caught:
        gs.export_graph(random_graph(), "graphs", slug, **options)
    one_line(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", "{", '{"graphs": 3}'])
def test_an_index_that_is_none_is_left_alone(text, tmp_path):
    (tmp_path / "graph-metadata.json").write_text(text)
    with pytest.raises(gs.InputError, match="graph-metadata.json") as caught:
        gs.export_graph(random_graph(), tmp_path, "a")
    one_line(caught)
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


# ---- reading -----------------------------------------------------------------------------------


def at(*place, value):
    """A change of a document: the value at a place; `...` removes it."""

    def change(document):
        inner = document
        for key in place[:-1]:
            inner = inner[key]
        if value is ...:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value

    return change


def twice(kind):
    return lambda document: document[kind].append(dict(document[kind][0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (at("metadata", value=...), "lacks 'metadata'"),
        (at("metadata", "prompt_tokens", value="x"), "prompt_tokens is 'x', not a list"),
        (at("nodes", value={}), "nodes is"),
        (at("nodes", value=[]), "no node is a logit"),
        (at("nodes", 0, value=3), "node 0: is 3, not an object"),
        (at("nodes", 0, "feature_type", value="lorsa"), "'lorsa' is not a type of node"),
        (at("nodes", 0, "node_id", value="10_12890134_-0x"), "not LAYER_FEATURE_POSITION"),
        (at("nodes", 0, "node_id", value="1_-1_2"), "is not that of a feature"),
        (at("nodes", 0, "node_id", value="E_1_2"), "is not that of a feature"),
        (at("nodes", 0, "ctx_idx", value=-1), "ctx_idx is -1"),
        (at("nodes", 0, "ctx_idx", value=99), "position is not within -1 to 4"),
        (at("nodes", 0, "activation", value="x"), "activation is 'x', not a number"),
        (at("nodes", -1, "token_prob", value=True), "token_prob is True"),
        (at("nodes", 20, "layer", value="E"), None),  # of ours the id says it
        (at("links", 0, "source", value="9_9_9"), "is not between its nodes"),
        (at("links", 0, "target", value="E_1_0"), "is not between its nodes"),
        (at("links", 0, "weight", value="1"), "weight is '1', not a number"),
        (at("links", 0, "weight", value=1e300), "NaN or infinities"),
        (twice("links"), "occurs twice"),
        (twice("nodes"), "two nodes have the same node_id"),
    ],
)
def test_documents_of_no_graph_are_refused(change, said, tmp_path):
    document = copy.deepcopy(gs.graph_document(random_graph(9)))
    change(document)
    (tmp_path / "x.json").write_text(json.dumps(document))
    if said is None:
        assert gs.load_graph(tmp_path / "x.json").selected == 12
        return
    with pytest.raises(gs.InputError, match=re.escape(said)) as caught:
        gs.load_graph(tmp_path / "x.json")
    one_line(caught)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"metadata": 1}', '{"a": NaN}'])
def test_other_json_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(gs.InputError, match="x.json") as caught:
        gs.load_graph(tmp_path / "x.json")
    one_line(caught)


def test_errors_of_other_ids_are_read(tmp_path):
    """circuit-tracer's: 0_{layer}_{position}; a link of such an id is told apart by order."""
    graph = random_graph(10, features=30, width=6, density=1.0)
    document = gs.graph_document(graph)
    new = {}
    for node in document["nodes"]:
        if node["feature_type"].endswith("error"):
            new[node["node_id"]] = f"0_{node['layer']}_{node['ctx_idx']}"
            node["node_id"] = new[node["node_id"]]
    for link in document["links"]:
        link["source"] = new.get(link["source"], link["source"])
    (tmp_path / "x.json").write_text(json.dumps(document))
    found = gs.load_graph(tmp_path / "x.json")
    graphs.same_graph(
        found, graph, skip={"targets", "value", "bias", "rest", "about", "cumulative", "effects"}
    )
    ids = [node["node_id"] for node in document["nodes"]]
    clear = [ids.count(i) == 1 for i in ids[: len(graph.sources)]]
    assert not all(clear)
    np.testing.assert_array_equal(found.effects[:, clear], graph.effects[:, clear])
