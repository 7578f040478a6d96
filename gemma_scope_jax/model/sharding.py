"""Where weights and batches live on a mesh: one table of partition specs.

Tensor parallelism runs over the mesh axis "model" (heads, mlp hidden, vocabulary), data parallelism
over "data", which also shards d_model of every matrix (FSDP). An axis that does not divide evenly
stays replicated, so every preset loads on every mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import GemmaConfig, Params, axis_sizes, each_weight

_F = TypeVar("_F", bound=Callable)
AXES = ("data", "model")
_AUTO = (AxisType.Auto, AxisType.Auto)


def make_mesh(
    data: int = 1, model: int | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of data x model devices with the axes ("data", "model").

    `model=None` uses all the devices that `data` leaves; `devices=None` means `jax.devices()`. The
    axes are `AxisType.Auto`: the compiler places what is not annotated, such as a user's intercept
    function. Raises `InputError` if there are too few devices or they do not divide.
    """
    devices = list(jax.devices() if devices is None else np.ravel(np.asarray(devices, object)))
    if data < 1 or (model is not None and model < 1):
        raise InputError(f"mesh of data={data}, model={model}: both must be at least 1")
    if model is None:
        if len(devices) % data:
            raise InputError(f"mesh: data={data} does not divide {len(devices)} devices")
        model = len(devices) // data
    if data * model > len(devices):
        raise InputError(f"mesh: data={data} x model={model} is more than {len(devices)} devices")
    return jax.make_mesh((data, model), AXES, axis_types=_AUTO, devices=devices[: data * model])


def our_mesh(mesh: Mesh | AbstractMesh) -> Mesh:
    """`mesh` as our programs take it: axes ("data", "model") in this order, both Auto.

    The devices stay as they are. Explicit axes, as `jax.make_mesh` makes them, become Auto; a
    missing axis gets one device, and other axes of one device are dropped. Raises `InputError` for
    axes with other names, whose meaning would be a guess.
    """
    known = isinstance(mesh, (Mesh, AbstractMesh))
    if known and mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh  # type: ignore[return-value]
    if not isinstance(mesh, Mesh):
        raise InputError(f"expected a mesh, as gs.make_mesh(2, 4) makes one, not {mesh!r}")
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape))
    if others := [name for name in sizes if name not in AXES and sizes[name] > 1]:
        raise InputError(
            f"the mesh has an axis {others[0]!r}: name its axes 'data' (batch, FSDP) and 'model' "
            "(heads, hidden, features): jax.sharding.Mesh(mesh.devices, ('data', 'model'))"
        )
    order = sorted(sizes, key=lambda name: AXES.index(name) if name in AXES else -1)
    devices = mesh.devices.transpose([mesh.axis_names.index(name) for name in order])
    devices = devices.reshape([sizes.get(name, 1) for name in AXES])
    return Mesh(devices, AXES, axis_types=_AUTO)


def on_auto_axes(tree: Any) -> Any:
    """`tree` with its arrays on Explicit axes put on equal meshes with Auto axes; no data move."""

    def auto(x: Any) -> Any:
        if not isinstance(x, jax.Array) or isinstance(x, Tracer):
            return x
        if not isinstance(x.sharding, NamedSharding):
            return x
        mesh: Any = x.sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            return x
        if set(mesh.axis_names) <= set(AXES):
            mesh = our_mesh(mesh)
        else:
            types = (AxisType.Auto,) * mesh.devices.ndim
            mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=types)
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(auto, tree)


def check_axes(weight: jax.Array) -> None:
    """Raise `InputError` if a weight is on a mesh with Explicit axes: our programs need Auto."""
    mesh = jax.typeof(weight).sharding.mesh
    if any(t == AxisType.Explicit and n > 1 for t, n in zip(mesh.axis_types, mesh.axis_sizes)):
        raise InputError(
            f"the weights are on a mesh with Explicit axes {mesh.axis_names}: load_model(.., mesh="
            "mesh), or device_put(params, gs.param_shardings(config, mesh)), makes them Auto"
        )


def own_mesh(function: _F) -> _F:
    """Decorates a function that runs our programs: they follow the weights' mesh, not one that the
    caller has set (`jax.set_mesh`). Under tracing, as in a caller's `jit`, it does nothing."""

    @functools.wraps(function)
    def call(*args, **options):
        if jax.sharding.get_abstract_mesh().empty:
            return function(*args, **options)
        try:
            unset = jax.set_mesh(Mesh(np.empty((), object), ()))
        except ValueError:  # a mesh cannot be set while tracing
            return function(*args, **options)
        with unset:
            return function(*args, **options)

    return call  # type: ignore[return-value]


def param_shardings(config: GemmaConfig, mesh: Mesh, fsdp: bool = True) -> Params:
    """The `NamedSharding` of every weight on `mesh` (see `our_mesh`): for `device_put` and `jit`.

    The layer axis L is never sharded. The query heads N are sharded over "model", or the head
    dimension H if N does not divide; kv heads (1 in the small models) are replicated if they do not
    divide. `fsdp=False` keeps d_model whole: for inference if the weights fit.
    """
    mesh = our_mesh(mesh)

    def fits(axis: str, size: int) -> str | None:
        return axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    sizes = axis_sizes(config)
    over = {"L": None, "D": fits("data", sizes["D"]) if fsdp else None}
    over |= {letter: fits("model", sizes[letter]) for letter in "NKHMV"}
    if over["N"]:
        over["H"] = None

    def sharding(name: str, axes: str) -> NamedSharding:
        if name.endswith("norm"):
            return NamedSharding(mesh, PartitionSpec())
        spec = (None if a == "H" and "K" in axes else over[a] for a in axes)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return each_weight(config, sharding)


def shard_batch(mesh: Mesh, array: Any) -> Any:
    """Put `array` [B, ...], or each array of a `TokenBatch`, on `mesh`: B split over "data",
    replicated over "model". Raises `InputError` if B does not divide."""
    if dataclasses.is_dataclass(array):
        return jax.tree.map(functools.partial(shard_batch, mesh), array)
    mesh = our_mesh(mesh)
    if np.ndim(array) < 1 or np.shape(array)[0] % mesh.shape["data"]:
        devices = f"{mesh.shape['data']} devices: make B a multiple of the 'data' axis"
        raise InputError(f"a batch of shape {np.shape(array)} does not split over {devices}")
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))


def mesh_of(weight: jax.Array) -> AbstractMesh | None:
    """The abstract mesh a weight is on if it has our axes, else None; also inside `jit`."""
    mesh = jax.typeof(weight).sharding.mesh
    ours = set(AXES) <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if ours else None


def mesh_under(weight: Any) -> Mesh | None:
    """The mesh with its devices of a concrete weight, if `mesh_of` finds one; else None."""
    return weight.sharding.mesh if mesh_of(weight) is not None else None


def place(mesh: Mesh | AbstractMesh | None, x: jax.Array, *axes: str | None) -> jax.Array:
    """Spread `x` over the mesh's `axes`, one per dimension, where they divide. None: no change."""
    if mesh is None:
        return x
    spec = (a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
