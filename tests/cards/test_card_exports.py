"""What cards are written as: the site, files for other programs; the command; published files."""

import gzip
import html.parser
import json
import re
import shutil
import struct
import subprocess
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_scope_jax.autointerp.explanations import write_explanations
from gemma_scope_jax.cards.build import build_cards
from gemma_scope_jax.cards.card_files import FILE, FeatureCards
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.cards.export.anthropic import cantor
from gemma_scope_jax.cards.export.neuronpedia import _about as neuronpedia_rows
from gemma_scope_jax.cards.published import PER_FEATURE
from gemma_scope_jax.cards.site import shard_of
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.release.files import load_coder, save_coder
from gemma_scope_jax.coders.sparse_coder import CoderInfo, SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS
from letters import Letters
from tiny import tiny_model
from tiny_command import command, give_tiny

F, LAYER = 48, 1
HOSTILE = '</script><script>alert("x")</script><!--&amp;\u2028 plums and pears'
EXPLAINED = {
    3: {
        "text": "zebra <b>crossings</b>",
        "method": "endpoint",
        "model": "m",
        "scores": {"detection": {"balanced_accuracy": 0.875}},
    }
}


def random_coder(d=32, width=F, seed=1, **place):
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / d**0.5
    return SparseCoder(
        normal(keys[0], d, width),
        jnp.zeros(width),
        jnp.full(width, 1.0).at[5].set(1e9),
        normal(keys[1], width, d),
        jnp.zeros(d),
        **{"layer": LAYER, **place},
        info=CoderInfo(l0=10.0),
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model(PRESETS["gemma-3-270m"], layers=4)


@pytest.fixture
def tiny(monkeypatch, model):
    """The name "tiny" is a tiny model with a tokenizer of letters; no cache is written."""
    give_tiny(monkeypatch, model)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """One command over two coders, compared with each other, with all exports."""
    tmp = tmp_path_factory.mktemp("made")
    for name, place in {"one": {}, "two": {"layer": 2, "seed": 2}}.items():
        save_coder(random_coder(**place), tmp / name, config_extra={"model_name": "acme/tiny"})
    write_explanations(tmp / "one", "one", EXPLAINED)
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 150)]
    (tmp / "text.txt").write_text(HOSTILE + "\n\f\n" + " ".join(words), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        give_tiny(patch, model)
        assert command(
            "cards", tmp / "one", tmp / "two", "--text", tmp / "text.txt", "--tokens", 5000,
            "--length", 64,
            "--out", tmp / "out", "--model", "tiny", "--top", 9, "--each", 2, "--before", 14,
            "--after", 9, "--compare", tmp / "two", "--export", "saedashboard", "neuronpedia",
            "anthropic", "anthropic-json",
        ) == 0  # fmt: skip
    return tmp / "out"


@pytest.fixture(scope="module")
def cards(made):
    return FeatureCards(made / "one" / "cards")


# -------------------------------------------------------------------------------------------------
# The site


def data_of(path):
    """The call in a data file: its name and its value."""
    text = path.read_text(encoding="utf-8")
    name, value = re.fullmatch(r'cards\("([a-z0-9-]+)",(.*)\)\n', text, re.S).groups()
    assert name == path.stem and not set("<>&\u2028\u2029") & set(text)
    return json.loads(value)


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
    assert overview["notes"][3] == "m, detection 0.88"
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


# -------------------------------------------------------------------------------------------------
# Other programs' files. Fields: sae-dashboard 0.8 and its neuronpedia_export, circuit-tracer 0.5


NUMBER, NUMBERS, TEXTS = (int, float), [(int, float)], [str]
DASHBOARD = {
    "feature_index": int, "neuron_alignment_indices": [int], "neuron_alignment_values": NUMBERS,
    "neuron_alignment_l1": NUMBERS, "correlated_neurons_indices": [int],
    "correlated_neurons_pearson": NUMBERS, "correlated_neurons_l1": NUMBERS,
    "correlated_features_indices": [int], "correlated_features_pearson": NUMBERS,
    "correlated_features_l1": NUMBERS, "neg_str": TEXTS, "neg_values": NUMBERS, "pos_str": TEXTS,
    "pos_values": NUMBERS, "frac_nonzero": NUMBER, "freq_hist_data_bar_values": NUMBERS,
    "freq_hist_data_bar_heights": NUMBERS, "logits_hist_data_bar_heights": NUMBERS,
    "logits_hist_data_bar_values": NUMBERS, "n_prompts_total": int, "n_tokens_in_prompt": int,
    "dataset": str, "decoder_weights_dist": NUMBERS, "vector": NUMBERS,
    "activations": [{
        "bin_min": NUMBER, "bin_max": NUMBER, "bin_contains": NUMBER, "tokens": TEXTS,
        "values": NUMBERS, "qualifying_token_index": int,
    }],
}  # fmt: skip
OPTIONAL = (str, int, float, type(None))
FEATURE = {
    **{k: v for k, v in DASHBOARD.items() if k not in (
        "feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations")},
    "modelId": str, "layer": str, "index": str, "creatorId": str, "createdAt": str,
    "maxActApprox": NUMBER, "hasVector": bool, "vectorLabel": OPTIONAL, "hookName": str,
    "vectorDefaultSteerStrength": NUMBER, "topkCosSimIndices": [int], "topkCosSimValues": NUMBERS,
    "sourceSetName": str,
}  # fmt: skip
ACTIVATION = {
    "id": str, "tokens": TEXTS, "index": str, "layer": str, "modelId": str, "maxValue": NUMBER,
    "maxValueTokenIndex": int, "minValue": NUMBER, "values": NUMBERS, "creatorId": str,
    "dataSource": OPTIONAL, "dataIndex": OPTIONAL, "dfaValues": NUMBERS, "dfaTargetIndex": OPTIONAL,
    "dfaMaxValue": OPTIONAL, "createdAt": str, "lossValues": NUMBERS, "binMin": NUMBER,
    "logitContributions": OPTIONAL, "binMax": NUMBER, "binContains": NUMBER,
    "qualifyingTokenIndex": int, "zIndices": OPTIONAL, "zValues": OPTIONAL,
}  # fmt: skip
ANTHROPIC = {
    "transcoder_id": str, "index": int, "top_logits": TEXTS, "bottom_logits": TEXTS,
    "act_min": NUMBER, "act_max": NUMBER, "quantile_values": NUMBERS, "histogram": NUMBERS,
    "activation_frequency": NUMBER,
    "examples_quantiles": [{"quantile_name": str, "examples": [{
        "tokens_acts_list": NUMBERS, "train_token_ind": int, "is_repeated_datapoint": bool,
        "tokens": TEXTS,
    }]}],
}  # fmt: skip


def check(value, schema, where=""):
    """Exactly these keys and types; a list's elements are all of one schema."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() == schema.keys(), where
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, element in enumerate(value):
            check(element, schema[0], f"{where}[{i}]")
    else:
        assert isinstance(value, schema), where
        assert bool in np.atleast_1d(schema) or not isinstance(value, bool), where


def test_the_check_finds_faults():
    good = {"a": 1, "b": [0.5]}
    check(good, {"a": int, "b": NUMBERS})
    for bad in ({"a": 1}, {**good, "c": 1}, {"a": True, "b": []}, {"a": 1, "b": ["x"]}, []):
        with pytest.raises(AssertionError):
            check(bad, {"a": int, "b": NUMBERS})


def test_saedashboard(made, cards):
    folder, tok = made / "one" / "saedashboard", Letters()
    batches = [json.loads(p.read_text()) for p in sorted(folder.glob("batch-*.json"))]
    assert len(batches) == 1
    for batch in batches:
        check(batch, {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": OPTIONAL,
                      "features": [DASHBOARD]})  # fmt: skip
    features = {f["feature_index"]: f for b in batches for f in b["features"]}
    skipped = json.loads((folder / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [5] and skipped["layer"] == "1"
    assert sorted([*features, 5]) == list(range(F))
    settings = json.loads((folder / "run_settings.json").read_text())
    assert (settings["n_quantiles"], settings["top_acts_group_size"]) == (5, 9)
    w = np.asarray(load_coder(made.parent / "one").w_dec, np.float64)
    for f, dashboard in features.items():
        groups = cards.groups(f)
        shown = [e for g in groups for e in g.examples]
        assert len(dashboard["activations"]) == len(shown)
        for activation, example in zip(dashboard["activations"], shown):
            assert activation["tokens"] == tok.decode_tokens(example.ids)
            np.testing.assert_allclose(activation["values"], example.values, atol=1e-5)
            assert activation["qualifying_token_index"] == example.at
        top = dashboard["activations"][: len(groups[0].examples)]
        assert {(a["bin_min"], a["bin_contains"]) for a in top} == {(-1, -1)}
        rest = dashboard["activations"][len(top) :]
        for a in rest:
            peak = a["values"][a["qualifying_token_index"]]
            assert a["bin_min"] - 1e-5 < peak <= a["bin_max"] + 1e-5 and 0 < a["bin_contains"] <= 1
        shares = {(a["bin_min"], a["bin_contains"]) for a in rest}
        assert sum(share for _, share in shares) == pytest.approx(1, abs=1e-4)
        aligned = np.argsort(-w[f])[:3]
        assert dashboard["neuron_alignment_indices"] == aligned.tolist()
        np.testing.assert_allclose(
            dashboard["neuron_alignment_l1"], np.abs(w[f][aligned]) / np.abs(w[f]).sum(), atol=1e-5
        )
        assert sum(dashboard["freq_hist_data_bar_heights"]) == groups[0].count
        assert dashboard["frac_nonzero"] == pytest.approx(float(cards["density"][f]))


def rows_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_neuronpedia(made):
    (source,) = (made / "one" / "neuronpedia" / "tiny").glob("1-one-????????")
    features, activations = (rows_of(source / n / "batch-0.jsonl.gz") for n in
                             ("features", "activations"))  # fmt: skip
    for rows, schema in ((features, FEATURE), (activations, ACTIVATION)):
        for row in rows:
            check(row, schema)
    assert len({a["id"] for a in activations}) == len(activations)
    assert all(len(a["id"]) == 25 for a in activations)
    most = {}
    for a in activations:
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
        most[a["index"]] = max(most.get(a["index"], 0), a["values"][a["qualifyingTokenIndex"]])
    for row in features:
        assert row["maxActApprox"] == pytest.approx(most[row["index"]], abs=1e-4)
        assert row["layer"] == source.name and row["hookName"] == "blocks.1.resid_post"
    (said,) = rows_of(source / "explanations" / "batch-0.jsonl.gz")
    assert said["index"] == "3" and said["description"] == EXPLAINED[3]["text"]
    assert said["scoreV1"] == 0.875
    for name, keys in {
        "release": {"name", "description", "creatorId", "urls", "createdAt"},
        "model": {"id", "instruct", "creatorId", "updatedAt"},
        "sourceset": {"modelId", "name", "releaseName", "visibility"},
        "source": {"id", "modelId", "setName", "hfRepoId", "num_prompts", "dataset"},
    }.items():  # fmt: skip
        row = json.loads((source / f"{name}.jsonl").read_text())
        assert keys <= row.keys()
    assert row["id"] == source.name and row["num_tokens_in_prompt"] == 64


@pytest.mark.parametrize("name, instruct", [
    ("gemma-3-1b-it", True), ("acme/tiny-IT", True), ("acme/tiny_it", True),
    ("gemma-3-4b-it-qat-q4_0", True), ("gemma-3-1b-pt", False), ("acme/kit", False),
])  # fmt: skip
def test_neuronpedia_is_told_of_instruction_tuned_models(made, tmp_path, name, instruct):
    shutil.copytree(made / "one" / "cards", tmp_path / "one")
    manifest = json.loads((tmp_path / "one" / FILE).read_text()) | {"model": name}
    (tmp_path / "one" / FILE).write_text(json.dumps(manifest))
    rows = neuronpedia_rows(FeatureCards(tmp_path / "one"), "source", "now")
    assert rows["model"]["instruct"] is instruct


def test_graph_viewers(made, cards):
    """As a viewer does it: the index, a range of bytes, its length, zlib, JSON."""
    folder, tok = made / "anthropic" / "features", Letters()
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    assert index.keys() == {"1", "2"}  # both coders, in one index
    data = (folder / index["1"]["filename"]).read_bytes()
    offsets = index["1"]["offsets"]
    assert len(offsets) == F + 1 and offsets[-1] == len(data)
    for f in range(F):
        part = data[offsets[f] : offsets[f + 1]]
        (length,) = struct.unpack("<I", part[:4])
        card = json.loads(zlib.decompress(part[4 : 4 + length]))
        check(card, ANTHROPIC)
        assert card["index"] == cantor(1, f) and len(card["quantile_values"]) == 99
        assert card["act_max"] == pytest.approx(float(cards["largest"][f]), abs=1e-5)
        assert card["histogram"] == cards["histogram"][f].tolist()
        shown = [e for g in cards.groups(f) for e in g.examples]
        listed = [e for q in card["examples_quantiles"] for e in q["examples"]]
        assert [e["tokens"] for e in listed] == [tok.decode_tokens(e.ids) for e in shown]
        assert [e["train_token_ind"] for e in listed] == [e.at for e in shown]
        places = [(e.document, e.position) for e in shown]
        repeated = [place in places[:i] for i, place in enumerate(places)]
        assert [e["is_repeated_datapoint"] for e in listed] == repeated
        alone = made / "anthropic-json" / f"{cantor(1, f)}.json"
        assert alone.exists() == (f != 5) and (f == 5 or json.loads(alone.read_bytes()) == card)


def test_cantor():
    """Every pair has a number of its own, along the diagonals."""
    pairs = [(layer, total - layer) for total in range(40) for layer in range(total, -1, -1)]
    assert [cantor(*pair) for pair in pairs] == list(range(len(pairs)))
    assert cantor(25, 9999) == 50_255_299


# -------------------------------------------------------------------------------------------------
# Published examples


def published(folder, rng, width=F, examples=12, sequences=9, length=20):
    """A file of the release's layout, and the dense activations that it was made from."""
    dense = np.round(rng.random((width, sequences, length)) ** 4 * 1000, 1).astype(np.float32)
    dense[rng.random(dense.shape) < 0.9] = 0
    dense[5] = 0
    flat = dense.reshape(width, -1)
    order = np.argsort(-flat, axis=-1, kind="stable")[:, :examples]
    found = np.take_along_axis(flat, order, -1)
    seq, pos = np.where(found > 0, order // length, 0), np.where(found > 0, order % length, 0)
    tensors = {
        "tokens": rng.integers(3, 300, (sequences, length)).astype(np.int32),
        "activations": found, "seq_ids": seq.astype(np.int32), "positions": pos.astype(np.int32),
        "logit_effects": np.zeros_like(found),
        "feature_frequencies": (flat > 0).mean(-1).astype(np.float32),
        "top_tokens": rng.integers(3, 300, (width, 10)).astype(np.int32),
        "top_logits": rng.random((width, 10)).astype(np.float32),
        "bottom_tokens": rng.integers(3, 300, (width, 10)).astype(np.int32),
        "bottom_logits": -rng.random((width, 10)).astype(np.float32),
    }  # fmt: skip
    save_file(tensors, folder / "examples.safetensors")
    return tensors


def test_published_examples(tmp_path):
    tensors = published(tmp_path, np.random.default_rng(0))
    settings = CardSettings(top=3, groups=5, each=2, before=4, after=3, bins=10)
    cards = build_cards(
        tmp_path / "examples.safetensors", random_coder(), tmp_path / "cards", settings=settings
    )
    assert "correlated_ids" not in cards and cards.manifest["strongest_only"] == 12
    for f in range(F):
        known = {
            (int(s), int(p)): float(v)
            for v, s, p in zip(*(tensors[n][f] for n in PER_FEATURE)) if v > 0
        }  # fmt: skip
        best = {}
        for (s, p), v in sorted(known.items()):
            if v > best.get(s, (0, 0))[0]:
                best[s] = (v, p)
        wanted = sorted(((v, s, p) for s, (v, p) in best.items()), key=lambda e: (-e[0], e[1:]))[:3]
        top, *parts = cards.groups(f)
        assert [(e.values[e.at], e.document, e.position) for e in top.examples] == wanted
        for e in [e for g in (top, *parts) for e in g.examples]:
            here = range(max(0, e.position - 4), min(20, e.position + 4))
            assert e.ids == [int(tensors["tokens"][e.document, t]) for t in here]
            assert e.values == [known.get((e.document, t), 0.0) for t in here]
        counts = [sum(g < 5 * v / max(known.values()) <= g + 1 for v in known.values())
                  for g in reversed(range(5))]  # fmt: skip
        assert [g.count for g in parts] == counts
        assert [len(g.examples) for g in parts] == [
            min(2, len({s for (s, _), v in known.items()
                        if g.low < v * (1 + 1e-9) and v <= g.high * (1 + 1e-6)}))
            for g in parts
        ]  # fmt: skip
    np.testing.assert_array_equal(cards["top_ids"], tensors["top_tokens"])
    np.testing.assert_allclose(cards["density"], tensors["feature_frequencies"])


def test_the_command_on_published_examples(tiny, tmp_path):
    """Neither model nor text is needed."""
    save_coder(random_coder(), tmp_path / "sae", config_extra={"model_name": "acme/tiny"})
    published(tmp_path / "sae", np.random.default_rng(1))
    options = ("--out", tmp_path / "out", "--model", "tiny", "--export", "saedashboard")
    assert command("cards", tmp_path / "sae", *options) == 0
    assert "published examples" in data_of(tmp_path / "out" / "sae" / "data" / "list.js")["about"]
    batch = json.loads((tmp_path / "out" / "sae" / "saedashboard" / "batch-0.json").read_text())
    check(batch["features"], [DASHBOARD])


def test_coders_of_several_layers(tiny, tmp_path):
    """A site for each of its layers."""
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape) / 6
    crosscoder = MultiLayerCoder(
        draw(0, 2, 32, F), jnp.zeros((2, F)), jnp.full((2, F), 0.1), draw(1, 3, F, 32),
        jnp.zeros((2, 32)), layers=(1, 2),
    )  # fmt: skip
    save_coder(crosscoder, tmp_path / "cross", config_extra={"model_name": "acme/tiny"})
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog " * 9)
    options = ("--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--model", "tiny",
               "--length", 64)  # fmt: skip
    assert command("cards", tmp_path / "cross", *options) == 0
    made = [FeatureCards(tmp_path / "out" / f"cross-layer-{i}" / "cards") for i in (1, 2)]
    assert [c.manifest["layer"] for c in made] == [1, 2]
    assert made[0]["largest"].tolist() != made[1]["largest"].tolist()
    np.testing.assert_array_equal(made[0]["example_tokens"].shape[:2], (F, 45))


# -------------------------------------------------------------------------------------------------
# Going on, and what cannot be


def test_finished_stages_are_kept(made, cards, tiny, tmp_path, monkeypatch, capsys):
    """The same command makes nothing anew but the site; other settings do."""
    before = {p.name: p.stat().st_mtime_ns for p in (made / "one" / "cards").glob("*.npy")}
    options = ("--store", made / "store", "--out", made, "--model", "tiny", "--top", 9, "--each", 2,
               "--before", 14, "--after", 9, "--compare", made.parent / "two")  # fmt: skip
    assert command("cards", made.parent / "one", made.parent / "two", *options) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (made / "one" / "cards").glob("*.npy")}
    assert before == after
    copy = tmp_path / "cards"
    shutil.copytree(made / "one" / "cards", copy)
    from gemma_scope_jax.extraction.store.store import FeatureStore

    store, coder = FeatureStore(made / "store"), load_coder(made.parent / "one")
    with monkeypatch.context() as patch:
        fail = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        patch.setattr("gemma_scope_jax.cards.examples._windows", fail)
        with pytest.raises(KeyboardInterrupt):
            build_cards(store, coder, copy, settings=CardSettings(top=7))
    assert not list(copy.glob(".*.npy"))
    with pytest.raises(InputError, match="not finished"):
        FeatureCards(copy)
    again = build_cards(store, coder, copy, settings=CardSettings(top=7))
    assert again["example_rows"].shape == (F, 7 + 25) and "top_ids" in again
    published(tmp_path, np.random.default_rng(0))
    other = build_cards(tmp_path / "examples.safetensors", coder, copy)
    assert "correlated_ids" not in other and "logit_range" not in other  # nothing stale is left


def bad(folder, tmp):
    """Command lines that cannot work, and a part of the line that says why."""
    (tmp / "text.txt").write_text("a quick brown fox")
    other = random_coder(seed=9).replace(threshold=jnp.full(F, 0.9))
    save_coder(other, tmp / "other", config_extra={"model_name": "acme/tiny"})
    save_coder(random_coder(d=16), tmp / "small", config_extra={"model_name": "acme/tiny"})
    (tmp / "garbled").mkdir()
    shutil.copytree(folder.parent / "one", tmp / "labelled")
    (tmp / "labelled" / "explanations.json").write_text('{"format": 9, "explanations": {}}')
    (tmp / "taken" / "one" / "cards").mkdir(parents=True)
    (tmp / "taken" / "one" / "cards" / FILE).write_text("{")
    for name, change in {
        "short": lambda t: t.pop("positions"), "narrow": lambda t: t.update(
            {n: t[n][:7] for n in (*PER_FEATURE, "feature_frequencies")}),
        "beyond": lambda t: t["positions"].__setitem__((0, 0), 9999),
        "flat": lambda t: t.update(tokens=t["tokens"].reshape(-1)),
        "alien": lambda t: t["tokens"].__setitem__((0, 0), 9999),
        "nowhere": lambda t: t["feature_frequencies"].__setitem__(3, np.nan),
    }.items():  # fmt: skip
        save_coder(random_coder(), tmp / name, config_extra={"model_name": "acme/tiny"})
        tensors = published(tmp / name, np.random.default_rng(0))
        change(tensors)
        save_file(tensors, tmp / name / "examples.safetensors")
    save_coder(random_coder(), tmp / "torn", config_extra={"model_name": "acme/tiny"})
    (tmp / "torn" / "examples.safetensors").write_bytes(b"\x10")
    one, store = folder.parent / "one", ("--store", folder / "store")
    yield ("cards", one, "--text", tmp / "text.txt", *store), "not both"
    yield ("cards", one), "no examples are published beside it: give --text"
    yield ("cards", one, "--store", tmp / "none"), "holds no sparse features"
    yield ("cards", one, "--text", tmp / "none.txt"), "none.txt"
    yield ("cards", tmp / "none", *store), "none"
    yield ("cards", tmp / "other", *store), "holds no features of other"
    yield ("cards", one, *store, "--compare", tmp / "small"), "cannot be compared"
    yield ("cards", one, *store, "--compare", tmp / "nobody"), "nobody"
    yield ("cards", one, *store, "--out", "gs://bucket/cards"), "a local folder"
    yield ("cards", one, *store, "--top", 0), "top is 0"
    yield ("cards", one, *store, "--before", -1), "before is -1"
    yield ("cards", one, *store, "--groups", 0), "groups is 0"
    yield ("cards", tmp / "labelled", *store), "format 9 is not known"
    yield ("cards", one, *store, "--out", tmp / "taken"), "not the manifest of cards"
    yield ("cards", tmp / "short"), "positions missing"
    yield ("cards", tmp / "narrow"), "has 7 features, the coder beside it 48"
    yield ("cards", tmp / "beyond"), "lies outside of the tokens"
    yield ("cards", tmp / "flat"), "expected [S, T]"
    yield ("cards", tmp / "alien"), "9999, and the tokenizer"
    yield ("cards", tmp / "nowhere"), "feature_frequencies are not all numbers"
    for number, model in enumerate(({"name": "tiny", "weights": "w"}, {"dtype": 3}, [])):
        shutil.copytree(folder / "store", tmp / f"store{number}")
        manifest = json.loads((tmp / f"store{number}" / "manifest.json").read_text())
        manifest["model"] = model
        (tmp / f"store{number}" / "manifest.json").write_text(json.dumps(manifest))
        yield (
            ("cards", one, "--store", tmp / f"store{number}"),
            ("dtype", "lacks 'name'", "manifest.json")[number],
        )
    yield ("cards", tmp / "torn"), "not a complete safetensors file"


def test_what_cannot_work_is_one_line(made, tiny, tmp_path, capsys):
    for argv, said in bad(made, tmp_path):
        out = () if "--out" in argv else ("--out", tmp_path / "out")
        assert command(*argv, *out, "--model", "tiny") == 2, argv
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and said in last, (argv, last)


def test_cards_need_a_folder_of_this_machine(tmp_path):
    with pytest.raises(InputError, match="a local folder"):
        build_cards(tmp_path / "x.safetensors", random_coder(), "gs://bucket/cards")
    with pytest.raises(InputError, match="no feature cards"):
        FeatureCards(tmp_path)
    with pytest.raises(InputError, match="multiple of groups"):
        CardSettings(bins=7)
