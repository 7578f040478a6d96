"""The optimizer: Adam, and what our recipe adds to it.

`update` removes the part of a decoder's gradient along the decoder, which would only change its
norm; clips gradients of unusual norm; limits how far a feature moves; and keeps decoders at unit
norm and thresholds at 0 or above, in this order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_scope_jax.kernels import active, cpu
from gemma_scope_jax.model.sharding import mesh_of
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
    grads: Weights,
    moments: Any,
    w: Weights,
    rate: jax.Array,
    dead: jax.Array,
    config: OptimizerConfig,
) -> tuple[Weights, Any]:
    """One step of the optimizer at a learning rate: (weights, moments).

    `moments` is the state of `adam(config)`; `dead` [N, X, F] is above 0 for dead features, whose
    thresholds move at the full rate.
    """
    if not _kernel(w):
        grads = dataclasses.replace(grads, w_dec=across(grads.w_dec, w.w_dec))
        return _by_optax(clipped(grads, moments, config), moments, w, rate, dead, config)
    # Decoders that write several layers are several arrays with one norm: those are left to optax.
    single = len(w.w_dec) == 1
    if single:
        arrays = {"w_enc": lambda tree: tree.w_enc, "w_dec": lambda tree: tree.w_dec[0]}
    else:
        arrays = {"w_enc": lambda tree: tree.w_enc}
        grads = dataclasses.replace(grads, w_dec=across(grads.w_dec, w.w_dec))
    if w.w_skip is not None:
        arrays["w_skip"] = lambda tree: tree.w_skip
    none = {name: () if name == "w_dec" else None for name in arrays}
    rest = lambda tree: dataclasses.replace(tree, **none)
    squares = _squares(grads)
    if single:  # the kernel leaves out what is along the decoder
        along = jnp.sum(grads.w_dec[0] * w.w_dec[0], -1)
        left = squares.w_dec[0] - jnp.sum(along**2, (1, 2))
        squares = dataclasses.replace(squares, w_dec=(jnp.maximum(left, 0.0),))
    factors = clip_factors(squares, moments, config)
    kept = {name: getattr(moments, name) for name in ("mu", "nu") if hasattr(moments, name)}
    few = moments._replace(**{name: rest(tree) for name, tree in kept.items()})
    small = scaled(rest(grads), rest(factors))
    new, few = _by_optax(small, few, rest(w), rate, dead, config)
    made = {
        name: _by_rows(pick, grads, kept, w, rate, factors, few.count, config, name == "w_dec")
        for name, pick in arrays.items()
    }
    part = lambda n: {k: (a[n],) if k == "w_dec" else a[n] for k, a in made.items()}
    whole = lambda tree, n: dataclasses.replace(tree, **part(n))
    moments = {name: whole(getattr(few, name), {"mu": 1, "nu": 2}[name]) for name in kept}
    return whole(new, 0), few._replace(**moments)


def _kernel(w: Weights) -> bool:
    """Whether `cpu.adam_rows` takes the step of large arrays: several times fewer passes over
    memory than XLA makes."""
    return active.backend() is cpu and mesh_of(w.w_enc) is None


def _by_rows(
    pick: Callable[[Weights], jax.Array],
    grads: Weights,
    moments: dict[str, Weights],
    w: Weights,
    rate: jax.Array,
    factors: Weights,
    count: jax.Array,
    config: OptimizerConfig,
    unit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weights, first moments, second moments) of the array that `pick` picks, by the kernel."""
    factor, count = pick(factors), count.astype(jnp.float32)
    known = [1.0 / (1.0 - jnp.float32(b) ** count) for b in (config.b1, config.b2)]
    scalars = jnp.stack([*(jnp.broadcast_to(a, factor.shape) for a in (rate, *known)), factor])
    m = pick(moments["mu"]) if "mu" in moments else jnp.zeros(1)
    how = {"b1": config.b1, "b2": config.b2, "epsilon": config.epsilon, "most": _most(config)}
    return cpu.adam_rows(pick(w), m, pick(moments["nu"]), pick(grads), scalars, unit=unit, **how)


def _by_optax(
    grads: Weights,
    moments: Any,
    w: Weights,
    rate: jax.Array,
    dead: jax.Array,
    config: OptimizerConfig,
) -> tuple[Weights, Any]:
    """`update` after the gradients have been clipped."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        changes, moments = adam(config).update(grads, moments, w)
    changes = limited(changes, config)
    slow = changes.threshold * jnp.where(dead > 0, 1.0, config.threshold_rate)
    changes = dataclasses.replace(changes, threshold=slow)
    w = jax.tree.map(lambda a, change: a - rate * change, w, changes)
    w_dec = unit_decoder(w.w_dec) if w.w_dec else ()
    w = dataclasses.replace(w, w_dec=w_dec, threshold=jnp.maximum(w.threshold, 0.0))
    return w, moments


def across(grads: tuple[jax.Array, ...], w_dec: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Gradients without their part along the decoder."""
    X = len(w_dec)
    dot = lambda i, j: jnp.sum(grads[j][:, i] * w_dec[j][:, i], -1)
    along = jnp.stack([sum(dot(i, j) for j in range(i, X)) for i in range(X)], 1)
    return tuple(g - along[:, : j + 1, :, None] * w for j, (g, w) in enumerate(zip(grads, w_dec)))


def clipped(grads: Weights, moments: Any, config: OptimizerConfig) -> Weights:
    """Gradients of a coder, for each kind of weight, of at most `clip` times their usual norm."""
    return scaled(grads, clip_factors(_squares(grads), moments, config))


def _squares(grads: Weights) -> Weights:
    """The squared norm of each coder's gradients: [N] for each kind of weight."""
    return jax.tree.map(lambda g: jnp.sum(g * g, tuple(range(1, g.ndim))), grads)


def clip_factors(squares: Weights, moments: Any, config: OptimizerConfig) -> Weights:
    """Factors [N] that cut a coder's gradients, for each kind of weight, to at most `clip` times
    their usual norm. `squares`: their squared norms, likewise.

    The usual norm is the root of the sum of Adam's second moments. An outlier token has thousands
    of active features; Adam moves each at its full rate, and at high learning rates one such batch
    could undo a run. Thresholds are exempt: they have to respond at once to an L0 off its target.
    """
    if not config.clip:
        return jax.tree.map(jnp.ones_like, squares)
    count = moments.count.astype(jnp.float32)
    known = 1.0 - jnp.float32(config.b2) ** count  # 0 before the first update

    def one(square: jax.Array, nu: jax.Array) -> jax.Array:
        usual = jnp.sum(nu, tuple(range(1, nu.ndim))) / jnp.maximum(known, 1e-9)
        limit, norm = config.clip * jnp.sqrt(usual), jnp.sqrt(square)
        return jnp.where((limit > 0) & (norm > limit), limit / jnp.maximum(norm, 1e-30), 1.0)

    cut = jax.tree.map(one, squares, moments.nu)
    return dataclasses.replace(cut, threshold=jnp.ones_like(cut.threshold))


def scaled(grads: Weights, factors: Weights) -> Weights:
    """Gradients times the factor [N] of their coder and kind."""
    return jax.tree.map(lambda g, f: g * f.reshape(-1, *[1] * (g.ndim - 1)), grads, factors)


def _most(config: OptimizerConfig) -> float:
    """The largest change of a feature, in learning rates; 0 for any."""
    if not config.step_limit:
        return 0.0
    return max(1.0, config.step_limit / config.learning_rate)


def limited(changes: Weights, config: OptimizerConfig) -> Weights:
    """Adam's changes, before the learning rate, limited for each feature.

    A feature that is seldom active has moments of nearly 0: without momentum, the next token on
    which it fires moves its weights by up to 30 learning rates, which can destroy the feature. So
    no feature's encoder, decoder or bias moves by more than `step_limit` (root mean square), or the
    learning rate if that is larger. Limiting thresholds, too, left more features dead.
    """
    if not config.step_limit:
        return changes
    most = _most(config)

    def one(u: jax.Array) -> jax.Array:
        rows = u.ndim == 4  # [N, X, features or inputs, D]; biases are [N, X, F or D]
        size = jnp.sqrt(jnp.mean(u * u, -1, keepdims=True)) if rows else jnp.abs(u)
        return u / jnp.maximum(1.0, size / most)

    cut = jax.tree.map(one, changes)
    return dataclasses.replace(cut, threshold=changes.threshold)
