"""Text to packed batches: every format, the global shuffle, exact positions, what tokens count."""

import contextlib
import gc
import gzip
import importlib
import itertools
import json
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.data.documents import TextData, open_documents, parse, read_documents
from gemma_scope_jax.data.order import positions_of, shuffled_positions, shuffled_window
from gemma_scope_jax.data.prefetch import prefetch
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import load_tokenizer
from letters import Letters
from tiny_tokenizer import tiny_proto, write_model

TEXTS = [f"document {i} " + "äbc\ndef " * (i % 7) for i in range(41)]
CHAT = [
    {"role": "user", "content": "the start of turn"},
    {"role": "assistant", "content": "end of turn and the end"},
    {"role": "user", "content": "one <end_of_turn> two"},
    {"role": "model", "content": "the mask"},
]


def as_lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_zst(path, lines):
    """Two frames, as parallel compressors write them."""
    half = lines.index(b"\n", len(lines) // 2) + 1
    compress = zstd_compress()
    path.write_bytes(compress(lines[:half]) + compress(lines[half:]))


def zstd_compress():
    for name in ("compression.zstd", "zstandard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).compress
    return None


def write_corpus(folder, kind, texts=TEXTS):
    """The texts in two files of a kind; the pattern that names them."""
    for number, part in enumerate((texts[:17], texts[17:])):
        path = folder / f"{number}.{kind}"
        if kind == "txt":
            path.write_text("\n\f\n".join([*part, " \n"]))
        elif kind == "jsonl":
            path.write_bytes(as_lines(part) + b"\n")
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(as_lines(part)))
        elif kind == "jsonl.zst":
            write_zst(path, as_lines(part))
        elif kind == "array_record":
            write_records(path, as_lines(part).splitlines() if number else map(str.encode, part))
    return str(folder / f"*.{kind}")


KINDS = ["txt", "jsonl", "jsonl.gz", "array_record", *(["jsonl.zst"] if zstd_compress() else [])]


# -------------------------------------------------------------------------------------------------
# Order


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_shuffled_order_is_a_bijection_of_its_seed_and_epoch(n, seed, epoch):
    order = shuffled_positions(np.arange(n), n, seed, epoch)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    one = shuffled_positions(np.array([n - 1]), n, seed, epoch)
    assert one[0] == order[-1]
    assert (positions_of(order, n, seed, epoch) == np.arange(n)).all()
    if n > 20:
        assert np.any(order != shuffled_positions(np.arange(n), n, seed, epoch + 1))
        assert np.any(order != shuffled_positions(np.arange(n), n, seed + 1, epoch))


def test_every_thing_comes_at_every_place_equally_often():
    n, times = 11, 3000
    seen = np.zeros((n, n))
    for epoch in range(times):
        seen[np.arange(n), shuffled_positions(np.arange(n), n, 0, epoch)] += 1
    chi_squared = np.sum((seen - times / n) ** 2) / (times / n)
    assert chi_squared < 160  # mean (n - 1) ** 2 = 100, standard deviation 14


def test_a_huge_order_needs_no_list():
    n = 10**15
    places = shuffled_positions(np.arange(1000) * 10**9, n, 3, 0)
    assert len(set(places.tolist())) == 1000 and 0 <= places.min() <= places.max() < n
    assert (positions_of(places, n, 3, 0) == np.arange(1000) * 10**9).all()
    assert abs(np.mean(places) / n - 0.5) < 0.05


def test_the_window_shuffle_loses_nothing_and_looks_no_further_than_its_window():
    shuffle = lambda seed: list(shuffled_window(range(100), 10, seed, 0))
    assert sorted(shuffle(0)) == list(range(100)) and shuffle(0) == shuffle(0) != shuffle(1)
    assert all(item <= place + 10 for place, item in enumerate(shuffle(0)))
    assert shuffle(0)[:10] != list(range(10))


# -------------------------------------------------------------------------------------------------
# Documents


def texts_of(documents, seed=0, epoch=0, shard=(0, 1), start=0):
    return [parse(r, TextData()) for r in documents.ordered(seed, epoch, shard, start)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_documents_shuffled_and_split_over_hosts(tmp_path, kind):
    pattern = write_corpus(tmp_path, kind)
    assert read_documents([pattern]) == TEXTS
    documents = open_documents(TextData(files=(pattern,)))
    whole = texts_of(documents)
    assert sorted(whole) == sorted(TEXTS) and whole != TEXTS
    assert texts_of(documents, epoch=1) != whole != texts_of(documents, seed=1)
    assert texts_of(documents, start=13) == whole[13:]
    for index in range(3):
        assert texts_of(documents, shard=(index, 3)) == whole[index::3]
        assert texts_of(documents, shard=(index, 3), start=4) == whole[index::3][4:]


@given(st.lists(st.sampled_from(["\n", "\f", "a", "\r\n", "\n\f\n", " ", "ü"]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_text_files_are_split_as_their_text_would_be(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("".join(parts).encode())
    expected = [d for d in path.read_text().split("\n\f\n") if d.strip()]
    if expected:
        assert read_documents([str(path)]) == expected
    else:
        with pytest.raises(InputError, match="no text"):
            read_documents([str(path)])


def test_an_index_holds_the_offsets_only(tmp_path):
    line = json.dumps({"text": "x" * 100_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 200)
    (tmp_path / "a.txt").write_text("\n\f\n".join(["x" * 100_000] * 200))
    tracemalloc.start()
    documents = open_documents(TextData(files=(str(tmp_path / "a.*"),)))
    next(documents.ordered(0, 0, (0, 1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert documents.count == 400 and peak < 2e6


def test_tfds_records_are_read_without_tensorflow(monkeypatch):
    """Stands in for the package: texts are bytes, and a list of messages a record of lists."""
    roles = np.array([m["role"].encode() for m in CHAT], object)
    contents = np.array([m["content"].encode() for m in CHAT], object)
    records = [{"text": t.encode(), "chat": {"role": roles, "content": contents}} for t in TEXTS]

    class Builder:
        def __init__(self, name, data_dir, file_format):
            assert (name, data_dir, file_format) == ("mine/x:1.0.0", "/data", "array_record")

        class info:
            full_name = "mine/x/1.0.0"

        def as_data_source(self, split):
            return {"train": records}[split]

    module = type(sys)("tensorflow_datasets")
    module.builder = Builder
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    data = TextData(tfds="mine/x:1.0.0", tfds_folder="/data")
    assert sorted(texts_of(open_documents(data))) == sorted(TEXTS)
    chats = TextData(tfds="mine/x:1.0.0", tfds_folder="/data", messages="chat")
    assert parse(next(open_documents(chats).in_order()), chats) == CHAT
    with pytest.raises(InputError, match="tfds build"):
        open_documents(TextData(tfds="mine/x:1.0.0", tfds_folder="/data", split="test"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match="pip install tensorflow-datasets"):
        open_documents(data)


# -------------------------------------------------------------------------------------------------
# Batches


class Recording(Letters):
    """A tokenizer that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode(self, text, bos=True):
        self.seen.append(text)
        return super().encode(text, bos)


def equal(a, b):
    same = lambda x, y: np.array_equal(x.tokens, y.tokens) and np.array_equal(x.mask, y.mask)
    return len(a) == len(b) and all(
        same(x, y) and np.array_equal(x.segments, y.segments) for x, y in zip(a, b)
    )


SOURCES = {"list": lambda texts: texts, "iterable": lambda texts: lambda: iter(texts)}


@given(
    texts=st.lists(st.integers(0, 40).map(lambda n: "abcdefg"[n % 7] * n), min_size=2, max_size=30),
    rows=st.integers(1, 4),
    length=st.integers(2, 24),
    seed=st.integers(0, 99),
    shard=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
    cut=st.integers(0, 30),
    kind=st.sampled_from(sorted(SOURCES)),
)
@settings(max_examples=150, deadline=None)
def test_resuming_at_any_boundary_goes_on_the_same(texts, rows, length, seed, shard, cut, kind):
    texts = [f"{i}{text}" for i, text in enumerate(texts)]
    source = SOURCES[kind](texts)
    make = lambda tok, workers=1, **k: TokenBatches(
        source, tok, rows, length, seed=seed, shard=shard, epochs=3, workers=workers, **k
    )
    first, positions = make(tok := Recording()), []
    positions.append(first.position)
    whole = [(positions.append(first.position), batch)[1] for batch in first]
    cut = min(cut, len(whole))
    position = json.loads(json.dumps(positions[cut]))
    resumed = make(again := Recording(), position=position)
    rest = list(resumed)
    assert equal(whole[cut:], rest) and resumed.position == first.position
    assert tok.seen[0] == again.seen[0]  # the sample in the fingerprint
    done = len(tok.seen) - len(again.seen)
    assert again.seen[1:] == tok.seen[1 + done :]
    # Nothing but the documents of earlier batches was left out.
    per_epoch = len(texts[shard[0] :: shard[1]])
    assert done == min(position["epoch"] * per_epoch + position["document"], 3 * per_epoch)
    assert equal(list(first.at(position)), rest)
    assert equal(list(make(Letters(), workers=5, position=position)), rest)


def test_batches_hold_the_documents_in_order_and_leave_little_room():
    tok = Letters()
    batches = list(TokenBatches(TEXTS, tok, 3, 32, seed=5, epochs=2))
    documents = open_documents(TEXTS)
    order = [t for epoch in (0, 1) for t in texts_of(documents, seed=5, epoch=epoch)]
    rows = [(t, s, c) for b in batches for t, s, c in zip(b.tokens, b.segments, b.mask)]
    kept = np.concatenate([t[c] for t, _, c in rows])
    np.testing.assert_array_equal(kept, np.concatenate([tok.encode(t, bos=False) for t in order]))
    for tokens, segments, mask in rows:
        starts = np.diff(segments, prepend=0) > 0
        assert np.all(tokens[starts] == 2) and np.array_equal(mask, (segments > 0) & ~starts)
    full = [s for _, s, _ in rows if s.any()][:-1]
    assert max(np.sum(s == 0) for s in full) <= 8  # <bos> and fewer than 8 tokens


def test_hosts_share_the_documents_and_without_epochs_there_is_no_end():
    tok, kept = Letters(), []
    for index in range(2):
        for batch in TokenBatches(TEXTS, tok, 2, 64, shard=(index, 2), epochs=1):
            kept += [batch.tokens[r][batch.segments[r] == s] for r in (0, 1) for s in range(1, 30)]
    letters = sorted(int(t) for piece in kept for t in piece[1:])
    assert letters == sorted(int(t) for text in TEXTS for t in tok.encode(text, bos=False))
    endless = TokenBatches(TEXTS[:2], tok, 1, 8)
    assert len(list(itertools.islice(endless, 100))) == 100 and endless.position["epoch"] > 10


def test_an_iterator_is_read_once_and_resumes_on_a_fresh_one():
    make = lambda **k: TokenBatches(iter(TEXTS), Letters(), 2, 32, **k)
    first = make()
    next(first), next(first)
    assert equal(list(make(position=first.position)), list(first))


def test_rows_may_change_on_resuming():
    a = TokenBatches(TEXTS, Letters(), 2, 32, epochs=1)
    before = [next(a), next(a)]
    b = TokenBatches(TEXTS, Letters(), 5, 50, epochs=1, position=a.position)
    kept = np.concatenate([x.tokens[x.mask] for x in [*before, *b]])
    whole = TokenBatches(TEXTS, Letters(), 2, 32, epochs=1)
    np.testing.assert_array_equal(kept, np.concatenate([x.tokens[x.mask] for x in whole]))


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return load_tokenizer(write_model(path, tiny_proto()))


@pytest.mark.parametrize("length", [12, 200])
@pytest.mark.parametrize("roles", [("assistant",), ("user", "model")])
def test_in_chats_only_what_the_roles_say_counts(tmp_path, gemma_like, roles, length):
    tok = gemma_like
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 3)
    data = TextData(files=(str(path),), messages="messages", roles=roles)
    batches = list(TokenBatches(data, tok, 2, length, epochs=1))
    counted = np.concatenate([b.tokens[b.mask] for b in batches])
    wanted = [
        m["content"]
        for m in CHAT
        if m["role"] == "assistant" or "user" in roles or m["role"] == "model"
    ]
    assert tok.decode(counted) == "".join(wanted) * 3
    assert not tok.special[counted].any()
    everything = [b.tokens[(b.segments > 0) & (b.tokens != tok.bos_id)] for b in batches]
    chat = tok.chat(CHAT, add_generation_prompt=False).ids[1:]
    np.testing.assert_array_equal(np.concatenate(everything), np.tile(chat, 3))


def test_control_tokens_never_count(gemma_like):
    tok = gemma_like
    batch = next(TokenBatches(["the start <end_of_turn> \x00 of turn"], tok, 1, 64))
    assert tok.special[batch.tokens[~batch.mask]].all()
    assert not tok.special[batch.tokens[batch.mask]].any()


# -------------------------------------------------------------------------------------------------
# Ahead of time


def threads():
    return [t for t in threading.enumerate() if t.name.endswith("(_run_ahead)")]


def test_prefetched_batches_and_positions_are_those_of_the_consumer():
    make = lambda **k: TokenBatches(TEXTS, Letters(), 2, 32, epochs=2, **k)
    plain, ahead = make(), prefetch(make(), 3)
    for batch in plain:
        taken, position = next(ahead)
        assert equal([batch], [taken]) and position == plain.position
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)


def test_errors_reach_the_consumer_and_the_thread_ends_with_it():
    def bad():
        yield "some text that fills more than a row of sixteen tokens"
        raise InputError("broken in the middle")

    ahead = prefetch(TokenBatches(bad(), Letters(), 1, 16))
    with pytest.raises(InputError, match="in the middle"):
        list(ahead)
    with prefetch(itertools.count(), 1) as numbers:
        assert next(numbers) == (0, None) and threads()
    forgotten = prefetch(itertools.count(), 1)
    thread = forgotten._thread
    assert next(forgotten) == (0, None)
    del forgotten
    gc.collect()
    thread.join(5)
    assert not thread.is_alive() and not threads()
    with pytest.raises(InputError):
        prefetch([], 0)


# -------------------------------------------------------------------------------------------------
# Bad input


def test_positions_of_other_data_are_refused(tmp_path):
    pattern = write_corpus(tmp_path, "jsonl")
    make = lambda seed=0, shard=(0, 1), position=None, **k: TokenBatches(
        TextData(files=(pattern,), **k), Letters(), 2, 32, seed=seed, shard=shard, position=position
    )
    batches = make()
    next(batches)
    make(position=batches.position)
    make(position=batches.position, shuffle_window=5)  # means nothing here
    for change in ({"seed": 1}, {"shard": (0, 2)}, {"field": "id"}, {"skip_bad": True}):
        with pytest.raises(InputError, match="other data"):
            make(position=batches.position, **change)
    for junk in ({}, [], {**batches.position, "offset": -1}, {**batches.position, "epoch": "0"}):
        with pytest.raises(InputError, match="not a position"):
            make(position=junk)
    with (tmp_path / "0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match="other data"):
        make(position=batches.position)


def bad_files(folder):
    good = as_lines(TEXTS)
    contents = {
        "notjson.jsonl": (b'{"text": "a"}\n{"text": \n', "byte 14: not JSON"),
        "nokey.jsonl": (b'{"body": "a"}\n', "no key 'text' .it has body"),
        "number.jsonl": (b'{"text": 3}\n', "must be text, not int"),
        "list.jsonl": (b'["a"]\n', "no key 'text'"),
        "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "lone surrogate"),
        "latin.txt": ("über".encode("latin-1"), "cannot be read as UTF-8"),
        "cut.jsonl.gz": (gzip.compress(good)[:-20], "broken or truncated"),
        "fake.jsonl.gz": (good, "broken or truncated"),
        "line.jsonl.gz": (gzip.compress(b"\n\n{"), "line 3: not JSON"),
        "fake.jsonl.zst": (good, "broken or truncated|pip install zstandard"),
        "a.txt.gz": (gzip.compress(b"text"), "must be JSON Lines"),
        "a.parquet": (b"PAR1", "convert it to .jsonl"),
        "fake.array_record": (good * 100, "not a complete ArrayRecord"),
        "empty.txt": (b"", "no text"),
    }
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        yield name, message


def test_bad_files_are_one_line_that_says_where(tmp_path, gemma_like):
    for name, message in bad_files(tmp_path):
        with pytest.raises(InputError, match=message) as caught:
            list(TokenBatches(TextData(files=(f"{tmp_path}/{name}",)), gemma_like, 1, 8, epochs=1))
        assert name in str(caught.value), name


BAD_CHATS = {
    "empty": [{"role": "user", "content": " "}],
    "order": [{"role": "model", "content": "first"}],
    "role": [{"role": "tool", "content": "x"}],
    "text": "hello",
    "none": [],
}


@pytest.mark.parametrize("chat", BAD_CHATS.values(), ids=list(BAD_CHATS))
def test_bad_chats_are_refused_or_left_out(tmp_path, gemma_like, chat):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": c}) + "\n" for c in (CHAT, chat, CHAT)))
    data = {"files": (str(path),), "messages": "chat"}
    make = lambda **k: list(TokenBatches(TextData(**data, **k), gemma_like, 1, 500, epochs=1))
    with pytest.raises(InputError, match="chats.jsonl, byte .*skip_bad"):
        make()
    assert make(skip_bad=True)[0].segments.max() == 2


def test_zst_without_a_decompressor_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"whatever")
    real = importlib.import_module

    def none_installed(name, *rest):
        if name in ("compression.zstd", "zstandard"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", none_installed)
    with pytest.raises(InputError, match="Python 3.14 or `pip install zstandard`"):
        read_documents([str(path)])


BAD_SOURCES = {
    "one string": ("text", "one string"),
    "empty list": ([], "empty"),
    "number": (3, "from a int"),
    "nothing": (TextData(), "no text given"),
    "bytes": ([b"x", b"y"], "must be a str, not bytes"),
    "empty texts": (["", ""], "empty or unusable"),
    "empty iterable": (lambda: [], "empty or unusable"),
    "no match": (TextData(files=("nowhere/*.txt",)), "no text files match nowhere"),
}


@pytest.mark.parametrize(("source", "message"), BAD_SOURCES.values(), ids=list(BAD_SOURCES))
def test_bad_sources_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        next(TokenBatches(source, Letters(), 1, 8))


def test_bad_settings_are_refused():
    for bad in (
        {"files": "a.txt"},
        {"roles": ("teacher",)},
        {"shuffle_window": 0},
        {"files": ("a",), "tfds": "b"},
        {"messages": "chat", "roles": ()},
    ):
        with pytest.raises(InputError):
            TextData(**bad)
    for bad in (
        {"batch_size": 0},
        {"context_size": 1},
        {"shard": (2, 2)},
        {"shard": (0, 3)},
        {"workers": 0},
    ):
        options = {"batch_size": 1, "context_size": 8, **bad}
        with pytest.raises(InputError):
            next(TokenBatches(["a", "b"], Letters(), **options))
