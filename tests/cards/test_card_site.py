"""The site: whole pages that ask nobody, searched and browsed."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from card_folders import EXPLAINED, F, data_of
from gemma_scope_jax.cards.site import shard_of
from letters import Letters


class Links(html.parser.HTMLParser):
    """Every address in a page, and that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("href", "src", "action")]
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("page", ["index.html", "one/index.html", "two/index.html"])
def test_pages_are_whole_and_ask_nobody(made, page):
    text = (made / page).read_text(encoding="utf-8")
    seen = Links()
    seen.feed(text)
    assert seen.open == []
    assert all(re.fullmatch(r"data:,|#/|(\.\./|one/|two/)index\.html", a) for a in seen.links)
    assert "default-src 'none'" in text and "{{" not in text
    assert not re.search(r"https?:|fetch\(|innerHTML|XMLHttpRequest", text)


def test_the_program_is_valid(made, tmp_path):
    if (node := shutil.which("node")) is None:
        pytest.skip("no node here")
    page = (made / "one" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "program.js").write_text(re.search(r"<script>(.*)</script>", page, re.S)[1])
    subprocess.run([node, "--check", tmp_path / "program.js"], check=True)
    words = ["a", "to", "über", "日本", "\U0001d4b3", "\U0001d4b3y", "42"]
    script = re.search(r"const shardOf = .*?;\n", page)[0]
    wanted = f"const all = {{shards: 128}}; {script} console.log(JSON.stringify(" + (
        f"{json.dumps(words)}.map(shardOf)))"
    )
    out = subprocess.run([node, "-e", wanted], check=True, capture_output=True, text=True).stdout
    assert json.loads(out) == [f"words-{shard_of(word)}" for word in words]


def test_the_list_and_the_cards_are_the_arrays(made, cards):
    overview = data_of(made / "one" / "data" / "list.js")
    assert overview["density"] == pytest.approx(np.asarray(cards["density"]), rel=1e-2)
    assert overview["largest"] == pytest.approx(np.asarray(cards["largest"]), rel=1e-3)
    assert overview["labels"][3] == EXPLAINED[3]["text"] and overview["labels"][4] == ""
    assert overview["notes"][3] == "m, fuzzing 0.88"
    assert overview["compared"] == [["two", "../two/index.html", F]]
    assert "text.txt" not in overview["about"] and str(made) not in json.dumps(overview)
    tok = Letters()
    for f in range(F):
        chunk = data_of(made / "one" / "data" / f"cards-{f // 32}.js")
        card, words = chunk["cards"][f % 32], chunk["words"]
        assert card["h"] == cards["histogram"][f].tolist()
        assert [words[w] for w, _ in card["l"][0]] == tok.decode_tokens(cards["top_ids"][f])
        assert [i for i, _ in card["c"]] == [i for i, *_ in cards.listed("correlated", f)]
        for (name, _, _, count, examples), group in zip(card["g"], cards.groups(f), strict=True):
            assert (name, count) == (group.name, group.count)
            for (where, at, ids, pairs), example in zip(examples, group.examples, strict=True):
                assert [words[w] for w in ids] == tok.decode_tokens(example.ids)
                assert where == (f"text.txt, document {example.document}, token {example.position}")
                values = np.zeros(len(ids))
                values[pairs[::2]] = pairs[1::2]
                strength = 1000 * np.array(example.values) / float(cards["largest"][f])
                np.testing.assert_allclose(values, strength, atol=0.51)
                assert at == example.at


def found(made, word):
    """Features and scores of a word, as the page reads them."""
    flat = data_of(made / "one" / "data" / f"words-{shard_of(word)}.js").get(word, [])
    features = np.cumsum(flat[::2]).tolist()
    return dict(zip(features, flat[1::2]))


def test_search(made, cards):
    """Labels, logit tokens, words of examples: each where it stands, and nowhere else."""
    tok = Letters()
    assert found(made, "zebra") == {3: 30} and found(made, "crossings") == {3: 30}
    texts = {}
    for f in range(F):
        some = cards.groups(f)[0].examples
        texts[f] = " ".join("".join(tok.decode_tokens(e.ids)) for e in some).lower()
    for word in ("plums", "pears", "alert"):
        here = {f for f, text in texts.items() if re.search(rf"\b{word}\b", text)}
        assert here and set(found(made, word)) == here
    raised = [tok.decode_tokens(ids)[0].lower() for ids in cards["top_ids"]]
    some = [(f, text) for f, text in enumerate(raised) if re.fullmatch(r"\w", text)]
    assert len(some) > 9  # features whose first token is a letter
    for f, letter in some:
        assert found(made, letter)[f] >= 6
    assert found(made, "nowhere") == {}


def browse(page, hash):
    """The page as a browser has it after its scripts ran."""
    run = subprocess.run(
        ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{page}{hash}"],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    return run.stdout.decode()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_in_a_browser(made, cards):
    page = made / "one" / "index.html"
    assert "1 feature for “zebra”" in browse(page, "#/search/zebra")
    card = browse(page, "#/feature/3")
    assert "zebra &lt;b&gt;crossings" in card and "Feature 3" in card
    plums = next(iter(found(made, "plums")))
    card = browse(page, f"#/feature/{plums}")
    spans = "".join(re.findall(r'<div class="text">(.*?)</div>', card))
    assert "plums" in re.sub(r"<[^>]*>", "", spans) and "text.txt, document 0" in card
    assert "../two/index.html#/feature/" in card and '<script>alert("x")' not in card
