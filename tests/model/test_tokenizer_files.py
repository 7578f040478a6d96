"""Reading the tokenizer out of every kind of file, sound, foreign or damaged.

Three writers (SentencePiece itself, llama.cpp's conventions, Hugging Face's) put the same tiny
model into files; SentencePiece on the original is the reference.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import tokenizer_files
from gemma_scope_jax.model.checkpoints import load
from gemma_scope_jax.model.tokenizer import load_tokenizer
from tiny_tokenizer import (
    RESERVED,
    SAMPLES,
    SPECIAL,
    hugging_face,
    tiny_proto,
    write_all,
    write_gguf,
    write_json,
    write_model,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def proto() -> pb.ModelProto:
    return tiny_proto()


@pytest.mark.parametrize("kind", ["model", "json", "gguf"])
def test_every_kind_of_file_gives_sentencepieces_ids(files, proto, kind):
    tok = load_tokenizer(files[kind])
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(proto.SerializeToString())
    assert tok.vocab_size == reference.get_piece_size()
    assert tok.pieces(range(tok.vocab_size)) == [p.piece for p in proto.pieces]
    assert [p for p, s in zip(proto.pieces, tok.special) if s] == [
        p for p in proto.pieces if p.piece in {*SPECIAL, *RESERVED}
    ]
    for text in SAMPLES:
        ids = tok.encode(text)
        assert ids.dtype == np.int32 and ids[0] == tok.bos_id
        assert ids[1:].tolist() == reference.encode(text) == tok.encode(text, bos=False).tolist()
    assert len(set(map(len, tok.pieces(tok.encode("of the turn"))))) > 1  # merges were learned


def test_a_folder_is_searched_for_the_best_file(files, tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer.model, tokenizer.json or .gguf"):
        load_tokenizer(tmp_path)
    for kind in ("gguf", "json", "model"):
        shutil.copy(files[kind], tmp_path)
        assert tokenizer_files.find_tokenizer(tmp_path).name == files[kind].name
        assert load_tokenizer(str(tmp_path)).bos_id == 2


def test_names(files, monkeypatch):
    asked = []

    def find(source, files):
        asked.append((source, files))
        return tokenizer_files.epath.Path(here)

    here = files["model"].parent
    monkeypatch.setattr(load, "find_checkpoint", find)
    monkeypatch.setattr(tokenizer_files, "is_packaged_model_installed", lambda: False)
    assert load_tokenizer("gemma-3-1b-it").bos_id == 2
    assert load_tokenizer("someone/tuned").bos_id == 2
    beside = (*tokenizer_files.SIBLINGS[1:], *tokenizer_files.TEMPLATES[:2])
    assert asked == [
        ("gemma-3-1b-it", ("tokenizer.model",)),
        ("someone/tuned", ("tokenizer.model", "tokenizer.json", *beside)),
    ]
    monkeypatch.setattr(tokenizer_files, "is_packaged_model_installed", lambda: True)
    monkeypatch.setattr(tokenizer_files, "packaged_model", lambda: files["gguf"])
    assert tokenizer_files.find_tokenizer("google/gemma-3-4b-pt").name == "tiny.gguf"
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["gemma-9-1b", "nowhere/x/tokenizer.model", "a.gguf", "b.json"])
def test_what_is_not_there(name):
    with pytest.raises(InputError, match=name):
        load_tokenizer(name)


def changed(proto: pb.ModelProto, change) -> pb.ModelProto:
    copy = pb.ModelProto()
    copy.CopyFrom(proto)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "not Gemma's"),
        (lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", True), "not Gemma's"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"abc"), "not Gemma's"),
        (lambda m: setattr(m.pieces[2], "piece", "<s>"), "it has no <bos>"),
        (lambda m: m.ClearField("pieces"), "it has no <pad>, <eos>"),
        (lambda m: setattr(m.pieces[-1], "piece", ""), "empty or repeated"),
        (lambda m: setattr(m.pieces[-1], "piece", "<pad>"), "empty or repeated"),
        (lambda m: setattr(m.pieces[-1], "score", float("nan")), "not finite"),
        (lambda m: setattr(m.pieces[30], "piece", "<0x1>"), "not a usable SentencePiece"),
    ],
)
def test_foreign_sentencepiece_models(proto, tmp_path, change, message):
    assert proto.pieces[30].type == tokenizer_files.BYTE
    path = write_model(tmp_path / "tokenizer.model", changed(proto, change))
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def byte(data: dict) -> dict:
    return {"id": data["model"]["vocab"]["<0x41>"], "content": "<0x41>"}


def rename(data: dict, old: str, new: str) -> None:
    vocab = data["model"]["vocab"]
    data["model"]["vocab"] = {new if p == old else p: i for p, i in vocab.items()}
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "".join(m) != old]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("model"), "not a complete tokenizer.json"),
        (lambda d: d.update(normalizer=None), "normalizer is None"),
        (lambda d: d.update(added_tokens=7), "not a complete tokenizer.json"),
        (lambda d: d["model"].update(vocab=["a"]), "not a complete tokenizer.json"),
        (lambda d: d["model"].update(merges=[["a"]]), "not a complete tokenizer.json"),
        (lambda d: d["model"].update(type="WordPiece"), "not a Gemma tokenizer"),
        (lambda d: d["model"]["vocab"].update(extra=10**9), "not a Gemma tokenizer"),
        (lambda d: d["normalizer"].update(content="_"), "not a Gemma tokenizer"),
        (lambda d: d["model"]["merges"].append(["zz", "zz"]), "not in SentencePiece's order"),
        (lambda d: d["model"]["merges"].append(["o", "f"]), "not in SentencePiece's order"),
        (lambda d: d.update(added_tokens=[]), "not a Gemma tokenizer"),
        (lambda d: d["added_tokens"].append(byte(d)), "not a usable SentencePiece"),
        (lambda d: rename(d, "of", "\ud83d"), "half of a surrogate pair"),
    ],
)
def test_foreign_tokenizer_jsons(proto, tmp_path, change, message):
    data = hugging_face(proto)
    change(data)
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_json(tmp_path / "tokenizer.json", data))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("model", "no SentencePiece tokenizer"),
        ("tokens", "missing or malformed"),
        ("types", "missing or malformed"),
        ("scores", "5 scores"),
    ],
)
def test_incomplete_gguf_metadata(proto, tmp_path, drop, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_gguf(tmp_path / "x.gguf", proto, drop))


@pytest.mark.parametrize(
    "data",
    [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"{" * 100_000, b"\n"],
)
def test_foreign_files(tmp_path, data):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(InputError, match=str(path)):
        load_tokenizer(path)


@pytest.mark.parametrize("kind", ["model", "json", "gguf"])
def test_damaged_files_raise_input_error_or_nothing(files, tmp_path, kind):
    data = np.frombuffer(files[kind].read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    refused = 0
    for trial in range(150):
        broken = data.copy()
        if trial % 5 == 0:
            broken = broken[: rng.integers(0, len(data))]
        else:
            at = rng.integers(0, len(data), rng.integers(1, 4))
            broken[at] = rng.integers(0, 256, len(at))
        path.write_bytes(broken.tobytes())
        try:
            tok = load_tokenizer(path)
        except InputError:
            refused += 1
        else:
            tok.decode(tok.encode("the <bos> turn"))
            tok.chat([{"role": "user", "content": "one"}])
    assert refused > 20
