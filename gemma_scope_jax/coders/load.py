"""Coders from anywhere: addresses on the hub, folders of three libraries, coders of this package.

    load_coder("gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium")
    load_coders("gemma-scope-2-270m-pt/transcoder_all/*_16k_l0_small")

A folder holds one coder, in the published layout or SAELens', or a circuit-tracer set: a transcoder
per layer, each of which can be named, as in `FOLDER/layer_3`.
"""

import contextlib
import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.interop import circuit_tracer, saelens
from gemma_scope_jax.coders.release import catalog, hub, parameters
from gemma_scope_jax.coders.release.files import describe, files_of, parameter_files, read_folder
from gemma_scope_jax.coders.release.parameters import Dtype
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.paths import expanded, folder_path, is_remote, local_copy, named_paths
from gemma_scope_jax.storage.safetensors_files import open_safetensors

PACKAGED = Path(__file__).parent.parent / "packaged"
Source = str | os.PathLike
Sources = Source | Coder | Iterable[Source | Coder]
Loaders = dict[str, Callable[[], Coder]]  # by what `load_coder` calls each coder


def load_coder(
    source: Source, *, dtype: Dtype = None, decoder: bool | None = None, revision: str | None = None
) -> Coder:
    """The coder in a folder, at an address of the release, or packaged with this library.

    source: a folder in the layout of the release, of SAELens or of circuit-tracer (for one of a
        transcoder set, `FOLDER/layer_3`); an address, whose weights and config are downloaded into
        the hub's cache; the name of a packaged coder; or a glob that matches one of these.
    dtype: of the weights in memory; default: as stored. The arithmetic is float32 either way.
    decoder: False leaves the decoder of a coder of several layers on disk (see `load_decoder`).
        By default a CLT's stays there and a crosscoder's is loaded.
    revision: of the hub repository.

    Raises `InputError` if there are several coders: use `load_coders`.
    """
    found = _loaders(source, _float_dtype(dtype), decoder, revision)
    if len(found) > 1:
        one = next(iter(found))
        raise InputError(f"{source}: a set of {len(found)} coders: name one of them, as {one}")
    (load,) = found.values()
    return load()


def load_coders(
    what: Sources, *, dtype: Dtype = None, decoder: bool | None = None, revision: str | None = None
) -> CoderSet:
    """All coders of a glob, a transcoder set's folder, a CLT, or a list of such things, in order.

    what: what `load_coder` takes; a glob over folders, packaged coders or addresses (the first of
        these with a match wins); a circuit-tracer set; loaded coders; or a list of any of these.
    dtype, decoder, revision: as for `load_coder`. `decoder=True` also applies to loaded coders.
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
    """The coder with its decoder in memory; for several layers the triangle only, file by file.

    source: a coder, unchanged unless its decoder is on disk; or what `load_coder` takes.
    """
    if not isinstance(source, Coder):
        return load_coder(source, decoder=True, **options)
    if source.w_dec is not None:
        return source
    files, dtype = files_of(source), source.w_enc.dtype
    w_dec = parameters.read_triangle(files, source.width, source.d_out, dtype)
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

    For a coder of several layers, `layer` is the features' source layer: [n, X, D], zeros for the
    outputs before it; with `to` >= `layer`, only what they write to that layer: [n, D]. Both are
    the coder's own layers, 0 to X - 1. Only the pages that hold the rows are read.
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
        raise InputError(f"layer is {layer}: choose one of the source layers 0 to {X - 1}")
    layer = layer or 0
    if to is not None and not layer <= to < X:
        raise InputError(f"source layer {layer} writes to {layer} to {X - 1}, not to {to}")
    path = files[layer]
    with open_safetensors(path) as file:
        shape = parameters.read_header(file, path)["w_dec"].shape
        index = parameters.feature_index(features, shape[0])
        stored, gather = parameters.Stored(file, "w_dec"), parameters.gather
        if not multi_layer:
            return gather(lambda a, b: stored[a:b], index, (shape[1],))
        if to is not None:
            return gather(lambda a, b: stored[a:b, to : to + 1], index, (1, shape[2]))[:, 0]
        rows = gather(lambda a, b: stored[a:b, layer:], index, (X - layer, shape[2]))
    return np.pad(rows, ((0, 0), (layer, 0), (0, 0)))


def matching(pattern: str) -> list[str]:
    """The folders, packaged coders or addresses that a glob matches.

    Without `*`, `?` or `[` a pattern stands for itself. Raises `InputError` if nothing matches.
    """
    if not set("*?[") & set(pattern):
        return [pattern]
    folders = [path for path in named_paths(pattern) if os.path.isdir(path)]
    packaged = [n for n in _packaged() if fnmatch.fnmatchcase(n, pattern)]
    found = folders or packaged or [str(a) for a in catalog.addresses(pattern=pattern)]
    if not found:
        raise InputError(f"{pattern}: matches no folder, packaged coder or address")
    split = lambda name: re.split(r"(\d+)", name)  # layer 9 comes before layer 10
    number = lambda part: (int(part), "") if part.isdigit() else (-1, part)
    return sorted(found, key=lambda name: list(map(number, split(name))))


def _packaged() -> list[str]:
    return sorted(p.name for p in PACKAGED.iterdir() if p.is_dir()) if PACKAGED.is_dir() else []


def _locate(source: Source, revision: str | None) -> tuple[Path, str]:
    """The local folder of a source, and the address or path that names what it holds."""
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"expected a folder or an address, got a {type(source).__name__}")
    text = os.fsdecode(source)
    if not text or "\0" in text:
        raise InputError(f"{text!r} is neither a folder nor an address")
    if is_remote(text):
        return local_copy(text), text
    folder = expanded(text)
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
        hint = nearest(text, packaged)
        raise InputError(f"{text!r} is not a folder, address or packaged coder{hint}")
    address = catalog.parse_address(text)
    return hub.fetch_folder(address, revision), str(address)


def _loaders(source: Source, dtype: Dtype, decoder: bool | None, revision: str | None) -> Loaders:
    """A loader for each of the coders that a source stands for."""
    found: Loaders = {}
    for name in matching(source) if isinstance(source, str) else [source]:
        place, member = _set_member(name) or (name, "")
        folder, path = _locate(place, revision)
        own = not member and bool(parameter_files(folder))
        if not own and not member and saelens.is_saelens_folder(folder):
            loaders = {path: partial(saelens.load_saelens, folder, path)}
        elif member or (not own and circuit_tracer.is_circuit_tracer_folder(folder)):
            loaders = circuit_tracer.loaders(folder, path)
        else:
            found[path] = partial(read_folder, folder, path, dtype, decoder)
            continue
        if member and f"{path}/{member}" not in loaders:
            names = [os.path.basename(other) for other in loaders]
            raise InputError(f"{path}: no {member} in it, but {', '.join(names)}")
        wanted = [f"{path}/{member}"] if member else loaders
        found |= {one: partial(_cast, loaders[one], dtype, one) for one in wanted}
    return found


def _set_member(source: Source) -> tuple[str, str] | None:
    """(folder, "layer_3") of a transcoder set's `FOLDER/layer_3`, None for anything else."""
    text = os.fsdecode(source) if isinstance(source, str | os.PathLike) else ""
    match = re.fullmatch(r"(.+)/(layer_\d{1,4})/?", text, re.DOTALL)
    if match is None or "\0" in text:
        return None
    if is_remote(text):
        there = False
        with contextlib.suppress(Exception):  # `local_copy` will report what is wrong
            there = (folder_path(match[1]) / circuit_tracer.CONFIG).is_file()
    else:
        own = expanded(text)
        there = circuit_tracer.is_circuit_tracer_folder(own.parent)
        if own.is_dir() and (parameter_files(own) or saelens.is_saelens_folder(own)):
            return None
    return (match[1], match[2]) if there else None


def _cast(load: Callable[[], Coder], dtype: Dtype, path: str) -> Coder:
    """Load a coder of another library, in a `dtype` that may not hold its values."""
    coder = load()
    if dtype is None:
        return coder
    coder = jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), coder)
    with parameters.errors_name(f"{path}: as {dtype}"):
        parameters.check_values(coder)
    return coder


def _float_dtype(dtype: Dtype) -> np.dtype | None:
    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        if (found := jnp.dtype(dtype)).name in parameters.DTYPES.values():
            return found
    raise InputError(f"dtype must be one of {', '.join(parameters.DTYPES.values())}")
