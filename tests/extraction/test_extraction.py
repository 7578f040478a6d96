"""The feature store against brute force: what is in it, resuming, sharing."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

import gemma_scope_jax as gs
from coders import random_coder
from feature_stores import CODERS, LISTS, SETTINGS, contents, dense
from gemma_scope_jax.coders.active_features import grouped
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import extract as extraction
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction import work
from gemma_scope_jax.extraction.estimate import plan_extraction
from gemma_scope_jax.extraction.extract import extract, token_bytes
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from gemma_scope_jax.model.tokenizer import SPAN_ROLES, Chat
from letters import Letters
from tiny import tiny_model

D, WIDTH = 32, 48


@pytest.mark.parametrize(("name", "layer"), LISTS)
def test_every_feature_is_that_of_the_piece_alone(model, store, name, layer):
    found, coder = dense(store, name, layer), CODERS[name]
    run = jax.jit(lambda tokens: gs.forward(model, tokens, [gs.features(coder)]).reads["features"])
    for segment in store.segments():
        for piece in np.unique(segment.pieces):
            (here,) = np.nonzero(segment.pieces == piece)
            tokens = np.pad(segment.tokens[here], (0, 32 - len(here)))
            f = np.asarray(run(tokens[None]))
            f = f[0] if isinstance(coder, SparseCoder) else f[coder.layers.index(layer), 0]
            f = np.where(segment.counted[here][:, None], f[: len(here)], 0.0)
            got = found[here + segment.start]
            np.testing.assert_allclose(got, f, rtol=1e-4, atol=1e-4)
    assert (found > 0).any(0).mean() > 0.9


@pytest.mark.parametrize(("name", "layer"), LISTS)
def test_the_index_says_the_same_as_the_tokens(store, name, layer):
    found = dense(store, name, layer)
    assert (store.fired(name, layer) == (found > 0).sum(0)).all()
    for feature in (0, 7, store.width(name) - 1):
        rows, values = store.feature(feature, name, layer)
        assert (rows == np.flatnonzero(found[:, feature])).all()
        assert (values == found[rows, feature]).all()
    for start, stop in ((0, store.width(name)), (3, 9)):
        offsets, rows, values = store.features(start, stop, name, layer)
        features, wanted = np.nonzero(found[:, start:stop].T)
        assert (np.repeat(np.arange(stop - start), np.diff(offsets)) == features).all()
        assert (rows == wanted).all() and (values == found[rows, features + start]).all()
    for segment in store.segments():
        offsets, rows, values = segment.by_feature(name, layer)
        again = np.zeros((len(segment), store.width(name)), np.float32)
        again[rows, np.repeat(np.arange(store.width(name)), np.diff(offsets))] = values
        assert (again == found[segment.start :][: len(segment)]).all()


def test_documents_and_windows_are_those_of_the_text(store, documents):
    ids = {n: Letters().encode(text, bos=False) for n, text in enumerate(documents)}
    assert sorted(store.document_numbers) == sorted(ids)
    assert store.counted == sum(map(len, ids.values()))
    for number, tokens in ids.items():
        found = store.document(number)
        assert found.where == f"document {number}"
        assert (found.tokens == tokens).all()
        assert (store.document(number, 3, 9).tokens == tokens[3:9]).all()
    everything = np.concatenate([s.tokens for s in store.segments()])
    pieces = np.cumsum(everything == 2)  # each begins with <bos>
    rows = np.random.default_rng(0).permutation(len(store))[:200]
    windows = store.windows(rows, 4, 2)
    for row, window in zip(rows, windows):
        for at, token in zip(range(row - 4, row + 3), window):
            inside = 0 <= at < len(store) and pieces[at] == pieces[row]
            assert token == (everything[at] if inside else -1)
    numbers, positions = store.places(rows)
    for row, number, position in zip(rows, numbers, positions):
        assert position == row - np.flatnonzero(everything[: row + 1] == 2)[-1]
        assert position == 0 or row in store.document(number).rows
    features, values = store.tokens_of(rows[:5], "a")[3]
    assert (dense(store, "a", 1)[rows[3], features] == values).all()


@pytest.mark.parametrize("source", ["shuffled", "in order", "stream", "partial", "old"])
def test_a_document_is_looked_for_in_its_shard_alone(
    model, documents, tmp_path, monkeypatch, source
):
    texts = (lambda: iter(documents)) if source == "stream" else documents
    settings = SETTINGS | {"seed": None if source == "in order" else 3}
    share = (1, 3) if source == "partial" else (0, 1)
    extract(model, {"a": CODERS["a"]}, Letters(), texts, tmp_path, **settings, share=share)
    if source == "old":  # written before the manifest told the order
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        del manifest["shuffled"]
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = FeatureStore(tmp_path)
    opened, real = [], FeatureStore._open
    monkeypatch.setattr(FeatureStore, "_open", lambda s, n: opened.append(n) or real(s, n))
    numbers = set(found.document_numbers)
    assert len(numbers) == (len(documents) if source != "partial" else 3 * len(documents) // 9)
    for number, text in enumerate(documents):
        del opened[:]
        if number in numbers:
            got = found.document(number)
            same = np.array_equal(got.tokens, Letters().encode(text, bos=False))
            assert same or source == "stream"  # whose numbers count the shuffled order
        else:
            with pytest.raises(InputError, match=f"document {number} is not in the store"):
                found.document(number)
        assert len(set(opened)) <= 1 or source == "old"
    for number in (-1, len(documents), 10**12):
        with pytest.raises(InputError, match="is not in the store"):
            found.where(number)
    rows = np.random.default_rng(0).permutation(len(found.segment(0)))[:20]
    segment = found.segment(0)
    assert segment.where(rows) == [found.where(d) for d in segment.documents[rows].tolist()]


def test_too_few_slots_change_nothing(model, documents, store, tmp_path):
    """Tokens with more features than slots are spilled, or their batch runs again."""
    few = extract(model, CODERS, Letters(), documents, tmp_path, **SETTINGS | {"slots": 7})
    for name, layer in LISTS:
        a, b = dense(store, name, layer), dense(few, name, layer)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_half_floats_keep_three_digits_and_what_is_active(model, documents, store, tmp_path):
    half = extract(
        model, CODERS, Letters(), documents, tmp_path, **SETTINGS | {"values": "float16"}
    )
    for name, layer in LISTS:
        a, b = dense(store, name, layer), dense(half, name, layer)
        assert ((a > 0) == (b > 0)).all()
        np.testing.assert_allclose(a, b, rtol=2**-11)
    assert half.bytes < store.bytes


@pytest.mark.parametrize("data,split", [(2, 2), (1, 4)])
def test_a_mesh_gives_the_same(model, documents, store, tmp_path, data, split):
    mesh = make_mesh(data, split)
    params = jax.device_put(model.params, param_shardings(model.config, mesh))
    spread = model.replace(params=params)
    # x has 16 features, of which a part of 4 has room for fewer: it spills.
    got = extract(spread, CODERS, Letters(), documents, tmp_path, **SETTINGS)
    for name, layer in LISTS:
        a, b = dense(store, name, layer), dense(got, name, layer)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_processes_and_interruptions_give_the_same_bytes(
    model, documents, store, tmp_path, monkeypatch
):
    whole = contents(store.folder)
    shared = tmp_path / "shared"
    for index in (1, 0, 2):
        got = extract(model, CODERS, Letters(), documents, shared, **SETTINGS, share=(index, 3))
        assert got.complete == (index == 2)
    assert contents(shared) == whole

    class Stop(Exception):
        pass

    stopped = tmp_path / "stopped"
    real = extraction.Runner.start
    for after in (0, 1, 3, 8, 2, 12):
        left = [after]

        def start(self, *batch, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return real(self, *batch)

        monkeypatch.setattr(extraction.Runner, "start", start)
        try:
            extract(model, CODERS, Letters(), documents, stopped, **SETTINGS)
        except Stop:
            assert all(not name.endswith("tmp") for name in contents(stopped))
    monkeypatch.setattr(extraction.Runner, "start", real)
    extract(model, CODERS, Letters(), documents, stopped, **SETTINGS)
    assert contents(stopped) == whole


def test_more_tokens_extend_a_store(model, documents, tmp_path):
    one = {"a": CODERS["a"]}
    few = extract(model, one, Letters(), documents, tmp_path / "s", tokens=500, **SETTINGS)
    assert 500 <= len(few) < 620
    same = extract(model, one, Letters(), documents, tmp_path / "s", tokens=400, **SETTINGS)
    assert same.counted == few.counted
    more = extract(model, one, Letters(), documents, tmp_path / "s", tokens=1100, **SETTINGS)
    again = extract(model, one, Letters(), documents, tmp_path / "t", tokens=1100, **SETTINGS)
    assert len(more) >= 1100 and more.counted == again.counted
    # how many documents a shard has is settled at the beginning
    assert dense(more, "a", 1).sum(0) == pytest.approx(dense(again, "a", 1).sum(0), rel=1e-5)


def test_all_of_the_text_extends_a_part_of_it(model, documents, store, tmp_path):
    extract(model, CODERS, Letters(), documents, tmp_path, tokens=200, **SETTINGS)
    extract(model, CODERS, Letters(), documents, tmp_path, **SETTINGS)
    whole = extract(model, CODERS, Letters(), documents, tmp_path, tokens=300, **SETTINGS)
    assert whole.complete and whole.counted == store.counted


@pytest.mark.parametrize("sample", [200, 2_000_000])
@pytest.mark.parametrize("tokens", [None, 900, 5000])
def test_streams_end_where_they_end(model, documents, tmp_path, monkeypatch, sample, tokens):
    """Of compressed files and functions nobody knows beforehand how many documents there are."""
    monkeypatch.setattr(work, "SAMPLE", sample)
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    one, data = {"a": CODERS["a"]}, TextData(files=(str(path),))
    found = extract(model, one, Letters(), data, tmp_path / "s", tokens=tokens, **SETTINGS)
    everything = sum(map(len, documents))
    least = min(everything, everything if tokens is None else tokens)
    assert found.complete and least * 0.8 <= found.counted <= everything
    if tokens == 900 and sample > 900:
        assert 900 <= len(found) < 1000 + 90
    assert not list((tmp_path / "s").glob(".*"))
    texts = sorted(found.document(n).tokens.tolist() for n in found.document_numbers)
    wanted = sorted(Letters().encode(text, bos=False).tolist() for text in documents)
    assert texts == wanted if least == everything else all(t in wanted for t in texts)


def test_a_text_that_shrinks_is_said(model, documents, tmp_path):
    texts = list(documents)
    source = lambda: iter(texts)
    one = {"a": CODERS["a"]}
    extract(model, one, Letters(), source, tmp_path, share=(0, 2), **SETTINGS)
    del texts[5:]
    with pytest.raises(InputError, match="the text has changed: shard 1 has no documents now"):
        extract(model, one, Letters(), source, tmp_path, share=(1, 2), **SETTINGS)
    assert not list(tmp_path.glob(".*"))


def test_firsts_and_thresholds_are_each_coders_own(model, documents, tmp_path):
    coders = {
        "low": random_coder(seed=7, threshold=-1.0),
        "late": random_coder(seed=7, threshold=0.5, first=4),
    }
    found = extract(model, coders, Letters(), documents, tmp_path, **SETTINGS)
    positions = np.concatenate([s.positions for s in found.segments()])
    low, late = dense(found, "low", 1), dense(found, "late", 1)
    assert not late[positions < 4].any() and (late[positions >= 4] > 0).any(-1).all()
    np.testing.assert_allclose(
        np.where(low > 0.5, low, 0.0)[positions >= 4], late[positions >= 4], rtol=1e-5
    )
    assert 0 < low[low > 0].min() < 0.1  # a ReLU: nothing negative, though the threshold is
    counted = {
        name: np.concatenate([s.counted_by(name) for s in found.segments()]) for name in coders
    }
    assert (counted["low"] == (positions >= 1)).all()
    assert (counted["late"] == (positions >= 4)).all()
    assert found.counted_by("low") == found.counted == (positions >= 1).sum()
    assert found.counted_by("late") == (positions >= 4).sum() < found.counted
    for coder, values in zip(found.describe()["l0"], (low, late)):
        assert coder["l0"] == pytest.approx((values > 0).sum(1)[counted[coder["coder"]]].mean())


def test_chats_count_what_the_roles_say(tmp_path):
    """Only the model's turns of a chat have features."""
    model, path = tiny_model(PRESETS["gemma-3-270m"], layers=4), tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    path.write_text("\n".join(json.dumps({"chat": turns}) for _ in range(3)))

    class Chats(Letters):
        def chat(self, messages, add_generation_prompt):
            ids = self.encode(messages[0]["content"] + messages[1]["content"])
            user, answer = map(SPAN_ROLES.index, ("user", "model"))
            return Chat(ids, np.array([user] * 4 + [answer] * (len(ids) - 4), np.int32))

    data = TextData(files=(str(path),), messages="chat")
    got = extract(model, CODERS["a"], Chats(), data, tmp_path / "s", **SETTINGS)
    counted = np.concatenate([s.counted for s in got.segments()])
    assert (
        len(got) == 18
        and counted.tolist() == [False] * 4 + [True] * 2 + ([False] * 4 + [True] * 2) * 2
    )
    assert (dense(got, got.coders[0], 1).any(1) == counted).all()
    # tokens are those that are read, as in training; what a store takes goes by those that count
    plan = plan_extraction(model, CODERS["a"], Chats(), data, tmp_path / "t", tokens=12, **SETTINGS)
    assert plan.documents == 2 and plan.tokens == 12
    assert plan.bytes_per_token == pytest.approx(token_bytes([CODERS["a"]], "float32") / 3)
    some = extract(model, CODERS["a"], Chats(), data, tmp_path / "t", tokens=12, **SETTINGS)
    assert len(some) == 12 and some.counted == 4


def test_one_program_whatever_the_shard(model, documents, tmp_path):
    from gemma_scope_jax.coders.active_features import active_features

    extract(model, CODERS, Letters(), documents, tmp_path / "s", **SETTINGS)
    before = active_features._cache_size()
    extract(model, CODERS, Letters(), documents[:9], tmp_path / "t", **SETTINGS)
    assert active_features._cache_size() == before
    groups = grouped(CODERS)
    assert [(g.site, g.layers) for g in groups] == [
        ("resid_post", (1, 2)),
        ("resid_post", (1,)),
        ("mlp_in", (0,)),
        ("resid_post", (0, 2, 3)),
    ]


@pytest.mark.parametrize(
    ("documents", "mean", "batch", "wanted"),
    [
        (12, 9_000, 2048, 3),  # a dozen files: a kill costs a third of two minutes, not all
        (12, 50_000, 2048, 12),  # a document is not cut
        (3000, 350, 2048, 32),
        (30_000, 350, 2048, 80),  # no longer than 131,072 tokens
        (10, 300, 2048, 1),  # less than 16 batches are not worth cutting
        (300_000, 350, 32_768, 100),  # on an accelerator a million
    ],
)
def test_shards_fit_the_job(documents, mean, batch, wanted):
    settings = manifests.ExtractionSettings(context_size=batch // 2)
    job = manifests.ExtractionJob(None, settings, 2, 9, {}, [])
    size = work.Size(documents, float(mean), 1.0)
    shards = -(-documents // job.per_shard(size))
    assert wanted <= shards <= 1.1 * wanted
    settings = dataclasses.replace(settings, shard_tokens=mean)
    by_hand = dataclasses.replace(job, settings=settings)
    assert by_hand.per_shard(size) == 1


def test_the_plan_is_what_happens(model, documents, store, tmp_path):
    settings = SETTINGS | {"values": "float16"}
    plan = plan_extraction(model, CODERS, Letters(), documents, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()
    assert plan.documents == len(documents) and plan.shards == len(store.shards)
    whole = sum(len(text) + bool(text) for text in documents)
    assert plan.tokens == pytest.approx(whole, abs=1)
    assert plan.memory > 100_000 and plan.tokens_per_second > 0
    said = f"{plan}\n{store.summary()}"
    with pytest.raises(InputError, match="another coders"):
        plan_extraction(model, {"a": CODERS["b"]}, Letters(), documents, store.folder, **SETTINGS)
    assert "tokens in 42 documents" in said and "bytes a token" in said and "L0" in said
    found = json.loads(json.dumps(store.describe()))
    assert found["complete"] and found["l0"][0]["l0"] == pytest.approx(
        (dense(store, "a", 1) > 0).sum() / store.counted
    )
