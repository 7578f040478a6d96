"""The feature store against brute force: what is in it, resuming, sharing, damage, bad input."""

import dataclasses
import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.cli.extract import print_plan
from gemma_scope_jax.cli.shared import print_store
from gemma_scope_jax.coders.active_features import grouped
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import CoderInfo, SparseCoder
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.data.text import fingerprint
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import extract as extraction
from gemma_scope_jax.extraction import work
from gemma_scope_jax.extraction.estimate import plan_extraction
from gemma_scope_jax.extraction.export import export_store
from gemma_scope_jax.extraction.extract import extract, token_bytes
from gemma_scope_jax.extraction.store.codec import (
    Entries,
    by_feature,
    differences,
    expand,
    expand_values,
    squeeze,
    store_values,
    undo_differences,
)
from gemma_scope_jax.extraction.store.shards import shard_name
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.sharding import make_mesh, param_shardings
from gemma_scope_jax.model.tokenizer import Chat, Span
from letters import Letters
from tiny import tiny_model

D, WIDTH = 32, 48
SETTINGS = dict(rows=2, length=32, slots=24, shard_tokens=300, values="float32")


def sae(seed, layer, width=WIDTH, threshold=1.0, **place):
    k = jax.random.split(jax.random.key(seed), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / D**0.5
    return SparseCoder(
        normal(k[0], D, width),
        normal(k[1], width),
        jnp.full(width, threshold),
        normal(k[2], width, D),
        jnp.zeros(D),
        layer=layer,
        **place,
    )


def crosscoder(seed, layers, width=16):
    k, x = jax.random.split(jax.random.key(seed), 2), len(layers)
    w_dec = jax.random.normal(k[1], (x * (x + 1) // 2, width, D))
    return MultiLayerCoder(
        jax.random.normal(k[0], (x, D, width)) / D**0.5,
        jnp.zeros((x, width)),
        jnp.full((x, width), 0.8),
        w_dec,
        jnp.zeros((x, D)),
        layers=layers,
    )


CODERS = {
    "a": sae(0, 1),
    "b": sae(1, 1),  # the same place again
    "c": sae(2, 2),
    "t": sae(3, 0, 40, reads="mlp_in", writes="mlp_out"),
    "x": crosscoder(4, (0, 2, 3)),
}
LISTS = [("a", 1), ("b", 1), ("c", 2), ("t", 0), ("x", 0), ("x", 2), ("x", 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(PRESETS["gemma-3-270m"], layers=4)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    texts = ["".join(chr(97 + i) for i in rng.integers(0, 26, n)) for n in rng.integers(0, 90, 40)]
    return texts + ["", "z"]


@pytest.fixture(scope="module")
def store(model, documents, tmp_path_factory):
    return extract(model, CODERS, Letters(), documents, tmp_path_factory.mktemp("s"), **SETTINGS)


def dense(store, name, layer):
    """float32 [tokens, F] of a store."""
    whole = np.zeros((len(store), store.width(name)), np.float32)
    for segment in store.segments():
        offsets, ids, values = segment.by_token(name, layer)
        for t in range(len(segment)):
            some = slice(offsets[t], offsets[t + 1])
            assert (np.diff(ids[some]) > 0).all()
            whole[segment.start + t, ids[some]] = values[some]
    return whole


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
        np.testing.assert_allclose(a, b, rtol=5e-4)
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


def test_firsts_and_thresholds_are_each_coders_own(model, documents, tmp_path, capsys):
    coders = {"low": sae(7, 1, threshold=-1.0), "late": sae(7, 1, threshold=0.5, first=4)}
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
    print_store(found, json=True)
    said = json.loads(capsys.readouterr().out)["l0"]
    for coder, values in zip(said, (low, late)):
        assert coder["l0"] == pytest.approx((values > 0).sum(1)[counted[coder["coder"]]].mean())


def test_chats_count_what_the_roles_say(tmp_path):
    """Only the model's turns of a chat have features."""
    model, path = tiny_model(PRESETS["gemma-3-270m"], layers=4), tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    path.write_text("\n".join(json.dumps({"chat": turns}) for _ in range(3)))

    class Chats(Letters):
        def chat(self, messages, add_generation_prompt):
            ids = self.encode(messages[0]["content"] + messages[1]["content"])
            return Chat(ids, (Span(0, 4, "user"), Span(4, len(ids), "model")))

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
    assert plan.bytes_per_token == pytest.approx(token_bytes({"a": CODERS["a"]}, "float32") / 3)
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


def test_the_plan_is_what_happens(model, documents, store, tmp_path, capsys):
    settings = SETTINGS | {"values": "float16"}
    plan = plan_extraction(model, CODERS, Letters(), documents, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()
    assert plan.documents == len(documents) and plan.shards == len(store.shards)
    whole = sum(len(text) + bool(text) for text in documents)
    assert plan.tokens == pytest.approx(whole, abs=1)
    assert plan.memory > 100_000 and plan.tokens_per_second > 0
    print_plan(plan)
    print_store(store)
    said = capsys.readouterr().out
    with pytest.raises(InputError, match="another coders"):
        plan_extraction(model, {"a": CODERS["b"]}, Letters(), documents, store.folder, **SETTINGS)
    assert "tokens in 42 documents" in said and "bytes a token" in said and "L0" in said
    print_store(store, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and found["l0"][0]["l0"] == pytest.approx(
        (dense(store, "a", 1) > 0).sum() / store.counted
    )


# -------------------------------------------------------------------------------------------------
# Other formats


def test_parquet_holds_what_the_store_holds(store, tmp_path):
    from pyarrow import parquet

    export_store(store, tmp_path / "p", "parquet")
    files = sorted((tmp_path / "p").glob("*.parquet"))
    assert len(files) == store.segment_count
    for file, segment in zip(files, store.segments()):
        table = parquet.read_table(file).to_pydict()
        assert table["token"] == segment.tokens.tolist()
        assert table["document"] == segment.documents.tolist()
        assert table["counted"] == segment.counted.tolist()
        for name, layer, column in (("a", 1, "a"), ("x", 2, "x/layer_2")):
            offsets, ids, values = segment.by_token(name, layer)
            assert sum(table[f"{column}.features"], []) == ids.tolist()
            assert sum(table[f"{column}.values"], []) == values.tolist()
            assert list(map(len, table[f"{column}.features"])) == np.diff(offsets).tolist()


@pytest.mark.parametrize("splits", [None, 5])
def test_delphi_finds_every_activation_where_it_looks(store, tmp_path, splits):
    from safetensors.numpy import load_file

    export_store(store, tmp_path / "d", "delphi", splits=splits)
    pieces = [s.tokens[s.pieces == p] for s in store.segments() for p in np.unique(s.pieces)]
    for name, layer, module in (("a", 1, "a"), ("x", 2, "x/layer_2")):
        again = np.zeros((len(pieces), 32, store.width(name)), np.float32)
        files = list((tmp_path / "d" / module).glob("*.safetensors"))
        assert len(files) == (splits or 1)
        for file in files:
            start, end = map(int, file.stem.split("_"))  # the last feature is its
            held = load_file(file)
            row, position, feature = held["locations"].astype(np.int64).T
            assert held["locations"].dtype == np.uint16 and feature.max() <= end - start
            again[row, position, feature + start] = held["activations"]
            for tokens, piece in zip(held["tokens"], pieces):
                assert tokens.tolist() == piece.tolist() + [0] * (32 - len(piece))
        found = np.concatenate([again[i, : len(piece)] for i, piece in enumerate(pieces)])
        np.testing.assert_allclose(found, dense(store, name, layer), rtol=1e-3)
        config = json.loads((tmp_path / "d" / module / "config.json").read_text())
        assert config["ctx_len"] == 32 and config["model_name"]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("width", [48, 70_000])
def test_delphi_files_are_those_of_the_whole_store_at_once(model, tmp_path, width, splits):
    """A file filled segment by segment has the bytes that safetensors writes of whole arrays."""
    from safetensors.numpy import save

    coder = sae(9, 1, width, threshold=1.0 if width == 48 else 3.0)
    found = extract(
        model,
        coder,
        Letters(),
        ["abcdefgh" * 9, "xyz", "hgf"],
        tmp_path / "s",
        **SETTINGS | {"shard_tokens": 30, "slots": width},
    )
    name = found.coders[0]
    rows, ids, values, pieces, tokens = [], [], [], [], []
    for segment in found.segments():
        offsets, some, held = segment.by_token()
        rows.append(np.repeat(np.arange(len(segment)), np.diff(offsets)) + segment.start)
        ids, values = [*ids, some], [*values, held.astype(np.float16)]
        pieces.append(segment.pieces + (pieces[-1][-1] + 1 if pieces else 0))
        tokens.append(segment.tokens)
    assert len(tokens) > 1
    rows, ids, values, pieces = map(np.concatenate, (rows, ids, values, pieces))
    positions = np.concatenate([s.positions for s in found.segments()])
    padded = np.zeros((pieces[-1] + 1, 32), np.int64)
    padded[pieces, positions] = np.concatenate(tokens)
    export_store(found, tmp_path / "d", "delphi", splits=splits)
    files = list((tmp_path / "d" / name).glob("*.safetensors"))
    assert len(files) == splits
    for file in files:
        start, last = map(int, file.stem.split("_"))
        here = (ids >= start) & (ids <= last)
        where = np.stack([pieces[rows], positions[rows], ids - start], 1)[here]
        kind = np.uint16 if last - start < 1 << 16 else np.uint32
        arrays = {"locations": where.astype(kind), "activations": values[here], "tokens": padded}
        assert file.read_bytes() == save(arrays)


def test_what_delphis_float16_does_not_hold_is_refused(model, tmp_path):
    loud = sae(9, 1, 8)
    loud = dataclasses.replace(loud, w_enc=loud.w_enc * 1e6)
    found = extract(
        model,
        {"loud": loud},
        Letters(),
        ["abcd"],
        tmp_path / "s",
        **SETTINGS | {"values": "float32"},
    )
    (segment,) = found.segments()
    assert segment.by_token()[2].max() > 65520
    line = r"^loud: feature \d+ fires at [0-9.e+]+ in document 0; delphi's files are float16"
    with pytest.raises(InputError, match=line):
        export_store(found, tmp_path / "d", "delphi")
    assert not (tmp_path / "d").exists()
    export_store(found, tmp_path / "p", "parquet")


def test_memory_of_a_delphi_export_does_not_grow_with_the_store(store, tmp_path):
    class Long:
        """A store `times` over."""

        def __init__(self, times):
            self.times, self.folder = times, store.folder
            self.manifest, self.coders = store.manifest, store.coders
            self.segment_count = times * store.segment_count

        def segments(self):
            return (s for _ in range(self.times) for s in store.segments())

        def fired(self, coder, layer):
            return self.times * store.fired(coder, layer)

    peaks = []
    for times in (1, 1, 12):
        tracemalloc.start()
        export_store(Long(times), tmp_path / str(len(peaks)), "delphi", splits=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors")) for n in "12"]
    assert sizes[1] > 11 * sizes[0] and peaks[2] < 1.2 * peaks[1]


def test_coders_of_one_last_name_are_all_exported(model, documents, tmp_path):
    from pyarrow import parquet

    two = {"resid_post/layer_1": CODERS["a"], "other/layer_1": CODERS["b"]}
    found = extract(model, two, Letters(), documents[:5], tmp_path / "s", **SETTINGS)
    export_store(found, tmp_path / "p", "parquet")
    names = parquet.read_table(next((tmp_path / "p").glob("*.parquet"))).column_names
    assert {f"{name}.values" for name in two} <= set(names)


def test_bad_exports_are_one_line(store, tmp_path):
    with pytest.raises(InputError, match="exported as parquet or delphi, not 'csv'"):
        export_store(store, tmp_path / "e", "csv")
    with pytest.raises(InputError, match="splits must be 1 to"):
        export_store(store, tmp_path / "f", "delphi", splits=0)
    (tmp_path / "g").write_text("")
    for taken in (tmp_path, tmp_path / "g"):
        with pytest.raises(InputError, match="holds something already"):
            export_store(store, taken, "delphi")


# -------------------------------------------------------------------------------------------------
# Damage and bad input


def test_a_flipped_byte_is_found_and_named(store, tmp_path):
    copy = tmp_path / "s"
    shutil.copytree(store.folder, copy)
    FeatureStore(copy).verify()
    victim = copy / shard_name(2)
    data, rng = victim.read_bytes(), np.random.default_rng(0)
    places = [0, len(data) - 1, len(data) - 12, len(data) - 100, *rng.integers(0, len(data), 60)]
    for at in places:
        victim.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(InputError, match="shard-000002.features: damaged"):
            FeatureStore(copy).verify()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        victim.write_bytes(data[:cut])
        with pytest.raises(InputError, match="shard-000002.features: (damaged|has)"):
            FeatureStore(copy).verify()
    victim.unlink()
    with pytest.raises(InputError, match="shard-000002.features: is missing"):
        FeatureStore(copy).verify()


def other(**changes):
    return SETTINGS | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(values="int4"), "values are stored as float16 or float32, not 'int4'"),
        (dict(precision="best"), "precision is highest, high, default, not 'best'"),
        (dict(share=(3, 3)), r"share \(3, 3\): must be"),
        (dict(length=100_000), "length 100000: .* takes 2 to"),
        (dict(rows=0), "rows 0 and slots 24 must be at least 1"),
        (dict(tokens=0), "tokens must be at least 1"),
        (dict(source=[]), "the list of documents is empty"),
        (dict(source=["", ""]), "no text: all documents are empty"),
        (dict(source=iter(["a"])), "an iterator can be read only once"),
        (dict(source=TextData(files=("nothing-*.txt",))), "no text files match"),
        (dict(coders={}), "no coders"),
        (dict(coders={"deep": sae(0, 9)}), "deep: the coder is for layer 9, but"),
        (dict(coders={"w": sae(0, 1, reads="z", writes="z")}), "w: the coder reads 32 values"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, changes, said):
    settings = other(**changes)
    source, coders = settings.pop("source", ["abcdef"]), settings.pop("coders", CODERS)
    with pytest.raises(InputError, match=said) as error:
        extract(model, coders, Letters(), source, tmp_path / "s", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(rows=4), "another data .rows 2 there, 4 now"),
        (dict(seed=1), "another data .text"),
        (dict(slots=9), "another slots"),
        (dict(coders={"a": CODERS["b"]}), "another coders .weights"),
        (dict(source=["other text"]), "another data"),
    ],
)
def test_a_folder_keeps_to_its_settings(model, tmp_path, changes, said):
    one = {"a": CODERS["a"]}
    extract(model, one, Letters(), ["abcdef", "ghi"], tmp_path, **SETTINGS)
    settings = other(**changes)
    source, coders = settings.pop("source", ["abcdef", "ghi"]), settings.pop("coders", one)
    with pytest.raises(InputError, match=f"holds features of {said}"):
        extract(model, coders, Letters(), source, tmp_path, **settings)


def test_a_folder_of_a_coder_is_called_by_its_name_and_known_by_its_weights(model, tmp_path):
    """Stores hold no paths of this machine; those of older versions do, and go on all the same."""
    at = lambda coder, path: dataclasses.replace(coder, info=CoderInfo(path=str(path)))
    places = (tmp_path / "sae", tmp_path / "x" / "one", tmp_path / "y" / "one", "x/two")
    coders = [at(CODERS[name], path) for name, path in zip("abab", places)]
    run = lambda coders, text=("abcd",) * 9: extract(
        model, coders, Letters(), list(text), tmp_path / "s", **SETTINGS | {"shard_tokens": 9}
    )
    assert run(coders).coders == ("sae", "one-1", "one-2", "x/two")
    file, last = tmp_path / "s" / "manifest.json", tmp_path / "s" / shard_name(1)
    assert str(tmp_path) not in file.read_text()
    manifest = json.loads(file.read_text())
    for coder, path in zip(manifest["coders"], places):
        coder["name"] = str(path)  # as of an older version
    shutil.rmtree(tmp_path / "s")
    file.parent.mkdir()
    file.write_text(json.dumps(manifest))
    run(coders)
    last.unlink()
    (tmp_path / "s" / "index.json").unlink()
    again = run([at(coder, Path("/elsewhere") / coder.info.path) for coder in coders])
    assert again.complete and again.coders == tuple(map(str, places))
    with pytest.raises(InputError, match="another coders .weights"):
        run([at(CODERS["b"], tmp_path / "sae"), *coders[1:]])


def test_a_text_that_was_edited_is_noticed_and_one_that_was_moved_goes_on(
    model, tmp_path, monkeypatch
):
    """Same name, same size: a store never holds half of one text and half of another."""
    one, store, path = {"a": CODERS["a"]}, tmp_path / "s", tmp_path / "text.txt"
    files = lambda name: TextData(files=(str(name),))
    again = lambda name: extract(model, one, Letters(), files(name), store, **SETTINGS)
    documents = [f"document {n}" for n in range(10, 70)]
    path.write_text("\n\f\n".join(documents))
    first = again(path)
    read = lambda found: np.concatenate([s.tokens for s in found.segments()])
    tokens, whole = read(first), (store / "manifest.json").read_bytes()
    assert len(first.shards) >= 2
    same = lambda found: found.complete and np.array_equal(read(found), tokens)

    def unfinished():
        (store / "index.json").unlink()
        (store / shard_name(1)).unlink()

    unfinished()
    monkeypatch.chdir(tmp_path)
    assert same(again("./text.txt"))
    unfinished()
    moved = path.rename(tmp_path / "other.txt")
    assert same(again(moved)) and (store / "manifest.json").read_bytes() == whole
    unfinished()
    manifest = json.loads((store / "manifest.json").read_text())
    text = work.open_text(files(moved.rename(path)), Letters(), 0)
    manifest["data"]["text"] = fingerprint(
        text.documents, text.data, text.tok, text.seed, named=True
    )
    (store / "manifest.json").write_text(json.dumps(manifest))  # as of an older version
    for shard in store.glob("shard-*"):
        shard.unlink()
    assert same(again(path))
    old = (store / "manifest.json").read_bytes()
    unfinished()
    path.write_text("\n\f\n".join([*documents[:-1], "document 99"]))
    for manifest in (whole, old):  # which has taken down what the text held when it went on
        (store / "manifest.json").write_bytes(manifest)
        with pytest.raises(InputError, match="another data .text: what it holds") as error:
            again(path)
        assert "\n" not in str(error.value)


def test_a_text_of_which_nothing_counts_is_refused(model, tmp_path):
    late = {"late": sae(0, 1, first=9)}
    with pytest.raises(InputError, match="no token counts.*position 9 or later"):
        extract(model, late, Letters(), ["abcdefgh"] * 9, tmp_path / "s", **SETTINGS)
    assert not (tmp_path / "s").exists()


def test_bad_reading_is_one_line(store, tmp_path):
    for ask, said in (
        (lambda: store.feature(0), "which coder"),
        (lambda: store.feature(99, "a"), "feature 99: the coder has 0 to 47"),
        (lambda: store.features(40, 49, "a"), "features 40 to 49: the coder has 0 to 47"),
        (lambda: store.feature(0, "x"), "layer None is none of its layers"),
        (lambda: store.fired("aa"), "no coder 'aa'"),
        (lambda: store.feature(0, "aa"), "no coder 'aa'"),
        (lambda: store.segment(0).rows(3, 3, "a"), "3 to 3 is no range"),
        (lambda: store.document(1000), "document 1000 is not in the store"),
        (lambda: store.windows([len(store)], 1, 1), "rows must be 0 to"),
        (lambda: store.places(np.arange(len(store)) > 3), "rows must be whole numbers, not bool"),
        (lambda: store.tokens_of([1.5]), "rows must be whole numbers, not float64"),
        (lambda: store.feature(2.5, "a"), "feature must be a whole number, not 2.5"),
        (lambda: store.segment(99), "segment 99: has 0 to"),
        (lambda: FeatureStore(tmp_path), "holds no sparse features"),
    ):
        with pytest.raises(InputError, match=said):
            ask()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="not the manifest"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not usable as JSON"):
        FeatureStore(tmp_path)


def test_shards_of_another_store_are_refused(model, documents, tmp_path):
    one, two = ({"a": CODERS[name]} for name in "ab")
    extract(model, one, Letters(), documents[:4], tmp_path, **SETTINGS)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="holds shards but no manifest.json"):
        extract(model, two, Letters(), documents[:4], tmp_path, **SETTINGS)
    other = extract(model, two, Letters(), documents[:4], tmp_path / "b", **SETTINGS)
    shutil.copy(other.folder / "manifest.json", tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(InputError, match="shard-000000.features: belongs to another store"):
        extract(model, two, Letters(), documents[:4], tmp_path, **SETTINGS)
    with pytest.raises(InputError, match="shard-000000.features: belongs to another store"):
        FeatureStore(tmp_path)


def test_an_index_that_is_old_or_damaged_does_not_count(model, documents, tmp_path):
    one = {"a": CODERS["a"]}
    extract(model, one, Letters(), documents, tmp_path, tokens=200, **SETTINGS)
    old = (tmp_path / "index.json").read_text()
    last = (tmp_path / shard_name(0)).read_bytes()  # cut short: more tokens make it anew
    whole = extract(model, one, Letters(), documents, tmp_path, tokens=1200, **SETTINGS)
    new = contents(tmp_path)
    (tmp_path / "index.json").write_text(old)  # as a process that has not heard of it may do
    (tmp_path / shard_name(0)).write_bytes(last)
    assert not FeatureStore(tmp_path).complete
    again = lambda: extract(model, one, Letters(), documents, tmp_path, tokens=1200, **SETTINGS)
    assert not again().complete  # the short shard is removed
    assert again().complete and contents(tmp_path) == new
    index = json.loads(new["index.json"])
    index["shards"][0]["segments"][0][0] += 1
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="index.json: is damaged"):
        FeatureStore(tmp_path).verify()
    for text in ('{"shards": 5}', '{"shards": [{}]}', "[]", "{"):
        (tmp_path / "index.json").write_text(text)
        assert again().complete and len(again()) == len(whole)


@pytest.mark.parametrize(
    "change", [{"coders": None}, {"per_shard": 0}, {"documents": "many"}, {"data": []}]
)
def test_a_damaged_manifest_is_one_line(store, tmp_path, change):
    manifest = json.loads((store.folder / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json: is damaged"):
        FeatureStore(tmp_path)


def test_shards_without_text_are_whole(model, tmp_path, capsys):
    one = {"a": CODERS["a"]}
    texts = ["", "abcdef", "", "ghi"]
    found = extract(model, one, Letters(), texts, tmp_path, **SETTINGS | {"shard_tokens": 1})
    assert found.complete and found.counted == 9 and len(found.document(0).tokens) == 0
    found.verify()
    print_store(found)
    assert "L0" in capsys.readouterr().out


def test_a_full_disk_leaves_whole_shards(model, documents, tmp_path, monkeypatch):
    from gemma_scope_jax.extraction.store.store import shards

    one = {"a": CODERS["a"]}
    extract(model, one, Letters(), documents, tmp_path / "t", **SETTINGS)
    whole = contents(tmp_path / "t")
    room = len(whole[shard_name(0)]) + len(whole[shard_name(1)]) - 200  # the second's end is not
    real, left = shards.ShardWriter._write, [room]

    def write(self, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(self, data)

    monkeypatch.setattr(shards.ShardWriter, "_write", write)
    with pytest.raises(InputError, match="no space left; free some and run the same again"):
        extract(model, one, Letters(), documents, tmp_path / "s", **SETTINGS)
    names = set(contents(tmp_path / "s"))
    assert names >= {"manifest.json", shard_name(0)} and not any(n.endswith("tmp") for n in names)
    monkeypatch.setattr(shards.ShardWriter, "_write", real)
    extract(model, one, Letters(), documents, tmp_path / "s", **SETTINGS)
    assert contents(tmp_path / "s") == whole


def test_a_shard_that_goes_away_while_it_is_read_is_named(model, documents, tmp_path):
    found = extract(model, CODERS["a"], Letters(), documents, tmp_path, **SETTINGS)
    segment = found.segment(0)
    (tmp_path / shard_name(0)).unlink()
    with pytest.raises(InputError, match="shard-000000.features: cannot be read .No such file"):
        segment.by_token()


def test_a_broken_model_is_refused(model, documents, tmp_path):
    embed = model.params.embed.at[100].set(jnp.nan)
    broken = model.replace(params=model.params.replace(embed=embed))
    with pytest.raises(InputError, match="resid_post of layer 1: the model's activations are not"):
        extract(broken, CODERS["a"], Letters(), documents, tmp_path, **SETTINGS)


# -------------------------------------------------------------------------------------------------
# The codecs


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i4", "<f2", "<f4"])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_arrays_survive(dtype, size):
    array = np.random.default_rng(0).integers(0, 200, size).astype(dtype)
    assert (expand(b"".join(squeeze(array)), dtype) == array).all()


@pytest.mark.parametrize("width", [50, 70_000])
def test_entries_survive(width):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 100)
    ids = [np.sort(rng.choice(width, n, replace=False)) for n in counts]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entries = Entries(offsets, np.concatenate(ids).astype(np.int32), rng.random(offsets[-1]))
    again = undo_differences(differences(entries.ids, offsets), offsets)
    assert (again == entries.ids).all()
    index = by_feature(entries, width)
    back = np.argsort(index.ids, kind="stable")
    features = np.repeat(np.arange(width), np.diff(index.offsets))
    assert (features[back] == entries.ids).all() and (index.values[back] == entries.values).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5, 1e20])
def test_half_floats_reach_over_eight_decades(scale):
    values = np.float32(scale) * np.logspace(-6, 0, 50, dtype=np.float32)
    stored, exponent = store_values(values, "float16")
    np.testing.assert_allclose(expand_values(stored, exponent), values, rtol=1e-3)
    tiny, exponent = store_values(np.array([scale, scale * 1e-15], np.float32), "float16")
    assert (expand_values(tiny, exponent) > 0).all()


CODER_INFO = CoderInfo(l0=12.0)


def test_slots_follow_the_target_l0():
    from gemma_scope_jax.coders.active_features import slots_for

    assert slots_for([sae(0, 1, info=CODER_INFO)]) == 64
    assert slots_for([sae(0, 1)]) == 256
