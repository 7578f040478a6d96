"""Transcoder sets and cross-layer transcoders in circuit-tracer's folders, read and written.

`config.yaml` gives the kind and, as TransformerLens hooks, the sites. The weights are one file per
layer, or an encoder and a decoder file per layer:

    layer_{i}.safetensors   W_enc [F, D], b_enc, W_dec [F, D], b_dec,
                            activation_function.threshold?, W_skip? [D_out, D]: x @ W_skip.T
    W_enc_{i}.safetensors   W_enc_{i} [F, D], b_enc_{i}, b_dec_{i}, threshold_{i}?,
                            W_skip_{i}? [D, D]: x @ W_skip_{i}, not transposed
    W_dec_{i}.safetensors   W_dec_{i} [F, X - i, D], to the layers from i on

Without thresholds the activation is relu. Source: circuit-tracer
(`transcoder/single_layer_transcoder.py`, `transcoder/cross_layer_transcoder.py`,
`utils/caching.py`).
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, CoderInfo
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.interop import hooks
from gemma_scope_jax.coders.interop.hooks import read_tensors, text_of
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder, block_index
from gemma_scope_jax.coders.release.config import untrained_positions
from gemma_scope_jax.coders.release.parameters import check_values, errors_name
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import normalise_model_name
from gemma_scope_jax.storage.atomic import write_folder
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.safetensors_files import StreamedTensor, write_safetensors
from gemma_scope_jax.storage.strict_yaml import read_yaml

CONFIG = "config.yaml"
CONSULTED = ("model_kind", "model_name", "feature_input_hook", "feature_output_hook", "scan")
CONSULTED += ("transcoders", "activation", "k")
HARMLESS = {  # key -> why it changes nothing
    **dict.fromkeys(("repo_id", "revision", "subfolder"), "where the folder is published"),
    **dict.fromkeys(("name", "description", "license", "tags", "library_name"), "for people"),
    **dict.fromkeys(("lazy_encoder", "lazy_decoder"), "when weights are read"),
    "dtype": "the weights have theirs",
    "device": "where it ran",
}
KINDS = ("transcoder_set", "cross_layer_transcoder")
THRESHOLD = "activation_function.threshold"
Files = dict[str, Callable[[], dict[str, Any]]]  # name -> what makes the file's tensors


def is_circuit_tracer_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder with a `config.yaml`."""
    return os.path.isfile(os.path.join(path, CONFIG))


def loaders(folder: Path, path: str) -> dict[str, Callable[[], Coder]]:
    """The loaders of a folder that is known as `path`: {path: the CLT}, or for a set
    {path/layer_3: the transcoder of layer 3}.

    They raise `InputError` for damaged or missing files, activations other than relu and JumpReLU,
    hooks that are not sites, and configs that only point at files on the hub.
    """
    config = read_yaml(folder / CONFIG)
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
            raise hooks.unknown_key(other[0], config[other[0]], CONSULTED)
        model_name = normalise_model_name(text_of(config, "model_name"))
        where = dict(
            reads=hooks.site_of_hook(text_of(config, "feature_input_hook") or "hook_resid_mid"),
            writes=hooks.site_of_hook(text_of(config, "feature_output_hook") or "hook_mlp_out"),
            first=untrained_positions(model_name),
        )
        files = _layer_files(config, folder) if kind == "transcoder_set" else {}
        if kind != "transcoder_set" and config.get("transcoders") is not None:
            raise InputError(f"transcoders are the files of a transcoder_set, not of a {kind}")
    own = os.path.abspath(folder)
    about = CoderInfo(model_name, "clt", path=path, folder=own, config={"circuit_tracer": config})
    if kind == "cross_layer_transcoder":
        return {path: partial(_load_clt, folder, where, about)}
    found: dict[str, Callable[[], Coder]] = {}
    for layer, file in files.items():
        name = f"{path.rstrip('/')}/layer_{layer}"
        own = os.path.join(about.folder, f"layer_{layer}")
        info = dataclasses.replace(about, type="transcoder", path=name, folder=own)
        found[name] = partial(_load_layer, file, {**where, "layer": layer}, info)
    return found


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
            raise InputError(f"transcoders are on the hub: load each by its address, as {address}")
        for name in listed:
            if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name:
                raise InputError(f"transcoders: {name!r} is outside the config's folder")
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
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].T
        arrays = _arrays(tensors, tensors["W_dec"], tensors.get(THRESHOLD))
        info = dataclasses.replace(info, width=tensors["b_enc"].shape[0])
        coder = SparseCoder(**arrays, info=info, **where)
        coder.check_shapes()
    return coder


def _arrays(
    tensors: dict[str, np.ndarray], w_dec: np.ndarray | None, threshold: np.ndarray | None
) -> dict[str, jax.Array]:
    """A coder's arrays. Threshold 0 is relu; below 0, circuit-tracer lets negative z through."""
    if threshold is None:
        threshold = np.zeros_like(tensors["b_enc"])
    if (threshold < 0).any():
        raise InputError("a negative threshold is not supported")
    arrays = {"w_enc": tensors["W_enc"].swapaxes(-1, -2), "threshold": threshold, "w_dec": w_dec}
    arrays |= {"b_enc": tensors["b_enc"], "b_dec": tensors["b_dec"]}
    if "W_skip" in tensors:
        arrays["w_skip"] = tensors["W_skip"]
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _load_clt(folder: Path, where: dict[str, Any], info: CoderInfo) -> MultiLayerCoder:
    layers = 0
    while (folder / f"W_enc_{layers}.safetensors").is_file():
        layers += 1
    if layers == 0:
        raise InputError(f"{folder}: no W_enc_0.safetensors beside {CONFIG}")
    wanted = {f"W_{end}_{i}.safetensors" for i in range(layers) for end in ("enc", "dec")}
    if more := _coder_files(folder) - wanted:
        raise InputError(f"{folder}: has {min(more)}, but the encoders are 0 to {layers - 1}")
    parts: dict[str, list[np.ndarray]] = {}
    w_dec: np.ndarray | None = None
    for i in range(layers):
        ranks = {f"W_enc_{i}": 2, f"b_enc_{i}": 1, f"b_dec_{i}": 1}
        optional = {f"threshold_{i}": 1, f"W_skip_{i}": 2}
        encoder = read_tensors(folder / f"W_enc_{i}.safetensors", ranks, optional)
        for name, tensor in encoder.items():
            parts.setdefault(name.removesuffix(f"_{i}"), []).append(tensor)
        file = folder / f"W_dec_{i}.safetensors"
        block = read_tensors(file, {f"W_dec_{i}": 3})[f"W_dec_{i}"]
        F, D = parts["W_enc"][0].shape
        if list(block.shape) != (want := [F, layers - i, D]):
            raise InputError(f"{file}: W_dec_{i} has shape {list(block.shape)}, expected {want}")
        if w_dec is None:  # filled in place: the decoder is nearly all of a CLT's memory
            w_dec = np.empty((layers * (layers + 1) // 2, F, D), block.dtype)
        start = block_index(i, i, layers)
        w_dec[start : start + layers - i] = block.transpose(1, 0, 2)
    with errors_name(folder):
        stacked = {}
        for name, tensors in parts.items():
            if len(tensors) != layers:
                raise InputError(f"{len(tensors)} of {layers} layers have {name}")
            if len({tensor.shape for tensor in tensors}) > 1:
                raise InputError(f"the layers' {name} have different shapes")
            stacked[name] = np.stack(tensors)
        arrays = _arrays(stacked, w_dec, stacked.get("threshold"))
        info = dataclasses.replace(info, width=stacked["b_enc"].size)
        coder = MultiLayerCoder(**arrays, layers=tuple(range(layers)), info=info, **where)
        coder.check_shapes()
    return coder


def save_circuit_tracer(coders: Coder | Iterable[Coder], folder: str | os.PathLike) -> None:
    """Write transcoders of the layers 0, 1, ... or one CLT so that circuit-tracer can load them.

    bfloat16 weights stay, all others become float32. The files appear together or not at all.
    circuit-tracer 0.5.0 ignores a CLT's skip; the version in its repository reads it.
    Raises `InputError` for a set with gaps, with mixed sites, widths or skips, for a crosscoder,
    and for a CLT whose decoder was left on disk.
    """
    import yaml

    several = CoderSet(coders)
    first = several[0]
    clt = len(several) == 1 and first.multi_layer
    files = _clt_files(first) if clt else _set_files(several)
    config = {"model_kind": KINDS[1 if clt else 0], "model_name": first.info.model_name}
    config["feature_input_hook"] = hooks.hook_of_site(first.reads)
    config["feature_output_hook"] = hooks.hook_of_site(first.writes)
    if scan := hooks.config_from(first.info, "circuit_tracer").get("scan"):
        config["scan"] = scan
    folder = expanded(folder)
    if others := _coder_files(folder) - set(files):
        raise InputError(f"{folder}: holds {min(others)} of another coder; choose a new folder")
    text = yaml.safe_dump(config, sort_keys=False).encode()
    writers: dict[str, Callable[[BinaryIO], Any]]
    writers = {name: partial(_write_tensors, tensors) for name, tensors in files.items()}
    write_folder(folder, {**writers, CONFIG: lambda file: file.write(text)})


def _write_tensors(tensors: Callable[[], dict[str, Any]], file: BinaryIO) -> None:
    """Tensors are made when their file's turn comes: two copies of a CLT need not fit in memory."""
    streamed = {}
    for name, weight in tensors().items():
        array = np.asarray(weight)
        if array.dtype.name != "bfloat16":
            array = array.astype(np.float32, copy=False)
        streamed[name] = StreamedTensor.whole(array)
    write_safetensors(file, streamed)


def _coder_files(folder: Path) -> set[str]:
    globs = ("layer_*.safetensors", "W_enc_*.safetensors", "W_dec_*.safetensors")
    return {path.name for glob in globs for path in folder.glob(glob)}


def _check_writable(coder: Coder) -> None:
    coder.check_shapes()
    check_values(coder)
    if coder.k is not None:
        raise InputError("circuit-tracer has no TopK coders: convert it with as_jump_relu")


def _set_files(several: CoderSet) -> Files:
    """The files of a transcoder set."""
    if any(coder.multi_layer for coder in several):
        raise InputError("circuit-tracer holds one SparseCoder a layer, or one CLT")
    coders = sorted(several, key=lambda coder: coder.layers)
    layers = [coder.layers[0] for coder in coders]
    if layers != list(range(len(coders))):
        got = ", ".join(map(str, layers))
        raise InputError(f"circuit-tracer needs every layer from 0 on, got {got}")
    for layer, coder in enumerate(coders):
        _check_writable(coder)
        for name in ("reads", "writes", "width", "kind"):
            if (here := getattr(coder, name)) != (first := getattr(coders[0], name)):
                where = f"{here} in layer {layer}, {first} in layer 0"
                raise InputError(f"circuit-tracer needs all layers alike: {name} is {where}")
    return {f"layer_{i}.safetensors": partial(_layer_tensors, c) for i, c in enumerate(coders)}


def _layer_tensors(coder: Coder) -> dict[str, Any]:
    tensors = {"W_enc": coder.w_enc.T, "b_enc": coder.b_enc, THRESHOLD: coder.threshold}
    tensors |= {"W_dec": coder.w_dec, "b_dec": coder.b_dec}
    return tensors if coder.w_skip is None else {**tensors, "W_skip": coder.w_skip.T}


def _clt_files(clt: Coder) -> Files:
    """The files of a cross-layer transcoder."""
    X = len(clt.layers)
    if clt.kind != "clt" or clt.layers != tuple(range(X)):
        raise InputError("circuit-tracer holds CLTs of every layer from 0 on, not a crosscoder")
    if clt.w_dec is None:
        raise InputError("the decoder of this CLT was left on disk: load_decoder(coder) first")
    _check_writable(clt)

    def encoder(i: int) -> dict[str, Any]:
        tensors = {"W_enc": clt.w_enc[i].T, "b_enc": clt.b_enc[i], "b_dec": clt.b_dec[i]}
        tensors["threshold"] = clt.threshold[i]
        if clt.w_skip is not None:
            tensors["W_skip"] = clt.w_skip[i]
        return {f"{name}_{i}": tensor for name, tensor in tensors.items()}

    def decoder(i: int) -> dict[str, Any]:
        start = block_index(i, i, X)
        return {f"W_dec_{i}": np.asarray(clt.w_dec[start : start + X - i]).transpose(1, 0, 2)}

    files = {f"W_enc_{i}.safetensors": partial(encoder, i) for i in range(X)}
    return files | {f"W_dec_{i}.safetensors": partial(decoder, i) for i in range(X)}
