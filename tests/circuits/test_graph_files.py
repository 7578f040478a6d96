"""Graphs come back from their files, and files of anything else are refused by one line."""

import dataclasses
import io
import json
import pickle
import zipfile

import numpy as np
import pytest

import gemma_scope_jax as gs
from assertions import one_line
from gemma_scope_jax.circuits import files
from graphs import random_graph, same_graph

UNKNOWN = {"value", "bias", "rest"}  # what viewers' JSON does not hold


@pytest.mark.parametrize(
    "make",
    [
        random_graph,
        lambda: random_graph(1).prune(),
        lambda: random_graph(2, density=1.0).merge_errors("all"),
        lambda: random_graph(3, features=0),
        lambda: dataclasses.replace(random_graph(4), about={"a": [1, {"b": None}], "c": "é\udc80"}),
    ],
)
def test_a_graph_comes_back_from_its_arrays(make, tmp_path):
    graph = make()
    graph.save(tmp_path / "new" / "graph.npz")
    about = {"a": [1, {"b": None}], "c": "é\ufffd"} if "c" in graph.about else graph.about
    same_graph(
        gs.load_graph(tmp_path / "new" / "graph.npz"), dataclasses.replace(graph, about=about)
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["graph.npz"]


def test_graphs_of_few_edges_are_compressed(tmp_path):
    graph = random_graph(5, features=60, layers=8, tokens=20)
    graph.save(tmp_path / "whole.npz")
    few = dataclasses.replace(graph, effects=graph.effects * (graph.effects > 5))
    few.save(tmp_path / "few.npz")
    assert (tmp_path / "few.npz").stat().st_size < 0.3 * graph.effects.nbytes
    same_graph(gs.load_graph(tmp_path / "few.npz"), few)


@pytest.mark.parametrize("merged", [None, "layer", "position", "all"])
def test_a_graph_comes_back_from_its_json(merged, tmp_path):
    graph = random_graph(6).prune(0.9, 0.98)
    if merged:
        graph = graph.merge_errors(merged)
        graph = dataclasses.replace(graph, cumulative=np.linspace(0.1, 1, len(graph.sources)))
    graph.save(tmp_path / "graph.json")
    found = gs.load_graph(tmp_path / "graph.json")
    nan = np.full(len(graph.targets), np.nan, np.float32)
    finals = graph.targets.kind == "logit"
    activation = np.where(finals, np.float32(np.nan), graph.targets.activation)
    kept = {name: nan for name in UNKNOWN}
    kept["targets"] = dataclasses.replace(graph.targets, activation=activation)
    kept["about"] = {**graph.about, "prompt": "".join(graph.tokens)}
    same_graph(found, dataclasses.replace(graph, **kept))


def test_neurons_and_directions_come_back(tmp_path):
    graph = random_graph(7)
    kinds = np.where(graph.sources.kind == "feature", "neuron", graph.sources.kind)
    targets = graph.targets
    asked = dataclasses.replace(
        targets,
        kind=np.array(["neuron"] * 12 + ["logit", "direction", "direction"]),
        label=np.array([""] * 12 + [' say "(p=1)"', "Paris - London", "\n"]),
        feature=np.concatenate([targets.feature[:13], [-1, -1]]).astype(np.int32),
    )
    sources = dataclasses.replace(graph.sources, kind=kinds)
    dataclasses.replace(graph, sources=sources, targets=asked).save(tmp_path / "graph.json")
    found = gs.load_graph(tmp_path / "graph.json")
    for name in ("kind", "feature", "layer", "position"):
        np.testing.assert_array_equal(getattr(found.targets, name), getattr(asked, name))
    assert found.targets.label.tolist()[13:] == ["Paris - London", "\n"]
    np.testing.assert_array_equal(found.sources.kind, kinds)


# ---- what is refused ---------------------------------------------------------------------------


def refused(path, said):
    with pytest.raises(gs.InputError, match=said) as caught:
        gs.load_graph(path)
    one_line(caught)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    graph = random_graph(8)
    graph.save(folder / "graph.npz")
    graph.save(folder / "graph.json")
    return folder


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 0.5, 0.9, -1])
def test_truncated_arrays_are_refused(good, tmp_path, kept):
    data = (good / "graph.npz").read_bytes()
    kept = int(kept * len(data)) if isinstance(kept, float) else kept
    (tmp_path / "graph.npz").write_bytes(data[:kept])
    refused(tmp_path / "graph.npz", "not a whole .npz of a graph")


def test_damaged_arrays_are_refused(good, tmp_path):
    data = bytearray((good / "graph.npz").read_bytes())
    with zipfile.ZipFile(good / "graph.npz") as archive:
        entry = archive.getinfo("effects.npy")
    data[entry.header_offset + 300] ^= 0xFF
    (tmp_path / "graph.npz").write_bytes(data)
    refused(tmp_path / "graph.npz", "not a whole .npz of a graph")


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npy(np.ones(3)), "not a whole .npz"),
        (pickle.dumps({"a": 1}), "not a whole .npz"),
        (b"\x80\x04", "not a whole .npz"),
        ({"weights": np.ones(3)}, r"an .npz, but not of a graph: \['weights'\]"),
        ({"header": np.ones(3)}, "not of a graph"),
        ({"header": np.frombuffer(b"{}", np.uint8)}, "lacks 'format'"),
        ({"header": np.frombuffer(b"[1", np.uint8)}, "not usable as JSON"),
        ({"header": np.frombuffer(b'{"format": "x"}', np.uint8)}, "format 'x', version None"),
    ],
)
def test_other_arrays_are_refused(content, said, tmp_path):
    if isinstance(content, dict):
        np.savez(tmp_path / "graph.npz", **content)
    else:
        (tmp_path / "graph.npz").write_bytes(content)
    refused(tmp_path / "graph.npz", said)


def header(**changes):
    def change(arrays):
        content = json.loads(arrays["header"].tobytes())
        text = json.dumps({**content, **changes})
        return {**arrays, "header": np.frombuffer(text.encode(), np.uint8)}

    return change


def put(name, value, at=None):
    def change(arrays):
        new = np.array(value if at is None else arrays[name])
        if at is not None:
            new[at] = value
        return {**arrays, name: new}

    return change


def without(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("effects"), "lacks effects as float32"),
        (without("source_layer"), "lacks source_layer"),
        (without("target_kind"), "lacks target_kind|differ in length"),
        (put("effects", np.ones((2, 2))), "lacks effects as float32"),
        (put("effects", np.ones((2, 2), np.float32)), r"effects are \(2, 2\), expected"),
        (put("effects", np.nan, (0, 0)), "NaN or infinities"),
        (put("weights", np.inf, 3), "NaN or infinities"),
        (put("weights", np.ones(3, np.float32)), "weights is not one number for each of 15"),
        (put("source_layer", np.ones(3, np.int32)), "differ in length"),
        (put("source_layer", 99, 20), "layer is not within -1 to 4"),
        (put("target_position", -2, 14), "position is not within"),
        (put("source_feature", 49, 0), "first 12 sources and targets differ in feature"),
        (put("source_kind", 99, 0), "does not fit its 4 kinds"),
        (put("source_kind", np.ones((2, 2), np.uint8)), "another type"),
        (put("ids", np.ones(3, np.int32)), r"\(3,\) ids for 5 tokens"),
        (put("cumulative", np.ones(3)), "cumulative is not one number"),
        (header(selected=40), "40 selected features"),
        (header(selected=-1), "selected features"),
        (header(selected=3), "kinds that do not belong there"),
        (header(selected="3"), "selected is '3', not a whole number"),
        (header(version=2), "version 2; this program reads"),
        (header(tokens=[1] * 5), "tokens is not a list of texts"),
        (header(about=[]), "about is"),
        (header(layers=None), "lacks 'layers'"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(good, tmp_path, change, said):
    with np.load(good / "graph.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "graph.npz", **change(arrays))
    refused(tmp_path / "graph.npz", said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.npz", "no such file"),
        ("none.json", "no such file"),
        ("graph.pt", "a graph is a file .npz or .json"),
        ("graph", "a graph is a file .npz or .json"),
    ],
)
def test_names_of_no_graph_are_refused(name, said, tmp_path):
    refused(tmp_path / name, said)
    if "none" not in name:
        with pytest.raises(gs.InputError, match=said):
            random_graph().save(tmp_path / name)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    graph = random_graph()
    graph.save(tmp_path / "graph.npz")
    before = (tmp_path / "graph.npz").read_bytes()
    with pytest.raises(gs.InputError, match="about is not JSON data"):
        dataclasses.replace(graph, about={"x": {1, 2}}).save(tmp_path / "graph.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(gs.InputError, match="cannot be written"):
        graph.save(tmp_path / "folder.npz")
    assert (tmp_path / "graph.npz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npz", "graph.npz"]


def test_a_sparse_graph_is_one_below_the_share(monkeypatch, tmp_path):
    """The share decides how it is written, never what comes back."""
    graph = random_graph(9)
    for share in (0.0, 1.0):
        monkeypatch.setattr(files, "SPARSE", share)
        graph.save(tmp_path / "graph.npz")
        same_graph(gs.load_graph(tmp_path / "graph.npz"), graph)
