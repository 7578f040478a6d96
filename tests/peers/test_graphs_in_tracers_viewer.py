"""Our graphs in circuit-tracer's own page and server: all is drawn, and nothing complains."""

import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from browser import CHROMIUM, Browser
from gemma_scope_jax.cards.export.anthropic import cantor
from page_graphs import dallas_graph
from tracer_viewer import LIBRARIES, SCRIPTS, served

pytestmark = [
    pytest.mark.peers,
    # what the peers warn about on import and in their own code is not ours to mend
    pytest.mark.filterwarnings("ignore"),
]
SLUG = "dallas"
KINDS = {"feature": "●", "error": "◆", "token": "■", "logit": "■"}  # as the page draws them
WAIT = "new Promise((done) => setTimeout(done, {}))"


@pytest.fixture(scope="module")
def graph():
    return dallas_graph().prune(0.9, 0.99)


@pytest.fixture(scope="module")
def browser(graph, tmp_path_factory):
    """The viewer with the graph and a feature file for each of its features."""
    pytest.importorskip("circuit_tracer")
    assert CHROMIUM, "install Chromium: these tests drive it"
    missing = [path for path in SCRIPTS.values() if path and not (LIBRARIES / path).exists()]
    assert not missing, f"`make peers` puts {', '.join(missing)} there; it needs npm"
    folder = tmp_path_factory.mktemp("viewer")
    data = folder / "data"
    write_features(graph, data / "features")
    gs.export_graph(graph, data, SLUG, features=data / "features")
    with (
        served(data, folder / "page") as address,
        Browser(folder / "profile", size=(1600, 1200)) as browser,
    ):
        browser.open(f"{address}?slug={SLUG}")
        for _ in range(100):
            if browser.run("document.querySelectorAll('.link-graph text.node').length"):
                break
            browser.run(WAIT.format(100))
        yield browser
        outside = [a for a in browser.requests if not a.startswith(("data:", address[:17]))]
        assert browser.errors == [] and outside == []


def write_features(graph, folder):
    """What `gemma-scope cards --export anthropic-json` writes, a file a feature."""
    folder.mkdir(parents=True)
    n, nodes = graph.selected, graph.sources
    for layer, feature, value in zip(nodes.layer[:n], nodes.feature[:n], nodes.activation[:n]):
        number, most = cantor(int(layer), int(feature)), float(value)
        example = {
            "tokens_acts_list": [0.0, most, most / 2],
            "train_token_ind": 1,
            "is_repeated_datapoint": False,
            "tokens": [" in", " Dallas", ","],
        }
        file = {
            "transcoder_id": "tiny",
            "index": number,
            "examples_quantiles": [{"quantile_name": "Top activations", "examples": [example]}],
            "top_logits": [f" up{feature}"],
            "bottom_logits": [" down"],
            "act_min": 0.0,
            "act_max": most,
            "quantile_values": [most] * 99,
            "histogram": [1.0, 0.0, 2.0],
            "activation_frequency": 0.01,
        }
        (folder / f"{number}.json").write_text(json.dumps(file), encoding="utf-8")


def test_every_node_and_token_is_drawn(browser, graph):
    """But the one with which the kept nodes pass the share that they were to reach: the page hides
    what is beyond it, in circuit-tracer's own files, too."""
    drawn = browser.run("[...document.querySelectorAll('text.node')].map((e) => e.textContent)")
    shown = (graph.cumulative <= 0.9) | (graph.sources.kind == "token")
    kinds = [*graph.sources.kind[shown], *graph.targets.kind[graph.selected :]]
    assert len(kinds) > 150 and (~shown).sum() <= 1
    assert sorted(drawn) == sorted(KINDS[str(kind)] for kind in kinds)
    texts = browser.run("document.querySelector('.link-graph').textContent")
    assert all(token.strip() in texts for token in graph.tokens)
    assert all(label.strip() in texts for label in graph.targets.label[graph.selected :])
    assert "Dallas" in browser.run("document.title")


def test_a_clicked_feature_has_its_links_and_examples(browser, graph):
    """Its rows are all of its effects, in and out; lines are painted; its file is shown."""
    n, size = graph.selected, graph.effects.copy()
    size[:, (graph.cumulative > 0.9) & (graph.sources.kind != "token")] = 0  # hidden
    best = int(np.argmax(np.count_nonzero(size[:, :n], 0) * np.count_nonzero(size[:n], 1)))
    node = gs.node_ids(graph)[0][best]
    before = painted(browser)
    x, y = browser.run(
        f"""(() => {{
            const node = d3.selectAll('text.node').filter((d) => d.node_id === {json.dumps(node)})
            const box = node.node().getBoundingClientRect()
            return [box.x + box.width / 2, box.y + box.height / 2]
        }})()"""
    )
    browser.click(x, y)
    browser.run(WAIT.format(500))
    rows = "document.querySelectorAll('.node-connections .{} .feature-row').length"
    counts = [browser.run(rows.format(side)) for side in ("input", "output")]
    assert counts == [np.count_nonzero(size[best]), np.count_nonzero(size[:, best])]
    lines = [one != other for one, other in zip(before, painted(browser), strict=True)]
    assert min(counts) > 0 and sum(lines) == 2  # black ones, and narrower coloured ones on them
    shown = browser.run("document.querySelector('.cg').innerText")
    assert f"up{graph.sources.feature[best]}" in shown and "Top activations" in shown


def painted(browser):
    """What the page's canvases show."""
    return browser.run("[...document.querySelectorAll('canvas')].map((c) => c.toDataURL())")
