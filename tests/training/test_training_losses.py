"""The trainer's losses and gradients against float64 NumPy and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.training.objective import calibrated
from loss_problems import (
    CASES,
    JUMPRELU,
    B,
    close,
    compiled,
    differences,
    kept,
    pre_activations,
    problem,
    reference,
    threshold_gradients,
)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_a_float64_forward_pass(name):
    p = problem(name)
    grads, parts = compiled(name, 0, None)(p.weights())
    for n in range(len(p.group.coders)):
        total, r = reference(p, p.arrays, n)
        wanted = {"loss": total, "mse": r["mse"], "fvu": r["fvu"], "l0": r["l0"].mean()}
        for key, value in wanted.items():
            assert float(parts[key][n]) == pytest.approx(value, rel=1e-5), key
        np.testing.assert_allclose(parts["frequency"][n], r["on"].mean(1), rtol=1e-6)
    for key, wanted in differences(name).items():
        if wanted is None:
            assert getattr(grads, key) is None
        for a, b in zip(jax.tree.leaves(getattr(grads, key)), jax.tree.leaves(wanted)):
            assert np.any(b), key
            close(a, b, 2e-5)


@pytest.mark.parametrize("name", JUMPRELU)
def test_threshold_gradients_are_the_straight_through_estimator(name):
    p = problem(name)
    grads, _ = compiled(name, 0, None)(p.weights())
    close(grads.threshold, threshold_gradients(name), 2e-5)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_topk_keeps_the_largest_and_trains_no_threshold(name):
    p = problem(name)
    grads, parts = compiled(name, 0, None)(p.weights())
    assert not np.any(grads.threshold)
    np.testing.assert_allclose(parts["l0"], 3.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_calibrated_thresholds_give_the_target_l0(name):
    p = problem(name)
    x = jnp.asarray(p.x, jnp.float32)
    w = calibrated(p.weights(), x, p.group)
    assert w.threshold.shape == p.arrays["threshold"].shape
    for n, c in enumerate(p.group.coders):
        assert len(np.unique(w.threshold[n])) == 1
        z = pre_activations(p.arrays, p.x, n, c)
        on = z > float(w.threshold[n, 0, 0])
        assert on.sum() == 3 * B
        if name == "batch_topk":  # the very features of training
            np.testing.assert_array_equal(on, kept(z, c)[0])
