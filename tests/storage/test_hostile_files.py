"""Whatever others, or a broken disk, put into files of ours: one line."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from card_folders import make_cards
from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.data.activations import files
from gemma_scope_jax.data.activations.store import ActivationStore
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.manifest import read_features_manifest, read_index
from gemma_scope_jax.extraction.store.codec import Entries
from gemma_scope_jax.extraction.store.shards import (
    FeatureList,
    Shard,
    ShardWriter,
    _with_checksum,
    shard_name,
)
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig, as_json
from gemma_scope_jax.training.train import _check_folder

HOSTILE = (
    "NaN", "-Infinity", "1e400", "1" + "0" * 400, str(2**39), "-1", "1.5", "true", "null", '"x"',
    '"../x"', r'"\ud800"', "[]", "{}", "[1]", '{"a": 1}', "[" * 3000 + "]" * 3000,
)  # fmt: skip
PLACE = "@place@"
STEPS = {"run": 8, "features": 3, "activations": 2}  # of what has many places


def activations(folder, rows=6):
    """A store of two layers, written without a model."""
    folder.mkdir()
    zeros = {"sum": [[0.0] * 4] * 2, "squared_norm": [0.0] * 2}
    manifest = files.FORMAT | {
        "model": {"name": "m", "dtype": "float32", "weights": "0"}, "dtype": "int8", "first": 1,
        "sites": {"resid_post": {"layers": [0, 2], "width": 4}}, "shard_rows": rows, "data": {},
        "rows": 0, "shards": [], "position": {}, "skip": 0, "sums": {"resid_post": zeros},
    }  # fmt: skip
    buffers = files.shard_buffers(manifest, rows)
    for tensors in buffers["resid_post"].values():
        tensors[:] = 1
    files.write_shard(folder, manifest, buffers, rows, {}, 0)


LISTS = [FeatureList("a", 0, 4)]


def features(folder):
    """A shard of features of 10 tokens, with the manifest and index of a store of it."""
    folder.mkdir()
    some = Entries(np.arange(11), np.zeros(10, np.int32), np.ones(10, np.float32))
    pieces = np.array([[0, 0, 10]], np.int32)
    with ThreadPoolExecutor(1) as pool, ShardWriter(folder, 0, LISTS, "float16", pool) as writer:
        writer.add(np.zeros(10, np.int32), np.ones(10, bool), pieces, [some])
        writer.close(store="s", documents=[(0, "a, byte 0", 9)])
    coder = {"name": "a", "kind": "sae", "layers": [0], "reads": "z", "writes": "z", "width": 4,
             "first": 1, "l0": None, "weights": "0"}  # fmt: skip
    manifest = {
        "format": "gemma_scope_jax sparse features", "version": 2, "coders": [coder],
        "model": {"name": "m", "dtype": "float32", "weights": "0"}, "values": "float16",
        "data": {"text": "0", "files": ["a"], "batch_size": 1, "context_size": 16,
                 "seed": 0, "roles": None},
        "slots": 4, "precision": "highest", "tokens": None, "documents": 1, "per_shard": 1,
        "mean": 10.0, "share": 1.0, "shuffled": None,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    index = {"shard": 0, "bytes": 9, "documents": 1, "segments": [[10, 9]], "entries": [10]}
    (folder / "index.json").write_text(json.dumps({"shards": [index]}))


def run_folder(folder):
    folder.mkdir()
    config = TrainConfig((CoderConfig(0),))
    (folder / "config.json").write_text(json.dumps(as_json(config)))


def read_activations(folder):
    store = ActivationStore(folder)
    store.read(np.arange(len(store)))
    store.verify()


def read_cards(folder):
    cards = FeatureCards(folder)
    assert len(cards["density"]) == 4
    assert cards.settings["before"] + cards.settings["after"] >= 0


def read_shard(folder):
    Shard(folder, 0).verify(LISTS)


def read_run(folder):
    _check_folder(TrainConfig((CoderConfig(0),)), folder_path(folder))


KINDS = {
    "activations": (activations, "manifest.json", read_activations),
    "features": (features, "manifest.json", read_features_manifest),
    "index": (features, "index.json", lambda folder: read_index(folder, 1)),
    "shard": (features, shard_name(0), read_shard),
    "cards": (make_cards, "cards.json", read_cards),
    "run": (run_folder, "config.json", read_run),
}


def places(value):
    """`value` with each of its parts, and all of it, replaced by `PLACE` in turn."""
    yield PLACE
    keys = list(value) if isinstance(value, dict) else []
    for key in range(len(value)) if isinstance(value, list) else keys:
        copy = value.copy()
        for part in places(value[key]):
            copy[key] = part
            yield copy


def with_checksum(text):
    """A shard's JSON whose checksum is right, wherever its text is JSON as we write it."""
    try:
        return _with_checksum(json.loads(text))
    except (ValueError, RecursionError):
        return f'{{"crc32":0,"shard":{text}}}'.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_expected_in_a_manifest_is_one_line(tmp_path, kind):
    make, name, read = KINDS[kind]
    make(tmp_path / "s")
    read(tmp_path / "s")
    path = tmp_path / "s" / name
    whole = json.loads(path.read_text())
    whole = whole["shard"] if kind == "shard" else whole
    refused = 0
    for text in [json.dumps(spoiled) for spoiled in places(whole)][:: STEPS.get(kind, 1)]:
        for token in HOSTILE:
            new = text.replace(f'"{PLACE}"', token)
            path.write_bytes(with_checksum(new) if kind == "shard" else new.encode())
            try:
                read(tmp_path / "s")
            except InputError as error:
                assert "\n" not in str(error) and str(tmp_path) in str(error)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ""])
def test_names_of_sites_do_not_leave_the_folder(tmp_path, name):
    activations(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    manifest = path.read_text().replace('"resid_post"', json.dumps(name))
    path.write_text(manifest)
    with pytest.raises(InputError, match="is not a site"):
        ActivationStore(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(values=dict(data_offsets=[40, 88])), "not a complete safetensors file"),
        (dict(scale=dict(data_offsets=[0, 40])), "not a complete safetensors file"),
        (dict(values=dict(shape=[2, 4, 6])), "values is I8"),
        (dict(values=dict(dtype="F32")), "not a complete safetensors file"),
        (dict(more=dict(dtype="I8", shape=[0], data_offsets=[96, 96])), "it holds"),
        (dict(scale=dict(shape=None)), "not a complete safetensors file"),
    ],
)
def test_tensors_of_a_shard_lie_side_by_side(tmp_path, change, said):
    activations(tmp_path / "s")
    path = tmp_path / "s" / "00000.resid_post.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, values in change.items():
        header[name] = header.get(name, {}) | values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    manifest = tmp_path / "s" / "manifest.json"
    new = json.loads(manifest.read_text())
    new["shards"][0]["files"]["resid_post"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(new))
    with pytest.raises(InputError, match=f"not a complete shard of activations .{said}"):
        ActivationStore(tmp_path / "s").read(np.arange(2))


def test_activations_that_are_not_finite_are_refused(tmp_path):
    activations(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    buffers, before = files.shard_buffers(manifest, 6), set(Path(tmp_path / "s").iterdir())
    buffers["resid_post"]["values"][:] = 1
    buffers["resid_post"]["scale"][:] = [[1.0], [np.inf]]
    with pytest.raises(InputError, match="resid_post of layer 2: the model's activations are not"):
        files.write_shard(tmp_path / "s", manifest, buffers, 6, {}, 0)
    assert set(Path(tmp_path / "s").iterdir()) == before
