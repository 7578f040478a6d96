"""Transcoder sets and cross-layer transcoders in circuit-tracer's folders, read and written.

`config.yaml` says what there is and, in TransformerLens' words, where it reads and writes. Then
either a file a layer, or an encoder and a decoder file a layer:

    layer_{i}.safetensors   W_enc [F, D], b_enc, W_dec [F, D], b_dec,
                            activation_function.threshold?, W_skip? [D_out, D]: x @ W_skip.T
    W_enc_{i}.safetensors   W_enc_{i} [F, D], b_enc_{i}, b_dec_{i}, threshold_{i}?,
                            W_skip_{i}? [D, D]: x @ W_skip_{i}, not transposed
    W_dec_{i}.safetensors   W_dec_{i} [F, X - i, D], to the layers from i on

Without thresholds it is relu. Source: circuit-tracer (`transcoder/single_layer_transcoder.py`,
`transcoder/cross_layer_transcoder.py`, `utils/caching.py`).
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, CoderInfo
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.interop.hooks import (
    config_from,
    errors_name,
    hook_of_site,
    model_named,
    read_tensors,
    site_of_hook,
    text_of,
)
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder, block_index
from gemma_scope_jax.coders.release.config import untrained_positions
from gemma_scope_jax.coders.release.parameters import check_values
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError, nearest, reason
from gemma_scope_jax.storage.atomic import write_folder
from gemma_scope_jax.storage.safetensors_files import StreamedTensor, write_safetensors
from gemma_scope_jax.storage.strict_json import parse_json

CONFIG = "config.yaml"
CONSULTED = (
    "model_kind",
    "model_name",
    "feature_input_hook",
    "feature_output_hook",
    "scan",
    "transcoders",
    "activation",
    "k",
)
HARMLESS = {  # key -> why it changes nothing
    "repo_id": "where the folder is published",
    "revision": "likewise",
    "subfolder": "likewise",
    "name": "for people",
    "description": "for people",
    "license": "for people",
    "tags": "for people",
    "library_name": "for people",
    "lazy_encoder": "when weights are read",
    "lazy_decoder": "likewise",
    "dtype": "the weights have theirs",
    "device": "where it ran",
}
LARGEST = 1 << 20  # bytes of a config.yaml
KINDS = ("transcoder_set", "cross_layer_transcoder")
THRESHOLD = "activation_function.threshold"
FILES = ("layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors")


def is_circuit_tracer_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder with a `config.yaml`."""
    return os.path.isfile(os.path.join(path, CONFIG))


def load_circuit_tracer(path: str | os.PathLike) -> CoderSet:
    """A transcoder set, a `SparseCoder` a layer, or a cross-layer transcoder as a set of one.

    Raises `InputError`, one line, for damaged or missing files, activations other than relu and
    JumpReLU, hooks that are no site, and configs that only point at files on the hub.
    """
    return CoderSet([load() for load in loaders(Path(path), str(path)).values()])


def loaders(folder: Path, path: str) -> dict[str, Callable[[], Coder]]:
    """What loads each coder of a folder that is known as `path`: {path: the CLT}, or of a set
    {path/layer_3: the transcoder of layer 3}, which is also the folder of what is written of it.
    """
    config = _read_yaml(folder / CONFIG)
    with errors_name(folder / CONFIG):
        kind = text_of(config, "model_kind")
        if kind not in KINDS:
            raise InputError(f"model_kind is {kind!r}, expected {' or '.join(KINDS)}")
        activation = text_of(config, "activation") or "relu"
        if activation.replace("_", "") not in ("relu", "jumprelu"):
            raise InputError(f"activation {activation!r} is not supported, only relu and jump_relu")
        if config.get("k") is not None:
            raise InputError(f"k is {config['k']!r:.40}, but the activation is {activation}")
        if other := [key for key in config if key not in CONSULTED and key not in HARMLESS]:
            raise InputError(
                f"key {other[0]!r:.60} ({config[other[0]]!r:.40}) is not known, and may be part of "
                f"what the coder computes{nearest(str(other[0]), CONSULTED)}; take it out if not"
            )
        model_name = model_named(config)
        where = dict(
            reads=site_of_hook(text_of(config, "feature_input_hook") or "hook_resid_mid"),
            writes=site_of_hook(text_of(config, "feature_output_hook") or "hook_mlp_out"),
            first=untrained_positions(model_name),
        )
        files = _layer_files(config, folder) if kind == "transcoder_set" else {}
        if kind != "transcoder_set" and config.get("transcoders") is not None:
            raise InputError(f"transcoders are the files of a transcoder_set, not of a {kind}")

    def info(kind: str, name: str = "") -> CoderInfo:
        own = os.path.join(os.path.abspath(folder), name) if name else os.path.abspath(folder)
        at = f"{path.rstrip('/')}/{name}" if name else path
        return CoderInfo(model_name, kind, path=at, folder=own, config={"circuit_tracer": config})

    if kind == "cross_layer_transcoder":
        return {path: functools.partial(_load_clt, folder, where, info("clt"))}
    found: dict[str, Callable[[], Coder]] = {}
    for layer, file in files.items():
        about = info("transcoder", f"layer_{layer}")
        found[about.path] = functools.partial(_load_layer, file, {**where, "layer": layer}, about)
    return found


def _read_yaml(file: Path) -> dict[str, Any]:
    """The config; what JSON cannot hold, aliases, equal keys and large files are refused."""
    import yaml

    try:
        if file.stat().st_size > LARGEST:
            raise InputError("larger than a config is")
        text = file.read_text(encoding="utf-8-sig")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise InputError("it has aliases (*name): write out what they stand for")
        _check_twice(yaml.compose(text, yaml.SafeLoader))
        config = parse_json(json.dumps(yaml.safe_load(text)), "it")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the parser lets every kind through: IndexError for `!!int ''`
        raise InputError(
            f"{file}: not YAML that can be used ({reason(error).removeprefix('it: ')})"
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected keys and values, found a {type(config).__name__}")
    return config


def _check_twice(node: Any) -> None:
    """Raise `InputError` for a key that occurs twice in the outermost mapping of a YAML node."""
    keys = [key.value for key, _ in node.value] if getattr(node, "id", "") == "mapping" else []
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"the key {twice[0]!r:.60} occurs twice")


def _layer_files(config: dict[str, Any], folder: Path) -> dict[int, Path]:
    """layer -> file, from the config's list or the folder's own layer_{i}.safetensors."""
    listed = config.get("transcoders")
    if listed is None:
        found = (re.fullmatch(r"layer_([0-9]{1,4})\.safetensors", p.name) for p in folder.iterdir())
        layers = sorted(int(match[1]) for match in found if match)
        files = {layer: folder / f"layer_{layer}.safetensors" for layer in layers}
    elif isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        if remote := [name for name in listed if "://" in name]:
            address = re.sub(r"^hf://|/params\.safetensors.*$", "", remote[0])
            raise InputError(
                f"transcoders are files on the hub ({remote[0]}): load each by its address, as "
                f"{address}"
            )
        for name in listed:
            if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name:
                raise InputError(f"transcoders: {name!r} leaves the folder of the config")
        files = {layer: folder / name for layer, name in enumerate(listed)}
    else:
        raise InputError("transcoders is not a list of file names")
    if not files:
        raise InputError("no layer_{i}.safetensors beside it")
    return files


def _load_layer(file: Path, where: dict[str, Any], info: CoderInfo) -> SparseCoder:
    ranks = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
    tensors = read_tensors(file, ranks, {THRESHOLD: 1, "W_skip": 2})
    with errors_name(file):
        skip = tensors.get("W_skip")
        coder = SparseCoder(
            w_enc=jnp.asarray(tensors["W_enc"].T),
            b_enc=jnp.asarray(tensors["b_enc"]),
            threshold=_threshold(tensors.get(THRESHOLD), tensors["b_enc"]),
            w_dec=jnp.asarray(tensors["W_dec"]),
            b_dec=jnp.asarray(tensors["b_dec"]),
            w_skip=None if skip is None else jnp.asarray(skip.T),
            info=dataclasses.replace(info, width=tensors["b_enc"].shape[0]),
            **where,
        )
        coder.check_shapes()
    return coder


def _threshold(threshold: np.ndarray | None, b_enc: np.ndarray) -> Any:
    """Thresholds as ours: 0 is relu. Below 0, circuit-tracer lets negative z through, we do not."""
    if threshold is None:
        return jnp.zeros(b_enc.shape, b_enc.dtype)
    if (threshold < 0).any():
        raise InputError("a negative threshold is not supported")
    return jnp.asarray(threshold)


def _load_clt(folder: Path, where: dict[str, Any], info: CoderInfo) -> MultiLayerCoder:
    layers = 0
    while (folder / f"W_enc_{layers}.safetensors").is_file():
        layers += 1
    if layers == 0:
        raise InputError(f"{folder}: no W_enc_0.safetensors beside {CONFIG}")
    wanted = {f"W_{end}_{i}.safetensors" for i in range(layers) for end in ("enc", "dec")}
    if more := _coder_files(folder) - wanted:
        raise InputError(f"{folder}: {min(more)} is there, but the encoders are 0 to {layers - 1}")
    parts: dict[str, list[np.ndarray]] = {}
    w_dec: np.ndarray | None = None
    for i in range(layers):
        ranks = {f"W_enc_{i}": 2, f"b_enc_{i}": 1, f"b_dec_{i}": 1}
        file = folder / f"W_enc_{i}.safetensors"
        for name, tensor in read_tensors(
            file, ranks, {f"threshold_{i}": 1, f"W_skip_{i}": 2}
        ).items():
            parts.setdefault(name.removesuffix(f"_{i}"), []).append(tensor)
        file = folder / f"W_dec_{i}.safetensors"
        block = read_tensors(file, {f"W_dec_{i}": 3})[f"W_dec_{i}"]
        F, D = parts["W_enc"][0].shape
        if block.shape != (F, layers - i, D):
            raise InputError(
                f"{file}: W_dec_{i} has shape {list(block.shape)}, expected {[F, layers - i, D]}"
            )
        if w_dec is None:  # filled in place: the decoder is nearly all of a CLT's memory
            w_dec = np.empty((layers * (layers + 1) // 2, F, D), block.dtype)
        start = block_index(i, i, layers)
        w_dec[start : start + layers - i] = block.transpose(1, 0, 2)
    with errors_name(folder):
        stacked = {name: _stack(name, arrays, layers) for name, arrays in parts.items()}
        skip = stacked.get("W_skip")
        coder = MultiLayerCoder(
            w_enc=jnp.asarray(stacked["W_enc"].transpose(0, 2, 1)),
            b_enc=jnp.asarray(stacked["b_enc"]),
            threshold=_threshold(stacked.get("threshold"), stacked["b_enc"]),
            w_dec=jnp.asarray(w_dec),
            b_dec=jnp.asarray(stacked["b_dec"]),
            w_skip=None if skip is None else jnp.asarray(skip),
            layers=tuple(range(layers)),
            info=dataclasses.replace(info, width=stacked["b_enc"].size),
            **where,
        )
        coder.check_shapes()
    return coder


def _stack(name: str, arrays: list[np.ndarray], layers: int) -> np.ndarray:
    if len(arrays) != layers:
        raise InputError(f"{len(arrays)} of {layers} layers have {name}")
    if len({array.shape for array in arrays}) > 1:
        raise InputError(f"the layers' {name} have different shapes")
    return np.stack(arrays)


def save_circuit_tracer(coders: Coder | Iterable[Coder], folder: str | os.PathLike) -> None:
    """Write transcoders of the layers 0, 1, ... or one CLT so that circuit-tracer can load them.

    bfloat16 weights stay, all others become float32. The files appear together or not at all.
    circuit-tracer 0.5.0 ignores the skip of a CLT's folder; its repository reads it.
    Raises `InputError` for a set with gaps, with mixed sites, widths or skips, for a crosscoder,
    and for a CLT whose decoder was left on disk.
    """
    several = CoderSet(coders)
    first = several[0]
    if len(several) == 1 and first.multi_layer:
        kind, files = "cross_layer_transcoder", _clt_files(first)
    elif any(coder.multi_layer for coder in several):
        raise InputError("circuit-tracer holds one SparseCoder a layer, or one CLT")
    else:
        kind, files = "transcoder_set", _set_files(several)
    config = {
        "model_kind": kind,
        "model_name": first.info.model_name,
        "feature_input_hook": hook_of_site(first.reads),
        "feature_output_hook": hook_of_site(first.writes),
    }
    if scan := config_from(first.info, "circuit_tracer").get("scan"):
        config["scan"] = scan
    if others := _coder_files(Path(folder)) - set(files):
        raise InputError(f"{folder}: holds {min(others)} of another coder; choose a new folder")
    writers = {
        name: functools.partial(_write_tensors, tensors=tensors) for name, tensors in files.items()
    }
    write_folder(Path(folder), {**writers, CONFIG: functools.partial(_write_yaml, config=config)})


def _write_tensors(file: BinaryIO, tensors: Callable[[], dict[str, Any]]) -> None:
    """Tensors are made when their file's turn comes: two copies of a CLT need not fit in memory."""
    streamed = {name: StreamedTensor.whole(_stored(tensor)) for name, tensor in tensors().items()}
    write_safetensors(file, streamed)


def _stored(weight: Any) -> np.ndarray:
    """A weight as it is written: bfloat16 stays, all else becomes float32."""
    array = np.asarray(weight)
    return array if array.dtype.name == "bfloat16" else array.astype(np.float32, copy=False)


def _write_yaml(file: BinaryIO, config: dict[str, Any]) -> None:
    import yaml

    file.write(yaml.safe_dump(config, sort_keys=False).encode())


def _coder_files(folder: Path) -> set[str]:
    return {path.name for glob in FILES for path in folder.glob(glob)}


def _set_files(several: CoderSet) -> dict[str, Callable[[], dict[str, Any]]]:
    """File name -> what makes its tensors, of a transcoder set."""
    coders = sorted(several, key=lambda coder: coder.layers)
    if [coder.layers for coder in coders] != [(i,) for i in range(len(coders))]:
        layers = ", ".join(str(coder.layers[0]) for coder in coders)
        raise InputError(f"circuit-tracer needs every layer from 0 on, got {layers}")
    for coder in coders:
        coder.check_shapes()
        _check_writable(coder)
        for name in ("reads", "writes", "width", "kind"):
            if (here := getattr(coder, name)) != (first := getattr(coders[0], name)):
                raise InputError(
                    f"circuit-tracer needs all layers alike: {name} is {here} in layer "
                    f"{coder.layers[0]}, {first} in layer 0"
                )
    return {
        f"layer_{coder.layers[0]}.safetensors": functools.partial(_layer_tensors, coder)
        for coder in coders
    }


def _check_writable(coder: Coder) -> None:
    check_values(coder)
    if coder.k is not None:
        raise InputError(
            "circuit-tracer's folders hold no TopK coders that other readers know: make it a "
            "JumpReLU coder with as_jump_relu"
        )


def _layer_tensors(coder: Coder) -> dict[str, Any]:
    tensors = {
        "W_enc": coder.w_enc.T,
        "b_enc": coder.b_enc,
        THRESHOLD: coder.threshold,
        "W_dec": coder.w_dec,
        "b_dec": coder.b_dec,
    }
    return tensors if coder.w_skip is None else {**tensors, "W_skip": coder.w_skip.T}


def _clt_files(clt: Coder) -> dict[str, Callable[[], dict[str, Any]]]:
    """File name -> what makes its tensors, of a cross-layer transcoder."""
    clt.check_shapes()
    X = len(clt.layers)
    if clt.kind != "clt" or clt.layers != tuple(range(X)):
        raise InputError("circuit-tracer holds CLTs of every layer from 0 on, not a crosscoder")
    if clt.w_dec is None:
        raise InputError("the decoder of this CLT was left on disk: load_decoder(coder) first")

    _check_writable(clt)

    def encoder(i: int) -> dict[str, Any]:
        tensors = {
            f"W_enc_{i}": clt.w_enc[i].T,
            f"b_enc_{i}": clt.b_enc[i],
            f"b_dec_{i}": clt.b_dec[i],
            f"threshold_{i}": clt.threshold[i],
        }
        return tensors if clt.w_skip is None else {**tensors, f"W_skip_{i}": clt.w_skip[i]}

    def decoder(i: int) -> dict[str, Any]:
        start = block_index(i, i, X)
        return {f"W_dec_{i}": np.asarray(clt.w_dec[start : start + X - i]).transpose(1, 0, 2)}

    files = {f"W_enc_{i}.safetensors": functools.partial(encoder, i) for i in range(X)}
    return files | {f"W_dec_{i}.safetensors": functools.partial(decoder, i) for i in range(X)}
