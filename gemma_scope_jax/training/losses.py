"""The loss of a JumpReLU coder and its straight-through gradients.

    L = |x - y|^2 + lambda * (2 / L0*) * (|f|_0 - L0*)^2

Source: Gemma Scope 2 technical paper, equations (4) and (5); JumpReLU SAEs, arXiv 2407.14435: with
the rectangle kernel K(u) = 1[|u| < 1/2] and bandwidth e,

    d JumpReLU(z) / d threshold = -(threshold / e) K((z - threshold) / e)
    d H(z - threshold) / d threshold = -(1 / e) K((z - threshold) / e)

and the sparsity penalty sends no gradient to z. Inputs have unit mean squared norm.
"""

from functools import partial

import jax
import jax.numpy as jnp


def _near(z, threshold, bandwidth):
    return (jnp.abs(z - threshold[None, :]) < 0.5 * bandwidth).astype(z.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """z * (z > threshold) for z [B, F], with the straight-through gradient to threshold [F]."""
    return jnp.where(z > threshold[None, :], jax.nn.relu(z), 0.0)


def _jumprelu_fwd(z, threshold, bandwidth):
    return jumprelu(z, threshold, bandwidth), (z, threshold)


def _jumprelu_bwd(bandwidth, saved, g):
    z, threshold = saved
    dz = jnp.where((z > threshold[None, :]) & (z > 0), g, 0.0)
    dt = -(threshold / bandwidth) * jnp.sum(g * _near(z, threshold, bandwidth), 0)
    return dz, dt


jumprelu.defvjp(_jumprelu_fwd, _jumprelu_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(z: jax.Array, threshold: jax.Array, bandwidth: float) -> jax.Array:
    """1[z > threshold] for z [B, F], with the straight-through gradient to threshold only."""
    return (z > threshold[None, :]).astype(z.dtype)


def _step_fwd(z, threshold, bandwidth):
    return step(z, threshold, bandwidth), (z, threshold)


def _step_bwd(bandwidth, saved, g):
    z, threshold = saved
    return jnp.zeros_like(z), -jnp.sum(g * _near(z, threshold, bandwidth), 0) / bandwidth


step.defvjp(_step_fwd, _step_bwd)


def quadratic_l0(l0: jax.Array, target: float) -> jax.Array:
    """(2 / L0*) (L0 - L0*)^2, elementwise: equation (5) without its weight."""
    return (2.0 / target) * (l0 - target) ** 2
