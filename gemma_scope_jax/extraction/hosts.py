"""One mesh over several hosts: each has its own rows of every batch, and all run in step.

A host that has run out of text runs batches of padding until the others have, too.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gemma_scope_jax.coders.active_features import ActiveFeatures, specs
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import sharding
from gemma_scope_jax.model.config import Model


def mesh_under(model: Model) -> Any:
    """The mesh ("data", "model") that the model's weights lie on, or None."""
    return sharding.mesh_under(model.params.embed)


def count_of(model: Model) -> int:
    """How many processes the model's mesh spans; 1 without a mesh."""
    mesh = mesh_under(model)
    return 1 if mesh is None else len({d.process_index for d in mesh.devices.flat})


def check(model: Model, batch_size: int) -> None:
    """Raise `InputError` unless hosts have whole rows of the mesh, which split `batch_size`."""
    mesh, hosts = mesh_under(model), count_of(model)
    if hosts == 1:
        return
    owners = [{d.process_index for d in line} for line in mesh.devices]
    if any(len(owner) > 1 for owner in owners) or len(owners) % hosts:
        raise InputError(
            'the mesh\'s axis "model" spans hosts: make it as long as the devices of one, or less'
        )
    if batch_size % (len(owners) // hosts):
        raise InputError(
            f"batch_size {batch_size} does not split over the {len(owners) // hosts} rows of a "
            "host's mesh"
        )


def put_rows(mesh: Any, array: np.ndarray) -> jax.Array:
    """This process's rows [B, ...] as its part of a batch of all of them."""
    place = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_process_local_data(place, array)


def own_part(mesh: Any, active: ActiveFeatures, width: int) -> Any:
    """What a group's results hold of this process's rows."""
    split = "model" if width % mesh.shape["model"] == 0 else None
    layered = jax.tree.map(
        lambda spec: PartitionSpec(None, *spec),
        specs("data", split),
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )
    return multihost_utils.global_array_to_host_local_array(active, mesh, layered)


def in_step(events: Iterable[Any]) -> Iterator[Any]:
    """`events`, and None as often as another process has more batches (`Ended` is not one)."""
    from gemma_scope_jax.extraction.work import Ended

    for event in events:
        if not isinstance(event, Ended):
            _anyone(True)
        yield event
    while _anyone(False):
        yield None


def _anyone(more: bool) -> bool:
    return bool(multihost_utils.process_allgather(np.array(more)).any())


def wait(model: Model) -> None:
    """Until all processes of the model's mesh are here."""
    if count_of(model) > 1:
        multihost_utils.sync_global_devices("features are written")
