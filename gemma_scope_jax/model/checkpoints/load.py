"""One loader for every kind of checkpoint: `load_model` by name, folder or file.

Weights stream from the file to the devices layer by layer: every leaf is allocated in its final
sharding; each layer is cast, checked for NaN and written in place there. Besides the model itself
the host holds one layer, or one slice of the embedding, at a time.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from gemma_scope_jax.errors import InputError, disk_error, reason
from gemma_scope_jax.model.checkpoints.gguf import open_gguf
from gemma_scope_jax.model.checkpoints.gguf_gemma import gguf_config, gguf_leaf
from gemma_scope_jax.model.checkpoints.huggingface import (
    huggingface_leaf,
    open_huggingface,
    refuse_adapters,
)
from gemma_scope_jax.model.checkpoints.huggingface_config import TOKENS, huggingface_config
from gemma_scope_jax.model.checkpoints.official import is_official, official_layer, open_official
from gemma_scope_jax.model.checkpoints.packaged import is_packaged_model_installed, packaged_model
from gemma_scope_jax.model.config import (
    GemmaConfig,
    Model,
    Params,
    abstract_params,
    normalise_model_name,
    preset,
)
from gemma_scope_jax.model.sharding import own_mesh, param_shardings
from gemma_scope_jax.progress import Report

EMBED_SLICE = 16 << 20  # bytes (as float32) of embedding that pass through the host at a time
CONFIGS = ("config.json", "adapter_config.json", *TOKENS[:2])  # the files that decide the shapes
WEIGHTS = (*CONFIGS, *TOKENS[2:], "*.safetensors", "*.safetensors.index.json")


@own_mesh
def load_model(
    source: str | os.PathLike,
    *,
    dtype: DTypeLike = "bfloat16",
    mesh: Mesh | None = None,
    config: GemmaConfig | None = None,
    progress: Report | None = None,
) -> Model:
    """Load a Gemma 3 text model.

    source    a Hugging Face folder; a .gguf file; an official (Orbax) folder, also on gs://; or a
              name: "gemma-3-270m" is the packaged model if extra `demo` is installed, all others
              ("gemma-3-1b-pt", "google/gemma-3-4b-it", any "owner/repository") come from Hugging
              Face's hub
    dtype     bfloat16 or float32 for the matrices; norms are always float32
    mesh      shards the weights as in `param_shardings`; None: the default device
    config    only for an official checkpoint whose sizes match no preset
    progress  called with the bytes of the model loaded so far and in all

    Raises `InputError` for an unknown name, a file that is missing, damaged, or not a Gemma 3, and
    weights that are NaN, infinite, or too large for `dtype`.
    """
    dtype = _checked_dtype(dtype)
    checkpoint = _open(find_checkpoint(source), config)
    return Model(_stream(checkpoint, dtype, mesh, progress), checkpoint.config)


def model_config(source: str | os.PathLike) -> GemmaConfig:
    """The architecture of what `load_model(source)` would load; reads no weights.

    Names of the Gemma 3 family need neither disk nor network. Raises `InputError`.
    """
    if not _is_local(source):
        if not _is_foreign_repository(str(source)):
            return preset(str(source))
        return huggingface_config(find_checkpoint(source, files=CONFIGS))
    path = find_checkpoint(source)
    if path.is_dir() and (path / "config.json").exists():
        return huggingface_config(path)
    return _open(path, None).config


def find_checkpoint(source: str | os.PathLike, files: tuple[str, ...] = WEIGHTS) -> epath.Path:
    """The folder or file that `source` (as in `load_model`) stands for, downloaded if necessary.

    `files`: the patterns to download from a repository on the hub. Raises `InputError`.
    """
    if _is_local(source):
        path = epath.Path(os.path.expanduser(source))
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        return path
    name = repository = str(source)
    if not _is_foreign_repository(name):
        preset(name)  # or it is unknown
        repository = normalise_model_name(name)
    is_packaged = repository == "google/gemma-3-270m" and not name.startswith("google/")
    if is_packaged and is_packaged_model_installed():
        return epath.Path(packaged_model())
    return _download(repository, files)


def _is_local(source: str | os.PathLike) -> bool:
    """Whether `source` is a path rather than a name; whatever exists on disk is a path."""
    text = os.fspath(source)
    return (
        not isinstance(source, str)
        or "://" in text
        or text.startswith((".", "~", os.sep))
        or text.endswith((".gguf", ".safetensors", os.sep))
        or text.count("/") > 1
        or os.path.exists(text)
    )


def _is_foreign_repository(name: str) -> bool:
    """Whether `name` is "owner/repository" of an owner other than google."""
    return not name.startswith("google/") and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _download(repository: str, files: tuple[str, ...]) -> epath.Path:
    from huggingface_hub import snapshot_download

    try:
        folder = epath.Path(snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:  # the network stack's exceptions change between hub versions
        raise hub_error(repository, error) from error
    if "*.safetensors" in files and not any(folder.glob("*.safetensors")):
        raise InputError(  # for an incomplete folder, the hub's library raises nothing
            f"{repository}: has no safetensors files, or the hub {_hub_state()}; check the "
            "repository and the network, or pass a folder that holds the model"
        )
    return folder


def _hub_state() -> str:
    from huggingface_hub import constants

    return "is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "cannot be reached"


def hub_error(repository: str, error: Exception, what: str = "") -> InputError:
    """What to do about an exception of the hub's library. what: what was to be downloaded, if it is
    not the whole repository."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    elsewhere = "check the network, or pass a folder that holds it"
    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: f"is gated: accept its terms at {page}, then run `hf auth login`; "
        "or pass a folder that holds it",
        errors.RevisionNotFoundError: f"has no such revision ({reason(error)}); see {page}/commits",
        errors.RepositoryNotFoundError: "neither a local folder nor a repository on the hub that "
        "you may read; check the name, or run `hf auth login`",
        errors.LocalEntryNotFoundError: f"not on this disk, and the hub {_hub_state()}; "
        f"{elsewhere} ({reason(error)})",
    }
    where = f"{what}: {repository}" if what else repository
    for kind, why in reasons.items():
        if isinstance(error, kind):
            return InputError(f"{where}: {why}")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.errno:
        return disk_error(where, error)
    return InputError(f"{where}: cannot be downloaded ({reason(error)}); {elsewhere}")


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """An opened checkpoint of any format; `read(leaf, layer, rows)` -> our layout, any float dtype.

    `rows` selects rows of `embed` and `head`; the other leaves are read whole, one layer at a time.
    """

    path: str
    config: GemmaConfig
    read: Callable[[str, int | None, slice], np.ndarray]


def _open(path: epath.Path, config: GemmaConfig | None) -> _Checkpoint:
    """Recognise the format, and check names and shapes before any weight is read."""
    where = str(path)
    if config is not None and not (path.is_dir() and is_official(path)):
        raise InputError(f"{where}: states its architecture; `config` is for official folders")
    if path.is_dir() and (path / "config.json").exists():
        folder = open_huggingface(where)
        return _Checkpoint(where, folder.config, functools.partial(huggingface_leaf, folder))
    if path.is_dir() and is_official(path):
        official = open_official(path, config)
        restore = functools.lru_cache(maxsize=1)(functools.partial(official_layer, official))

        def read(leaf: str, layer: int | None, rows: slice) -> np.ndarray:
            array = restore(layer)[leaf]
            return array[rows] if leaf == "embed" else array

        return _Checkpoint(where, official.config, read)
    if path.is_dir():
        refuse_adapters(path)
        files = [x.name for x in path.iterdir() if x.name.endswith(".gguf")]
        hint = f"; pass the file {min(files)} itself" if files else ""
        what = "neither a Hugging Face folder (config.json) nor an Orbax checkpoint"
        raise InputError(f"{where}: {what}{hint}")
    if where.endswith(".safetensors"):
        raise InputError(f"{where}: pass the folder that holds it and its config.json")
    file = open_gguf(where)
    known = gguf_config(file)
    return _Checkpoint(where, known, functools.partial(gguf_leaf, file, known))


def _checked_dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known == jnp.float16:
        why = "Gemma 3's residual stream outgrows it (65,504); choose bfloat16 or float32"
        raise InputError(f"dtype float16: {why}")
    if known is None or known not in (jnp.bfloat16, jnp.float32):
        raise InputError(f"dtype {dtype!r}: choose bfloat16 or float32")
    return known


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Where one leaf of the parameters goes, and its layout while it is filled.

    A leaf is filled as [P, rows, ...]: its first axis is split into the P parts that the sharding
    gives it, so that writing a slice of rows moves nothing between devices. P is 1 except for a
    sharded embedding.
    """

    name: str
    target: jax.ShapeDtypeStruct
    sharding: NamedSharding | None

    @property
    def parts(self) -> int:
        if self.inner is None or self.inner.spec[0] is None:
            return 1
        return self.inner.mesh.shape[self.inner.spec[0]]

    @property
    def rows(self) -> int:
        return self.target.shape[0] // self.parts

    @property
    def inner(self) -> NamedSharding | None:
        """The sharding of [P, rows, ...]."""
        if self.sharding is None:
            return None
        first, *rest = tuple(self.sharding.spec) or (None,)
        return NamedSharding(self.sharding.mesh, PartitionSpec(first, None, *rest))

    def put(self, values: np.ndarray) -> jax.Array:
        """Host `values` [P, n, ...] on the devices, each with its own part."""
        if self.inner is None:
            return jax.device_put(values)
        return jax.make_array_from_callback(values.shape, self.inner, lambda index: values[index])


@functools.partial(jax.jit, static_argnums=0)
def _allocate(leaves: tuple[_Leaf, ...]) -> list[jax.Array]:
    zeros = (jnp.zeros((x.parts, x.rows, *x.target.shape[1:]), x.target.dtype) for x in leaves)
    return [_placed(array, x.inner) for array, x in zip(zeros, leaves)]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(arrays: list, values: list, row: jax.Array, leaves: tuple[_Leaf, ...]):
    """Write each of `values` [P, n, ...] at `row` of its array; also return which are finite."""
    cast = [x.astype(leaf.target.dtype) for x, leaf in zip(values, leaves)]
    written = [
        _placed(jax.lax.dynamic_update_slice_in_dim(array, x, row, axis=1), leaf.inner)
        for array, x, leaf in zip(arrays, cast, leaves)
    ]
    return written, jnp.stack([jnp.isfinite(x).all() for x in cast])


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _merge(arrays: list[jax.Array], leaves: tuple[_Leaf, ...]) -> list[jax.Array]:
    return [_placed(x.reshape(y.target.shape), y.sharding) for x, y in zip(arrays, leaves)]


def _placed(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def _stream(
    checkpoint: _Checkpoint, dtype: jnp.dtype, mesh: Mesh | None, progress: Report | None
) -> Params:
    """Fill all leaves: embedding and head by slices of rows, then one layer after the other."""
    config = checkpoint.config
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    shardings = [None] * len(paths)
    if mesh is not None:
        shardings = jax.tree.leaves(param_shardings(config, mesh))
    leaves = tuple(_Leaf(path[-1].name, x, s) for (path, x), s in zip(paths, shardings))
    arrays = dict(zip(leaves, _allocate(leaves)))
    done, total = 0, sum(x.size * x.dtype.itemsize for x in arrays.values())
    for some, layer, row, values in _slices(checkpoint, leaves):
        placed = [leaf.put(x) for leaf, x in zip(some, values)]
        written, finite = _write([arrays[leaf] for leaf in some], placed, np.int32(row), some)
        arrays.update(zip(some, written))
        for leaf, x, is_finite in zip(some, values, np.asarray(finite)):
            if not is_finite:
                where = leaf.name if layer is None else f"{leaf.name} of layer {layer}"
                why = f"numbers too large for {leaf.target.dtype}"
                if not np.isfinite(x).all():
                    why = "NaN or infinity; download it again"
                raise InputError(f"{checkpoint.path}: {where} holds {why}")
            done += x.size * leaf.target.dtype.itemsize
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(tree, _merge(list(arrays.values()), leaves))


def _slices(
    checkpoint: _Checkpoint, leaves: tuple[_Leaf, ...]
) -> Iterator[tuple[tuple[_Leaf, ...], int | None, int, list[np.ndarray]]]:
    """(leaves, layer, row, values [P, n, ...] of each leaf) until everything is read."""
    named = {leaf.name: leaf for leaf in leaves}
    tables, final_norm = [named.pop("embed")], named.pop("final_norm")
    tables += [named.pop("head")] if "head" in named else []
    blocks = tuple(named.values())
    for table in tables:
        step = max(1, EMBED_SLICE // (4 * table.parts * checkpoint.config.d_model))
        for row in range(0, table.rows, step):
            stop = min(row + step, table.rows)
            starts = range(0, checkpoint.config.vocab, table.rows)  # one per part
            parts = [checkpoint.read(table.name, None, slice(x + row, x + stop)) for x in starts]
            yield (table,), None, row, [np.stack(parts) if len(parts) > 1 else parts[0][None]]
    yield (final_norm,), None, 0, [checkpoint.read("final_norm", None, slice(None))[None]]
    for layer in range(checkpoint.config.layers):
        values = [checkpoint.read(leaf.name, layer, slice(None))[None, None] for leaf in blocks]
        yield blocks, layer, layer, values
