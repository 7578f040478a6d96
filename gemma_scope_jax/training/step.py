"""One update of all coders of a run, on activations from the buffer or from a store."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope_jax.training import optimizer
from gemma_scope_jax.training.buffer import pairs
from gemma_scope_jax.training.objective import Dials, Parts, gradients
from gemma_scope_jax.training.recipe import TrainConfig
from gemma_scope_jax.training.state import GroupState, Sites, TrainPlan, TrainState
from gemma_scope_jax.training.weights import CoderGroup, Weights


def precision(config: TrainConfig) -> contextlib.AbstractContextManager[Any]:
    """A context in which products have the config's precision."""
    name = config.precision
    if name == "bfloat16" and jax.default_backend() == "gpu":
        name = "BF16_BF16_F32"  # JAX's "bfloat16" is the default on GPUs, TF32
    return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)


def update(state: TrainState, x: Sites, plan: TrainPlan) -> tuple[TrainState, list[Parts]]:
    """One update on activations x {site: [L, batch, D]} of every coder that learns from them; the
    others have no parts."""
    done, parts = [], []
    with precision(plan.config):
        for group, old in zip(plan.groups, state.groups):
            part = {}
            if not group.template.loss.kl_weight:
                read, write = pairs(plan, group, x, state.scale)
                now = dials(old, group, state.update)
                grads, part = gradients(old.weights, read, write, now, group, plan.capacity(group))
                old, part = apply(old, grads, part, now, state, plan, group)
            done.append(old)
            parts.append(part)
        return dataclasses.replace(state, groups=tuple(done), update=state.update + 1), parts


def dials(state: GroupState, group: CoderGroup, update: jax.Array) -> Dials:
    """The weights of a group's losses at an update."""
    config = group.template.loss
    ramp = jnp.minimum(1.0, update.astype(jnp.float32) / max(1, config.l0_warmup))
    target = state.l0_start + ramp * (group.of("target_l0") - state.l0_start)
    dead = jax.nn.relu(1.0 - state.activity / group.dead_limit)
    return Dials(group.of("l0_weight") * ramp, target, dead)


def activities(old: jax.Array, share: jax.Array, group: CoderGroup) -> jax.Array:
    """The running mean of each feature's `share` of a batch's tokens, over `dead_after` updates.

    It is at most e times the limit, the value of all features in use, so that a feature that no
    longer fires is dead after `dead_after` updates, however often it fired before.
    """
    new = old + (share - old) / max(1, group.template.loss.dead_after)
    return jnp.minimum(new, jnp.e * group.dead_limit)


def apply(
    old: GroupState,
    grads: Weights,
    parts: Parts,
    dials: Dials,
    state: TrainState,
    plan: TrainPlan,
    group: CoderGroup,
) -> tuple[GroupState, Parts]:
    """(a group's state after one step of the optimizer, its parts of the loss for the log)."""
    config = plan.config.optimizer
    rate = optimizer.learning_rate(config, state.update, state.total)
    weights, moments = optimizer.update(grads, old.optimizer, old.weights, rate, dials.dead, config)
    if "edge" in parts:  # BatchTopK: the next update looks for its cut-off from here on
        edge = jnp.broadcast_to(parts["edge"][:, None, None], weights.threshold.shape)
        weights = dataclasses.replace(weights, threshold=edge)
    activity = activities(old.activity, parts["frequency"], group)
    logged = {name: part for name, part in parts.items() if name not in ("frequency", "edge")}
    logged["dead"] = jnp.mean(dials.dead > 0, (1, 2))
    return dataclasses.replace(old, weights=weights, optimizer=moments, activity=activity), logged
