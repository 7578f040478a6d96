"""The terms of a coder's loss, each a small function, and the straight-through gradients.

    L = mean |y - y_hat|^2 + lambda (2 / L0*) (L0 - L0*)^2 + frequency + revival

Source: Gemma Scope 2 technical paper, equations (4) to (6); JumpReLU SAEs, arXiv 2407.14435: with
the rectangle kernel K(u) = 1[|u| < 1/2] and bandwidth e,

    d JumpReLU(z) / d threshold = -(threshold / e) K((z - threshold) / e)
    d H(z - threshold) / d threshold = -(1 / e) K((z - threshold) / e)

and the sparsity penalty sends no gradient to z. Activations have unit mean squared norm; `z` and
`threshold` have the same shape, over all features or over the active ones.
"""

from functools import partial

import jax
import jax.numpy as jnp


def _near(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    return (jnp.abs(z - threshold) < 0.5 * bandwidth).astype(z.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """z * (z > threshold), elementwise, with the straight-through gradient to `threshold`."""
    return jnp.where(z > threshold, jax.nn.relu(z), 0.0)


def _jumprelu_backward(bandwidth, saved, g):
    z, threshold = saved
    dz = jnp.where((z > threshold) & (z > 0), g, 0.0)
    return dz, -(threshold / bandwidth) * g * _near(z, threshold, bandwidth)


jumprelu.defvjp(lambda z, t, width: (jumprelu(z, t, width), (z, t)), _jumprelu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """1[z > threshold], elementwise, with the straight-through gradient to `threshold` only."""
    return (z > threshold).astype(z.dtype)


def _step_backward(bandwidth, saved, g):
    z, threshold = saved
    return jnp.zeros_like(z), -g * _near(z, threshold, bandwidth) / bandwidth


step.defvjp(lambda z, t, width: (step(z, t, width), (z, t)), _step_backward)


def quadratic_l0(l0: jax.Array, target: jax.Array) -> jax.Array:
    """(2 / L0*) (L0 - L0*)^2, elementwise: equation (5) without its weight."""
    return (2.0 / target) * (l0 - target) ** 2


def tanh_l0(f: jax.Array, scale: float) -> jax.Array:
    """sum tanh(c f) over the last axis: Anthropic's smooth count of active features, for decoder
    rows of unit norm. Source: Circuits updates, January 2025."""
    return jnp.sum(jnp.tanh(scale * f), -1)


def frequency_penalty(frequency: jax.Array, limit: float) -> jax.Array:
    """limit * sum max(0, p / limit - 1)^2 over the last axis, p [..., F] the share of tokens.

    The paper penalises features above 10 %, but gives no formula. Here one more activation of a
    feature costs 2 at twice the limit, and nothing up to the limit. Near the target of equation (5)
    it costs (4 / L0*) (L0 - L0*) lambda, a few thousandths: weights of about 0.01 have an effect.
    """
    return limit * jnp.sum(jax.nn.relu(frequency / limit - 1.0) ** 2, -1)


def share_of_tokens(
    fired: jax.Array, excess: jax.Array, threshold: jax.Array, tokens: int, narrowest: float
) -> jax.Array:
    """The share p of tokens on which features are active, with a gradient to their thresholds.

    `fired` is the number of a feature's active tokens, `excess` the sum of z - threshold over them,
    all [..., F]. The gradient is that of exponentially distributed values, dp / dthreshold = -p /
    mean(z - threshold), with a mean of at least `narrowest`: the kernel of `step` is too narrow for
    features with all values far above their threshold.
    """
    fired, excess = jax.lax.stop_gradient((fired, excess))
    mean = jnp.maximum(excess / jnp.maximum(fired, 1.0), narrowest)
    p = fired / tokens
    return p - p / mean * (threshold - jax.lax.stop_gradient(threshold))


def token_weight(y: jax.Array, outlier: float) -> jax.Array:
    """min(1, outlier^2 / |y|^2) over y [..., D]: outlier tokens have the weight of `outlier`."""
    return jnp.minimum(1.0, outlier**2 / jnp.maximum(jnp.sum(y * y, -1), 1e-9))


def end_to_end(mse: jax.Array, kl: jax.Array, beta: float) -> jax.Array:
    """(MSE + alpha beta KL) / (1 + beta), alpha = stop_gradient(MSE / (KL + 1e-8)): eq. (6)."""
    alpha = jax.lax.stop_gradient(mse / (kl + 1e-8))
    return (mse + alpha * beta * kl) / (1.0 + beta)
