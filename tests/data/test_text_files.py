"""Text files under all their names: what a name means, what is no text, which text it is."""

import gzip
import json
import os

import numpy as np
import pytest

from gemma_scope_jax.data import document_files, text_identity
from gemma_scope_jax.data.batches import TokenBatches, counting, fingerprint, readings
from gemma_scope_jax.data.documents import TextData, open_documents, parse, read_documents
from gemma_scope_jax.data.text_identity import file_digest, file_digests
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.storage.paths import named_paths
from letters import Letters
from memory_use import least_peak
from text_files import write_records

LINES = b'{"text": "one"}\n{"text": "two"}\n'
MARK = b"\xef\xbb\xbf"


def batches(path, tokenizer=None, rows=1, length=32, **options):
    read = {k: options.pop(k) for k in ("epochs", "position") if k in options}
    data = TextData(files=(str(path),), **options)
    return TokenBatches(data, tokenizer or Letters(), rows, length, **read)


# -------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.JSONL",
        "a.ndjson",
        "a.JsonLines",
        "a.b.jsonl",
        "a.jsonl-00000-of-00002",
        "a.JSONL.GZ",
        "a.ndjson.gz",
    ],
)
def test_json_lines_are_read_as_records_under_any_of_their_names(tmp_path, name):
    data = gzip.compress(LINES) if name.lower().endswith("gz") else LINES
    (tmp_path / name).write_bytes(data)
    assert read_documents([f"{tmp_path}/{name}"]) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "readme", "notes.md", "v1.2", "a.jsonl.txt"])
def test_what_else_is_text_is_one_document(tmp_path, name):
    (tmp_path / name).write_bytes(b"one\ntwo")
    assert read_documents([f"{tmp_path}/{name}"]) == ["one\ntwo"]


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.TSV", "a.Json", "a.PARQUET", "a.tfrecord-00000-of-00001", "a.jsonl.zip",
     "a.jsonl.bak", "a.jsonl.1", "a.csv.gz", "a.TXT.GZ", "a.jsonl.gz.part"],
)  # fmt: skip
def test_what_would_be_read_as_something_it_is_not_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(InputError, match=r"\.jsonl"):
        read_documents([f"{tmp_path}/{name}"])


def test_array_records_in_capitals(tmp_path):
    (tmp_path / "a.Array_Record").write_bytes(LINES)
    with pytest.raises(InputError, match="not a complete ArrayRecord"):
        read_documents([f"{tmp_path}/a.Array_Record"])


def test_names_with_brackets_are_names_before_they_are_patterns(tmp_path, monkeypatch):
    for folder in ("run [3]", "run 3"):
        (tmp_path / folder).mkdir()
        for name in ("a[1].txt", "a1.txt", "b*.txt", "bc.txt"):
            (tmp_path / folder / name).write_text(f"{folder}/{name}")
    inside = f"{tmp_path}/run [3]"
    assert read_documents([f"{inside}/a[1].txt"]) == ["run [3]/a[1].txt"]
    assert read_documents([f"{inside}/b*.txt"]) == ["run [3]/b*.txt"]
    assert read_documents([f"{inside}/a[12].txt"]) == ["run [3]/a1.txt"]  # which is no name
    assert len(read_documents([f"{inside}/*.txt"])) == 4
    assert read_documents([f"{tmp_path}/run [1-5]/a1.txt"]) == ["run 3/a1.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_paths("~/run [3]") == [inside] and named_paths("~/none*") == []


def test_a_file_comes_once_however_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    assert read_documents(["a.txt", "./a.txt", f"{tmp_path}/a.txt", "*.txt"]) == ["one"]
    with pytest.raises(InputError, match="is a folder; name its files"):
        read_documents([str(tmp_path)])
    with pytest.raises(InputError, match="gs://b/~/a.txt: text is read from local files"):
        read_documents(["gs://b/~/a.txt"])


def test_a_name_that_is_not_utf8_is_legible_where_it_is_quoted(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one\n\f\ntwo")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    data = TextData(files=(f"{tmp_path}/*.txt",))
    (where, _) = [record.where for record in open_documents(data).ordered(None)]
    assert where == rf"{tmp_path}/caf\udce9.txt, byte 0"
    (tmp_path / "b.txt").write_text("three")
    text = EvaluationText(data, Letters(), batch_size=1, context_size=32)
    [batch] = text
    sources = batch.labels["source"].numbers[batch.mask]
    names = [name.rpartition("/")[2] for name in text.groups["source"]]
    assert names == ["b.txt", r"caf\udce9.txt"]
    assert sorted(sources.tolist()) == [0] * 5 + [1] * 6


# -------------------------------------------------------------------------------------------------
# What is no text, or too much


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    path = tmp_path / name
    pack = gzip.compress if name.endswith("gz") else bytes
    plain = name == "a.txt"
    path.write_bytes(pack(MARK + (b"one\n\f\n" + MARK + b"two" if plain else LINES)))
    assert read_documents([str(path)]) == ["one", "two"]
    path.write_bytes(pack(MARK + b"\n"))
    with pytest.raises(InputError, match="no text"):
        list(batches(path, epochs=1))


GOOD = b'{"text": "good", "score": NaN, "more": {"text": "other"}}\n'
BAD = {
    "deep": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "deep elsewhere": (b'{"text": "a", "b": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
    "twice": (b'{"text": "a", "text": "b"}', "'text' occurs twice"),
    "half": (rb'{"text": "\ud83d"}', "lone surrogate"),
    "latin": (b'{"text": "caf\xe9"}', "not JSON"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "not JSON"),
    "surrogate": (b'{"text": "\xed\xa0\xbd"}', "not JSON"),
    "digits": (b'{"text": "a", "n": ' + b"9" * 9999 + b"}", "not JSON"),
    "key": (b'{"\x1b]0;title\x07": 1}', "not JSON"),
    "keys": (json.dumps({"k" * 999: 1}).encode(), r"it has k+\.\.\."),
}


@pytest.mark.parametrize(("record", "said"), BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_record_is_one_bad_record(tmp_path, record, said, suffix):
    path = tmp_path / f"a.{suffix}"
    data = GOOD + record.replace(b"\n", b" ") + b"\n" + GOOD
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(InputError, match=said) as error:
        list(batches(path, epochs=1))
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 600
    (batch,) = batches(path, epochs=1, skip_bad=True)
    assert batch.segments.max() == 2


def test_a_key_of_a_message_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"m": [{"role": "user", "content": "a", "content": "b"}]}\n')
    data = TextData(files=(str(path),), messages="m")
    with pytest.raises(InputError, match="'content' occurs twice"):
        parse(next(open_documents(data).ordered(None)), data)


def test_a_record_longer_than_any_document_is_a_bad_one(tmp_path, monkeypatch):
    monkeypatch.setattr(document_files, "LONGEST", 100)
    path = tmp_path / "a.array_record"
    write_records(path, [b"short", b"x" * 101, b"short, too"])
    with pytest.raises(InputError, match="record 1: a line or record of more than"):
        list(batches(path, epochs=1))
    (batch,) = batches(path, epochs=1, skip_bad=True)
    assert batch.segments.max() == 2


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_an_endless_line_is_one_bad_record_and_not_read_into_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(document_files, "LONGEST", 100_000)
    data = GOOD + b'{"text": "' + b"x" * 50_000_000 + b'"}\n' + GOOD
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix.endswith("gz") else data)

    def read():
        with pytest.raises(
            InputError, match=rf"a\.{suffix}, (line 2|byte \d+): a line or record of more than"
        ):
            list(batches(path, epochs=1))
        (batch,) = batches(path, epochs=1, skip_bad=True)
        assert batch.segments.max() == 2

    assert least_peak(read) < 8_000_000


def test_bytes_of_tfds_that_are_not_utf8_are_refused_not_replaced():
    record = document_files.Record("TFDS x, record 3", {"text": b"caf\xe9"}, "mapping")
    with pytest.raises(InputError, match="record 3: not UTF-8"):
        parse(record, TextData())


def test_parts_of_a_message_arrive_whole_from_json_and_tfds():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat, data = [{"role": "user", "content": parts}], TextData(messages="m")
    record = lambda value, kind: document_files.Record("here", value, kind)
    assert parse(record(json.dumps({"m": chat}).encode(), "json"), data) == chat
    columns = {"type": [b"text", b"text"], "text": [b"a", b"b"]}
    rows = {"role": np.array([b"user"], object), "content": [columns]}
    assert parse(record({"m": rows}, "mapping"), data) == chat
    with pytest.raises(InputError, match="must be a list of messages"):
        parse(record({"m": {"role": "user", "content": "x"}}, "mapping"), data)


# -------------------------------------------------------------------------------------------------
# Which text it is


def identity(source):
    data = source if isinstance(source, TextData) else TextData()
    return fingerprint(open_documents(source), data, Letters(), 0)


def test_a_text_is_known_by_its_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\n\f\ntwo")
    before, times = identity(TextData(files=(str(path),))), (path.stat().st_mtime_ns,) * 2
    monkeypatch.chdir(tmp_path)
    assert identity(TextData(files=("a.txt",))) == identity(TextData(files=("./a.txt",))) == before
    moved = path.rename(tmp_path / "b.txt")
    assert identity(TextData(files=(str(moved),))) == before
    moved.write_text("one\n\f\ntwa")  # of the same size, and as old
    os.utime(moved, ns=times)
    assert identity(TextData(files=(str(moved),))) != before
    zipped = tmp_path / "c.jsonl.gz"
    zipped.write_bytes(gzip.compress(LINES, mtime=0))
    compressed = identity(TextData(files=(str(zipped),)))
    zipped.write_bytes(gzip.compress(LINES.replace(b"two", b"owt"), mtime=0))
    assert identity(TextData(files=(str(zipped),))) != compressed
    assert identity(["one", "two"]) != identity(["one", "owt"]) != identity(["oneo", "wt"])


def test_the_digest_of_a_large_file_is_kept_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(text_identity, "PART", 1000)
    monkeypatch.setattr(text_identity, "REMEMBERED", 5000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, read = tmp_path / "a.txt", []
    real = text_identity._of_file
    monkeypatch.setattr(text_identity, "_of_file", lambda *a: read.append(a) or real(*a))
    rng = np.random.default_rng(0)
    path.write_bytes(data := rng.bytes(7000))
    first = file_digest(path)
    assert file_digest(path) == first and len(read) == 2  # it may still change unseen
    monkeypatch.setattr(text_identity, "_SETTLED", -1.0)
    assert [file_digest(path) for _ in range(3)] == [first] * 3 and len(read) == 3
    kept = path.stat()
    path.write_bytes(data[:6500] + b"x" + data[6501:])
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert file_digest(path) != first and len(read) == 4
    path.write_bytes(data)
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")
    assert file_digest(path) == first
    (small := tmp_path / "b.txt").write_bytes(data[:4000])
    (tmp_path / "none").write_text("a file")  # a cache that cannot be written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert file_digests([small, path, small])[1:] == [first, file_digest(small)]


def test_positions_go_on_in_the_same_text_and_in_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("\n\f\n".join(["some words"] * 20))
    (first := batches(path, rows=2, length=16)).__next__()
    place = first.position
    monkeypatch.chdir(tmp_path)
    rest = batches("./a.txt", rows=2, length=16, position=place)
    np.testing.assert_array_equal(next(rest).tokens, next(first).tokens)
    about = (first.text.documents, first.text.data, Letters(), 0)
    older = {**place, "data": fingerprint(*about, named=True)}  # by name and size alone
    assert batches(path, rows=2, length=16, position=older).position == place
    path.write_text("\n\f\n".join(["some wards"] * 20))
    with pytest.raises(InputError, match="belongs to other data: the text"):
        batches(path, rows=2, length=16, position=place)


# -------------------------------------------------------------------------------------------------
# What counts, and how often


def test_who_waits_for_tokens_that_count_waits_for_one_pass_over_the_text():
    texts = ["abc", "defg", "hi"] * 3
    make = lambda **k: TokenBatches(texts, Letters(), 1, 8, **k)
    walk = lambda source, first: counting(
        ((batch, source.position) for batch in source), first, source.position
    )
    seen = []
    with pytest.raises(InputError, match="no token counts.*position 5 or later"):
        for _, place in walk(make(), 5):
            seen.append(place)
    assert all(place["epoch"] == 0 for place in seen) and len(seen) > 3
    resumed, seen = make(position=seen[2]), []
    with pytest.raises(InputError, match="no token counts"):
        for _, place in walk(resumed, 5):
            seen.append(place)
    assert seen[-1]["epoch"] == 1  # a whole pass from where it went on
    assert len(list(walk(make(epochs=3), 4))) == len(list(make(epochs=3)))


def test_how_often_a_text_has_been_begun():
    source = TokenBatches(["abcdefg"] * 4, Letters(), 1, 8, epochs=3)
    assert readings(source.position) == 0
    assert [readings(source.position) for _ in source] == [1] * 4 + [2] * 4 + [3] * 4
