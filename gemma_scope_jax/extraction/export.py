"""A feature store in the format of others: delphi's cache of latents.

The store is read a segment at a time.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.segment import Segment
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.atomic import new_folder, write_folder, write_json
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.safetensors_files import array_bytes
from gemma_scope_jax.storage.safetensors_layout import lay_out

FORMATS = ("delphi",)
_HELD = 50_000_000  # entries per delphi file, which delphi reads whole


def export_store(
    store: FeatureStore, folder: str | os.PathLike, format: str, *, splits: int | None = None
) -> Path:
    """Write `store` as "delphi" into a local folder, which must be new or empty.

    splits  the number of files for delphi's features; default: 50 million activations per file
    Raises `InputError` for other formats, folders that are not empty and full disks.
    """
    path = expanded(folder)
    if format not in FORMATS:
        raise InputError(f"stores are exported as {' or '.join(FORMATS)}, not {format!r}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: holds something already; choose a new folder")
    with new_folder(path) as new:
        _delphi(store, new, splits)
    return path


def lists(store: FeatureStore) -> Iterator[tuple[str, int, int, str]]:
    """(coder, layer, width, folder name) of each stored list. Parts of a coder's name that would
    leave the folder, such as the .. of ../coders/one, are left out.
    """
    whole = [[p for p in name.split("/") if p.strip(".")] or ["coder"] for name in store.coders]
    short = [parts[-1] for parts in whole]
    names = [n if short.count(n) == 1 else "/".join(parts) for n, parts in zip(short, whole)]
    for number, (coder, name) in enumerate(zip(store.manifest["coders"], names)):
        if names.count(name) > 1:
            name = f"{name}-{number}"
        for layer in coder["layers"]:
            suffix = f"/layer_{layer}" if len(coder["layers"]) > 1 else ""
            yield coder["name"], layer, coder["width"], name + suffix


# --- delphi (delphi/latents/cache.py and loader.py, EleutherAI) ----------------------------------


class _Split(NamedTuple):
    """A file of delphi's: features `start` to `stop` of a coder's layer, `count` activations."""

    coder: str
    layer: int
    module: str
    start: int
    stop: int
    count: int


def _delphi(store: FeatureStore, folder: Path, splits: int | None) -> None:
    """{module}/{start}_{end}.safetensors, `end` the last feature: `locations` uint16 or uint32
    [N, 3] (row of `tokens`, position in it, feature - start), `activations` float16 [N], `tokens`
    int64 [rows, length]; and config.json, delphi's `CacheConfig` and the model's name.

    A piece of a document is a row, padded with 0 to the store's length. Activations are not scaled:
    those beyond float16 (65504) raise `InputError`.
    """
    data = store.manifest["data"]
    length = data["context_size"]
    shape = sum(map(_piece_count, store.segments())), length
    config = {
        "model_name": store.manifest["model"]["name"],
        "dataset_repo": " ".join(data["files"]),
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": data["batch_size"],
        "ctx_len": length,
        "n_tokens": shape[0] * length,
    }
    work = [
        _Split(coder, layer, name, *part)
        for coder, layer, width, name in lists(store)
        for part in _ranges(store.fired(coder, layer), splits, width)
    ]
    progress = Progress(len(work) * store.segment_count, "segments")
    for number, split in enumerate(work):
        done = lambda i, n=number: progress.at(n * store.segment_count + i)
        write = partial(_write_split, store, split, shape, done)
        file = f"{split.start}_{split.stop - 1}.safetensors"
        writers = {file: write, "config.json": partial(write_json, value=config)}
        write_folder(folder / split.module, writers)


def _write_split(
    store: FeatureStore, split: _Split, shape: tuple[int, int], done: Callable, file: BinaryIO
) -> None:
    """Fill the file's tensors in parallel, a segment at a time. shape: of `tokens`."""
    kind = "uint16" if max(*shape, split.stop - split.start) <= 1 << 16 else "uint32"
    tensors = {"locations": (kind, (split.count, 3)), "activations": ("float16", (split.count,))}
    header, places = lay_out({**tensors, "tokens": ("int64", shape)})
    file.write(header)
    at, before = {name: begin for name, (begin, _) in places.items()}, 0
    for i, segment in enumerate(store.segments(), 1):
        arrays = _delphi_arrays(segment, split, shape[1], before)
        arrays["locations"] = arrays["locations"].astype(kind)
        for name, array in arrays.items():
            file.seek(at[name])
            file.write(array_bytes(array))
            at[name] += array.nbytes
        before += len(arrays["tokens"])
        done(i)
    if at != {name: end for name, (_, end) in places.items()}:
        raise InputError(f"{store.folder}: has changed while it was exported; export it again")


def _delphi_arrays(
    segment: Segment, split: _Split, length: int, before: int
) -> dict[str, np.ndarray]:
    """A segment's part of the tensors of a file; its first piece is row `before`."""
    tokens = np.zeros((_piece_count(segment), length), np.int64)
    tokens[segment.pieces, segment.positions] = segment.tokens
    offsets, rows, values = segment.features(split.start, split.stop, split.coder, split.layer)
    features = np.repeat(np.arange(split.stop - split.start), np.diff(offsets))
    order = np.argsort(rows, kind="stable")  # by token
    rows, features, values = rows[order], features[order], values[order]
    places = (segment.pieces[rows] + before, segment.positions[rows], features)
    with np.errstate(over="ignore"):
        activations = values.astype(np.float16)
    if not np.isfinite(activations).all():
        i = int(np.argmax(~np.isfinite(activations)))
        raise InputError(
            f"{split.module}: feature {split.start + features[i]} fires at {values[i]:g} in "
            f"document {segment.documents[rows[i]]}; delphi's files are float16, which ends at "
            "65504: read the store's Parquet instead"
        )
    return {"locations": np.stack(places, 1), "activations": activations, "tokens": tokens}


def _piece_count(segment: Segment) -> int:
    return int(segment.pieces[-1]) + 1


def _ranges(fired: np.ndarray, splits: int | None, width: int) -> list[tuple[int, int, int]]:
    """(start, stop, activations) of ranges of features with about as many activations each."""
    total = int(fired.sum())
    splits = max(1, -(-total // _HELD)) if splits is None else splits
    if not 1 <= splits <= width:
        raise InputError(f"splits must be 1 to {width}, the number of features, not {splits}")
    wanted = np.arange(1, splits) * total / splits
    ends = np.searchsorted(np.cumsum(fired), wanted, side="left") + 1
    ends = np.unique(np.concatenate([ends[ends < width], [width]])).tolist()
    return [(a, b, int(fired[a:b].sum())) for a, b in zip([0, *ends[:-1]], ends)]
