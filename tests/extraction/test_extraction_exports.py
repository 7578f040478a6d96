"""A store as Parquet and as delphi's files."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from coders import random_coder
from feature_stores import CODERS, SETTINGS, dense
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.export import export_store
from gemma_scope_jax.extraction.extract import extract
from letters import Letters
from memory_use import least_peak


def test_parquet_readers_take_the_store_as_it_is(store):
    from pyarrow import parquet

    assert not {p.suffix for p in (store.folder / "tokens").iterdir()} - {".parquet"}
    tokens = parquet.read_table(store.folder / "tokens").sort_by("row")
    features = parquet.read_table(store.folder / "features")  # Hive's partitions: coder, layer
    for name in ("tokens", "documents", "positions", "offsets", "counted"):
        wanted = np.concatenate([getattr(segment, name) for segment in store.segments()])
        name = name.removesuffix("s")
        assert (tokens[name].to_numpy() == wanted).all()
    rows = tokens["row"].to_numpy()
    assert (np.diff(rows) > 0).all()
    coder, layer = features["coder"].to_pylist(), features["layer"].to_numpy()
    for name, of in (("a", 1), ("x", 2)):
        here = (np.array(coder) == name) & (layer == of)
        found = np.zeros((len(store), store.width(name)), np.float32)
        at = np.searchsorted(rows, features["row"].to_numpy()[here])
        found[at, features["feature"].to_numpy()[here]] = features["value"].to_numpy()[here]
        assert (found == dense(store, name, of)).all()


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

    coder = random_coder(width, seed=9, threshold=1.0 if width == 48 else 3.0)
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
    loud = random_coder(8, seed=9, threshold=1.0)
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

    folders = (tmp_path / str(number) for number in itertools.count())

    def export(times):
        folder = next(folders)
        export_store(Long(times), folder, "delphi", splits=1)
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    assert export(12) > 11 * export(1)
    assert least_peak(lambda: export(12)) < 1.2 * least_peak(lambda: export(1))


def test_coders_of_one_last_name_are_all_exported(model, documents, tmp_path):
    two = {"resid_post/layer_1": CODERS["a"], "other/layer_1": CODERS["b"]}
    found = extract(model, two, Letters(), documents[:5], tmp_path / "s", **SETTINGS)
    export_store(found, tmp_path / "p", "delphi")
    configs = (tmp_path / "p").rglob("config.json")
    assert {str(path.parent.relative_to(tmp_path / "p")) for path in configs} == set(two)


def test_bad_exports_are_one_line(store, tmp_path):
    with pytest.raises(InputError, match="exported as delphi, not 'csv'"):
        export_store(store, tmp_path / "e", "csv")
    with pytest.raises(InputError, match="splits must be 1 to"):
        export_store(store, tmp_path / "f", "delphi", splits=0)
    (tmp_path / "g").write_text("")
    for taken in (tmp_path, tmp_path / "g"):
        with pytest.raises(InputError, match="holds something already"):
            export_store(store, taken, "delphi")
