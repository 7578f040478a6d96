"""The shuffle buffer: activations of the model's passes, drawn in random order, at unit norm.

The activations of a pass (without <bos>, padding and tokens that the data exclude) overwrite the
oldest of a ring buffer on the device, one for each site; updates draw from it in random order. Each
layer of each site is divided by one scalar, for unit mean squared norm; `weights.fold` undoes that.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.sharding import place
from gemma_scope_jax.training.recipe import CoderConfig
from gemma_scope_jax.training.state import Sites, TrainPlan, TrainState
from gemma_scope_jax.training.weights import CoderGroup


def model_activations(model: Model, batch: TokenBatch, plan: TrainPlan) -> tuple[Sites, jax.Array]:
    """Activations {site: [L, B*T, D]}, and which to use: the batch's mask without <bos>, [B*T]."""
    reads = [capture(site, layers) for site, layers in plan.sites]
    out = forward(model, batch, reads, stop_at_layer=plan.stop, logits="none", remat=None)
    return all_rows(out.reads, plan), batch.counted(plan.config.first).reshape(-1)


def all_rows(reads: Sites, plan: TrainPlan) -> Sites:
    """A pass's activations {site: [L, B, T, D]} as {site: [L, B*T, D]}."""
    return {s: reads[s].reshape(len(ls), -1, reads[s].shape[-1]) for s, ls in plan.sites}


def fill(state: TrainState, x: Sites, mask: jax.Array) -> TrainState:
    """Write the activations in the mask over the oldest of the buffer."""
    buffer, slot, filled = _write(state.buffer, state.slot, state.filled, x, mask)
    return dataclasses.replace(state, buffer=buffer, slot=slot, filled=filled)


def hold(state: TrainState, x: Sites, mask: jax.Array) -> TrainState:
    """Write the held-out activations over the oldest held-out ones."""
    held, slot, filled = _write(state.held, state.held_slot, state.held_filled, x, mask)
    return dataclasses.replace(state, held=held, held_slot=slot, held_filled=filled)


def _write(
    ring: Sites, slot: jax.Array, filled: jax.Array, x: Sites, mask: jax.Array
) -> tuple[Sites, jax.Array, jax.Array]:
    """(ring with the x of the mask written into it, next slot to write, slots ever written)."""
    size = next(iter(ring.values())).shape[1]
    number, new = jnp.cumsum(mask.astype(jnp.int32)), jnp.sum(mask, dtype=jnp.int32)
    last = mask & (number > new - size)  # write no slot twice: sites might choose differently
    places = jnp.where(last, (slot + number - 1) % size, size)  # beyond the end: dropped
    write = lambda old, new: old.at[:, places].set(new.astype(old.dtype), mode="drop")
    ring = {site: write(old, x[site]) for site, old in ring.items()}
    return ring, (slot + new) % size, jnp.minimum(filled + new, size)


def draw(state: TrainState, plan: TrainPlan) -> tuple[TrainState, Sites]:
    """A batch from the buffer: each slot at most once in a sweep, in a new order each time. Slots
    left over at the end of a sweep wait for the next one."""
    size, batch = state.order.shape[0], plan.config.train_batch_size
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
    """(what a group reads, what it should write): [N, X, B, D] each, unit mean squared norm."""
    layers_of, reads, writes = dict(plan.sites), group.template.reads, group.template.target

    def pick(site: str) -> jax.Array:
        at = [[layers_of[site].index(layer) for layer in row] for row in group.layers]
        at = jnp.asarray(at, jnp.int32)
        rows = x[site][at].astype(jnp.float32) / scale[site][at][..., None, None]
        return place(plan.mesh, rows, None, None, "data", None)

    read = pick(reads)
    return read, read if writes == reads else pick(writes)


def scales(x: Sites, plan: TrainPlan) -> Sites:
    """Root-mean-square norms of a sample {site: [L, B, D]}: [L] each.

    The norms of outlier tokens are cut at `outlier` median norms, or they would dominate.
    """
    limit = max(c.loss.outlier for c in plan.config.coders)

    def one(rows: jax.Array) -> jax.Array:
        squares = jnp.sum(jnp.square(rows.astype(jnp.float32)), -1)
        median = jnp.median(squares, 1, keepdims=True)
        return jnp.sqrt(jnp.mean(jnp.minimum(squares, limit**2 * median), 1))

    return {site: one(rows) for site, rows in x.items()}


def scales_of(plan: TrainPlan, coder: CoderConfig, scale: Sites) -> Sites:
    """The scales of a coder's layers at the sites it reads, "in", and writes, "out": [X] each."""
    layers = dict(plan.sites)
    at = lambda site: jnp.asarray([layers[site].index(i) for i in coder.layer_tuple])
    ends = {"in": coder.reads, "out": coder.target}
    return {end: scale[site][at(site)] for end, site in ends.items()}
