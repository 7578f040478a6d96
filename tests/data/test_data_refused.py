"""Files, chats, sources, settings and positions that cannot be read are refused in one line."""

import gzip
import json

import pytest

from gemma_scope_jax.data.batches import TokenBatches
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError
from letters import Letters
from text_files import CHAT, TEXTS, as_lines, write_corpus


def test_positions_of_other_data_are_refused(tmp_path):
    pattern = write_corpus(tmp_path, "jsonl")
    make = lambda seed=0, position=None, **k: TokenBatches(
        TextData(files=(pattern,), **k), Letters(), 2, 32, seed=seed, position=position
    )
    batches = make()
    next(batches)
    make(position=batches.position)
    make(position=batches.position, shuffle_window=5)  # means nothing here
    for change in ({"seed": 1}, {"field": "id"}, {"skip_bad": True}):
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
        "latin.txt": ("über".encode("latin-1"), "not UTF-8 text"),
        "cut.jsonl.gz": (gzip.compress(good)[:-20], "broken or truncated"),
        "fake.jsonl.gz": (good, "broken or truncated"),
        "line.jsonl.gz": (gzip.compress(b"\n\n{"), "line 3: not JSON"),
        "fake.jsonl.zst": (good, "broken or truncated"),
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
    for bad in ({"batch_size": 0}, {"context_size": 1}):
        options = {"batch_size": 1, "context_size": 8, **bad}
        with pytest.raises(InputError):
            next(TokenBatches(["a", "b"], Letters(), **options))
