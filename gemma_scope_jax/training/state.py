"""What a run carries from update to update, and the plan from which its program is compiled.

`TrainPlan` is static: the recipe, the coders in groups of one shape, the sites that are read, the
mesh. `TrainState` is data: everything in a checkpoint.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.kernels import active
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.training.held_out import KEPT
from gemma_scope_jax.training.init import random_weights
from gemma_scope_jax.training.optimizer import adam
from gemma_scope_jax.training.recipe import TrainConfig
from gemma_scope_jax.training.weights import CoderGroup, Weights, groups

FEWEST = 128  # slots of a token, where the width allows it: L0s near 20 vary most among tokens
Sites = dict[str, jax.Array]  # site -> activations of its layers [L, ..., D]


@flax.struct.dataclass
class GroupState:
    """What one group of coders carries from update to update."""

    weights: Weights
    optimizer: Any  # optax's state
    activity: jax.Array  # float32 [N, X, F]: recent share of tokens; see `step.activities`
    l0_start: jax.Array  # float32 [N]: the target L0 at the start


@flax.struct.dataclass
class TrainState:
    """Everything in a checkpoint: a run resumed from it continues bit for bit."""

    groups: tuple[GroupState, ...]
    buffer: Sites  # site -> [L, buffer, D] raw activations, bfloat16; empty with a store
    slot: jax.Array  # int32: the next slot of the buffer to write
    filled: jax.Array  # int32: slots ever written
    order: jax.Array  # int32 [buffer]: the order in which slots are drawn
    drawn: jax.Array  # int32: slots of `order` already drawn
    scale: Sites  # site -> float32 [L]: root-mean-square norm of raw activations; 0 until known
    update: jax.Array  # int32: updates done
    total: jax.Array  # int32: updates of the whole run, known when they begin
    key: jax.Array
    held: Sites  # site -> [L, kept, D] the latest held-out activations; {} with a store
    held_slot: jax.Array  # int32: the next slot of `held` to write
    held_filled: jax.Array  # int32: slots ever written


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """The static part of a run, from which its program follows."""

    config: TrainConfig
    groups: tuple[CoderGroup, ...]
    sites: tuple[tuple[str, tuple[int, ...]], ...]  # each site with the layers that coders use
    mesh: Mesh | None = None

    @property
    def stop(self) -> int:
        """How many of the model's layers have to run."""
        return 1 + max(layer for _, layers in self.sites for layer in layers)

    def capacity(self, group: CoderGroup) -> int:
        """Slots for a token (of one layer) in the sparse step; 0 for dense products."""
        if not self.config.sparse or (self.mesh is not None and self.mesh.size > 1):
            return 0
        most = (group.template.width - 1) // max(1, active.backend().FEATURES_A_SLOT)
        if group.template.activation == "topk":  # as many as are kept, of one layer
            slots = int(group.template.target_l0)
            return slots if group.X == 1 and slots <= most else 0
        target = max(max(c.target_l0, c.loss.l0_start or 0) for c in group.coders)
        slots = 16 * int(-(-self.config.sparse * target // 16))
        return min(max(slots, FEWEST), most // 16 * 16) if slots <= most else 0


def make_plan(config: TrainConfig, model: GemmaConfig, mesh: Mesh | None = None) -> TrainPlan:
    """The plan of a run. Raises `InputError` for sites that the model does not have."""
    config, wanted = config.resolved, {}
    for coder in config.coders:
        for site in (coder.reads, coder.target):
            site_width(model, site)
            wanted.setdefault(site, set()).update(coder.layer_tuple)
    sites = tuple((site, tuple(sorted(layers))) for site, layers in sorted(wanted.items()))
    return TrainPlan(config, groups(config), sites, mesh)


def init_state(plan: TrainPlan, model: GemmaConfig) -> TrainState:
    """Random coders and an empty buffer."""
    config = plan.config
    buffer = 0 if config.store else config.buffer
    rows = lambda count: {
        s: jnp.zeros((len(ls), count, site_width(model, s)), jnp.bfloat16)
        for s, ls in plan.sites
        if buffer
    }
    counters = ("slot", "filled", "update", "total", "held_slot", "held_filled")
    return TrainState(
        groups=tuple(_group_state(plan, group, model) for group in plan.groups),
        buffer=rows(buffer),
        order=jnp.arange(max(1, buffer), dtype=jnp.int32),  # Orbax cannot save empty arrays
        drawn=jnp.asarray(buffer, jnp.int32),  # all drawn: the first draw shuffles
        scale={s: jnp.zeros(len(ls)) for s, ls in plan.sites},
        key=jax.random.key(config.seed),
        held=rows(min(KEPT, buffer)),
        **{name: jnp.zeros((), jnp.int32) for name in counters},
    )


def _group_state(plan: TrainPlan, group: CoderGroup, model: GemmaConfig) -> GroupState:
    d_in, d_out = (site_width(model, s) for s in (group.template.reads, group.template.target))
    weights = random_weights(group, d_in, d_out, plan.config.seed)
    start = [c.loss.l0_start or c.target_l0 for c in group.coders]
    return GroupState(
        weights,
        adam(plan.config.optimizer).init(weights),
        jnp.e * group.dead_limit + jnp.zeros(weights.b_enc.shape),
        jnp.asarray(start, jnp.float32),
    )


def placement(plan: TrainPlan, model: GemmaConfig) -> Any:
    """A tree of shardings, the placement of a state on the plan's mesh; None for one device.

    Features are split over "model" (weights, the optimizer's moments, `activity`), buffered
    activations over "data"; arrays that have no such axis, or do not divide, are everywhere.
    """
    mesh = plan.mesh
    if mesh is None:
        return None

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = {getattr(p, "name", getattr(p, "key", "")) for p in path}
        spec = [None] * leaf.ndim
        if names & {"w_enc", "b_enc", "threshold", "w_dec", "activity"}:
            axis, over = 2, "model"
        elif names & {"buffer", "held"}:
            axis, over = 1, "data"
        else:
            return NamedSharding(mesh, PartitionSpec())
        if leaf.shape[axis] % mesh.shape[over] == 0:
            spec[axis] = over
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(lambda: init_state(plan, model)))


def first_state(plan: TrainPlan, model: GemmaConfig) -> TrainState:
    """`init_state`, made in place on the plan's mesh."""
    if plan.mesh is None:
        return init_state(plan, model)
    return jax.jit(lambda: init_state(plan, model), out_shardings=placement(plan, model))()


def abstract_state(plan: TrainPlan, model: GemmaConfig) -> TrainState:
    """Shapes, dtypes and shardings of `first_state`."""
    shapes = jax.eval_shape(lambda: init_state(plan, model))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = placement(plan, model) or jax.tree.map(lambda _: here, shapes)
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places
    )
