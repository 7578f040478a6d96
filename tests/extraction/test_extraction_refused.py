"""Damage to a store is found and named, and what cannot be extracted is one line."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from coders import random_coder
from feature_stores import CODERS, SETTINGS, contents, other
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.data.batches import fingerprint
from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import extract as extract_module
from gemma_scope_jax.extraction import work
from gemma_scope_jax.extraction.extract import check_extraction, extract
from gemma_scope_jax.extraction.store.shards import shard_name
from gemma_scope_jax.extraction.store.store import FeatureStore
from letters import Letters


def test_a_flipped_byte_is_found_and_named(store, tmp_path):
    copy = tmp_path / "s"
    shutil.copytree(store.folder, copy)
    FeatureStore(copy).verify()
    rng, name = np.random.default_rng(0), "000002-0000.parquet"
    for victim in (copy / shard_name(2), copy / "tokens" / name,
                   copy / "features" / "coder=x" / "layer=2" / name):  # fmt: skip
        data, said = victim.read_bytes(), f"{victim.name}: damaged .*; delete "
        places = [0, *(len(data) - n for n in (1, 5, 12, 100)), *rng.integers(0, len(data), 60)]
        for at in places:
            victim.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(InputError, match=said) as error:
                FeatureStore(copy).verify()
            assert "\n" not in str(error.value)
        for cut in (0, 10, len(data) // 2, len(data) - 1):
            victim.write_bytes(data[:cut])
            with pytest.raises(InputError, match=said):
                FeatureStore(copy).verify()
        victim.unlink()
        with pytest.raises(InputError, match=f"{victim.name}: is missing; "):
            FeatureStore(copy).verify()
        victim.write_bytes(data)


def test_what_is_read_of_a_damaged_file_is_refused_or_right(store, tmp_path):
    """Without `verify`, too: pages have checksums of their own, and so has the footer."""
    copy, at = tmp_path / "s", Path("features") / "coder=a" / "layer=1" / "000001-0000.parquet"
    shutil.copytree(store.folder, copy)
    right, data, refused = store.segment(1).by_feature("a"), (copy / at).read_bytes(), 0
    places = range(0, len(data), 4)
    for place in places:
        (copy / at).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            found = FeatureStore(copy).segment(1).by_feature("a")
        except InputError as error:
            assert "000001-0000.parquet: damaged" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(np.array_equal(a, b) for a, b in zip(found, right))
    assert refused > 0.9 * len(places)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(values="int4"), "values are stored as float16 or float32, not 'int4'"),
        (dict(precision="best"), "precision must be one of highest, high, default, not 'best'"),
        (dict(share=(3, 3)), r"share \(3, 3\): must be"),
        (dict(context_size=100_000), "context_size 100000: .* takes 2 to"),
        (dict(batch_size=0), "batch_size 0: must be at least 1"),
        (dict(slots=0), "slots 0: must be at least 1"),
        (dict(shard_tokens=-5), "shard_tokens -5: must be at least 1"),
        (dict(tokens=0), "tokens must be at least 1"),
        (dict(source=[]), "the list of documents is empty"),
        (dict(source=["", ""]), "no text: all documents are empty"),
        (dict(source=iter(["a"])), "an iterator can be read only once"),
        (dict(source=TextData(files=("nothing-*.txt",))), "no text files match"),
        (dict(coders={}), "no coders"),
        (
            dict(coders={"deep": random_coder(layer=9, threshold=1.0)}),
            "deep: the coder is for layer 9, but",
        ),
        (
            dict(coders={"w": random_coder(threshold=1.0, reads="z", writes="z")}),
            "w: the coder reads 32 values",
        ),
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
        (dict(batch_size=4), "another data .batch_size 2 there, 4 now"),
        (dict(seed=1), "another text"),
        (dict(slots=9), "another slots"),
        (dict(coders={"a": CODERS["b"]}), "another coders .weights"),
        (dict(source=["other text"]), "another text"),
    ],
)
def test_a_folder_keeps_to_its_settings(model, tmp_path, changes, said):
    one = {"a": CODERS["a"]}
    extract(model, one, Letters(), ["abcdef", "ghi"], tmp_path, **SETTINGS)
    settings = other(**changes)
    source, coders = settings.pop("source", ["abcdef", "ghi"]), settings.pop("coders", one)
    refused = pytest.raises(InputError, match=f"holds features of {said}")
    with refused:
        extract(model, coders, Letters(), source, tmp_path, **settings)
    with refused if said.startswith(("another text", "another coders")) else nullcontext():
        check_extraction(model.config, coders, tmp_path, Letters(), source, **settings)


def test_a_folder_is_called_by_its_coders_name(model, tmp_path):
    """It is known by its weights: stores hold no paths of this machine. Those of older versions
    do, and go on all the same."""
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
        text.documents, text.data, text.tokenizer, text.seed, named=True
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
        with pytest.raises(InputError, match="another text .its content") as error:
            again(path)
        assert "\n" not in str(error.value)


def test_a_text_of_which_nothing_counts_is_refused(model, tmp_path):
    late = {"late": random_coder(threshold=1.0, first=9)}
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
        (lambda: store.segment(0).features(3, 3, "a"), "features 3 to 3: the coder has 0 to 47"),
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
    with pytest.raises(InputError, match="shard-000000.json: belongs to another store"):
        extract(model, two, Letters(), documents[:4], tmp_path, **SETTINGS)
    with pytest.raises(InputError, match="shard-000000.json: belongs to another store"):
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
    with pytest.raises(InputError, match="manifest.json: .*; extract into another folder"):
        FeatureStore(tmp_path)


def test_shards_without_text_are_whole(model, tmp_path):
    one = {"a": CODERS["a"]}
    texts = ["", "abcdef", "", "ghi"]
    found = extract(model, one, Letters(), texts, tmp_path, **SETTINGS | {"shard_tokens": 1})
    assert found.complete and found.counted == 9 and len(found.document(0).tokens) == 0
    found.verify()
    assert "L0" in found.summary()


def test_a_full_disk_leaves_whole_shards(model, documents, tmp_path, monkeypatch):
    from gemma_scope_jax.extraction.store import shards

    one = {"a": CODERS["a"]}
    extract(model, one, Letters(), documents, tmp_path / "t", **SETTINGS)
    whole = contents(tmp_path / "t")
    of = lambda n: [len(d) for name, d in whole.items() if f"{n:06d}" in name]
    real, left = (
        shards.ShardWriter._write,
        [sum(of(0)) + sum(of(1)) - 20],
    )  # the second's end is not

    def write(self, path, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(self, path, data)

    monkeypatch.setattr(shards.ShardWriter, "_write", write)
    with pytest.raises(InputError, match="no space left; free some and run the same again"):
        extract(model, one, Letters(), documents, tmp_path / "s", **SETTINGS)
    names = set(contents(tmp_path / "s"))
    assert names == {"manifest.json", *(name for name in whole if "000000" in name)}
    monkeypatch.setattr(shards.ShardWriter, "_write", real)
    extract(model, one, Letters(), documents, tmp_path / "s", **SETTINGS)
    assert contents(tmp_path / "s") == whole


def test_a_file_that_goes_away_while_it_is_read_is_named(model, documents, tmp_path):
    found = extract(model, {"a/b": CODERS["a"]}, Letters(), documents, tmp_path, **SETTINGS)
    segment, file = found.segment(0), "features/coder=a%2Fb/layer=1/000000-0000.parquet"
    (tmp_path / file).unlink()
    said = f"{file}: is missing; delete shard-000000.json and extract again"
    with pytest.raises(InputError, match=said):
        segment.by_token()
    (tmp_path / shard_name(0)).unlink()
    (tmp_path / "index.json").unlink()
    extract(model, {"a/b": CODERS["a"]}, Letters(), documents, tmp_path, **SETTINGS)
    FeatureStore(tmp_path).verify()


def test_a_broken_model_is_refused(model, documents, tmp_path):
    embed = model.params.embed.at[100].set(jnp.nan)
    broken = model.replace(params=model.params.replace(embed=embed))
    with pytest.raises(InputError, match="resid_post of layer 1: the model's activations are not"):
        extract(broken, CODERS["a"], Letters(), documents, tmp_path, **SETTINGS)


def test_a_bucket_that_cannot_be_asked_is_one_line(model, monkeypatch):
    class NoCredentials:
        def __fspath__(self):
            return "gs://b/x"

        __str__ = __fspath__

        def __truediv__(self, name):
            return self

        def exists(self):
            raise RuntimeError("401 no credentials")

    monkeypatch.setattr(extract_module, "check_writable", lambda folder: None)
    monkeypatch.setattr(extract_module, "folder_path", lambda folder: NoCredentials())
    with pytest.raises(InputError, match="gs://b/x: 401 no credentials"):
        check_extraction(model.config, CODERS, "gs://b/x", Letters(), ["abc"], **SETTINGS)
