"""The optimizer: Adam, and what our recipe adds to it.

`update` removes the part of a decoder's gradient along the decoder, which would only change its
norm; clips gradients of unusual norm; limits how far a feature moves; and keeps decoders at unit
norm and thresholds at 0 or above, in this order.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_scope_jax.training.recipe import OptimizerConfig
from gemma_scope_jax.training.weights import Weights, unit_decoder


def learning_rate(config: OptimizerConfig, update: jax.Array, total: jax.Array) -> jax.Array:
    """The rate of update number `update` of `total`, int32 scalars: a cosine from a tenth over the
    warm-up, then constant, then linear to 0 over the `decay`."""
    update, total = update.astype(jnp.float32), total.astype(jnp.float32)
    ramp = jnp.minimum(1.0, update / max(1, config.warmup))
    rate = config.learning_rate * (1.0 - 0.45 * (1.0 + jnp.cos(jnp.pi * ramp)))
    if not config.decay:
        return rate
    return rate * jnp.clip((total - update) / jnp.maximum(1.0, config.decay * total), 0.0, 1.0)


def adam(config: OptimizerConfig) -> Any:  # optax's types accept arrays, not dataclasses
    """Adam; with b1 = 0, as published, without the first moment, which nothing would read."""
    if config.b1 == 0:
        how = {"eps_in_sqrt": False, "bias_correction": True}
        return optax.scale_by_rms(config.b2, config.epsilon, **how)
    return optax.scale_by_adam(config.b1, config.b2, config.epsilon)


def update(
    grads: Weights, moments: Any, w: Weights, rate: jax.Array, config: OptimizerConfig
) -> tuple[Weights, Any]:
    """One step of the optimizer at a learning rate: (weights, moments).

    `moments` is the state of `adam(config)`.
    """
    grads = dataclasses.replace(grads, w_dec=across(grads.w_dec, w.w_dec))
    grads = clipped(grads, moments, config)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        changes, moments = adam(config).update(grads, moments, w)
    changes = limited(changes, config)
    w = jax.tree.map(lambda a, change: a - rate * change, w, changes)
    w = dataclasses.replace(w, w_dec=unit_decoder(w.w_dec), threshold=jnp.maximum(w.threshold, 0.0))
    return w, moments


def across(grads: tuple[jax.Array, ...], w_dec: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Gradients without their part along the decoder."""
    X = len(w_dec)
    dot = lambda i, j: jnp.sum(grads[j][:, i] * w_dec[j][:, i], -1)
    along = jnp.stack([sum(dot(i, j) for j in range(i, X)) for i in range(X)], 1)
    return tuple(g - along[:, : j + 1, :, None] * w for j, (g, w) in enumerate(zip(grads, w_dec)))


def clipped(grads: Weights, moments: Any, config: OptimizerConfig) -> Weights:
    """Gradients of a coder, for each kind of weight, of at most `clip` times their usual norm.

    The usual norm is the root of the sum of Adam's second moments. An outlier token has thousands
    of active features; Adam moves each at its full rate, and at high learning rates one such batch
    could undo a run. Thresholds are exempt: they have to respond at once to an L0 off its target.
    """
    if not config.clip:
        return grads
    count = moments.count.astype(jnp.float32)
    known = 1.0 - jnp.float32(config.b2) ** count  # 0 before the first update

    def one(g: jax.Array, nu: jax.Array) -> jax.Array:
        over = lambda a: jnp.sum(a, tuple(range(1, a.ndim)), keepdims=True)
        limit = config.clip * jnp.sqrt(over(nu) / jnp.maximum(known, 1e-9))
        norm = jnp.sqrt(over(g * g))
        return jnp.where((limit > 0) & (norm > limit), g * (limit / jnp.maximum(norm, 1e-30)), g)

    cut = jax.tree.map(one, grads, moments.nu)
    return dataclasses.replace(cut, threshold=grads.threshold)


def limited(changes: Weights, config: OptimizerConfig) -> Weights:
    """Adam's changes, before the learning rate, limited for each feature.

    A feature that is seldom active has moments of nearly 0: without momentum, the next token on
    which it fires moves its weights by up to 30 learning rates, which can destroy the feature. So
    no feature's encoder, decoder or bias moves by more than `step_limit` (root mean square), or the
    learning rate if that is larger. Limiting thresholds, too, left more features dead.
    """
    if not config.step_limit:
        return changes
    most = max(1.0, config.step_limit / config.learning_rate)

    def one(u: jax.Array) -> jax.Array:
        rows = u.ndim == 4  # [N, X, features or inputs, D]; biases are [N, X, F or D]
        size = jnp.sqrt(jnp.mean(u * u, -1, keepdims=True)) if rows else jnp.abs(u)
        return u / jnp.maximum(1.0, size / most)

    cut = jax.tree.map(one, changes)
    return dataclasses.replace(cut, threshold=changes.threshold)
