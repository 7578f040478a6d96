"""Activations on disk: written once, in shards, by a writer that may be killed at any moment; read
memory-mapped in any order, such as a global shuffle.

Running the model costs far more than reading its activations, so many coders, epochs and sweeps
share one pass. The manifest is replaced after each shard and holds the position in the text where
the next one begins, so the same call continues to the same bytes.
"""

import functools
import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.data.activations import files
from gemma_scope_jax.data.batches import TokenBatches, counting, readings
from gemma_scope_jax.data.order import shuffled_positions
from gemma_scope_jax.data.prefetch import prefetch
from gemma_scope_jax.errors import InputError, disk_error, nearest, no_space
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward, site_width
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.sharding import mesh_under, own_mesh, shard_batch
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import digest

LOG = logging.getLogger(__name__)
_OPEN_FILES = 128  # of the shards read last

SiteLayers = Mapping[str, Sequence[int]]


# --- Writing -------------------------------------------------------------------------------------


@own_mesh
def write_activations(
    model: Model,
    batches: TokenBatches,
    sites: SiteLayers,
    folder: str | os.PathLike,
    tokens: int,
    *,
    dtype: str = "bfloat16",
    shard_rows: int = 65536,
    first: int = 1,
) -> "ActivationStore":
    """Store the activations of `tokens` tokens, at some layers of some sites.

    `sites` maps a site to its layers. Tokens before position `first` of their document's piece, and
    those that the data excludes, are left out. `dtype`: "bfloat16", or "int8" with a float32 scale
    per token and layer. Two shards of `shard_rows` tokens are held in memory. The same call
    continues a store, more `tokens` extend it; a kill loses at most the shard being filled. The
    bytes are the same then, if the device computes the same in two processes (CPUs do). Raises
    `InputError` for what does not fit: sites, another store in the folder, a full disk.
    """
    path = files.local_folder(folder)
    manifest = _new_manifest(model, batches, sites, dtype, shard_rows, first)
    with only_writer(path):
        try:
            manifest = _continued(path, manifest, batches)
            if manifest["rows"] < tokens:
                _write(model, batches, path, manifest, tokens)
        except OSError as error:
            if not no_space(error):
                raise disk_error(path, error) from error
            raise _full(path, manifest, tokens) from error
    return ActivationStore(path)


def _new_manifest(
    model: Model, batches: TokenBatches, sites: SiteLayers, dtype: str, shard_rows: int, first: int
) -> dict[str, Any]:
    """The manifest of an empty store."""
    if not model.params.final_norm.is_fully_addressable:
        raise InputError("the model is spread over several hosts: use one host per store")
    held, sums = {}, {}
    for site, layers in sites.items():
        width = site_width(model.config, site)
        held[site] = {"layers": list(layers), "width": width}
        sums[site] = {"sum": [[0.0] * width for _ in layers], "squared_norm": [0.0] * len(layers)}
    data = {"text": batches.fingerprint, "rows": batches.batch_size, "length": batches.context_size}
    about = {"model": model_identity(model), "sites": held, "dtype": dtype, "first": first}
    about |= {"shard_rows": shard_rows, "data": data}
    empty = {"rows": 0, "shards": [], "position": batches.position, "skip": 0, "sums": sums}
    return files.FORMAT | about | empty


def _continued(path: Path, new: dict, batches: TokenBatches) -> dict:
    """The manifest of the store in the folder, or `new`. Raises `InputError` for another store."""
    if not (path / files.MANIFEST).exists():
        return new
    old = files.read_activations_manifest(path)
    same = {}
    if batches.text.same_text(old["data"].get("text")):  # perhaps in the form of older versions
        same = {"data": {**old["data"], "text": batches.fingerprint}}
    for key in ("model", "sites", "dtype", "first", "shard_rows", "data"):
        if same.get(key, old[key]) != new[key]:
            what = f"{key} ({str(old[key])[:100]}, now {str(new[key])[:100]})"
            raise InputError(f"{path}: holds activations of another {what}; choose another folder")
    files.check_sizes(path, old)
    return old


def _full(path: Path, manifest: dict, tokens: int) -> InputError:
    left = tokens - manifest["rows"]
    needed = left * files.row_bytes(manifest["sites"], manifest["dtype"]) / 1e9
    free = shutil.disk_usage(path).free / 1e9
    return InputError(
        f"{path}: no space left: the {left:,} tokens still to be stored need {needed:.3g} GB and "
        f"{free:.3g} GB are free; free some, or store fewer or as int8, and run the same again"
    )


def _write(model: Model, batches: TokenBatches, path: Path, manifest: dict, tokens: int) -> None:
    """Fill shard after shard; each is written while the next is filled. Updates `manifest`."""
    left = (tokens - manifest["rows"]) * files.row_bytes(manifest["sites"], manifest["dtype"])
    if left > shutil.disk_usage(path).free:
        raise _full(path, manifest, tokens)
    rows, shard_rows, skip = manifest["rows"], manifest["shard_rows"], manifest["skip"]
    progress = Progress(tokens, begun=rows)
    size = min(shard_rows, tokens - rows)
    buffers, spare = files.shard_buffers(manifest, size), files.shard_buffers(manifest, size)
    filled, after = 0, manifest["position"]
    rest = batches.at(after)
    with ThreadPoolExecutor(1) as disk:
        writing = None
        for before, after, values, keep in _passes(model, rest, manifest):
            at, skip = skip, 0
            while at < len(keep) and rows < tokens:
                count = min(len(keep) - at, shard_rows - filled, tokens - rows)
                _copy(values, keep[at : at + count], buffers, filled)
                filled, at, rows = filled + count, at + count, rows + count
                if filled == shard_rows or rows == tokens:
                    if writing is not None:
                        writing.result()
                    place = (after, 0) if at == len(keep) else (before, at)
                    shard = (path, manifest, buffers, filled, *place)
                    writing = disk.submit(files.write_shard, *shard)
                    buffers, spare, filled = spare, buffers, 0
            progress.at(rows)
            if rows == tokens:
                break
        if writing is not None:
            writing.result()
    if filled:
        files.write_shard(path, manifest, buffers, filled, after, 0)
    if rows < tokens:
        LOG.warning("the text ended at %s of %s tokens", f"{rows:,}", f"{tokens:,}")
    if (times := readings(after)) > 1:
        LOG.warning("the text has been read %d times: the store repeats it", times)


def _copy(values: dict, keep: np.ndarray, buffers: files.Buffers, start: int) -> None:
    """Copy the tokens `keep` of a pass into the buffers from row `start` on."""
    for site, tensors in buffers.items():
        for name, buffer in tensors.items():
            for into, x in zip(buffer, values[site][name]):
                np.take(x, keep, axis=0, out=into[start : start + len(keep)], mode="clip")


def _passes(model: Model, batches: TokenBatches, manifest: dict) -> Iterator[tuple]:
    """(position before, position after, {site: {tensor: [layers, B*T, ...]}}, the tokens to store)
    of each batch. The device computes a batch while the previous one is stored.
    """
    sites = tuple((site, tuple(held["layers"])) for site, held in manifest["sites"].items())
    run = partial(_pass, model, sites=sites, dtype=manifest["dtype"], first=manifest["first"])
    mesh = mesh_under(model.params.embed)
    put = jnp.asarray if mesh is None else partial(shard_batch, mesh)

    before, waiting = batches.position, None  # the position before the thread moves it
    with prefetch(batches) as ahead:
        for batch, after in counting(ahead, manifest["first"], before):
            out = run(jax.tree.map(put, batch))
            if waiting is not None:
                yield _in_memory(*waiting)
            waiting = (before, after, *out)
            before = after
        if waiting is not None:
            yield _in_memory(*waiting)


def _in_memory(before: Any, after: Any, values: dict, keep: jax.Array) -> tuple:
    return before, after, jax.tree.map(np.asarray, values), np.flatnonzero(np.asarray(keep))


@partial(jax.jit, static_argnames=("sites", "dtype", "first"))
def _pass(model: Model, batch: TokenBatch, *, sites: tuple, dtype: str, first: int):
    """Activations as stored, {site: {tensor: [layers, B*T, ...]}}, and which tokens to store."""
    captures = [capture(site, layers) for site, layers in sites]
    stop = 1 + max(max(layers) for _, layers in sites)
    out = forward(model, batch, captures, stop_at_layer=stop, logits="none", remat=None)
    flat = {site: x.reshape(x.shape[0], -1, x.shape[-1]) for site, x in out.reads.items()}
    store = _as_int8 if dtype == "int8" else lambda x: {"values": x.astype(jnp.bfloat16)}
    return {site: store(x) for site, x in flat.items()}, batch.counted(first).reshape(-1)


def _as_int8(x: jax.Array) -> dict[str, jax.Array]:
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), -1) / 127.0
    steps = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    return {"values": jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), "scale": scale}


# --- Reading -------------------------------------------------------------------------------------


class ActivationStore:
    """Activations written by `write_activations` into a local folder, memory-mapped.

    `sites` are the {site: layers} to read; default: all. `len(store)` is the number of tokens.
    Opening checks that every file exists with its size; `verify` reads them all. Raises
    `InputError` for folders that are not a complete store.
    """

    def __init__(self, folder: str | os.PathLike, sites: SiteLayers | None = None):
        self.folder = files.local_folder(folder)
        self.manifest = files.read_activations_manifest(self.folder)
        files.check_sizes(self.folder, self.manifest)
        stored = {site: tuple(s["layers"]) for site, s in self.manifest["sites"].items()}
        wanted = stored if sites is None else {site: tuple(l) for site, l in sites.items()}
        for site, layers in wanted.items():
            if site not in stored:
                raise InputError(f"{self.folder}: no site {site!r}{nearest(site, stored)}")
            if missing := set(layers) - set(stored[site]):
                layer, own = min(missing), stored[site]
                raise InputError(f"{self.folder}: no layer {layer} of {site}; it has {own}")
        self.sites: dict[str, tuple[int, ...]] = wanted
        self._index = {s: [stored[s].index(l) for l in layers] for s, layers in wanted.items()}
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.manifest["shards"]])
        self._map = functools.lru_cache(_OPEN_FILES)(self._map_shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything stored."""
        return digest(self.manifest["shards"])

    def width(self, site: str) -> int:
        """Values per token and layer."""
        return self.manifest["sites"][site]["width"]

    def verify(self) -> None:
        """Read every file and compare its checksum. `InputError` names the first bad one."""
        for number, shard in enumerate(self.manifest["shards"]):
            for site, entry in shard["files"].items():
                path = self.folder / files.shard_name(number, site)
                if files.checksum(path) != entry["crc32"]:
                    hint = "copy it again, or write the store again"
                    raise InputError(f"{path}: its bytes have changed; {hint}")

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{site: [layers, n, D]} of tokens `rows`, integers [n] in any order.

        bfloat16, or float32 for an int8 store. Raises `InputError` for rows outside of the store.
        """
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1 or (rows.size and not 0 <= rows.min() <= rows.max() < len(self)):
            raise InputError(f"rows must be integers [n] in 0..{len(self) - 1}")
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], self._starts)
        kind = np.float32 if self.manifest["dtype"] == "int8" else files.DTYPES["bfloat16"]
        empty = lambda site, layers: np.empty((len(layers), len(rows), self.width(site)), kind)
        out = {site: empty(site, layers) for site, layers in self.sites.items()}
        for shard in np.flatnonzero(np.diff(cuts)).tolist():
            places = order[cuts[shard] : cuts[shard + 1]]
            local = rows[places] - self._starts[shard]
            for site, into in out.items():
                tensors = self._map(shard, site)
                for i, layer in enumerate(self._index[site]):
                    x = tensors["values"][layer][local]
                    if "scale" in tensors:
                        x = x * tensors["scale"][layer][local][:, None]
                    into[i, places] = x
        return out

    def _map_shard(self, shard: int, site: str) -> dict[str, np.ndarray]:
        path = self.folder / files.shard_name(shard, site)
        rows = self.manifest["shards"][shard]["rows"]
        return files.map_shard(path, self.manifest, site, rows)

    def batch_rows(self, batch: int, n: int, seed: int = 0, rows: int | None = None) -> np.ndarray:
        """The rows, int64 [batch], of batch `n` of an endless shuffle, another in every epoch.

        `rows`: use only the first `rows` of the store, which must not be empty.
        """
        size = len(self) if rows is None else rows
        epochs, places = np.divmod(n * batch + np.arange(batch), size)
        found = np.empty(batch, np.int64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            found[now] = shuffled_positions(places[now], size, seed, epoch)
        return found

    def batches(
        self, batch: int, seed: int = 0, start: int = 0, rows: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """`read(batch_rows(...))` of batch `start`, `start` + 1, ... without end.

        A batch depends on (seed, number) alone: to resume, start where you stopped.
        `data.prefetch.prefetch` reads ahead. For `rows` see `batch_rows`.
        """
        for n in itertools.count(start):
            yield self.read(self.batch_rows(batch, n, seed, rows))
