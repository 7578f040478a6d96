"""The published folders of coders, read and written: single-layer, crosscoder and CLT alike.

A folder holds config.json and params.safetensors, or one params_layer_{i}.safetensors per source
layer, with `w_enc [D, F]`, `b_enc [F]`, `threshold [F]`, `w_dec [F, D_out]` (for several layers
`[F, X, D]`, the output layers in absolute order), `b_dec [D_out]` and, for affine coders,
`affine_skip_connection [D, D_out]`, applied as x @ A.

Files are streamed: reading needs little more memory than the tensors it returns.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma_scope_jax.coders.coder import Coder, check_fits
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder, block_index
from gemma_scope_jax.coders.release import parameters
from gemma_scope_jax.coders.release.config import (
    FolderConfig,
    architecture,
    config_of,
    folder_config,
)
from gemma_scope_jax.coders.release.parameters import DTYPES, TENSORS, Dtype, Header, read_header
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import write_folder, write_json
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.storage.safetensors_files import (
    StreamedTensor,
    open_safetensors,
    write_safetensors,
)
from gemma_scope_jax.storage.strict_json import read_object

PLACES = ("reads", "writes", "first", "k", "info")  # fields of a coder that come from its config

# --- Reading -------------------------------------------------------------------------------------


def read_folder(folder: Path, path: str, dtype: Dtype, decoder: bool | None) -> Coder:
    """The coder of a local folder that is known as `path`; see `load_coder` for the rest."""
    files, config = describe(folder, path)
    if not config.multi_layer:
        if decoder is False:
            raise InputError(f"{path}: only a crosscoder's or CLT's decoder can be left on disk")
        return _coder(config, parameters.read_single_layer(files[0], dtype))
    if decoder is None:
        decoder = config.type == "crosscoder"
    return _coder(config, parameters.read_multi_layer(files, dtype, decoder))


def parameter_files(folder: Path | epath.Path) -> list[str]:
    """The names of the published parameter files in a folder."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(n for n in names if re.fullmatch(r"params(_layer_\d+)?\.safetensors", n))


def describe(folder: Path, path: str) -> tuple[list[Path], FolderConfig]:
    """The parameter files in order and their config, checked against the files' headers."""
    names, config_file = parameter_files(folder), folder / "config.json"
    if not names:
        raise InputError(f"{folder}: has neither params.safetensors nor params_layer_0.safetensors")
    given = read_object(config_file) if config_file.exists() else {}
    with parameters.errors_name(config_file):
        config = folder_config(given, path, len(names))
        foreign = "params.safetensors" in names if config.multi_layer else len(names) > 1
        if foreign or (names[0] != "params.safetensors" and not config.multi_layer):
            raise InputError(f"{', '.join(names[:2])} do not belong to a {config.type}")
    files = [folder / name for name in names]
    if config.multi_layer:
        files = [folder / f"params_layer_{i}.safetensors" for i in range(len(config.layers))]
        if missing := [f.name for f in files if f.name not in names]:
            raise InputError(f"{folder}: {missing[0]} of {len(files)} is missing; download it")
    headers = []
    for name in files:
        with open_safetensors(name) as file:
            headers.append(read_header(file, name))
        if headers[-1] != headers[0]:
            raise InputError(f"{name}: shapes or dtypes differ from those of {files[0].name}")
    if ("threshold" in headers[0]) != (config.k is None):
        what, kind = ("no", "jump_relu") if config.k is None else ("a", "topk")
        raise InputError(f"{files[0]}: has {what} tensor 'threshold', but architecture {kind}")
    with parameters.errors_name(files[0]):
        _check_against_config(_abstract(config, headers[0]), config)
    if more := sorted(set(names) - {file.name for file in files}):
        raise InputError(f"{folder}: has {more[0]}, but the layers are {config.layers}")
    info = dataclasses.replace(config.info, folder=os.path.abspath(folder))
    return files, dataclasses.replace(config, info=info)


def files_of(coder: Coder) -> list[Path]:
    """The files a coder was loaded from, whose decoder must still have its shape."""
    if not coder.info.folder:
        raise InputError(f"this {coder.kind} was not loaded from a folder that has its decoder")
    files, _ = describe(Path(coder.info.folder), coder.info.path)
    with open_safetensors(files[0]) as file:
        shape = read_header(file, files[0])["w_dec"].shape
    if shape != (expected := (coder.width, len(coder.layers), coder.d_out)):
        raise InputError(f"{files[0]}: w_dec is {list(shape)}, the coder needs {list(expected)}")
    return files


def _coder(config: FolderConfig, arrays: Mapping[str, Any]) -> Coder:
    if config.k is not None:  # a TopK coder's file has no thresholds: they are 0
        bias = arrays["b_enc"]
        zeros = bias if isinstance(bias, jax.ShapeDtypeStruct) else jnp.zeros_like(bias)
        arrays = {**arrays, "threshold": zeros}
    places: dict[str, Any] = {name: getattr(config, name) for name in PLACES}
    if config.multi_layer:
        return MultiLayerCoder(**arrays, layers=config.layers, **places)
    return SparseCoder(**arrays, layer=config.layers[0], **places)


def _abstract(config: FolderConfig, header: Header) -> Coder:
    """The coder of files with this header, without values."""
    if not config.multi_layer:
        return _coder(config, header)
    X, w_dec = len(config.layers), header["w_dec"]
    stacked = {k: jax.ShapeDtypeStruct((X, *v.shape), v.dtype) for k, v in header.items()}
    coder = _coder(config, {**stacked, "w_dec": None})
    coder.check_shapes()
    if w_dec.shape != (expected := (coder.width, X, coder.d_in)):
        raise InputError(f"w_dec has shape {list(w_dec.shape)}, expected {list(expected)}")
    return coder


def _check_against_config(coder: Coder, config: FolderConfig) -> None:
    """Raise `InputError` if tensors and config.json contradict each other."""
    coder.check_shapes()
    if coder.layers != config.layers:
        raise InputError(f"the coder has layers {coder.layers}, the config {config.layers}")
    width = coder.width * len(coder.layers)
    if config.info.width not in (None, width):
        raise InputError(f"{width} features, but the config's width is {config.info.width}")
    if config.affine not in (None, coder.w_skip is not None):
        there = "is there" if coder.w_skip is not None else "is missing"
        raise InputError(f"affine_skip_connection {there}, affine_connection is {config.affine}")
    if model := architecture(config.info.model_name):
        check_fits(model, coder)


# --- Writing -------------------------------------------------------------------------------------


def save_coder(
    coder: Coder,
    folder: str | os.PathLike,
    *,
    config_extra: Mapping[str, Any] | None = None,
    int8: bool = False,
) -> None:
    """Write a coder in the published layout: config.json and the parameters, in their own dtype.

    config_extra: keys of config.json that override those the coder came with.
    int8: write the matrices of a coder of one layer in half the room of bfloat16, with scales for
        rows and columns (`release.parameters`). Only this library reads such files; loaded and
        saved again without `int8`, the coder is in the published layout.

    The decoder of a `MultiLayerCoder` gets its full output axis; one left on disk is copied from
    there. The files get their names when all are complete. Raises `InputError` for what could not
    be loaded again.
    """
    folder = folder_path(folder)
    coder.check_shapes()
    for field in TENSORS:
        array = getattr(coder, field)
        if array is not None and str(array.dtype) not in DTYPES.values():
            raise InputError(f"{field} is {array.dtype}, not {', '.join(DTYPES.values())}")
    if int8 and coder.multi_layer:
        raise InputError(f"int8 is for coders of one layer, not for a {coder.kind}")
    config = config_of(coder, config_extra or {})
    names = ["params.safetensors"]
    if coder.multi_layer:
        names = [f"params_layer_{i}.safetensors" for i in range(len(coder.layers))]
    sources = files_of(coder) if coder.multi_layer and coder.w_dec is None else [None] * len(names)
    _check_against_config(coder, folder_config(config, os.fspath(folder), len(names)))
    if folder.is_dir() and (others := set(parameter_files(folder)) - set(names)):
        raise InputError(f"{folder}: holds {min(others)} of another coder; choose a new folder")
    on_host = jax.tree.map(np.asarray, coder)
    parameters.check_values(on_host)
    writers: dict[str, Callable[[BinaryIO], None]] = {
        name: functools.partial(_write_parameters, on_host, i, source, int8)
        for i, (name, source) in enumerate(zip(names, sources))
    }
    writers["config.json"] = lambda file: write_json(file, config)
    try:
        write_folder(folder, writers)
    except TypeError as error:
        raise InputError(f"config_extra is not JSON: {error}") from error


def _write_parameters(
    coder: Coder, i: int, source: Path | None, int8: bool, file: BinaryIO
) -> None:
    """Write the parameter file of source layer `i`; its decoder is in memory or in `source`."""
    tensors = {}
    for field, name in TENSORS.items():
        array = getattr(coder, field)
        if field == "w_dec" and coder.multi_layer:
            tensors[name] = _decoder_tensor(coder, i, source)
        elif int8 and array is not None and field in parameters.MATRICES:
            for end, part in zip(("", *parameters.SCALES), parameters.as_int8(array)):
                tensors[name + end] = StreamedTensor.whole(part)
        elif array is not None and not (field == "threshold" and coder.k is not None):
            tensors[name] = StreamedTensor.whole(array[i] if coder.multi_layer else array)
    write_safetensors(file, tensors)


def _decoder_tensor(coder: Coder, i: int, source: Path | None) -> StreamedTensor:
    """The decoder of source layer `i` [F, X, D] in chunks of rows, zeros before output `i`."""
    X, first = len(coder.layers), block_index(i, i, len(coder.layers))
    shape = (coder.width, X, coder.d_out)
    dtype = (coder.w_enc if source else coder.w_dec).dtype

    def chunks() -> Iterator[np.ndarray]:
        for rows in parameters.row_chunks(shape, 4):
            full = np.zeros((rows.stop - rows.start, *shape[1:]), dtype)
            if source is None:
                full[:, i:] = coder.w_dec[first : first + X - i, rows].transpose(1, 0, 2)
            else:
                with open_safetensors(source) as file:
                    full[:, i:] = parameters.Stored(file, "w_dec")[rows, i:]
            yield full

    return StreamedTensor(str(dtype), shape, chunks())
