"""One compiled step: the model's pass, a shuffle buffer on the device, the updates of all coders.

Activations of a pass (without <bos>, padding and what the data leaves out) overwrite the oldest of
a ring buffer, one a site; updates draw from it in random order. Each layer of each site is divided
by one scalar so that they have unit mean squared norm; `fold` puts that into the weights.
With stored activations the batches come from the host and the rest is the same.
"""

import contextlib
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gemma_scope_jax.kernels import active
from gemma_scope_jax.model.batch import counted
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import forward, site_width
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.sharding import place
from gemma_scope_jax.training.held_out import KEPT
from gemma_scope_jax.training.init import random_weights
from gemma_scope_jax.training.objective import gradients
from gemma_scope_jax.training.recipe import CoderConfig, OptimizerConfig, TrainConfig
from gemma_scope_jax.training.weights import CoderGroup, Weights, groups, unit_decoder

Sites = dict[str, jax.Array]  # site -> activations of its layers [L, ..., D]


@flax.struct.dataclass
class GroupState:
    """What one group of coders carries from update to update."""

    weights: Weights
    optimizer: Any
    activity: jax.Array  # float32 [N, X, F]: recent share of tokens, cut; see `activities`
    l0_start: jax.Array  # float32 [N]: target L0 from which the target comes down


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds: resuming from it continues bit for bit."""

    groups: tuple[GroupState, ...]
    buffer: Sites  # site -> [L, buffer, D] raw activations, bfloat16; empty with a store
    slot: jax.Array  # int32: of the buffer, to write next
    filled: jax.Array  # int32: slots ever written
    order: jax.Array  # int32 [buffer]: the order in which slots are drawn
    drawn: jax.Array  # int32: slots of `order` already drawn
    scale: Sites  # site -> float32 [L]: root-mean-square norm of raw activations; 0 until known
    update: jax.Array  # int32: updates done
    total: jax.Array  # int32: updates there will be, known when they begin
    key: jax.Array
    held: Sites  # site -> [L, kept, D] the latest activations that are held out; {} with a store
    held_slot: jax.Array  # int32: of `held`, to write next
    held_filled: jax.Array  # int32: slots ever written


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What decides the program of a run: static, and the same for every step."""

    config: TrainConfig
    groups: tuple[CoderGroup, ...]
    sites: tuple[tuple[str, tuple[int, ...]], ...]  # each site with the layers somebody reads
    mesh: Any = None

    @property
    def stop(self) -> int:
        """The model's layers that have to run."""
        return 1 + max(layer for _, layers in self.sites for layer in layers)

    def capacity(self, group: CoderGroup) -> int:
        """Slots a token (of one layer) in the sparse step, 0 for dense products."""
        if not self.config.sparse or (self.mesh is not None and self.mesh.size > 1):
            return 0
        target = max(max(c.target_l0, c.loss.l0_start or 0) for c in group.coders)
        slots = 16 * int(-(-self.config.sparse * target // 16))
        least = active.FEATURES_A_SLOT[active.sparse_form()]
        return slots if least * slots < group.like.width else 0


def make_plan(config: TrainConfig, model: GemmaConfig, mesh: Any = None) -> TrainPlan:
    """The plan of a run. Raises `InputError` for layers and sites that the model does not have."""
    config, wanted = config.warmed, {}
    for coder in config.coders:
        for site in (coder.reads, coder.target):
            site_width(model, site)
            wanted.setdefault(site, set()).update(coder.layer_tuple)
    sites = tuple((site, tuple(sorted(layers))) for site, layers in sorted(wanted.items()))
    return TrainPlan(config, groups(config), sites, mesh)


# -------------------------------------------------------------------------------------------------
# State


def learning_rate(config: TrainConfig, update: jax.Array, total: jax.Array) -> jax.Array:
    """Of an update: cosine from a tenth over the warm-up, then constant (then linear decay)."""
    o = config.optimizer
    update, total = update.astype(jnp.float32), total.astype(jnp.float32)
    ramp = jnp.minimum(1.0, update / max(1, o.warmup))
    rate = o.learning_rate * (1.0 - 0.45 * (1.0 + jnp.cos(jnp.pi * ramp)))
    if not o.decay:
        return rate
    return rate * jnp.clip((total - update) / jnp.maximum(1.0, o.decay * total), 0.0, 1.0)


def optimizer(config: TrainConfig) -> Any:  # optax's types know arrays, not dataclasses
    """Adam; with b1 = 0, as published, without the first moment that nobody would read."""
    o = config.optimizer
    if o.b1 == 0:
        return optax.scale_by_rms(o.b2, o.epsilon, eps_in_sqrt=False, bias_correction=True)
    return optax.scale_by_adam(o.b1, o.b2, o.epsilon)


def init_state(plan: TrainPlan, model: GemmaConfig) -> TrainState:
    """Coders at random, an empty buffer."""
    config = plan.config
    buffer = 0 if config.store else config.buffer
    rows = lambda count: {
        s: jnp.zeros((len(ls), count, site_width(model, s)), jnp.bfloat16)
        for s, ls in plan.sites
        if buffer
    }
    return TrainState(
        tuple(_group_state(plan, group, model) for group in plan.groups),
        rows(buffer),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.arange(max(1, buffer), dtype=jnp.int32),  # Orbax saves no empty arrays
        jnp.asarray(buffer, jnp.int32),  # all drawn: the first draw shuffles
        {s: jnp.zeros(len(ls)) for s, ls in plan.sites},
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        jax.random.key(config.seed),
        rows(min(KEPT, buffer)),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def _group_state(plan: TrainPlan, group: CoderGroup, model: GemmaConfig) -> GroupState:
    d_in, d_out = (site_width(model, s) for s in (group.like.reads, group.like.target))
    weights = random_weights(group, d_in, d_out, plan.config.seed)
    start = [c.loss.l0_start or c.target_l0 for c in group.coders]
    return GroupState(
        weights,
        optimizer(plan.config).init(weights),
        jnp.e * dead_limit(group) + jnp.zeros(weights.b_enc.shape),
        jnp.asarray(start, jnp.float32),
    )


def state_shardings(state: TrainState, mesh: Any) -> TrainState:
    """Where a state lives on a mesh: features over "model", buffered activations over "data".

    Weights, the optimizer's moments and counters of features split over their feature axis; what
    has none, or does not divide, is everywhere. `state` may be abstract.
    """

    def one(path, leaf):
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

    return jax.tree_util.tree_map_with_path(one, state)


def first_state(plan: TrainPlan, model: GemmaConfig) -> TrainState:
    """`init_state`, made in place on the plan's mesh."""
    if plan.mesh is None:
        return init_state(plan, model)
    places = placement(plan, model)
    return jax.jit(lambda: init_state(plan, model), out_shardings=places)()


def abstract_state(plan: TrainPlan, model: GemmaConfig) -> TrainState:
    """Shapes, dtypes and places of `first_state`."""
    shapes = jax.eval_shape(lambda: init_state(plan, model))
    if plan.mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: here, shapes)
    else:
        places = state_shardings(shapes, plan.mesh)
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, places
    )


def placement(plan: TrainPlan, model: GemmaConfig) -> Any:
    """`state_shardings` of a run, None for one device."""
    if plan.mesh is None:
        return None
    return state_shardings(jax.eval_shape(lambda: init_state(plan, model)), plan.mesh)


# -------------------------------------------------------------------------------------------------
# Activations


def model_activations(model: Model, tokens, segments, counts, plan: TrainPlan):
    """Activations {site: [L, B*T, D]}, and which count (data's `counts`, no padding, no <bos>)."""
    out = forward(
        model,
        tokens,
        [capture(site, layers) for site, layers in plan.sites],
        segments=segments,
        stop_at_layer=plan.stop,
        logits="none",
        remat=None,
    )
    x = {s: out.reads[s].reshape(len(ls), -1, out.reads[s].shape[-1]) for s, ls in plan.sites}
    return x, (counted(segments, plan.config.first) & counts).reshape(-1)


def fill(state: TrainState, x: Sites, counts: jax.Array) -> TrainState:
    """Write the activations that count over the oldest of the buffer."""
    buffer, slot, filled = _write(state.buffer, state.slot, state.filled, x, counts)
    return dataclasses.replace(state, buffer=buffer, slot=slot, filled=filled)


def hold(state: TrainState, x: Sites, counts: jax.Array) -> TrainState:
    """Write the activations that are held out over the oldest of these."""
    held, slot, filled = _write(state.held, state.held_slot, state.held_filled, x, counts)
    return dataclasses.replace(state, held=held, held_slot=slot, held_filled=filled)


def _write(ring: Sites, slot: jax.Array, filled: jax.Array, x: Sites, counts: jax.Array):
    """(ring, slot to write next, slots ever written) with those of x that count written into it."""
    size = next(iter(ring.values())).shape[1]
    number, new = jnp.cumsum(counts.astype(jnp.int32)), jnp.sum(counts, dtype=jnp.int32)
    last = counts & (number > new - size)  # no slot is written twice, or sites might choose apart
    places = jnp.where(last, (slot + number - 1) % size, size)  # beyond the end: dropped
    write = lambda old, new: old.at[:, places].set(new.astype(old.dtype), mode="drop")
    ring = {site: write(old, x[site]) for site, old in ring.items()}
    return ring, (slot + new) % size, jnp.minimum(filled + new, size)


def draw(state: TrainState, plan: TrainPlan) -> tuple[TrainState, Sites]:
    """A batch from the buffer: each slot at most once in a sweep, in another order each time.

    What a sweep leaves over, where the batch does not divide the buffer, waits for the next.
    """
    size, batch = state.order.shape[0], plan.config.batch
    key, shuffle = jax.random.split(state.key)
    over = state.drawn + batch > size
    order = jax.lax.cond(
        over, lambda: jax.random.permutation(shuffle, state.order), lambda: state.order
    )
    begin = jnp.where(over, 0, state.drawn)
    slots = jax.lax.dynamic_slice_in_dim(order, begin, batch)
    state = dataclasses.replace(state, key=key, order=order, drawn=begin + batch)
    return state, {site: rows[:, slots] for site, rows in state.buffer.items()}


def pairs(
    plan: TrainPlan, group: CoderGroup, x: Sites, scale: Sites
) -> tuple[jax.Array, jax.Array]:
    """What a group reads and what it should write: [N, X, B, D] each, unit mean squared norm."""
    mesh, layers_of = plan.mesh, dict(plan.sites)

    def pick(site):
        at = [[layers_of[site].index(layer) for layer in row] for row in group.layers]
        at = jnp.asarray(at, jnp.int32)
        rows = x[site][at].astype(jnp.float32) / scale[site][at][..., None, None]
        return place(mesh, rows, None, None, "data", None)

    read = pick(group.like.reads)
    return read, read if group.like.target == group.like.reads else pick(group.like.target)


# -------------------------------------------------------------------------------------------------
# Updates


def dials(
    state: GroupState, group: CoderGroup, update: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What moves during a run: weight [N] and target [N] of the L0 penalty, dead features.

    Those are float32 [N, X, F]: 0 for a feature that is active often enough, 1 for a silent one.
    """
    config = group.like.loss
    ramp = jnp.minimum(1.0, update.astype(jnp.float32) / max(1, config.l0_warmup))
    target = state.l0_start + ramp * (group.of("target_l0") - state.l0_start)
    dead = jax.nn.relu(1.0 - state.activity / dead_limit(group))
    return group.of("l0_weight") * ramp, target, dead


def dead_limit(group: CoderGroup) -> jax.Array:
    """The share of tokens under which a feature counts as dead: [N, 1, 1]."""
    mean = group.of("target_l0") / (group.X * group.like.width)
    return (group.like.loss.dead_below * mean)[:, None, None]


def activities(old: jax.Array, share: jax.Array, group: CoderGroup) -> jax.Array:
    """The running mean of each feature's `share` of a batch's tokens, over `dead_after` updates.

    It is cut at e times the limit, where all features in use are, so that one that falls silent is
    known to be dead after `dead_after` updates, however often it was active before.
    """
    new = old + (share - old) / max(1, group.like.loss.dead_after)
    return jnp.minimum(new, jnp.e * dead_limit(group))


def apply(old: GroupState, grads: Weights, parts: dict, dead, state: TrainState, plan, group):
    """One step of Adam: (group state, parts). Decoders stay at unit norm, thresholds positive."""
    config = plan.config
    w: Any = old.weights
    rate = learning_rate(config, state.update, state.total)
    grads = dataclasses.replace(grads, w_dec=_across(grads.w_dec, w.w_dec))
    grads = clipped(grads, old.optimizer, config.optimizer)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        changes, moments = optimizer(config).update(grads, old.optimizer, w)
    changes = limited(changes, config.optimizer)
    w = jax.tree.map(lambda a, change: a - rate * change, w, changes)
    w = dataclasses.replace(w, w_dec=unit_decoder(w.w_dec), threshold=jnp.maximum(w.threshold, 0.0))
    parts = dict(parts)
    activity = activities(old.activity, parts.pop("frequency"), group)
    parts["dead"] = jnp.mean(dead > 0, (1, 2))
    return dataclasses.replace(old, weights=w, optimizer=moments, activity=activity), parts


def clipped(grads: Weights, moments: Any, config: OptimizerConfig) -> Weights:
    """Gradients of a coder, of each kind of weight, of at most `clip` times their usual norm.

    That is the root of Adam's second moments, summed. A token of enormous norm has thousands of
    active features; Adam moves each at its full rate, together they overshoot, and at high learning
    rates one such batch could undo a run. Thresholds are left alone: theirs has to answer an L0
    that is off at once, and one token cannot move them far.
    """
    if not config.clip:
        return grads
    count = moments.count.astype(jnp.float32)
    known = 1.0 - jnp.float32(config.b2) ** count  # 0 before the first update

    def one(g, nu):
        over = lambda a: jnp.sum(a, tuple(range(1, a.ndim)), keepdims=True)
        limit = config.clip * jnp.sqrt(over(nu) / jnp.maximum(known, 1e-9))
        norm = jnp.sqrt(over(g * g))
        return jnp.where((limit > 0) & (norm > limit), g * (limit / jnp.maximum(norm, 1e-30)), g)

    cut = jax.tree.map(one, grads, moments.nu)
    return dataclasses.replace(cut, threshold=grads.threshold)


def limited(changes: Weights, config: OptimizerConfig) -> Weights:
    """Adam's changes, before the learning rate, with those of single features cut.

    A feature that is seldom active has moments of nearly 0: without momentum, the first token on
    which it is active again moves each of its weights by up to 30 learning rates. At high rates
    that makes something else of the feature, and the more of them are rare, the less a coder
    learns. No feature's encoder, decoder or bias moves by more than `step_limit` (root mean square
    of its entries), or the learning rate if that is larger. Thresholds are left alone, see
    `clipped`; cut, too, more features stayed silent.
    """
    if not config.step_limit:
        return changes
    most = max(1.0, config.step_limit / config.learning_rate)

    def one(u):
        rows = u.ndim == 4  # [N, X, features or inputs, D]; biases are [N, X, F or D]
        size = jnp.sqrt(jnp.mean(u * u, -1, keepdims=True)) if rows else jnp.abs(u)
        return u / jnp.maximum(1.0, size / most)

    cut = jax.tree.map(one, changes)
    return dataclasses.replace(cut, threshold=changes.threshold)


def _across(grads: tuple[jax.Array, ...], w_dec: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Gradients without their part along the decoder, which would only change its norm."""
    X = len(w_dec)
    along = jnp.stack(
        [sum(jnp.sum(grads[j][:, i] * w_dec[j][:, i], -1) for j in range(i, X)) for i in range(X)],
        1,
    )
    return tuple(g - along[:, : j + 1, :, None] * w for j, (g, w) in enumerate(zip(grads, w_dec)))


def precision(config: TrainConfig) -> Any:
    """A context in which products have the config's precision."""
    name = config.precision
    if name == "bfloat16" and jax.default_backend() == "gpu":
        name = "BF16_BF16_F32"  # what JAX calls bfloat16 is the default there, TF32
    return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)


def update(state: TrainState, x: Sites, plan: TrainPlan) -> tuple[TrainState, list]:
    """One update on activations x {site: [L, batch, D]} of every coder that learns from them."""
    with precision(plan.config):
        return _update(state, x, plan)


def _update(state, x, plan):
    done, parts = [], []
    for group, old in zip(plan.groups, state.groups):
        part = None
        if not group.like.loss.kl_weight:
            read, write = pairs(plan, group, x, state.scale)
            dial = dials(old, group, state.update)
            grads, part = gradients(old.weights, read, write, *dial, group, plan.capacity(group))
            old, part = apply(old, grads, part, dial[-1], state, plan, group)
        done.append(old)
        parts.append(part)
    return dataclasses.replace(state, groups=tuple(done), update=state.update + 1), parts


def scales(x: Sites, plan: TrainPlan) -> Sites:
    """Root-mean-square norms of a sample {site: [L, B, D]}: [L] each.

    Rare tokens of enormous norm count as if at `outlier` median norms, or they would decide it.
    """
    limit = max(c.loss.outlier for c in plan.config.coders)

    def one(rows):
        squares = jnp.sum(jnp.square(rows.astype(jnp.float32)), -1)
        median = jnp.median(squares, 1, keepdims=True)
        return jnp.sqrt(jnp.mean(jnp.minimum(squares, limit**2 * median), 1))

    return {site: one(rows) for site, rows in x.items()}


def scales_of(plan: TrainPlan, coder: CoderConfig, scale: Sites) -> Sites:
    """The scales of a coder's layers where it reads, "in", and where it writes, "out": [X] each."""
    layers = dict(plan.sites)

    def pick(site):
        return scale[site][jnp.asarray([layers[site].index(i) for i in coder.layer_tuple])]

    return {"in": pick(coder.reads), "out": pick(coder.target)}
