"""Gemma 3 from Google DeepMind's own checkpoints: Orbax folders, local or on gs://.

The published ones (gs://gemma-data/checkpoints/gemma3-*, Kaggle's flax variation) name their arrays
flatly, "transformer/layer_0/attn/q_einsum" with a leaf "w"; the gemma library saves nested ones
without "transformer". Joined with "/" the names are the same. One layer is read at a time.

Source: gemma 4.0, gm/ckpts/{_checkpoint,_compat}.py and gm/nn/_modules.py.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.model.checkpoints.shapes import LAYER, NAMES, TOP
from gemma_scope_jax.model.config import PRESETS, GemmaConfig, axis_sizes
from gemma_scope_jax.storage.strict_json import read_object

PREFIXES = ("", "transformer/", "params/", "params/transformer/")
MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
# Arrays that do not change what the text model computes, and why.
HARMLESS = {
    r"((params/)?transformer/|params/)?(vision_encoder|SigLiPFromPatches_0)/.+": "images",
    r"((params/)?transformer/|params/)?embedder/mm_.+": "images",
    r"(step|(opt_state|optimizer)(/.+)?|training_time_hours)": "only in training",
}
_HARMLESS = re.compile("|".join(HARMLESS))


def _heads_inside(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 0, 2)  # [N, D, H] -> [D, N, H]


AXES = {  # of the arrays, by the letters of `config.py`; "D" of all others
    "embedder/input_embedding": "VD",
    "attn/q_einsum/w": "NDH",
    "attn/kv_einsum/w": "2KDH",
    "attn/attn_vec_einsum/w": "NHD",
    "mlp/gating_einsum/w": "2MD",
    "mlp/linear/w": "MD",
    "attn/_query_norm/scale": "H",
    "attn/_key_norm/scale": "H",
}
# file layout -> ours, where they differ
OURS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "w_q": _heads_inside,
    "w_k": lambda x: _heads_inside(x[0]),
    "w_v": lambda x: _heads_inside(x[1]),
    "w_gate": lambda x: x[0].T,
    "w_up": lambda x: x[1].T,
}


@dataclasses.dataclass(frozen=True)
class OfficialCheckpoint:
    """An opened checkpoint: names, shapes and dtypes of all arrays checked, no weight read."""

    path: str
    config: GemmaConfig
    arrays: Mapping[str, Any]  # by name, preceded by "layer_0/" within a layer: TensorStore


def is_official(folder: str | os.PathLike) -> bool:
    """Whether `folder` looks like an Orbax checkpoint."""
    return any((epath.Path(folder) / mark).exists() for mark in MARKS)


def open_official(
    folder: str | os.PathLike, config: GemmaConfig | None = None
) -> OfficialCheckpoint:
    """Open an Orbax checkpoint of Gemma 3, nested or flat.

    Arrays other than the text model's and `HARMLESS` ones (a vision encoder, a trainer's state) are
    refused: LoRA weights change what the model computes, and others may.

    The files hold no architecture: sizes come from the shapes, and the preset with these sizes
    supplies the rest (window, RoPE). For other sizes pass `config`. Raises `InputError`.
    """
    path = epath.Path(folder)
    if not (path / "_METADATA").exists() and (path / "default" / "_METADATA").exists():
        path = path / "default"  # a trainer's
    path, metadata = path.resolve(), read_object(path / "_METADATA")
    stored = _array_keys(path, metadata)
    if any("stacked_layers/" in name for name in stored):
        advice = "load it with gemma.gm.ckpts.load_params and save it again with save_params"
        raise InputError(f"{path}: holds stacked layers; {advice}")
    prefix = next((p for p in PREFIXES if f"{p}embedder/input_embedding" in stored), None)
    if prefix is None:
        raise InputError(f"{path}: has no embedder/input_embedding; not a Gemma checkpoint")
    others = {name for name in stored if not name.startswith(prefix)}
    stored = {n.removeprefix(prefix): s for n, s in stored.items() if n.startswith(prefix)}
    layers = 0
    while f"layer_{layers}/attn/attn_vec_einsum/w" in stored:
        layers += 1
    wanted = [*_stems(None), *(f"layer_{i}/{x}" for i in range(layers) for x in _stems(0))]
    for name in wanted:
        if name not in stored:
            raise InputError(f"{path}: {name} is missing; download the checkpoint again")
    _check_others(path, sorted(others | (stored.keys() - set(wanted))))
    arrays = _open_arrays(path, metadata, {name: stored[name] for name in wanted})
    width = arrays["final_norm/scale"].size
    fitting = (c for c in PRESETS.values() if (c.layers, c.d_model) == (layers, width))
    config = config or next(fitting, None)
    if config is None:
        none = f"{layers} layers of width {width} match none of {', '.join(PRESETS)}"
        raise InputError(f"{path}: {none}; pass `config` for a model of your own")
    if config.layers != layers:
        raise InputError(f"{path}: has {layers} layers, {config.name} has {config.layers}")
    size = axis_sizes(config) | {"2": 2}
    for name, array in arrays.items():
        axes = AXES.get(re.sub(r"layer_\d+/", "", name), "D")
        expected = tuple(size[axis] for axis in axes)
        if tuple(array.shape) != expected:
            raise InputError(f"{path}: {name} is {array.shape}, {config.name} needs {expected}")
        if array.dtype.name not in ("float32", "float16", "bfloat16"):
            raise InputError(f"{path}: {name} is {array.dtype.name}, not a float")
    return OfficialCheckpoint(str(path), config, arrays)


def _check_others(path: epath.Path, names: Iterable[str]) -> None:
    for name in names:
        if _HARMLESS.fullmatch(name):
            continue
        why = "is not one of Gemma 3's and may change what it computes; remove it if it does not"
        if "lora" in name.split("/"):
            advice = "merge them (gemma's peft.fuse_params) and save again"
            why = f"belongs to unmerged LoRA weights; {advice}"
        raise InputError(f"{path}: {name} {why}")


def official_layer(file: OfficialCheckpoint, layer: int | None) -> dict[str, np.ndarray]:
    """All leaves of one layer in our layout without L, in the file's dtype (strided views).

    `layer=None`: `embed` and `final_norm`. Raises `InputError` for damaged files.
    """
    within = "" if layer is None else f"layer_{layer}/"
    stems = _stems(layer)
    reads = {stem: file.arrays[within + stem].read() for stem in stems}  # in parallel
    read = {stem: _result(file.path, within + stem, future) for stem, future in reads.items()}
    same = lambda x: x
    return {leaf: OURS.get(leaf, same)(read[stem]) for stem in stems for leaf in stems[stem]}


def _array_keys(path: epath.Path, metadata: dict[str, Any]) -> dict[str, str]:
    """The name of each array, its keys joined with "/" -> its key in the checkpoint."""
    stored: dict[str, str] = {}
    try:
        for entry in metadata["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            name = "/".join(keys)
            if name.endswith(("mlp/linear", "mlp/gating_einsum")):
                name += "/w"  # which the nested layout lacks, and the flat one has
            if name in stored:
                raise InputError(f"{path}: holds {name} twice")
            stored[name] = ".".join(keys)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}/_METADATA: lists no arrays; download it again") from error
    return stored


def _open_arrays(
    path: epath.Path, metadata: dict[str, Any], stored: Mapping[str, str]
) -> dict[str, Any]:
    """Name -> TensorStore of each array, opened in parallel (on gs:// each takes a round trip).

    Uses tensorstore rather than orbax, which always restores a whole tree at once and, if a file is
    damaged, leaves its other reads running to print tracebacks.
    """
    import tensorstore as ts

    base = {"driver": "file", "path": f"{path}/"}
    if str(path).startswith("gs://"):
        bucket, _, folder = str(path).removeprefix("gs://").partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
    context = ts.Context()
    futures = {}
    for name, key in stored.items():
        kvstore = base | {"path": f"{base['path']}{key}/"}
        if (path / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
        spec = {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": kvstore}
        if metadata.get("store_array_data_equal_to_fill_value"):
            spec["fill_missing_data_reads"] = False  # a lost chunk is an error, not zeros
        futures[name] = ts.open(spec, open=True, read=True, context=context)
    return {name: _result(str(path), name, future) for name, future in futures.items()}


def _result(path: str, name: str, future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:  # whatever its drivers raise: ValueError, OverflowError, ...
        raise InputError(
            f"{path}: {name} is damaged ({reason(error)}); download the checkpoint again"
        ) from error


def _stems(layer: int | None) -> dict[str, list[str]]:
    """Name of an array -> the leaves in it: w_k and w_v share one, and so do w_gate and w_up."""
    stems: dict[str, list[str]] = {}
    for leaf in TOP[:2] if layer is None else LAYER:
        stems.setdefault(NAMES[leaf][2], []).append(leaf)
    return stems
