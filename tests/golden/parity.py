"""Our side of the parity tests: the forward pass as users compile it, and the tolerances."""

from functools import partial

import jax
import numpy as np

import gemma_scope_jax as gs
from golden.weights import SITES

# strict_jax.py has tests compiled with little optimisation; parity is claimed for what users run.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@partial(jax.jit, compiler_options=AS_USERS)
def _run(model, ids):
    return gs.forward(model, ids, [gs.capture(site) for site in SITES])


def our_forward(model: gs.Model, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [B, T, V] and, by site, activations [L, B, T, ...] of our forward pass."""
    out = _run(model, jax.numpy.asarray(ids))
    return np.asarray(out.logits), {site: np.asarray(out.reads[site]) for site in SITES}


def assert_sites_agree(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """At every site, layer by layer, within 2e-5 of the largest value."""
    for site in SITES:
        assert ours[site].shape == theirs[site].shape
        for layer, (mine, other) in enumerate(zip(ours[site], theirs[site], strict=True)):
            error = np.abs(mine - other).max() / np.abs(other).max()
            assert error < 2e-5, (site, layer, error)
