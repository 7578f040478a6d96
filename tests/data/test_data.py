"""Text to packed batches: every format, exact positions, what tokens count."""

import itertools
import json
import sys
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_jax.data import batches as batching
from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.data.documents import TextData, open_documents, parse, read_documents
from gemma_scope_jax.data.prefetch import prefetch
from gemma_scope_jax.errors import InputError
from letters import Letters
from memory_use import least_peak
from text_files import CHAT, KINDS, TEXTS, write_corpus

# -------------------------------------------------------------------------------------------------
# Documents


def texts_of(documents, seed=0, epoch=0, start=0):
    return [parse(r, TextData()) for r in documents.ordered(seed, epoch, start)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_its_documents_shuffled(tmp_path, kind):
    pattern = write_corpus(tmp_path, kind)
    assert read_documents([pattern]) == TEXTS
    documents = open_documents(TextData(files=(pattern,)))
    whole = texts_of(documents)
    assert sorted(whole) == sorted(TEXTS) and whole != TEXTS
    assert texts_of(documents, epoch=1) != whole != texts_of(documents, seed=1)
    assert texts_of(documents, start=13) == whole[13:]


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

    def read():
        documents = open_documents(TextData(files=(str(tmp_path / "a.*"),)))
        next(documents.ordered(0))
        assert documents.count == 400

    assert least_peak(read) < 2e6


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
    assert parse(next(open_documents(chats).ordered(None)), chats) == CHAT
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
    cut=st.integers(0, 30),
    kind=st.sampled_from(sorted(SOURCES)),
)
@settings(max_examples=150, deadline=None)
@mock.patch.object(batching, "THREADS", 1)  # documents are encoded in their order
def test_resuming_at_any_boundary_goes_on_the_same(texts, rows, length, seed, cut, kind):
    texts = [f"{i}{text}" for i, text in enumerate(texts)]
    source = SOURCES[kind](texts)
    make = lambda tok, **k: TokenBatches(source, tok, rows, length, seed=seed, epochs=3, **k)
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
    assert done == min(position["epoch"] * len(texts) + position["document"], 3 * len(texts))
    assert equal(list(first.at(position)), rest)
    with mock.patch.object(batching, "THREADS", 5):
        assert equal(list(make(Letters(), position=position)), rest)


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


def test_without_epochs_there_is_no_end():
    endless = TokenBatches(TEXTS[:2], Letters(), 1, 8)
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
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetched_batches_and_positions_are_those_of_the_consumer():
    make = lambda **k: TokenBatches(TEXTS, Letters(), 2, 32, epochs=2, **k)
    plain = make()
    with prefetch(make()) as ahead:
        for batch in plain:
            taken, position = next(ahead)
            assert equal([batch], [taken]) and position == plain.position
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(ahead)


def test_errors_reach_the_consumer_and_the_thread_ends_with_the_block():
    def bad():
        yield "some text that fills more than a row of sixteen tokens"
        raise InputError("broken in the middle")

    source = TokenBatches(bad(), Letters(), 1, 16)
    with prefetch(source) as ahead, pytest.raises(InputError, match="in the middle"):
        list(ahead)
    with pytest.raises(KeyError), prefetch(itertools.count()) as numbers:
        assert next(numbers) == (0, None) and threads()
        raise KeyError
    assert not threads()


def test_only_a_few_batches_are_made_ahead():
    made = []
    with prefetch(made.append(i) or i for i in itertools.count()) as numbers:
        for i in range(20):
            assert next(numbers) == (i, None)
            assert len(made) <= i + 6


def test_a_forgotten_iterator_waits_for_nobody():
    """It may be ended by the garbage collector, in the start of a thread, which would lock up."""
    goes_on, done, calls = threading.Event(), threading.Event(), itertools.count()

    class Slow(Letters):
        def encode(self, text, **options):
            if text == "a" * 40 and next(calls):  # the second document, and those after it
                goes_on.wait(60)
                done.set()
            return super().encode(text, **options)

    batches = TokenBatches(["a" * 40] * 8, Slow(), 1, 8)
    next(batches)
    batches._batches.close()
    ended_first = not done.is_set()
    goes_on.set()
    assert ended_first and done.wait(60)
