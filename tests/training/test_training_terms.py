"""Single terms of the loss are their formulas, and their gradients the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.training import losses
from gemma_scope_jax.training.losses import jumprelu, quadratic_l0, step


def test_jumprelu_and_step_are_the_published_ones():
    """Strict, and with the published gradients."""
    bandwidth = 0.5
    z = jnp.array([[0.2, 0.5, 0.6, 0.9, -1.0], [0.5001, 0.1, 2.0, 0.3, 0.74]])
    threshold = jnp.full((2, 5), 0.5)
    assert jumprelu(z, threshold, bandwidth)[0, 1] == 0 and step(z, threshold, bandwidth)[0, 1] == 0
    np.testing.assert_array_equal(jumprelu(z, threshold, bandwidth), np.where(z > 0.5, z, 0))
    g = jnp.asarray(np.random.default_rng(0).standard_normal(z.shape), jnp.float32)
    near = np.abs(np.asarray(z) - 0.5) / bandwidth < 0.5
    dz, dt = jax.vjp(lambda z, t: jumprelu(z, t, bandwidth), z, threshold)[1](g)
    np.testing.assert_allclose(dz, np.asarray(g) * (np.asarray(z) > 0.5), rtol=1e-6)
    np.testing.assert_allclose(dt, -0.5 / bandwidth * np.asarray(g) * near, rtol=1e-6)
    dz, dt = jax.vjp(lambda z, t: step(z, t, bandwidth), z, threshold)[1](g)
    assert not np.any(dz)
    np.testing.assert_allclose(dt, -np.asarray(g) * near / bandwidth, rtol=1e-6)


def test_an_active_jumprelu_below_zero_is_silent():
    """Thresholds stay at or above 0, but nothing negative may come out should one not."""
    z, threshold = jnp.array([-0.5, 0.5]), jnp.array([-1.0, -1.0])
    assert jumprelu(z, threshold, 0.1).tolist() == [0, 0.5]
    assert jax.grad(lambda z: jumprelu(z, threshold, 0.1).sum())(z).tolist() == [0, 1]


def test_penalties_are_their_formulas():
    rng = np.random.default_rng(0)
    l0, f = rng.uniform(0, 40, 7).astype(np.float32), rng.uniform(0, 2, (3, 6)).astype(np.float32)
    got = quadratic_l0(jnp.asarray(l0), jnp.float32(20.0))
    np.testing.assert_allclose(got, [2 / 20 * (v - 20) ** 2 for v in l0], rtol=1e-5)
    got = losses.tanh_l0(jnp.asarray(f), 4.0)
    np.testing.assert_allclose(got, [sum(np.tanh(4 * v) for v in row) for row in f], rtol=1e-6)
    p = np.array([0.0, 0.1, 0.05, 0.2, 0.35], np.float32)
    wanted = sum(0.1 * (v / 0.1 - 1) ** 2 for v in p if v > 0.1)
    assert losses.frequency_penalty(jnp.asarray(p), 0.1) == pytest.approx(wanted, rel=1e-5)
    y = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(losses.token_weight(jnp.asarray(y), 2.0), [4 / 25, 1, 1], rtol=1e-6)


def test_a_feature_over_the_frequency_limit_pays_and_one_below_does_not():
    slope = jax.grad(lambda p: losses.frequency_penalty(p, 0.1))(jnp.array([0.05, 0.1, 0.2, 0.3]))
    np.testing.assert_allclose(slope, [0, 0, 2, 4], rtol=1e-5, atol=1e-6)


def test_end_to_end_is_equation_6_and_alpha_is_a_constant():
    mse, kl, beta = 0.3, 0.02, 1.5
    value, (dm, dk) = jax.value_and_grad(losses.end_to_end, (0, 1))(
        jnp.float32(mse), jnp.float32(kl), beta
    )
    alpha = mse / (kl + 1e-8)
    assert value == pytest.approx((mse + alpha * beta * kl) / (1 + beta), rel=1e-6)
    assert dm == pytest.approx(1 / (1 + beta), rel=1e-6)
    assert dk == pytest.approx(alpha * beta / (1 + beta), rel=1e-6)
