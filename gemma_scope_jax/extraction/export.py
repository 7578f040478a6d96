"""A feature store in the formats of others: Parquet tables, and delphi's cache of latents.

Both go through the store a segment at a time; what they hold is what the store holds.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.buckets import write_text
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store import FeatureStore
from gemma_scope_jax.progress import Progress

FORMATS = ("parquet", "delphi")
_HELD = 50_000_000  # entries of a delphi file held in memory


def export_store(
    store: FeatureStore, folder: str | os.PathLike, format: str, *, splits: int | None = None
) -> Path:
    """Write `store` as "parquet" or "delphi" into a local folder, which must be new or empty.

    splits  files that delphi's features are split into; default: as many as keep 50 million
            activations in each
    Raises `InputError` for other formats, a folder that holds something, a missing package.
    """
    path = Path(folder).expanduser()
    if format not in FORMATS:
        raise InputError(f"stores are exported as {' or '.join(FORMATS)}, not {format!r}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: holds something already; choose a new folder")
    path.mkdir(parents=True, exist_ok=True)
    if format == "parquet":
        _parquet(store, path)
    else:
        _delphi(store, path, splits)
    return path


def lists(store: FeatureStore) -> Iterator[tuple[str, int, int, str]]:
    """(coder, layer, width, column name) of everything that is stored."""
    short = [os.path.basename(name.rstrip("/")) for name in store.coders]
    for coder, name in zip(store.manifest["coders"], short):
        if short.count(name) > 1:  # whole names where the last parts are alike
            name = coder["name"].strip("/")
        for layer in coder["layers"]:
            several = f"/layer_{layer}" * (len(coder["layers"]) > 1)
            yield coder["name"], layer, coder["width"], name + several


# -------------------------------------------------------------------------------------------------
# Parquet


def _parquet(store: FeatureStore, folder: Any) -> None:
    """features-NNNNN.parquet, one for each segment: a row for each token.

    document int64, position int32 (in its piece, `<bos>` is 0), offset int32 (in the document's
    tokens, -1 for `<bos>`), token int32, counted bool, and for every coder's layer the columns
    NAME.features list<int32> and NAME.values list<float32>.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("Parquet needs `pip install pyarrow`") from None
    progress, done = Progress(len(store)), 0
    for number, segment in enumerate(store.segments()):
        columns: dict[str, Any] = {
            "document": segment.documents, "position": segment.positions,
            "offset": segment.offsets, "token": segment.tokens, "counted": segment.counted,
        }  # fmt: skip
        columns = {name: pa.array(values) for name, values in columns.items()}
        for coder, layer, _, name in lists(store):
            offsets, ids, values = segment.by_token(coder, layer)
            ends = pa.array(offsets.astype(np.int32))
            columns[f"{name}.features"] = pa.ListArray.from_arrays(ends, pa.array(ids))
            columns[f"{name}.values"] = pa.ListArray.from_arrays(ends, pa.array(values))
        file = folder / f"features-{number:05d}.parquet"
        parquet.write_table(pa.table(columns), file.with_suffix(".tmp"), compression="zstd")
        file.with_suffix(".tmp").replace(file)
        done += len(segment)
        progress.at(done)
    write_text(folder / "manifest.json", json.dumps(store.manifest, indent=1))


# -------------------------------------------------------------------------------------------------
# delphi (delphi/latents/cache.py and loader.py, EleutherAI)


def _delphi(store: FeatureStore, folder: Any, splits: int | None) -> None:
    """{module}/{start}_{end}.safetensors, `end` the last feature: `locations` uint16 or uint32
    [N, 3] (row of `tokens`, position in it, feature - start), `activations` float16 [N], `tokens`
    int64 [rows, length]; and config.json.

    A piece of a document is a row, padded with 0 to the store's length; delphi takes activations
    as they are, and float16 ends at 65504: larger ones are cut to it.
    """
    from safetensors.numpy import save_file

    length = store.manifest["data"]["length"]
    tokens = _rows(store, length)
    work = [
        (coder, layer, name, start, stop)
        for coder, layer, width, name in lists(store)
        for start, stop in _ranges(store.fired(coder, layer), splits, width)
    ]
    progress = Progress(len(work), "files")
    for done, (coder, layer, name, start, stop) in enumerate(work, 1):
        module = folder / name
        module.mkdir(parents=True, exist_ok=True)
        locations, activations = _located(store, coder, layer, start, stop)
        small = max(len(tokens), length, stop - start) <= 1 << 16
        found = {
            "locations": locations.astype(np.uint16 if small else np.uint32),
            "activations": activations.astype(np.float16), "tokens": tokens,
        }  # fmt: skip
        file = module / f"{start}_{stop - 1}.safetensors"
        save_file(found, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        config = json.dumps(_delphi_config(store, length, len(tokens)))
        write_text(module / "config.json", config)
        progress.at(done)


def _delphi_config(store: FeatureStore, length: int, rows: int) -> dict[str, Any]:
    """What delphi's `CacheConfig` says, and the model's name."""
    data = store.manifest["data"]
    return {
        "model_name": store.manifest["model"]["name"], "dataset_repo": " ".join(data["files"]),
        "dataset_split": "", "dataset_name": "", "dataset_column": "text",
        "batch_size": data["rows"], "ctx_len": length, "n_tokens": rows * length,
    }  # fmt: skip


def _ranges(fired: np.ndarray, splits: int | None, width: int) -> list[tuple[int, int]]:
    """Ranges of features with about as many activations in each."""
    total = int(fired.sum())
    splits = max(1, -(-total // _HELD)) if splits is None else splits
    if not 1 <= splits <= width:
        raise InputError(f"splits must be 1 to {width}, the features, not {splits}")
    wanted = np.arange(1, splits) * total / splits
    ends = np.searchsorted(np.cumsum(fired), wanted, side="left") + 1
    ends = np.unique(np.concatenate([ends[ends < width], [width]])).tolist()
    return list(zip([0, *ends[:-1]], ends))


def _rows(store: FeatureStore, length: int) -> np.ndarray:
    """Tokens int64 [pieces, length], 0 after a piece's end."""
    rows = []
    for segment in store.segments():
        found = np.zeros((int(segment.pieces[-1]) + 1, length), np.int64)
        found[segment.pieces, segment.positions] = segment.tokens
        rows.append(found)
    return np.concatenate(rows)


def _located(store: FeatureStore, coder: str, layer: int, start: int, stop: int):
    """(locations int64 [N, 3], activations float32 [N]) of features `start` to `stop`, by token."""
    locations, activations, before = [], [], 0
    for segment in store.segments():
        offsets, rows, values = segment.features(start, stop, coder, layer)
        features = np.repeat(np.arange(stop - start), np.diff(offsets))
        order = np.argsort(rows, kind="stable")
        rows, features, values = rows[order], features[order], values[order]
        place = (segment.pieces[rows] + before, segment.positions[rows], features)
        locations.append(np.stack(place, 1))
        activations.append(np.minimum(values, np.finfo(np.float16).max))
        before += int(segment.pieces[-1]) + 1
    return np.concatenate(locations), np.concatenate(activations)


def print_export(store: FeatureStore, folder: Path, *, json_output: bool) -> None:
    """Where an export is, and how large."""
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if json_output:
        print(json.dumps({"folder": str(folder), "bytes": size, "tokens": len(store)}))
    else:
        print(f"{len(store):,} tokens, {size / 1e6:,.1f} MB: {folder}")
