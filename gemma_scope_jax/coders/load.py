"""Coders from wherever they are: the hub's addresses, folders of three libraries, this package.

    load_coder("gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium")
    load_coders("gemma-scope-2-270m-pt/transcoder_all/*_16k_l0_small")

A folder holds one coder, in the published layout or SAELens', or a set of circuit-tracer's: a
transcoder for each layer, of which `FOLDER/layer_3` is one.
"""

import fnmatch
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.interop import circuit_tracer, saelens
from gemma_scope_jax.coders.release import catalog, hub
from gemma_scope_jax.coders.release.files import describe, files_of, parameter_files, read_folder
from gemma_scope_jax.coders.release.parameters import (
    DTYPES,
    check_values,
    feature_index,
    gather,
    read_header,
    read_triangle,
)
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.paths import folder_path, is_remote, local_copy, named_paths
from gemma_scope_jax.storage.safetensors_files import open_safetensors

PACKAGED = Path(__file__).parent.parent / "packaged"
Source = str | os.PathLike


def load_coder(
    source: Source, *, dtype: Any = None, decoder: bool | None = None, revision: str | None = None
) -> Coder:
    """The coder in a folder, at an address of the release, or packaged with this library.

    source: a folder in the published layout, or of SAELens or circuit-tracer; an address as
        "gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium", whose weights and config
        are fetched from the hub into its cache; or the name of a packaged coder. A glob may stand
        for one of these. Of a transcoder set, `FOLDER/layer_3`.
    dtype: of the weights in memory; as stored by default. The arithmetic is float32 either way.
    decoder: False leaves the decoder of a coder of several layers on disk (see `load_decoder`).
        By default a CLT's stays there and a crosscoder's is loaded.
    revision: of the hub repository.

    Raises `InputError` for what holds several coders: `load_coders` takes those.
    """
    found = _loaders(source, _float_dtype(dtype), decoder, revision)
    if len(found) > 1:
        raise InputError(
            f"{source}: a set of {len(found)} coders: name one of them, as {next(iter(found))} "
            "(in Python, load_coders takes them all)"
        )
    (load,) = found.values()
    return load()


def load_coders(
    what: Source | Coder | Iterable[Source | Coder],
    *,
    dtype: Any = None,
    decoder: bool | None = None,
    revision: str | None = None,
) -> CoderSet:
    """All coders of a glob, a transcoder set's folder, a CLT, or a list of such things, in order.

    what: what `load_coder` takes; a glob over addresses, packaged coders or folders, of which the
        first kind with a match counts; a folder of circuit-tracer's with a transcoder a layer;
        coders that are loaded already; or any of these in a list.
    dtype, decoder, revision: as `load_coder` takes them, for those that are not loaded yet;
        `decoder=True` brings in the decoders of the others, too.
    """
    dtype = _float_dtype(dtype)
    found: list[Coder] = []
    for one in [what] if isinstance(what, str | os.PathLike | Coder) else what:
        if isinstance(one, Coder):
            found.append(load_decoder(one) if decoder else one)
        else:
            found += [load() for load in _loaders(one, dtype, decoder, revision).values()]
    return CoderSet(found)


def load_decoder(source: Coder | Source, **options: Any) -> Coder:
    """The coder with its decoder in memory: of several layers the triangle only, file by file.

    source: a coder, returned as it is unless its decoder was left on disk; or what `load_coder`
    takes (with its options).
    """
    if not isinstance(source, Coder):
        return load_coder(source, decoder=True, **options)
    if source.w_dec is not None:
        return source
    w_dec = read_triangle(files_of(source), source.width, source.d_out, source.w_enc.dtype)
    return source.replace(w_dec=jax.device_put(w_dec))


def decoder_rows(
    source: Coder | Source,
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
    if isinstance(source, Coder):
        files, multi_layer = files_of(source), source.multi_layer
    else:
        files, config = describe(*_locate(source, revision))
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


def _loaders(
    source: Source, dtype: Any, decoder: bool | None, revision: str | None
) -> dict[str, Callable[[], Coder]]:
    """What loads each of the coders that a source stands for, by what `load_coder` calls it."""
    found: dict[str, Callable[[], Coder]] = {}
    for name in matching(source) if isinstance(source, str) else [source]:
        if (member := _set_member(name)) is None:
            found |= _in_folder(*_locate(name, revision), dtype, decoder)
            continue
        folder, path = _locate(member[0], revision)
        every = circuit_tracer.loaders(folder, path)
        if (one := f"{path}/{member[1]}") not in every:
            names = [os.path.basename(other) for other in every]
            raise InputError(f"{path}: no {member[1]} in it, but {', '.join(names)}")
        found[one] = _casting(every[one], dtype, one)
    return found


def _set_member(source: Source) -> tuple[str, str] | None:
    """(folder, "layer_3") of a transcoder set's `FOLDER/layer_3`, None for anything else."""
    match = re.fullmatch(r"(.+)/(layer_\d{1,4})/?", os.fsdecode(source), re.DOTALL)
    if match is None or "\0" in match[0]:
        return None
    if is_remote(match[1]):
        there = (folder_path(match[1]) / circuit_tracer.CONFIG).is_file()
    else:
        own = Path(match[0]).expanduser()
        there = circuit_tracer.is_circuit_tracer_folder(own.parent)
        if own.is_dir() and (parameter_files(own) or saelens.is_saelens_folder(own)):
            return None
    return (match[1], match[2]) if there else None


def _in_folder(
    folder: Path, path: str, dtype: Any, decoder: bool | None
) -> dict[str, Callable[[], Coder]]:
    """What loads each coder of a local folder that is known as `path`."""
    if not parameter_files(folder) and saelens.is_saelens_folder(folder):
        loaders = {path: functools.partial(saelens.load_saelens, folder, path)}
    elif not parameter_files(folder) and circuit_tracer.is_circuit_tracer_folder(folder):
        loaders = circuit_tracer.loaders(folder, path)
    else:
        return {path: functools.partial(read_folder, folder, path, dtype, decoder)}
    return {name: _casting(load, dtype, name) for name, load in loaders.items()}


def _casting(load: Callable[[], Coder], dtype: Any, path: str) -> Callable[[], Coder]:
    """The loader of a foreign folder's coder, in another dtype, which may not hold its values."""
    if dtype is None:
        return load

    def cast() -> Coder:
        coder = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), load())
        try:
            check_values(coder)
        except InputError as error:
            raise InputError(f"{path}: as {dtype}, {error}") from error
        return coder

    return cast


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
