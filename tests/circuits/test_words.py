"""Labels of features, and the strongest paths, against a list of all paths."""

import dataclasses

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of
from gemma_scope_jax.circuits.words import FeatureDetails, label_graph, strongest_paths
from graphs import random_graph
from letters import Letters


def all_paths(graph):
    """(share, effect, names) of every path, by following every edge."""
    n = graph.selected
    size = np.abs(graph.effects) / np.abs(graph.effects).sum(1, keepdims=True)
    found = []

    def follow(row, share, effect, way):
        for source in np.flatnonzero(graph.effects[row]):
            more = graph.effects[row, source] / (graph.value[row] if row < n else 1)
            given = share * size[row, source], effect * more, (int(source), *way)
            if source < n:
                follow(source, *given)
            else:
                found.append(given)

    for row in range(n, len(graph.targets)):
        follow(row, graph.weights[row] / graph.weights.sum(), 1.0, (row,))
    return sorted(found, reverse=True)


def test_strongest_paths_are_those_of_all(model):
    graph = gs.attribute(model, coders_of("plain", width=6), IDS[:5], [7, 9]).prune(1, 0.999)
    want, got = all_paths(graph), strongest_paths(graph, 50)
    assert len(want) > 200 and sum(share for share, *_ in want) == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose([p.share for p in got], [w[0] for w in want[:50]], rtol=1e-5)
    np.testing.assert_allclose([p.effect for p in got], [w[1] for w in want[:50]], rtol=1e-4)
    effects = sum(effect for _, effect, _ in want)
    assert np.isfinite(effects) and all(len(p.nodes) >= 1 for p in got)
    inner = [w for w in want if len(w[2]) > 2][:3]
    got = strongest_paths(graph, 3, direct=False)
    np.testing.assert_allclose([p.share for p in got], [w[0] for w in inner], rtol=1e-5)


def test_paths_read_as_sentences(model):
    coders, tok = coders_of("affine"), Letters()
    graph = gs.attribute(model, coders, IDS, tokenizer=tok).prune()
    details = gs.feature_details(model, coders, tok, graph)
    labelled = gs.label_graph(graph, details)
    n = graph.selected
    for i in range(n):
        key = int(graph.sources.layer[i]), int(graph.sources.feature[i])
        words = [w.strip() or repr(w) for w in details[key].raises[:3]]
        assert labelled.sources.label[i] == ", ".join(words) == labelled.targets.label[i]
    lines = [str(path) for path in gs.strongest_paths(labelled, 200)]
    assert all(("raises" in line) != ("lowers" in line) and "%" in line for line in lines)
    assert any("feature" in line for line in lines)
    mine = label_graph(graph, {key: FeatureDetails("mine")})
    assert (
        "mine" in mine.sources.label and (mine.sources.label[n:] == graph.sources.label[n:]).all()
    )


def test_a_graph_without_targets_has_no_paths():
    graph = random_graph()
    none = dataclasses.replace(graph, weights=np.zeros_like(graph.weights))
    with pytest.raises(gs.InputError, match="lead nowhere"):
        strongest_paths(none)


def test_paths_of_a_graph_from_a_file_say_the_same(model, tmp_path):
    graph = gs.attribute(model, coders_of("plain", width=8), IDS, [7, 9]).prune()
    graph.save(tmp_path / "graph.json")  # which holds no values
    again = gs.load_graph(tmp_path / "graph.json")
    ours, theirs = (gs.strongest_paths(g, 5, direct=False) for g in (graph, again))
    np.testing.assert_allclose([p.effect for p in theirs], [p.effect for p in ours], rtol=1e-4)
    verbs = [[word for word in ("raises", "lowers") if word in str(p)] for p in theirs]
    assert verbs == [["raises" if p.effect > 0 else "lowers"] for p in ours]
