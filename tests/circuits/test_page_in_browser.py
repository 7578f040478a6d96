"""The page of an attribution graph in a browser: what mouse and keys do, without a complaint."""

import dataclasses
import json

import numpy as np
import pytest

from browser import CHROMIUM, Browser
from gemma_scope_jax.circuits.page import graph_page
from gemma_scope_jax.circuits.words import FeatureDetails, label_graph
from page_graphs import dallas_graph, page_graph

pytestmark = pytest.mark.slow  # and they need Chromium
HOSTILE = '</script><script>alert("x")</script><b>\u202e"\'\\'
FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM, "install Chromium: these tests drive it"
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def seen(browser, tmp_path):
    """Opens the page of a graph; afterwards nothing was complained of or asked for."""

    def open_page(*args, size=(1400, 900), **options):
        browser.errors.clear()
        browser.requests.clear()
        browser.resize(*size)
        (tmp_path / "page.html").write_text(graph_page(*args, **options), encoding="utf-8")
        browser.open(tmp_path / "page.html")
        return browser

    yield open_page
    assert browser.errors == []
    assert [a for a in browser.requests if not a.endswith("/page.html") and a != "data:,"] == []


def value(browser, script):
    return json.loads(browser.run(f"JSON.stringify({script})"))


def test_first_view_shows_the_strongest(seen):
    graph = dallas_graph()
    browser = seen(graph)
    head = browser.run("document.querySelector('header').innerText")
    assert "The capital of the state containing Dallas is" in head and "Austin" in head
    assert "60 of" in head and "41 %" in head
    assert "say Austin" in browser.run("panel.innerText")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    apart = """(() => { const some = everyNode.filter((i) => shown[i]);
      const pairs = (a) => some.filter((b) => b < a && rows[a] === rows[b] && !isAsked(a));
      return Math.min(...some.flatMap((a) => pairs(a).map((b) =>
        Math.hypot(px[a] - px[b], py[a] - py[b]) - radiusOf(a) - radiusOf(b)))); })()"""
    assert browser.run(apart) > 0  # no two nodes overlap
    browser.run("state.nodes = state.links = 1, refresh()")
    browser.run(FRAME)
    assert browser.run(apart) > 0


def test_the_whole_graph_is_seen_unless_it_is_too_long(seen):
    """Also when it grows; of a long prompt its end is seen, and all of it by zooming out."""
    inside = """everyNode.filter((i) => shown[i]).every((i) =>
      px[i] > LEFT && px[i] < width && py[i] > 0 && py[i] < height - BOTTOM)"""
    browser = seen(dallas_graph(), size=(1000, 700))
    assert browser.run(inside)
    for change in ("togglePin(0)", "state.nodes = .9, refresh()", "zoom(2), fitView()"):
        browser.run(change)
        browser.run(FRAME)
        assert browser.run(inside) and browser.run("fitting < 1"), change
    browser = seen(page_graph(("<bos>", *(f"word {i}" for i in range(40))), features=80))
    assert browser.run("scale === 1 && px[asked[0]] < width") and not browser.run(inside)
    browser.run("zoom(.01)")
    browser.run(FRAME)
    assert browser.run(inside)


@pytest.mark.parametrize("size", [(400, 800), (1400, 900)])
def test_mouse_chooses_drags_and_zooms(seen, size):
    graph = dallas_graph()
    browser = seen(graph, size=size)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    find = "nodeRank.order.find((i) => nameOf(i) === 'say Austin')"
    x, y = value(
        browser,
        f"""(() => {{ const i = {find}, box = view.getBoundingClientRect();
      return [box.left + px[i], box.top + py[i]]; }})()""",
    )
    browser.click(x, y)
    assert browser.run("nameOf(state.selected)") == "say Austin"
    assert "Incoming" in browser.run("panel.textContent")
    before = value(browser, f"[px[{find}], py[{find}]]")
    for kind, dx in (("Pressed", 0), ("Moved", -10), ("Moved", -40), ("Released", -40)):
        browser.mouse(kind, x + dx, y, buttons=1)
    browser.run(FRAME)
    after = value(browser, f"[px[{find}], py[{find}]]")
    assert after[0] - before[0] == pytest.approx(-40, abs=1) and after[1] == pytest.approx(
        before[1]
    )
    browser.mouse("Wheel", x, y, deltaX=0, deltaY=-300)
    browser.run(FRAME)
    assert browser.run("scale / fitting") > 1.3


def test_keys_walk_pin_group_and_search(seen):
    graph = dallas_graph()
    browser = seen(graph)
    browser.run("scroll.focus()")
    browser.key("ArrowUp")
    assert browser.run("nameOf(state.selected)") == "Austin"
    browser.key("ArrowDown")
    assert browser.run("rows[state.selected] < TOP") and "layer" in browser.run(
        "byId('said').textContent"
    )
    browser.key("Enter", "\r")
    assert browser.run("state.pinned.length") == 1 and not browser.run("byId('sub').hidden")
    browser.key("/", "/")
    for sign in "texas":
        browser.key(sign, sign)
    assert "Texas" in browser.run("panel.innerText")
    browser.key("Enter", "\r")
    assert browser.run("nameOf(state.selected)") == "Texas"
    browser.key("Enter", "\r")
    assert browser.run("state.pinned.length") == 2
    browser.key("g", "g")
    for sign in "two":
        browser.key(sign, sign)
    browser.key("Enter", "\r")
    assert value(browser, "state.groups.map((g) => [g.name, g.nodes.length])") == [["two", 2]]
    browser.key("?", "?")
    assert browser.run("byId('keys').open")
    browser.key("Escape")
    browser.key("Escape")
    assert browser.run("state.selected === null && !byId('keys').open")


def test_groups_are_pinned_at_first(seen):
    """Once each, with the likeliest token; links of a group are summed between the boxes."""
    graph = page_graph(density=1, features=12)
    browser = seen(graph, groups={"one": [0, 1], HOSTILE: [1, 11], "none": []})
    found = value(
        browser, "state.groups.map((g) => [g.name, g.nodes.map((i) => nodes.feature[i])])"
    )
    feature = graph.sources.feature.tolist()
    assert found == [["one", feature[:2]], [HOSTILE, [feature[11]]]]
    assert not browser.run("byId('sub').hidden")
    assert browser.run("document.querySelectorAll('#boxes .box').length") == 3
    assert "×2" in browser.run("byId('boxes').innerText")


def test_links_of_groups_are_summed_and_heads_shown(seen):
    graph = page_graph(density=1, features=12)
    heads = {(graph.selected, 0): [(1, 3, 2, 0.25), (0, -1, 2, -0.5)]}
    browser = seen(graph, heads=heads)
    browser.run("""everyNode.filter((i) => kindOf(i) !== "error").forEach(togglePin);
      for (const i of everyNode.filter((i) => kindOf(i) === "feature")) marked.add(ids[i]);
      group("all"); for (const i of asked) marked.add(ids[i]); group("out")""")
    wanted = graph.effects[graph.selected :, : graph.selected].sum()
    (link,) = [
        b for b in value(browser, "between().map((b) => [b.from.name, b.to.name, b.all])")
        if b[:2] == ["all", "out"]
    ]  # fmt: skip
    assert link[2] == pytest.approx(wanted, rel=1e-3)
    browser.run("choose(asked[0]), panel.querySelectorAll('.all').forEach((b) => b.click()),"
                " panel.querySelector('.more').click()")  # fmt: skip
    table = browser.run("panel.querySelector('table').innerText")
    assert "−" not in table.split("\n")[0] and "none" in table and "0.25" in table


def test_outgoing_links_lead_to_targets_first_and_then_by_influence(seen):
    """Not by effect, whose unit is each target's own."""
    graph = page_graph(density=1, features=12)
    graph.effects[: graph.selected] *= 1e4
    browser = seen(graph)
    browser.run("choose(0)")
    links = value(browser, "outgoing[0].map((l) => [isAsked(links.target[l]), scores[l]])")
    assert sum(to_target for to_target, _ in links) == 2 < len(links)
    assert links == sorted(links, reverse=True)
    lists = "[...panel.querySelectorAll('h2')].filter((h) => h.textContent.startsWith('Outgoing'))"
    assert "x" in browser.run(f"{lists}[0].nextElementSibling.innerText").split("\n")[:4]


def test_only_probabilities_are_percentages(seen):
    """Of a difference, or a token whose weight was given, the value is shown."""
    graph = page_graph(answers=((" small", 1.0), (" large", 0.25), ("' small' - ' large'", 1.0)))
    graph.targets.kind[-1] = "direction"
    graph.value[-3:] = 2.5, -1.25, -7.55
    browser = seen(graph)
    for place in ("byId('answer')", "panel.querySelector('.list')"):
        text = browser.run(f"{place}.innerText")
        assert "25 %" in text and "+2.5" in text and "−7.55" in text and "100" not in text
    browser.run("byId('search').value = 'large', drawPanel()")
    assert "−7.55" in browser.run("panel.innerText")
    browser.run("choose(asked[0])")
    assert "probability" not in browser.run("panel.innerText")


def test_numbers_of_pinned_links_do_not_overlap(seen):
    browser = seen(dallas_graph())
    browser.run("asked.concat(nodeRank.order.slice(0, 12)).forEach(togglePin)")
    browser.run(FRAME)
    places = value(browser, """(() => { const pen = byId("between").getContext("2d"), all = [];
      pen.fillText = (text, x, y) => all.push([x, y, pen.measureText(text).width]);
      drawBetween();
      return all; })()""")  # fmt: skip
    assert len(places) > 4
    for i, (x, y, wide) in enumerate(places):
        for a, b, w in places[:i]:
            assert abs(x - a) > (wide + w) / 2 or abs(y - b) > 11


def test_a_view_is_written_and_read_back(seen):
    graph = dallas_graph()
    browser = seen(graph)
    browser.run("""nodeRank.order.slice(0, 4).forEach(togglePin);
      group("four"); choose(nodeRank.order[5]);
      state.labels.set(nodeRank.order[5], "mine"); state.moved.set(3, [4, 5]);
      state.nodes = .5; refresh()""")
    written = value(browser, "written()")
    assert written["groups"][0]["name"] == "four" and len(written["groups"][0]["nodes"]) == 4
    browser = seen(graph)
    written["pinned"].append("feature/99/1/1")  # of another graph
    written["labels"]["__proto__"] = "x"
    assert browser.run(f"readBack(JSON.parse({json.dumps(json.dumps(written))}))") == 2
    browser.run("refresh(), changed()")
    again = value(browser, "written()")
    assert again["groups"] == written["groups"] and again["moved"] == written["moved"]
    assert list(again["labels"].values()) == ["mine"] and again["nodes"] == 0.5
    for wrong in ("null", "[]", "{}", '{"gemma_scope_graph_view": 2}'):
        assert browser.run(
            f"(() => {{ try {{ readBack({wrong}) }} catch (e) {{ return e.message }} }})()"
        )
    odd = {"gemma_scope_graph_view": 1, "nodes": "x", "pinned": 3, "groups": [None, {"nodes": 1}],
           "moved": {written["pinned"][0]: ["a", None]}, "boxes": 1, "labels": [1]}  # fmt: skip
    browser.run(f"readBack({json.dumps(odd)}), refresh(), changed()")


def test_hostile_text_and_empty_graphs(seen):
    graph = page_graph(("<bos>", HOSTILE, "\x00\n", "\ud800"), answers=((HOSTILE, 0.5), ("", 0.1)))
    key = (int(graph.sources.layer[0]), int(graph.sources.feature[0]))
    browser = seen(
        label_graph(graph, {key: FeatureDetails(HOSTILE)}),
        details={key: FeatureDetails("", [HOSTILE], [HOSTILE], [([HOSTILE], [1.0])])},
        notes={HOSTILE: [[HOSTILE], [HOSTILE]]},
        title=HOSTILE,
    )
    browser.run("nodeRank.order.forEach(togglePin), group(nameOf(0)), choose(0)")
    text = browser.run("document.body.innerText")
    assert "<script>alert" in text and "‹202e›" in text and "\u202e" not in text
    assert browser.run("document.querySelectorAll('main b, main script').length") == browser.run(
        "panel.querySelectorAll('.row > b').length"
    )
    for empty in (page_graph(features=0), page_graph(("<bos>",), 1, 0, ()), page_graph(density=0)):
        browser = seen(empty)
        browser.run("walk('ArrowUp'), walk('ArrowLeft'), fitView(), zoom(2), choose(null)")
        browser.run(FRAME)


def test_directions_and_merged_errors_have_places(seen):
    """A merged error has no layer, or no position, or neither: -1."""
    graph = page_graph()
    targets = dataclasses.replace(graph.targets, kind=graph.targets.kind.copy())
    targets.kind[graph.selected :] = "direction"
    sources = dataclasses.replace(
        graph.sources, layer=graph.sources.layer.copy(), position=graph.sources.position.copy()
    )
    errors = np.flatnonzero(sources.kind == "error")
    sources.layer[errors[::2]] = -1
    sources.position[errors[:4]] = -1
    browser = seen(dataclasses.replace(graph, sources=sources, targets=targets))
    browser.run("state.nodes = state.links = 1, refresh()")
    browser.run(FRAME)
    assert browser.run("columns[0].from === -1 && everyNode.every((i) => px[i] > LEFT)")
    said = value(browser, "everyNode.filter((i) => kindOf(i) === 'error').map(describe)")
    names = value(browser, "everyNode.filter((i) => kindOf(i) === 'error').map(nameOf)")
    assert "error of all layers" in names and "error 1 at 3" in names
    assert "error, all layers, all tokens" in said and all("-1" not in text for text in said)


def test_files_of_views_are_opened(seen):
    graph = page_graph()
    browser = seen(graph)
    give = """(text) => { const all = new DataTransfer();
      all.items.add(new File([text], "view.json"));
      byId("file").files = all.files; byId("file").dispatchEvent(new Event("change")); }"""
    view = {"gemma_scope_graph_view": 1, "pinned": [browser.run("ids[0]"), "token/1/2/3"]}
    for text, says in ((json.dumps(view), "1 of its nodes"), ("{", "cannot be opened")):
        browser.run(f"({give})({json.dumps(text)})")
        browser.run(FRAME)
        assert says in browser.run("panel.innerText")
    assert browser.run("state.pinned.length") == 1 and not browser.run("byId('sub').hidden")
