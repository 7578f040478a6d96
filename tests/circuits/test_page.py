"""The page of an attribution graph: what is in it, and that no text breaks out."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest

from gemma_scope_jax.circuits.page import graph_page, node_influence
from gemma_scope_jax.circuits.words import FeatureDetails, label_graph
from page_graphs import page_graph

HOSTILE = '</script><script>alert("x")</script>{{data}}{{title}}<!--&amp;\u202e\u2028"\'\\'
VOID = ("meta", "link", "input", "br")


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("href", "src", "action")]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "circle")


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


@pytest.fixture(scope="module")
def graph():
    return page_graph()


def hostile_graph():
    graph = page_graph(("<bos>", HOSTILE, "\x00\n", "\ud800"), answers=((HOSTILE, 0.5), ("", 0.1)))
    for table in (graph.sources, graph.targets):
        table.label[:] = HOSTILE
    return graph


def hostile_page(graph):
    keys = [(int(graph.sources.layer[i]), int(graph.sources.feature[i])) for i in range(2)]
    examples = [([HOSTILE], [1.0])]
    return graph_page(
        label_graph(graph, {keys[0]: FeatureDetails(HOSTILE)}),
        details={keys[1]: FeatureDetails("", [HOSTILE], [HOSTILE], examples)},
        notes={HOSTILE: [[HOSTILE], [HOSTILE]]},
        title=HOSTILE,
    )


@pytest.mark.parametrize("make", [page_graph, hostile_graph, lambda: page_graph(features=0)])
def test_page_is_whole_and_asks_nobody(make):
    page = hostile_page(make()) if make is hostile_graph else graph_page(make())
    seen = Tags()
    seen.feed(page)
    assert seen.open == [] and seen.links == ["data:,"] and seen.scripts == 2
    assert "default-src 'none'" in page and "{{" not in page.replace("{{data}}{{title}}", "")
    program = page.split('id="data">')[1].split("</script>", 1)[1]
    assert not re.search(r"https?:|fetch\(|innerHTML|XMLHttpRequest|\beval\b", program)


def test_no_text_breaks_out():
    graph = hostile_graph()
    page = hostile_page(graph)
    assert page.count("<script") == page.count("</script>") == 2
    assert re.search("<title>(.*)</title>", page)[1].startswith("&lt;/script&gt;&lt;script&gt;")
    data = data_of(page)
    assert data["tokens"] == ["<bos>", HOSTILE, "\x00\n", "\ufffd"]
    assert data["title"] == HOSTILE and HOSTILE in data["nodes"]["label"]


def test_the_page_holds_the_graph(graph):
    """Links, to four digits; of the nodes without links only tokens; nodes name the same nodes."""
    data = data_of(graph_page(graph))
    nodes, links, n = data["nodes"], data["links"], graph.selected
    assert links["all"] == len(links["weight"]) == np.count_nonzero(graph.effects)
    names = list(zip(nodes["kind"], nodes["layer"], nodes["position"], nodes["feature"]))
    assert len(set(names)) == len(names)

    def name(table, i):
        kind = data["kinds"].index(table.kind[i])
        return (kind, *(int(getattr(table, c)[i]) for c in ("layer", "position", "feature")))

    found = {
        (names[t], names[s]): w
        for t, s, w in zip(links["target"], links["source"], links["weight"])
    }
    for r, c in zip(*np.nonzero(graph.effects)):
        weight = found[name(graph.targets, r), name(graph.sources, c)]
        np.testing.assert_allclose(weight, graph.effects[r, c], rtol=6e-4)
    assert nodes["kind"].count(data["kinds"].index("token")) == len(graph.tokens)
    for k, i in enumerate(data["inputs"]["node"]):
        (r,) = [r for r in range(len(graph.targets)) if name(graph.targets, r) == names[i]]
        np.testing.assert_allclose(data["inputs"]["value"][k], graph.value[r], rtol=6e-4)
    assert [names[i] for i in data["inputs"]["node"][-2:]] == [
        name(graph.targets, n),
        name(graph.targets, n + 1),
    ]


def test_influence_is_the_sum_over_all_paths(graph):
    """By the inverse of a square matrix, which needs as many rows as columns."""
    n, s, t = graph.selected, len(graph.sources), len(graph.targets)
    square = np.zeros((s + t - n, s + t - n))
    at = np.r_[np.arange(n), np.arange(s, s + t - n)]
    size = np.abs(graph.effects).astype(np.float64)
    square[at, :s] = size / np.maximum(size.sum(1, keepdims=True), 1e-30)
    start = np.zeros(len(square))
    start[s:] = graph.weights[n:] / graph.weights.sum()
    all_paths = start @ np.linalg.inv(np.eye(len(square)) - square)
    through, reached = node_influence(graph)
    np.testing.assert_allclose(through, all_paths[:s], atol=1e-6)
    np.testing.assert_allclose(reached, all_paths[at], atol=1e-6)


def test_only_the_strongest_links_are_kept(graph):
    data = data_of(graph_page(graph, most_links=10))
    assert data["links"]["all"] > 10 == len(data["links"]["weight"])
    _, reached = node_influence(graph)
    score = np.abs(graph.effects) / np.abs(graph.effects).sum(1, keepdims=True) * reached[:, None]
    best = graph.effects[score >= np.sort(score, axis=None)[-10]]
    np.testing.assert_allclose(np.sort(data["links"]["weight"]), np.sort(best), rtol=6e-4)


def test_labels_details_heads_and_notes(graph):
    key = (int(graph.sources.layer[0]), int(graph.sources.feature[0]))
    row, column = (int(i[-1]) for i in np.nonzero(graph.effects))
    data = data_of(
        graph_page(
            label_graph(graph, {key: FeatureDetails("mine"), (0, -5): FeatureDetails("no")}),
            details={key: FeatureDetails(raises=["x"], examples=[(["a", "b"], [0, 1 / 3])])},
            heads={(row, column): [(1, 2, 3, 1 / 3), (1, -1, 3, float("nan"))], (0, 10**6): []},
            notes={"Scores": [["of", "score"], ["all", np.float32(0.25)], ["none", None]]},
        )
    )
    assert data["nodes"]["label"][0] == "mine" and data["nodes"]["detail"][0] == 0
    assert data["details"] == [[["x"], [], [[["a", "b"], [0, 0.3333]]]]]
    assert data["heads"] == [[data["links"]["all"] - 1, [[1, 2, 3, 0.3333], [1, -1, 3, None]]]]
    assert data["notes"] == [["Scores", [["of", "score"], ["all", 0.25], ["none", "None"]]]]


def test_facts_are_lines_of_text(graph):
    about = {"coders": ["a", "b"], "targets": [[{"kind": "logit"}], None], "generation": {"k": 1},
             "seconds": 1.5, "none": None}  # fmt: skip
    data = data_of(graph_page(dataclasses.replace(graph, about=about)))
    assert data["about"] == [["coders", "a, b"], ["seconds", "1.5"]]
