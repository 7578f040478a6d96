"""Where weights and batches live on a mesh: one table of partition specs.

Tensor parallelism runs over the mesh axis "model" (heads, mlp hidden, vocabulary), data parallelism
over "data", which also shards d_model of every matrix (FSDP). An axis that does not divide stays
replicated, so every preset loads on every mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Block, GemmaConfig, Params
from gemma_scope_jax.model.processes import join_processes as join_processes

_F = TypeVar("_F", bound=Callable)


def make_mesh(
    data: int = 1, model: int | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of data x model devices with the axes ("data", "model").

    `model=None` takes all the devices that `data` leaves; `devices=None` means `jax.devices()`.
    The axes are `AxisType.Auto`: the compiler places what nobody annotated, such as a user's
    intercept function. Raises `InputError` when the devices do not suffice or do not divide.
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
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * model],
    )


AXES = ("data", "model")


def our_mesh(mesh: Any) -> Mesh:
    """`mesh` as our programs take it: axes ("data", "model") in this order, both Auto.

    The devices stay as they are. Axes of Explicit type, as `jax.make_mesh` makes them, become Auto;
    an axis that is missing has one device, and others are left out if they have one. Raises
    `InputError` for axes of other names, whose meaning would be a guess.
    """
    known = isinstance(mesh, (Mesh, AbstractMesh))
    if known and mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}:
        return mesh  # type: ignore[return-value]
    if not isinstance(mesh, Mesh):
        raise InputError(f"a mesh is wanted, as gs.make_mesh(2, 4) makes one, not {mesh!r}")
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape))
    if others := [name for name in sizes if name not in AXES and sizes[name] > 1]:
        raise InputError(
            f"the mesh has an axis {others[0]!r}: ours are 'data' (rows of a batch, and FSDP) and "
            "'model' (heads, hidden, features); name those of yours so that are meant: "
            "jax.sharding.Mesh(mesh.devices, ('data', 'model'))"
        )
    order = sorted(sizes, key=lambda name: AXES.index(name) if name in AXES else -1)
    devices = mesh.devices.transpose([mesh.axis_names.index(name) for name in order])
    devices = devices.reshape([sizes.get(name, 1) for name in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def on_auto_axes(tree: Any) -> Any:
    """`tree` with its arrays on meshes with Explicit axes put on equal ones with Auto axes, as all
    our programs have; the data stay where they are.
    """
    explicit = lambda x: (
        isinstance(x, jax.Array)
        and not isinstance(x, Tracer)
        and isinstance(x.sharding, NamedSharding)
        and AxisType.Explicit in x.sharding.mesh.axis_types
    )
    if not any(map(explicit, jax.tree.leaves(tree))):
        return tree

    def auto(x: Any) -> Any:
        if not explicit(x):
            return x
        mesh = x.sharding.mesh
        ours = set(mesh.axis_names) <= set(AXES)
        types = (AxisType.Auto,) * mesh.devices.ndim
        mesh = our_mesh(mesh) if ours else Mesh(mesh.devices, mesh.axis_names, axis_types=types)
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(auto, tree)


def check_axes(weight: jax.Array) -> None:
    """Raise `InputError` if a weight lies on a mesh with Explicit axes: no program of ours says
    where each of its values lies.
    """
    mesh = jax.typeof(weight).sharding.mesh
    if any(t == AxisType.Explicit and n > 1 for t, n in zip(mesh.axis_types, mesh.axis_sizes)):
        raise InputError(
            f"the weights lie on a mesh with Explicit axes {mesh.axis_names}: load_model(.., mesh="
            "mesh), or device_put(params, gs.param_shardings(config, mesh)), makes them Auto"
        )


def own_mesh(function: _F) -> _F:
    """Decorates what runs our programs: they go by where the weights lie, not by a mesh that the
    caller has set (`jax.set_mesh`). Traced, as inside a `jit` of the caller's, it changes nothing.
    """

    @functools.wraps(function)
    def call(*args, **options):
        if jax.sharding.get_abstract_mesh().empty:
            return function(*args, **options)
        try:
            unset = jax.set_mesh(Mesh(np.empty((), object), ()))
        except ValueError:  # it cannot be set here: this is being traced
            return function(*args, **options)
        with unset:
            return function(*args, **options)

    return call  # type: ignore[return-value]


def param_specs(config: GemmaConfig, mesh: Mesh, fsdp: bool = True) -> Params:
    """The `PartitionSpec` of every weight, as a `Params`: the layer axis L is never sharded.

    The query heads N are sharded over "model", or the head dimension H where N does not divide;
    kv heads (1 in the small models) are replicated where they do not divide. `fsdp=False` keeps
    d_model whole: for inference where the weights fit.
    """
    c, mesh = config, our_mesh(mesh)

    def fits(axis: str, size: int) -> str | None:
        return axis if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    D = fits("data", c.d_model) if fsdp else None
    N, K = fits("model", c.heads), fits("model", c.kv_heads)
    H = None if N else fits("model", c.head_dim)
    M, V = fits("model", c.d_mlp), fits("model", c.vocab)
    P = PartitionSpec
    return Params(
        embed=P(V, D),
        blocks=Block(
            pre_attn_norm=P(),
            w_q=P(None, D, N, H),
            w_k=P(None, D, K, None),
            w_v=P(None, D, K, None),
            q_norm=P(),
            k_norm=P(),
            w_o=P(None, N, H, D),
            post_attn_norm=P(),
            pre_mlp_norm=P(),
            w_gate=P(None, D, M),
            w_up=P(None, D, M),
            w_down=P(None, M, D),
            post_mlp_norm=P(),
        ),
        final_norm=P(),
        head=None if c.tied else P(V, D),
    )


def param_shardings(config: GemmaConfig, mesh: Mesh, fsdp: bool = True) -> Params:
    """`param_specs` as `NamedSharding`s on `mesh` (see `our_mesh`): for `device_put`, `jit` and the
    loader.
    """
    mesh = our_mesh(mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config, mesh, fsdp))


def shard_batch(mesh: Mesh, array: Any) -> Any:
    """Put `array` [B, ...], or each of a `TokenBatch`, on `mesh`: B split over "data", replicated
    over "model".

    Raises `InputError` when B does not divide.
    """
    if isinstance(array, TokenBatch):
        return jax.tree.map(functools.partial(shard_batch, mesh), array)
    mesh = our_mesh(mesh)
    if np.ndim(array) < 1 or np.shape(array)[0] % mesh.shape["data"]:
        raise InputError(
            f"batch of shape {np.shape(array)} does not split over {mesh.shape['data']} devices; "
            'make B a multiple of the mesh\'s "data" axis'
        )
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))


def mesh_of(weight: jax.Array) -> Any:
    """The abstract mesh a weight lives on if it has our axes, else None.

    The type of a weight tells it, inside `jit` too, so that nobody has to hand it down.
    """
    mesh = jax.typeof(weight).sharding.mesh
    ours = {"data", "model"} <= set(mesh.axis_names) and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if ours else None


def mesh_under(weight: Any) -> Any:
    """The mesh with its devices, where `mesh_of` finds one, of a weight that is there; or None."""
    return weight.sharding.mesh if mesh_of(weight) is not None else None


def place(mesh: Any, x: jax.Array, *axes: str | None) -> jax.Array:
    """Spread `x` over the mesh's `axes`, one a dimension, where they divide; no mesh, no change."""
    if mesh is None:
        return x
    spec = (a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
