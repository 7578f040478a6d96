"""The published folders of coders, read and written: single-layer, crosscoder and CLT alike.

A folder holds config.json and params.safetensors, or one params_layer_{i}.safetensors a source
layer, with `w_enc [D, F]`, `b_enc [F]`, `threshold [F]`, `w_dec [F, D_out]` (of several layers
`[F, X, D]`, the output layers in absolute order), `b_dec [D_out]` and, for affine coders,
`affine_skip_connection [D, D_out]`, applied as x @ A.

Files are streamed: loading needs little more memory than the tensors it returns, and decoder rows
can be read without loading anything. Whatever cannot be used raises `InputError`.
"""

import dataclasses
import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, check_values
from gemma_scope_jax.coders.multi_layer_coder import (
    MultiLayerCoder,
    block_index,
    check_multi_layer_coder,
)
from gemma_scope_jax.coders.release import catalog, hub
from gemma_scope_jax.coders.release.config import FolderConfig, config_of, folder_config, read_json
from gemma_scope_jax.coders.release.parameters import (
    DTYPES,
    TENSORS,
    Header,
    feature_index,
    gather,
    read_header,
    read_multi_layer,
    read_single_layer,
    read_triangle,
    row_chunks,
)
from gemma_scope_jax.coders.sparse_coder import SparseCoder, check_coder
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.atomic import write_folder, write_json
from gemma_scope_jax.storage.disk import is_remote
from gemma_scope_jax.storage.globs import named_paths
from gemma_scope_jax.storage.paths import folder_path, local_copy
from gemma_scope_jax.storage.safetensors_files import (
    StreamedTensor,
    open_safetensors,
    write_safetensors,
)

PACKAGED = Path(__file__).parent.parent.parent / "packaged"


def load_coder(
    source: str | os.PathLike,
    *,
    dtype: Any = None,
    decoder: bool | None = None,
    revision: str | None = None,
) -> Coder:
    """The coder in a folder, at an address of the release, or packaged with this library.

    source: a folder in the published layout, or of SAELens or circuit-tracer; an address as
        "gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium", whose weights and config
        are fetched from the hub into its cache; or the name of a packaged coder.
    dtype: of the weights in memory; as stored by default. The arithmetic is float32 either way.
    decoder: False leaves the decoder of a coder of several layers on disk (see `load_decoder`).
        By default a CLT's stays there and a crosscoder's is loaded.
    revision: of the hub repository.
    """
    dtype = _float_dtype(dtype)
    folder, path = _locate(source, revision)
    if not parameter_files(folder) and (load := _foreign_loader(folder)):
        return load(folder) if dtype is None else _cast(load(folder), dtype, path)
    files, config = _describe(folder, path)
    if not config.multi_layer:
        if decoder is False:
            raise InputError(f"{path}: only a crosscoder's or CLT's decoder can be left on disk")
        return _coder(config, read_single_layer(files[0], dtype))
    if decoder is None:
        decoder = config.type == "crosscoder"
    return _coder(config, read_multi_layer(files, dtype, decoder))


def load_decoder(source: MultiLayerCoder | str | os.PathLike, **options: Any) -> MultiLayerCoder:
    """The coder with its decoder in memory: reads the triangle only, file by file.

    source: a `MultiLayerCoder` whose decoder was left on disk, or what `load_coder` takes (with its
    options).
    """
    if not isinstance(source, MultiLayerCoder):
        coder = load_coder(source, decoder=True, **options)
        if not isinstance(coder, MultiLayerCoder):
            raise InputError(f"{source}: a coder of one layer, which load_coder loads whole")
        return coder
    if source.w_dec is not None:
        return source
    w_dec = read_triangle(_files_of(source), source.width, source.d_out, source.w_enc.dtype)
    return dataclasses.replace(source, w_dec=jax.device_put(w_dec))


def decoder_rows(
    source: MultiLayerCoder | str | os.PathLike,
    features: Sequence[int] | np.ndarray,
    *,
    layer: int | None = None,
    to: int | None = None,
    revision: str | None = None,
) -> np.ndarray:
    """Decoder rows straight from disk, as stored: [n, D_out], in the order of `features`.

    Of a coder of several layers, the rows of features of source layer `layer`: [n, X, D], zeros for
    the outputs before it; or [n, D], what they write to output layer `to` >= `layer`. Both count
    the coder's own layers, 0 to X - 1. Only the pages that hold the rows are touched.
    """
    if isinstance(source, MultiLayerCoder):
        files, multi_layer = _files_of(source), True
    else:
        files, config = _describe(*_locate(source, revision))
        multi_layer = config.multi_layer
    X = len(files)
    if not multi_layer and (layer, to) != (None, None):
        raise InputError("layer and to choose among several layers; this coder has one")
    if multi_layer and (layer is None or not 0 <= layer < X):
        raise InputError(f"layer {layer}: which of the source layers 0 to {X - 1}?")
    layer = layer or 0
    if to is not None and not layer <= to < X:
        raise InputError(f"source layer {layer} writes to {layer} to {X - 1}, not to {to}")
    path = files[layer]
    with open_safetensors(path) as file:
        shape = read_header(file, path)["w_dec"].shape
        index = feature_index(features, shape[0])
        stored = file.get_slice("w_dec")
        if not multi_layer:
            return gather(lambda a, b: stored[a:b], index, (shape[1],))
        if to is not None:
            return gather(lambda a, b: stored[a:b, to : to + 1], index, (1, shape[2]))[:, 0]
        rows = gather(lambda a, b: stored[a:b, layer:], index, (X - layer, shape[2]))
    return np.concatenate([np.zeros((len(rows), layer, shape[2]), rows.dtype), rows], axis=1)


def save_coder(
    coder: Coder, folder: str | os.PathLike, *, config_extra: Mapping[str, Any] | None = None
) -> None:
    """Write a coder in the published layout: config.json and the parameters, in their own dtype.

    config_extra: keys of config.json that go over those the coder came with. The decoder of a
    `MultiLayerCoder` gets its full output axis; one left on disk is copied from there. The files
    take their names when all are complete. Raises `InputError` for what could not be loaded again,
    weights that are NaN or infinite among it.
    """
    folder = folder_path(folder)
    _check_shapes(coder)
    for field in TENSORS:
        array = getattr(coder, field)
        if array is not None and str(array.dtype) not in DTYPES.values():
            raise InputError(f"{field} is {array.dtype}, not {', '.join(DTYPES.values())}")
    config = config_of(coder, config_extra or {})
    names, sources = ["params.safetensors"], [None]
    if isinstance(coder, MultiLayerCoder):
        names = [f"params_layer_{i}.safetensors" for i in range(len(coder.layers))]
        sources = _files_of(coder) if coder.w_dec is None else [None] * len(names)
    _check_against_config(coder, folder_config(config, os.fspath(folder), len(names)))
    if folder.is_dir() and (others := set(parameter_files(folder)) - set(names)):
        raise InputError(f"{folder}: holds {min(others)} of another coder; choose a new folder")
    on_host = jax.tree.map(np.asarray, coder)
    check_values(on_host)
    writers: dict[str, Callable[[BinaryIO], None]] = {
        name: functools.partial(_write_parameters, on_host, i, source)
        for i, (name, source) in enumerate(zip(names, sources))
    }
    writers["config.json"] = lambda file: write_json(file, config)
    try:
        write_folder(folder, writers)
    except TypeError as error:
        raise InputError(f"config_extra is not JSON: {error}") from error


def parameter_files(folder: Any) -> list[str]:
    """The names of the published parameter files that a folder, given as a path, holds."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(n for n in names if re.fullmatch(r"params(_layer_\d+)?\.safetensors", n))


# Finding a folder and what it holds


def matching(pattern: str) -> list[str]:
    """What a glob stands for, as `load_coder` takes it: folders, packaged coders, addresses.

    Anything without `*`, `?` or `[`, and an existing folder, stands for itself. Raises `InputError`
    if a glob matches nothing.
    """
    if not set("*?[") & set(pattern):
        return [pattern]
    folders = [path for path in named_paths(pattern) if os.path.isdir(path)]
    packaged = [n for n in _packaged() if fnmatch.fnmatchcase(n, pattern)]
    found = folders or packaged or [str(a) for a in catalog.addresses(pattern=pattern)]
    if not found:
        raise InputError(f"{pattern}: matches no folder, packaged coder or address")
    return sorted(found, key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _packaged() -> list[str]:
    return sorted(p.name for p in PACKAGED.iterdir() if p.is_dir()) if PACKAGED.is_dir() else []


def _locate(source: str | os.PathLike, revision: str | None) -> tuple[Path, str]:
    """The local folder of a source, and the address or path that says what it holds."""
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"expected a folder or an address, got a {type(source).__name__}")
    text = os.fsdecode(source)
    if not text or "\0" in text:
        raise InputError(f"{text!r} is neither a folder nor an address")
    if is_remote(text):
        return local_copy(text), text
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder, os.path.abspath(folder)
    if folder.exists():
        raise InputError(f"{text}: a file; pass the folder that holds it, {folder.parent}")
    packaged = _packaged()
    if text in packaged:
        return PACKAGED / text, text
    if isinstance(source, os.PathLike) or text[0] in "/.~":
        raise InputError(f"{text}: no such folder")
    if "/" not in text.strip("/"):
        raise InputError(
            f"{text!r} is no folder, address or packaged coder{nearest(text, packaged)}"
        )
    address = catalog.parse_address(text)
    return hub.fetch_folder(address, revision), str(address)


def _foreign_loader(folder: Path) -> Callable[[Path], Any] | None:
    """The reader of another library's folder, None if it is nobody's."""
    from gemma_scope_jax.coders.interop import circuit_tracer, saelens

    if saelens.is_saelens_folder(folder):
        return saelens.load_saelens
    if circuit_tracer.is_circuit_tracer_folder(folder):
        return circuit_tracer.load_circuit_tracer
    return None


def _cast(loaded: Any, dtype: Any, path: str) -> Any:
    """A foreign folder's coder, or coders by layer, in another dtype, which may not hold them."""
    cast = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), loaded)
    for coder in cast.values() if isinstance(cast, dict) else [cast]:
        try:
            check_values(coder)
        except InputError as error:
            raise InputError(f"{path}: as {dtype}, {error}") from error
    return cast


def _describe(folder: Path, path: str) -> tuple[list[Path], FolderConfig]:
    """The parameter files in order and what they are, the headers checked against the config."""
    names, config_file = parameter_files(folder), folder / "config.json"
    if not names:
        raise InputError(
            f"{folder}: holds neither params.safetensors nor params_layer_0.safetensors"
        )
    given = read_json(config_file) if config_file.exists() else {}
    try:
        config = folder_config(given, path, len(names))
        foreign = "params.safetensors" in names if config.multi_layer else len(names) > 1
        if foreign or (names[0] != "params.safetensors" and not config.multi_layer):
            raise InputError(f"{', '.join(names[:2])} do not belong to a {config.type}")
    except InputError as error:
        raise InputError(f"{config_file}: {error}") from error
    files = [folder / name for name in names]
    if config.multi_layer:
        files = [folder / f"params_layer_{i}.safetensors" for i in range(len(config.layers))]
        if missing := [f.name for f in files if f.name not in names]:
            raise InputError(f"{folder}: {missing[0]} is missing, of {len(files)}; download it")
    headers = []
    for name in files:
        with open_safetensors(name) as file:
            headers.append(read_header(file, name))
        if headers[-1] != headers[0]:
            raise InputError(f"{name}: shapes or dtypes differ from those of {files[0].name}")
    if ("threshold" in headers[0]) != (config.k is None):
        what = "there is no tensor" if config.k is None else "there is a tensor"
        kind = "jump_relu" if config.k is None else "topk"
        raise InputError(f"{files[0]}: {what} 'threshold', but the architecture is {kind}")
    try:
        _check_against_config(_abstract(config, headers[0]), config)
    except InputError as error:
        raise InputError(f"{files[0]}: {error}") from error
    if more := sorted(set(names) - {file.name for file in files}):
        raise InputError(f"{folder}: {more[0]} is there, but the layers are {config.layers}")
    info = dataclasses.replace(config.info, folder=os.path.abspath(folder))
    return files, dataclasses.replace(config, info=info)


def _files_of(coder: MultiLayerCoder) -> list[Path]:
    """The files a coder was loaded from, checked to be still of its shape."""
    if not coder.info.folder:
        raise InputError(f"this {coder.kind} was not loaded from a folder: its decoder is nowhere")
    files, _ = _describe(Path(coder.info.folder), coder.info.path)
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
    if config.multi_layer:
        coder = MultiLayerCoder(**arrays, layers=config.layers)
    else:
        coder = SparseCoder(**arrays, layer=config.layers[0])
    return dataclasses.replace(
        coder,
        reads=config.reads,
        writes=config.writes,
        first=config.first,
        k=config.k,
        info=config.info,
    )


def _abstract(config: FolderConfig, header: Header) -> Coder:
    """The coder of a folder whose files have this header, without values."""
    if not config.multi_layer:
        return _coder(config, header)
    X, w_dec = len(config.layers), header["w_dec"]
    stacked = {k: jax.ShapeDtypeStruct((X, *v.shape), v.dtype) for k, v in header.items()}
    coder = _coder(config, {**stacked, "w_dec": None})
    _check_shapes(coder)
    if w_dec.shape != (expected := (coder.width, X, coder.d_in)):
        raise InputError(f"w_dec has shape {list(w_dec.shape)}, expected {list(expected)}")
    return coder


def _check_shapes(coder: Coder) -> None:
    if isinstance(coder, MultiLayerCoder):
        check_multi_layer_coder(coder)
    else:
        check_coder(coder)


def _check_against_config(coder: Coder, config: FolderConfig) -> None:
    """Raise `InputError` where tensors and config.json contradict each other."""
    _check_shapes(coder)
    layers = coder.layers if isinstance(coder, MultiLayerCoder) else (coder.layer,)
    if layers != config.layers:
        raise InputError(f"the coder has layers {layers}, the config {config.layers}")
    width = coder.width * len(layers)
    if config.info.width not in (None, width):
        raise InputError(f"{width} features, but the config's width is {config.info.width}")
    if config.affine is not None and config.affine != (coder.w_skip is not None):
        there = "is there" if coder.w_skip is not None else "is missing"
        raise InputError(
            f"affine_skip_connection {there}, but affine_connection is {config.affine}"
        )
    if model := config.architecture:
        for site, size in ((coder.reads, coder.d_in), (coder.writes, coder.d_out)):
            special = {"z": model.heads * model.head_dim, "mlp_act": model.d_mlp}
            if size != (expected := special.get(site, model.d_model)):
                raise InputError(
                    f"{site} of {config.info.model_name} has {expected} values, not {size}"
                )


def _float_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(DTYPES.values())}")
    return dtype


# Writing


def _write_parameters(coder: Coder, i: int, source: Path | None, file: BinaryIO) -> None:
    """Write the parameter file of source layer `i`; its decoder is in memory or in `source`."""
    arrays = {field: getattr(coder, field) for field in TENSORS}
    if coder.k is not None:
        del arrays["threshold"]
    if isinstance(coder, MultiLayerCoder):
        w_dec = arrays.pop("w_dec")
        arrays = {field: None if array is None else array[i] for field, array in arrays.items()}
        dtype = str((coder.w_enc if w_dec is None else w_dec).dtype)
        shape = (coder.width, len(coder.layers), coder.d_out)
        decoder = StreamedTensor(dtype, shape, _decoder_chunks(w_dec, i, source, shape, dtype))
        tensors = {"w_dec": decoder}
    else:
        tensors = {}
    for field, array in arrays.items():
        if array is not None:
            tensors[TENSORS[field]] = StreamedTensor.whole(array)
    write_safetensors(file, tensors)


def _decoder_chunks(
    w_dec: np.ndarray | None, i: int, source: Path | None, shape: tuple[int, ...], dtype: str
) -> Iterator[np.ndarray]:
    """The decoder of source layer `i` [F, X, D] in chunks of rows, zeros before output `i`."""
    X = shape[1]
    first = block_index(i, i, X)
    for rows in row_chunks(shape, 4):
        full = np.zeros((rows.stop - rows.start, *shape[1:]), jnp.dtype(dtype))
        if w_dec is not None:
            full[:, i:] = w_dec[first : first + X - i, rows].transpose(1, 0, 2)
        else:
            assert source is not None
            with open_safetensors(source) as file:
                full[:, i:] = file.get_slice("w_dec")[rows, i:]
        yield full
