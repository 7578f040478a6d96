"""The compiled pass of an extraction: batches of tokens in, entries of every coder's layer out."""

import dataclasses
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_scope_jax.coders import active_features as on_device
from gemma_scope_jax.coders.active_features import ActiveFeatures, CoderStack
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import hosts
from gemma_scope_jax.extraction.store.codec import Entries, offsets_of
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.sharding import mesh_under

IN_FLIGHT = 3  # batches on the device that the host has not copied yet
Started = tuple[TokenBatch, list[ActiveFeatures]]  # a batch on the device and its results, pending


class Runner:
    """The compiled pass of a job. `start` runs a batch, `finish` brings its entries to the host."""

    def __init__(self, model: Model, coders: Mapping[str, Coder], slots: int, precision: str):
        self.model, self.slots, self.mesh = model, slots, mesh_under(model.params.embed)
        self.hosts = hosts.count_of(model)
        self.groups, self.coders = on_device.grouped(coders), coders
        self.weights = tuple(on_device.encoders(g, coders, self.mesh) for g in self.groups)
        rows = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec("data"))
        whole = partial(jax.make_array_from_process_local_data, rows)  # of all processes' rows
        self._put = jnp.asarray if rows is None else whole
        self._run = partial(on_device.active_features, groups=self.groups, precision=precision)
        self._room = threading.Semaphore(IN_FLIGHT)
        self.again = 0  # batches that had to run again with more slots

    def compiled(self, batch: TokenBatch) -> jax.stages.Compiled:
        """The program for batches of this shape."""
        batch, jitted = jax.tree.map(self._put, batch), on_device.active_features
        return jitted.lower(
            self.model, self.weights, batch, slots=self.slots, **self._run.keywords
        ).compile()

    def launch(self, batch: TokenBatch) -> Started:
        """Run a batch without waiting for its results."""
        batch = jax.tree.map(self._put, batch)
        return batch, self._run(self.model, self.weights, batch, slots=self.slots)

    def start(self, batch: TokenBatch) -> Started:
        """`launch` once there is room on the device; pass the result to `finish`."""
        self._room.acquire()
        return self.launch(batch)

    def finish(self, started: Started, kept: np.ndarray) -> list[Entries]:
        """The entries of every coder's layers, coders in order, at the tokens `kept` (of N)."""
        try:
            found = self._on_host(started)
        finally:
            self._room.release()
        entries: dict[tuple[str, int], Entries] = {}
        for group, active in zip(self.groups, found):
            if not active.finite.all():
                layer = group.layers[int(np.argmin(active.finite))]
                why = "the model's activations are not finite: damaged, or its dtype overflows"
                raise InputError(f"{group.site} of layer {layer}: {why}")
            for i, member in enumerate(group.members):
                entries[member] = layer_entries(group, active, i, kept)
        coders = self.coders.items()
        return [entries[name, own] for name, coder in coders for own in range(len(coder.layers))]

    def _on_host(self, started: Started) -> list[ActiveFeatures]:
        """The results of this process's rows, as numpy; spilled rows only if there are any."""
        batch, found = started
        slots, widest = self.slots, max(group.width for group in self.groups)
        while any(np.asarray(active.overflow).any() for active in found):
            slots = min(4 * slots, widest)
            self.again += 1
            found = self._run(self.model, self.weights, batch, slots=slots)
        held = []
        for group, active in zip(self.groups, found):
            if self.mesh is not None and self.hosts > 1:
                active = hosts.own_part(self.mesh, active, group.width)
            spilled = active.spilled
            host: Any = jax.tree.map(np.asarray, dataclasses.replace(active, spilled=None))
            size = host.count.shape[1] // host.spilled_tokens.shape[1]
            some = [
                np.asarray(spilled[i]) if (which < size).any() else None
                for i, which in enumerate(host.spilled_tokens)
            ]
            held.append(host.replace(spilled=some))
        return held


def layer_entries(group: CoderStack, active: ActiveFeatures, i: int, kept: np.ndarray) -> Entries:
    """The entries of a group's i-th layer at the tokens `kept` (ascending, of N)."""
    count, parts = active.count[i][kept], active.count.shape[-1]  # [n, m]
    slots, part = active.values.shape[-1] // parts, group.width // parts
    over = count > slots
    used = np.arange(slots, dtype=np.int32)[None, None, :] < np.where(over, 0, count)[..., None]
    ids = active.features[i][kept].reshape(used.shape)
    if parts > 1:
        ids = ids.astype(np.int32) + np.arange(parts, dtype=np.int32)[None, :, None] * part
    ids, values = ids[used].astype(np.int32), active.values[i][kept].reshape(used.shape)[used]
    if not over.any():
        return Entries(offsets_of(count.sum(-1)), ids, values)
    count, n = count.astype(np.int64), len(active.count[i])
    found = []  # a row's second product may differ in a tie, so its own entries are counted
    tokens, size = active.spilled_tokens[i], n // len(active.spilled_tokens[i])
    for shard, j, r in zip(*np.nonzero(tokens < size)):
        row = int(np.searchsorted(kept, shard * size + tokens[shard, j, r]))
        dense = active.spilled[i][shard, r, j * part : (j + 1) * part]
        (here,) = np.nonzero(dense)
        count[row, j] = len(here)
        found.append((row * parts + j, here + j * part, dense[here]))
    starts = offsets_of(count.reshape(-1))
    all_ids, all_values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    fits = np.ones(starts[-1], bool)
    for unit, here, dense in found:
        some = slice(starts[unit], starts[unit + 1])
        fits[some], all_ids[some], all_values[some] = False, here, dense
    all_ids[fits], all_values[fits] = ids, values
    return Entries(starts[::parts], all_ids, all_values)
