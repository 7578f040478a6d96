"""One mesh over several hosts: each has its own rows of every batch, and all run in step.

A host that has run out of text runs batches of padding until the others are done.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from gemma_scope_jax.coders.active_features import ActiveFeatures, specs
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.work import Ended
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.sharding import mesh_under

T = TypeVar("T")


def count_of(model: Model) -> int:
    """The number of processes that the model's mesh spans; 1 without a mesh."""
    mesh = mesh_under(model.params.embed)
    return 1 if mesh is None else len({d.process_index for d in mesh.devices.flat})


def check(model: Model, batch_size: int) -> None:
    """Raise `InputError` unless each host has whole rows of the mesh, which divide `batch_size`."""
    mesh, hosts = mesh_under(model.params.embed), count_of(model)
    if mesh is None or hosts == 1:
        return
    owners = [{d.process_index for d in line} for line in mesh.devices]
    if any(len(owner) > 1 for owner in owners) or len(owners) % hosts:
        raise InputError('the mesh\'s axis "model" spans hosts: keep it within the devices of one')
    if batch_size % (rows := len(owners) // hosts):
        where = f"the {rows} mesh rows of each host: make it a multiple of {rows}"
        raise InputError(f"batch_size {batch_size} does not split over {where}")


def own_part(mesh: Mesh, active: ActiveFeatures, width: int) -> Any:
    """The part of a group's results that belongs to this process's rows."""
    each = specs("data", "model" if width % mesh.shape["model"] == 0 else None)
    is_spec = lambda s: isinstance(s, PartitionSpec)
    layered = jax.tree.map(lambda spec: PartitionSpec(None, *spec), each, is_leaf=is_spec)
    return multihost_utils.global_array_to_host_local_array(active, mesh, layered)


def in_step(events: Iterable[T]) -> Iterator[T | None]:
    """`events`, then a None for each batch that another process has more (`Ended` is not one)."""
    for event in events:
        if not isinstance(event, Ended):
            _anyone(True)
        yield event
    while _anyone(False):
        yield None


def _anyone(more: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(more)).any())


def wait(model: Model) -> None:
    """Wait until all processes of the model's mesh are here."""
    if count_of(model) > 1:
        multihost_utils.sync_global_devices("features are written")
