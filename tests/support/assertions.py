"""What tests say again and again."""

import jax
import numpy as np


def same(a, b, rtol=1e-5):
    """Two arrays or trees, equal within a share of each leaf's largest entry."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves[0]) == len(leaves[1])
    for one, other in zip(*leaves):
        assert one.shape == other.shape
        atol = rtol * np.abs(other).max() if other.size else 0
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def one_line(excinfo):
    assert "\n" not in str(excinfo.value)


def close(got, want, rtol=3e-5, atol=1e-6):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
