"""The k largest entries of a token, without a sort of all: as a sort finds them."""

import jax
import numpy as np
import pytest

from gemma_scope_jax.kernels import cpu, xla
from gemma_scope_jax.kernels.active import encode_active

BACKENDS = {"xla": xla} | ({"cpu": cpu} if cpu.available() else {})


def by_sorting(z, k):
    """values, features in rising order, count: of one token."""
    above = np.flatnonzero(z > 0)
    ids = np.sort(above[np.argsort(-z[above], kind="stable")[:k]])
    pad = (0, k - len(ids))
    return np.pad(z[ids], pad), np.pad(ids, pad), len(ids)


@pytest.mark.parametrize("kernels", BACKENDS.values(), ids=list(BACKENDS))
@pytest.mark.parametrize("width", (5, 17, 1003))  # less than a block of 16, ragged, many blocks
@pytest.mark.parametrize("k", (1, 4, 5))
def test_they_are_those_of_a_sort(kernels, width, k):
    rng = np.random.default_rng(width + k)
    z = rng.standard_normal((2, 40, width)).astype(np.float32)
    z[0, 0] = -1.0  # none above zero
    z[0, 1, 1:] = -1.0  # one at most
    z[0, 2] = np.sort(z[0, 2])  # each entry is the largest so far
    z[0, 3] = np.sort(z[0, 3])[::-1]
    z[0, 4] = 1.0  # all alike
    bias = (rng.standard_normal((2, width)) / 8).astype(np.float32)
    bias[0] = 0
    found = [np.asarray(a) for a in jax.jit(kernels.largest, static_argnums=2)(z, bias, k)]
    for s, b in np.ndindex(2, 40):
        values, feature, count = by_sorting(z[s, b] + bias[s], k)
        np.testing.assert_array_equal(found[0][s, b], values)
        np.testing.assert_array_equal(found[1][s, b], feature)
        assert found[2][s, b] == count


@pytest.mark.parametrize("kernels", BACKENDS.values(), ids=list(BACKENDS))
def test_their_gradients_are_those_of_a_sort(kernels):
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 5), (2, 30, 5), (2, 30)))
    weight = rng.standard_normal((2, 9, 4)).astype(np.float32)

    def ours(w, b):
        return (encode_active(x, w, b, None, 4, using=kernels).z * weight).sum()

    grads = jax.grad(ours, (0, 1))(w, b)
    found = encode_active(x, w, b, None, 4, using=kernels)
    assert bool(found.complete)
    wanted = np.zeros_like(w), np.zeros_like(b)
    for s, t in np.ndindex(2, 9):
        for slot in range(int(found.count[s, t])):
            f = int(found.feature[s, t, slot])
            wanted[0][s, f] += weight[s, t, slot] * x[s, t]
            wanted[1][s, f] += weight[s, t, slot]
    for a, e in zip(grads, wanted):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
