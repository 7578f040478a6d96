"""The sparse step of the trainer is the dense one, in every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.kernels import active, cpu, triton, xla
from gemma_scope_jax.training import objective
from gemma_scope_jax.training.objective import calibrated
from loss_problems import JUMPRELU, LOSS, K, close, compiled, problem, reference

KERNELS = {"cpu": cpu, "xla": xla, "triton": triton}
if not cpu.available():
    del KERNELS["cpu"]


@pytest.mark.parametrize(
    "name,kernels",
    [
        pytest.param(
            name,
            module,
            id=f"{name}-{kernels}",
            marks=[pytest.mark.slow] * (kernels == "triton" and name != "sae"),  # interpreted
        )
        for name in JUMPRELU
        for i, (kernels, module) in enumerate(KERNELS.items())
        if i == 0 or name in ("sae", "clt", "matryoshka")
    ],
)
def test_the_sparse_step_is_the_dense_one(name, kernels, monkeypatch):
    monkeypatch.setattr(active, "backend", lambda: kernels)
    p = problem(name)
    low = p.arrays["threshold"] - 2.0  # nearly all are active then, more than there are slots
    z = np.stack([reference(p, p.arrays, n)[1]["z"] for n in range(len(p.group.coders))])
    slots = lambda t: np.sum(z > t[:, :, None] - LOSS.bandwidth / 2, -1).max((0, 1))  # [B]
    assert 0 < slots(p.arrays["threshold"]).max() <= K < np.sort(slots(low))[-5]
    # So few slots that one to four tokens, of nine, need more lists than one.
    monkeypatch.setattr(objective, "TOKENS", 2)
    monkeypatch.setattr(objective, "LISTS", 1)
    monkeypatch.setattr(objective, "SOURCES", 1)
    *_, few, _, _, _, most = np.sort(slots(p.arrays["threshold"])).tolist()
    assert 0 < few < most
    usual, lower = p.weights(), p.weights(threshold=low)
    for w, slots, dense in ((usual, K, 0), (lower, K, 1), (usual, few, 0)):
        got, wanted = compiled(name, slots, kernels)(w), compiled(name, 0, None)(w)
        assert np.all(np.asarray(got[1].pop("dense")) == dense)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            close(a, b, 1e-5)


@pytest.mark.parametrize(
    "kernels", [pytest.param(k, marks=[pytest.mark.slow] * (k == "triton")) for k in KERNELS]
)
def test_the_sparse_step_of_batch_topk_is_the_dense_one(kernels, monkeypatch):
    """From the last cut-off on; a much lower one makes the step dense."""
    name, p = "batch_topk", problem("batch_topk")
    monkeypatch.setattr(active, "backend", lambda: KERNELS[kernels])
    monkeypatch.setattr(objective, "TOKENS", 2)
    monkeypatch.setattr(objective, "LISTS", 1)
    monkeypatch.setattr(objective, "SOURCES", 1)
    last = calibrated(p.weights(), jnp.asarray(p.x, jnp.float32), p.group).threshold
    z = objective.encode(p.weights(), jnp.asarray(p.x, jnp.float32), p.group).z
    counts = np.sort((z > objective.BELOW * last[:, :, None] - objective.NEAR).sum(-1).max((0, 1)))
    *_, few, _, most = counts.tolist()
    assert 0 < few < most
    for last_edge, slots, dense in ((last, most, 0), (last, few, 0), (2 * last, most, 1)):
        w = p.weights(threshold=np.asarray(last_edge))
        got, wanted = compiled(name, slots, kernels)(w), compiled(name, 0, None)(w)
        assert np.all(np.asarray(got[1].pop("dense")) == dense)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            close(a, b, 1e-5)
        np.testing.assert_allclose(got[1]["edge"], last[:, 0, 0], rtol=1e-5)
    # Fewer are above zero than may be active: all of them are, and the cut-off is zero.
    top = jnp.max(z, (2, 3), keepdims=True)[:, :, 0]
    w = p.weights(b_enc=np.asarray(p.arrays["b_enc"] - 0.9 * top), threshold=0 * np.asarray(last))
    got, wanted = compiled(name, most, kernels)(w), compiled(name, 0, None)(w)
    assert not np.any(np.asarray(got[1].pop("dense")))
    assert np.all(got[1]["edge"] == 0) and 0 < np.max(got[1]["l0"]) < p.group.template.target_l0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_sparse_step_of_topk_is_the_dense_one(kernels, monkeypatch):
    monkeypatch.setattr(active, "backend", lambda: xla if kernels == "triton" else KERNELS[kernels])
    p = problem("topk")
    k = int(p.group.template.target_l0)
    # The last coder has tokens with fewer entries above zero than it may keep.
    bias = np.array(p.arrays["b_enc"])
    z = objective.encode(p.weights(), jnp.asarray(p.x, jnp.float32), p.group).z
    bias[-1] -= np.quantile(z[-1], 0.9)
    for w in (p.weights(), p.weights(b_enc=bias)):
        got, wanted = compiled("topk", k, kernels)(w), compiled("topk", 0, None)(w)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            close(a, b, 1e-5)
    assert 0 < got[1]["l0"][-1] < k == got[1]["l0"][0]


def test_too_few_slots_change_nothing():
    """One slot a token, of which most need more: the dense step, bit for bit."""
    p = problem("sae")
    got, wanted = compiled("sae", 1, None)(p.weights()), compiled("sae", 0, None)(p.weights())
    assert np.all(np.asarray(got[1].pop("dense")) == 1)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(a, b)
