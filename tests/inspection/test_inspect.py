"""Inspection and label material against what the model and the coder say directly."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coders import random_coder
from gemma_scope_jax.cards.labels import AFTER, BEFORE, build_labels, read_labels, write_labels
from gemma_scope_jax.coders.directions import logit_tokens
from gemma_scope_jax.coders.splice import features
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.inspection.inspect_text import inspect_text, strongest_features
from gemma_scope_jax.inspection.page import inspection_page
from gemma_scope_jax.inspection.terminal import inspection_tables, label_text, visible
from gemma_scope_jax.model.run import run
from gemma_scope_jax.progress import console
from letters import Letters

tok = Letters()
HOSTILE = '</script><script>alert("x")</script>{{data}}<!--&amp;'


@pytest.fixture(scope="module")
def coder():
    return random_coder(threshold=1.0)


@pytest.fixture(scope="module")
def seen(model, coder):
    return inspect_text(model, coder, tok, HOSTILE, top_k=3, shown=7)


def test_next_tokens_are_the_models(model, seen):
    """Padding to a power of two does not move the end of the text."""
    ids = tok.encode(HOSTILE)
    assert seen.ids == ids.tolist() and "".join(seen.tokens[1:]) == HOSTILE
    logits = np.asarray(run(model, ids[None]).logits[0, -1], np.float64)
    best = np.argsort(-logits)[:10]
    assert [n.id for n in seen.next] == best.tolist()
    np.testing.assert_allclose([n.logit for n in seen.next], logits[best], atol=1e-4)
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose([n.probability for n in seen.next], chances[best], rtol=1e-3)


def test_features_are_the_coders(model, coder, seen):
    ids = tok.encode(HOSTILE)
    f = np.asarray(run(model, ids[None], [features(coder)]).reads["features"][0])
    assert seen.features[0] == [] and len(seen.features) == len(ids)
    for t, listed in enumerate(seen.features):
        best = [i for i in np.argsort(-f[t])[:3].tolist() if f[t, i] > 0]
        assert [i for i, _ in listed] == best
        np.testing.assert_allclose([a for _, a in listed], f[t, best], rtol=1e-4)
    assert len(set(seen.strongest)) == 7
    np.testing.assert_allclose(np.array(seen.heat), f[:, seen.strongest].T, atol=1e-5)
    assert set(seen.labels) == {i for some in seen.features for i, _ in some} | set(seen.strongest)
    assert abs(seen.figures["l0"] - (f[1:] > 0).sum(-1).mean()) < 1e-6


def test_every_token_is_stood_for_while_there_is_room():
    values = np.array([[9.0, 8.0], [1.0, 0.5], [2.0, 0.0]])
    ids = np.array([[4, 5], [6, 4], [7, 8]])
    assert strongest_features(values, ids, 3) == [4, 6, 7]  # by where they peak
    assert strongest_features(values, ids, 4) == [4, 5, 6, 7]
    assert strongest_features(values, ids, 1) == [4]
    assert strongest_features(values, ids, 9) == [4, 5, 6, 7]  # 8 is not active
    assert strongest_features(np.zeros((3, 2)), ids, 9) == []


@pytest.mark.parametrize(
    "text, said",
    [("", "empty"), (" \n\t", "empty"), ("x" * 64, "65 tokens, more than the context")],
)
def test_texts_that_cannot_be_inspected(model, coder, text, said):
    with pytest.raises(InputError, match=said):
        inspect_text(model, coder, tok, text)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(layer=4), "layer 4"),
        (dict(reads="z", writes="z"), "reads 32 values at z"),
        (dict(first=9), "skips the first 9"),
    ],
)
def test_coders_that_do_not_fit(model, coder, change, said):
    with pytest.raises(InputError, match=said):
        inspect_text(model, coder.replace(**change), tok, "abc")
    with pytest.raises(InputError, match="top-k 0"):
        inspect_text(model, coder, tok, "abc", top_k=0)
    with pytest.raises(InputError, match="48 features"):
        inspect_text(model, coder, tok, "abc", top_k=49)


# -------------------------------------------------------------------------------------------------
# The page and the terminal


def test_page_is_inert_and_self_contained(seen):
    page = inspection_page(seen)
    assert page.count("<script") == page.count("</script>") == 2  # the data and the program
    assert not re.search(r"(https?:)?//[a-z]", page.lower().replace("// ----", ""))
    assert "default-src 'none'" in page and "{{title}}" not in page
    title = re.search("<title>(.*)</title>", page)[1]
    assert title.startswith("&lt;/script&gt;&lt;script&gt;")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert not set("<>&") & set(data)
    data = json.loads(data)
    assert "".join(data["tokens"][1:]) == HOSTILE
    dense = np.zeros((len(data["heat"]), len(data["tokens"])))
    for row, pairs in zip(dense, data["heat"]):
        row[np.array(pairs[::2], int)] = pairs[1::2]
    np.testing.assert_allclose(dense, np.array(seen.heat), rtol=1e-3)


def test_json_is_plain_and_complete(seen):
    data = json.loads(json.dumps(seen.as_dict(), allow_nan=False))
    assert data["features"][3][0].keys() == {"feature", "activation"}
    assert data["next"][0].keys() == {"token", "id", "probability", "logit"}
    assert {str(f) for f in seen.strongest} <= data["labels"].keys()
    assert data["figures"]["delta_loss"] is not None


def print_inspection(seen, width):
    for part in inspection_tables(seen, width):
        console(width=width).print(part)


def test_terminal_shows_every_token_on_a_line_of_its_own(seen, capsys):
    print_inspection(seen, 300)
    out = capsys.readouterr().out
    for title in ("Next token", "Features, token by token", "L0 ", "FVU ", "delta loss "):
        assert title in out
    rows = out.split("strongest in")[1].split("L0 ")[0].splitlines()
    assert sum(line[:1] not in ("", " ") for line in rows) == len(seen.tokens)
    assert "not read by the coder" in out
    assert visible("a\n\tb\x1b[1m") == "a⏎⇥b\\x1b[1m"
    label = {
        "top_logits": [" the", "\n"],
        "bottom_logits": [],
        "density": 0.1,
        "examples": [{"tokens": [" so", " it", " goes"], "values": [0.0, 2.0, 1.0], "source": "s"}],
    }
    assert label_text(label) == "the, ⏎ · so[ it] goes"


# -------------------------------------------------------------------------------------------------
# Label material


def test_logit_tokens_are_those_of_the_direct_path(model, coder):
    gain = 1 + np.asarray(model.params.final_norm, np.float64)
    embed = np.asarray(model.params.embed, np.float64)
    logits = (np.asarray(coder.w_dec, np.float64) * gain) @ embed.T
    logits = logits[:, 3:]  # control tokens are left out
    found = logit_tokens(model, coder, tok, [7, 0, 31], k=4)
    for i, (top, bottom) in zip([7, 0, 31], found):
        order = np.argsort(-logits[i])
        assert top == [chr(c) for c in order[:4]] and bottom == [chr(c) for c in order[::-1][:4]]
    assert logit_tokens(model, coder.replace(writes="mlp_in"), tok, [1, 2]) == [([], [])] * 2
    assert logit_tokens(model, coder, tok, []) == []


def test_logit_tokens_of_heads_go_through_the_output_projection(model, coder):
    z = coder.replace(
        w_enc=jnp.ones((64, 48)),
        w_dec=jax.random.normal(jax.random.key(9), (48, 64)),
        b_dec=jnp.zeros(64),
        reads="z",
        writes="z",
    )
    blocks = jax.tree.map(lambda w: np.asarray(w[1], np.float64), model.params.blocks)
    rows = (
        np.asarray(z.w_dec, np.float64) @ blocks.w_o.reshape(64, 32) * (1 + blocks.post_attn_norm)
    )
    gain = 1 + np.asarray(model.params.final_norm, np.float64)
    logits = (rows * gain) @ np.asarray(model.params.embed, np.float64).T
    for i, (top, _) in zip([3, 4], logit_tokens(model, z, tok, [3, 4], k=3)):
        assert top == [chr(c) for c in np.argsort(-logits[i, 3:])[:3]]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    word = lambda n: "".join(map(chr, rng.integers(65, 120, n)))
    return [("first", word(70)), ("first", word(40)), ("second", word(90)), ("second", word(12))]


@pytest.fixture(scope="module")
def labels(model, coder, texts):
    return build_labels(model, coder, tok, texts, examples=2, logits=5, context_size=32)


def test_examples_are_the_strongest(model, coder, texts, labels):
    """Each feature's snippets are its strongest, one a piece of text, with its activations."""
    fired, count, best = np.zeros(48), 0, {i: [] for i in range(48)}
    for number, ids in pieces_of([text for _, text in texts], 32):
        f = np.asarray(run(model, ids[None], [features(coder)]).reads["features"][0])
        fired, count = fired + (f > 0).sum(0), count + len(ids) - 1
        for i in range(48):
            t = int(f[:, i].argmax())
            best[i].append((f[t, i], texts[number][0], ids, t, f[:, i]))
    assert labels["tokens"] == count
    for i, label in enumerate(labels["features"]):
        wanted = sorted((b for b in best[i] if b[0] > 0), key=lambda b: -b[0])[:2]
        assert abs(label["density"] - fired[i] / count) < 1e-6
        assert len(label["examples"]) == len(wanted)
        for example, (peak, source, ids, t, f) in zip(label["examples"], wanted):
            inside = slice(max(1, t - BEFORE), t + AFTER + 1)
            assert example["tokens"] == tok.decode_tokens(ids[inside])
            assert example["source"] == source
            np.testing.assert_allclose(example["values"], f[inside], rtol=6e-2)
            assert abs(max(example["values"]) - peak) < 6e-2 * peak


def pieces_of(documents, length):
    """The pieces `pack` makes, (document, ids with <bos>): written out here as an oracle."""
    pieces, used = [], 0
    for number, ids in enumerate(tok.encode(d, bos=False) for d in documents):
        while len(ids):
            room = length - used - 1
            if room < min(8, len(ids)):
                used = 0
                continue
            pieces.append((number, np.concatenate([[2], ids[:room]]).astype(np.int32)))
            used, ids = used + len(pieces[-1][1]), ids[room:]
    return pieces


def test_labels_survive_the_file(labels, tmp_path):
    path = write_labels(labels, tmp_path)
    assert path.name == "labels.json.zst"
    read = read_labels(tmp_path, 48)
    assert read == labels["features"] and len(read) == 48
    path.unlink()
    assert read_labels(tmp_path, 48) is None
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    assert read_labels(tmp_path, 48) == labels["features"]


def test_labels_are_used_when_they_are_there(model, coder, labels, tmp_path):
    write_labels(labels, tmp_path)
    seen = inspect_text(model, coder, tok, "hello", labels=read_labels(tmp_path, 48))
    f = seen.strongest[0]
    assert seen.labels[f] == labels["features"][f]
    page = inspection_page(seen)
    example = next(e for f in seen.strongest for e in seen.labels[f]["examples"])
    assert json.dumps(example["source"]) in page


def broken(labels):
    whole = gzip.compress(json.dumps(labels).encode())
    one = lambda **change: gzip.compress(
        json.dumps({**labels, "features": [{**labels["features"][0], **change}] * 48}).encode()
    )
    return {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "not gzip": b"{}",
        "not json": gzip.compress(b"{"),
        "a list": gzip.compress(b"[1]"),
        "no features": gzip.compress(b'{"tokens": 3}'),
        "flipped": whole[:40] + b"x" + whole[41:],
        "label of a string": gzip.compress(b'{"tokens": 3, "features": ["x"]}'),
        "numbers for tokens": one(top_logits=[1, 2]),
        "no density": one(density=None),
        "uneven example": one(examples=[{"tokens": ["a"], "values": [], "source": ""}]),
        "another coder's": gzip.compress(
            json.dumps({**labels, "features": labels["features"][:9]}).encode()
        ),
        "true for a density": one(density=True),
        "half a character": one(top_logits=["\ud800"]),
        "a bomb": gzip.compress(b" " * (4 << 20)),
        "deep": gzip.compress(b"[" * 100_000),
        **{
            f"{number[:9]} for a density": gzip.compress(
                gzip.decompress(one(density=-7.125)).replace(b"-7.125", number.encode())
            )
            for number in ("NaN", "-Infinity", "1e400", "9" * 400, "true")
        },
        **{
            f"{tokens} tokens": gzip.compress(json.dumps({**labels, "tokens": tokens}).encode())
            for tokens in (-1, "3", 2.5, True, None, [])
        },
    }


def test_broken_label_files_are_one_line(labels, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_scope_jax.data.whole_files.MOST", 2 << 20)
    for name, content in broken(labels).items():
        (tmp_path / "labels.json.gz").write_bytes(content)
        with pytest.raises(InputError, match=str(tmp_path)) as error:
            read_labels(tmp_path, 48)
        assert "\n" not in str(error.value), name


def test_examples_that_show_no_token_are_left_out(labels, tmp_path):
    """As older versions wrote them, of special tokens alone."""
    kept = labels["features"][0]["examples"]
    empty = {"tokens": [], "values": [], "source": "a.txt"}
    features = [labels["features"][0] | {"examples": [empty, *kept]}, *labels["features"][1:]]
    write_labels(labels | {"features": features}, tmp_path)
    assert read_labels(tmp_path, 48)[0]["examples"] == kept


def test_no_text_no_labels(model, coder):
    with pytest.raises(InputError, match="no text"):
        build_labels(model, coder, tok, [])
    with pytest.raises(InputError, match="no text"):
        build_labels(model, coder, tok, [("blank", " \n")])


def test_explanations_are_shown_beside_the_logits(model, coder, capsys):
    """In the JSON, the terminal and the page; other features stay as they are."""
    entry = {
        "text": "a <b> of it",
        "method": "endpoint",
        "model": "judge-1",
        "examples": 9,
        "scores": {"detection": {"balanced_accuracy": 0.876}},
    }
    plain = inspect_text(model, coder, tok, "abc", top_k=3, shown=7)
    feature = plain.features[-1][0][0]
    seen = inspect_text(model, coder, tok, "abc", top_k=3, shown=7, explanations={feature: entry})
    label = seen.as_dict()["labels"][str(feature)]
    assert (label["explanation"], label["explained"]) == ("a <b> of it", "judge-1, detection 0.88")
    same = {f: a for f, a in seen.labels.items() if f != feature}
    assert same == {f: a for f, a in plain.labels.items() if f != feature}
    assert label_text(seen.labels[feature]).startswith("a <b> of it · ")
    assert label_text(seen.labels[feature], 8).startswith("a <b> o… · ")
    print_inspection(seen, 300)
    assert "a <b> of it" in capsys.readouterr().out
    page = inspection_page(seen)
    assert "a <b> of it" not in page and "a \\u003cb\\u003e of it" in page


def assert_columns_stay(model, coder, entry, capsys):
    """However long explanations are, every token, number and activation is there in full."""
    long = {
        f: entry | {"text": f"{f} is about 漢字 and " + "words " * 20} for f in range(coder.width)
    }
    seen = inspect_text(model, coder, tok, "abc", top_k=3, shown=7, explanations=long)
    wanted = [
        (visible(token) if i == 0 else "", feature, f"{activation:,.0f}")
        for token, features in zip(seen.tokens, seen.features)
        for i, (feature, activation) in enumerate(features)
    ]
    for width in (300, 100, 120, 60):
        print_inspection(seen, width)
        out = capsys.readouterr().out
        lines = out.split("strongest in")[1].splitlines()
        rows = [line for line in lines if " is about" in line]
        assert len(rows) == len(wanted) and max(map(len, lines)) <= width
        for line, (token, feature, activation) in zip(rows, wanted):
            head = f"{token} {feature} {activation} {feature} is about"
            assert " ".join(line.split()).startswith(head.strip())
