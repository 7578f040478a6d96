"""Coders of every kind with a batch, and what their losses and gradients are in float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.training.objective import Dials, gradients
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig
from gemma_scope_jax.training.weights import CoderGroup, Weights

B, D, E, F, K = 9, 5, 4, 16, 12
LOSS = LossConfig(bandwidth=0.2, l0_weight=0.3, outlier=1.5, dead_weight=0.4, frequency_limit=0.15)
TRANSCODER = dict(reads="mlp_in", writes="mlp_out", width=F, target_l0=3)
SAE = dict(width=F, target_l0=3)


def two(loss=LOSS, **options):
    """Two coders of a group that differ in layer and weights."""
    other = dataclasses.replace(
        loss, l0_weight=0.2, dead_weight=0.7, frequency_weight=2 * loss.frequency_weight
    )
    return CoderConfig(3, loss=loss, **options), CoderConfig(4, loss=other, seed=1, **options)


def loss(**changes):
    return dataclasses.replace(LOSS, **changes)


CASES = {
    "sae": two(**SAE),
    "transcoder": (CoderConfig(2, loss=loss(sparsity="step", dead_weight=0.0), **TRANSCODER),),
    "skip": (CoderConfig(2, skip=True, loss=loss(per_token=False), **TRANSCODER),),
    "crosscoder": (CoderConfig((1, 3, 5), loss=loss(frequency_weight=0.5), **SAE),),
    "clt": tuple(
        dataclasses.replace(c, layers=(i, i + 1), skip=True)
        for i, c in enumerate(two(loss(per_token=False), **TRANSCODER))
    ),
    "matryoshka": two(
        loss(sparsity="tanh", frequency_weight=0.5), prefixes=(3, 8), input_bias=False, **SAE
    ),
    "topk": two(activation="topk", **SAE),
    "batch_topk": (CoderConfig((1, 2), activation="batch_topk", loss=LOSS, **SAE),),
}
CASES = {
    name: tuple(c if c.activation else dataclasses.replace(c, activation="jumprelu") for c in some)
    for name, some in CASES.items()
}
JUMPRELU = [name for name in CASES if "topk" not in name]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A group, its weights as float64 arrays, and a batch."""

    group: CoderGroup
    arrays: dict  # w_dec: a list
    x: np.ndarray
    y: np.ndarray
    dead: np.ndarray
    target: np.ndarray

    def weights(self, **changes):
        a = {
            k: jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), v)
            for k, v in (self.arrays | changes).items()
        }
        return Weights(**(a | {"w_dec": tuple(a["w_dec"])}))


@functools.cache
def problem(name):
    group, rng = CoderGroup(CASES[name]), np.random.default_rng(7)
    same = group.template.target == group.template.reads
    N, X, d, e = len(group.coders), group.X, D, D if same else E
    draw = lambda *s: rng.standard_normal(s).astype(np.float32).astype(np.float64)
    x = draw(N, X, B, d) / 2
    x[:, :, 2] *= 4  # beyond `outlier`
    y = x if same else draw(N, X, B, e)
    arrays: dict = {
        "w_enc": draw(N, X, F, d),
        "b_enc": draw(N, X, F) / 8,
        "w_dec": [draw(N, j + 1, F, e) / 2 for j in range(X)],
        "b_dec": draw(N, X, e) / 4,
        "w_skip": draw(N, X, d, e) / 4 if group.template.skip else None,
    }
    # Each threshold midway between two of the feature's values: 2 of 9 tokens are active.
    z = np.stack([pre_activations(arrays, x, n, group.template) for n in range(N)])
    order = np.sort(z, 2)
    arrays["threshold"] = np.maximum((order[:, :, -3] + order[:, :, -2]) / 2, 0.05)
    dead = np.maximum(1 - 3 * rng.random((N, X, F)), 0)
    made = Problem(group, arrays, x, y, dead, np.array([3.0, 4.0])[:N])
    if group.template.activation == "jumprelu":
        gap = np.abs(z - arrays["threshold"][:, :, None])
        assert gap.min() > 1e-4 and np.sum(gap < LOSS.bandwidth / 2) > 5
    return made


def pre_activations(a, x, n, config):
    """[X, B, F] of coder n."""
    z = []
    for i in range(x.shape[1]):
        rows = x[n, i] - a["b_dec"][n, i] if config.apply_b_dec_to_input else x[n, i]
        z.append(rows @ a["w_enc"][n, i].T + a["b_enc"][n, i])
    return np.stack(z)


def kept(z, config):
    """Bool [X, B, F] that TopK or BatchTopK keep, and the cut-off of each token, 0 or more."""
    k, tokens = int(config.target_l0), z.shape[1]
    if config.activation == "batch_topk":
        edge = np.sort(z.ravel())[-k * tokens]
        return (z >= edge) & (z > 0), np.maximum(edge, 0)
    edges = np.array([np.sort(z[:, b].ravel())[-k] for b in range(tokens)])
    edges = np.maximum(edges, 0)[None, :, None]
    return (z >= edges) & (z > 0), edges


def reference(p, a, n, edge=None, held=None):
    """Coder n in plain float64: its loss, the other parts, and the pieces they are made of.

    The revival of dead features sees `held` for z, where given: it has no gradient to it.
    """
    c, X, ends = p.group.coders[n], p.group.X, p.group.ends
    q, x, y = c.loss, p.x[n], p.y[n]
    z = pre_activations(a, p.x, n, c)
    t, on = np.broadcast_to(a["threshold"][n][:, None], z.shape), None
    if c.activation == "jumprelu":
        on = z > t
    else:
        on, own = kept(z, c)
        t = np.broadcast_to(own if edge is None else edge, z.shape)
    f = z * on
    weight = np.minimum(1, q.outlier**2 / np.sum(y**2, -1))
    residual = np.zeros((X, len(ends), B, y.shape[-1]))
    for j in range(X):
        for m, end in enumerate(ends):
            out = sum(f[i, :, :end] @ a["w_dec"][j][n, i, :end] for i in range(j + 1))
            out = out + a["b_dec"][n, j]
            if a["w_skip"] is not None:
                out = out + x[j] @ a["w_skip"][n, j]
            residual[j, m] = y[j] - out
    errors = np.array(
        [[np.mean(weight[j] * np.sum(r**2, -1)) for r in residual[j]] for j in range(X)]
    )
    total, l0 = errors.mean(1).sum(), on.sum((0, 2))
    if c.activation == "jumprelu":
        target = p.target[n]
        if q.sparsity == "tanh":
            sparsity = np.tanh(q.tanh_scale * f).sum((0, 2)).mean()
        elif q.sparsity == "step":
            sparsity = l0.mean()
        elif q.per_token:
            sparsity = np.mean([2 / target * (v - target) ** 2 for v in l0])
        else:
            sparsity = 2 / target * (l0.mean() - target) ** 2
        over = np.maximum(on.mean(1) / q.frequency_limit - 1, 0)
        total += q.l0_weight * sparsity + q.frequency_weight * q.frequency_limit * np.sum(over**2)
    far = np.maximum(t - (z if held is None else held), 0)
    if c.activation != "jumprelu":
        far = np.where(on, 0, far)  # the last to be kept is the cut-off itself
    total += q.dead_weight * np.sum(p.dead[n] * far.mean(1))
    centre = np.sum((y - y.mean(1, keepdims=True)) ** 2, -1)
    return total, {
        "z": z,
        "t": t,
        "on": on,
        "f": f,
        "l0": l0,
        "residual": residual,
        "weight": weight,
        "mse": errors[:, -1].sum(),
        "fvu": errors[:, -1].sum() / np.mean(weight * centre, 1).sum(),
    }


@functools.cache
def differences(name):
    """Central differences of the summed loss in every weight but the thresholds."""
    p = problem(name)
    a = jax.tree.map(np.copy, p.arrays)
    N = len(p.group.coders)
    topk = p.group.template.activation != "jumprelu"
    start = [pre_activations(a, p.x, n, p.group.template) for n in range(N)]
    fixed = [(kept(z, p.group.template)[1], None) if topk else (None, z) for z in start]

    def slopes(v):
        out = np.zeros_like(v)
        for index in np.ndindex(v.shape):
            n, old = index[0], v[index]  # coder n's weights are in its own loss only
            values = []
            for h in (1e-5, -1e-5):
                v[index] = old + h
                values.append(reference(p, a, n, *fixed[n])[0])
            v[index] = old
            out[index] = (values[0] - values[1]) / 2e-5
        return out

    return {k: jax.tree.map(slopes, v) for k, v in a.items() if k != "threshold"}


def threshold_gradients(name):
    """The straight-through estimator, an activation at a time: float64 [N, X, F].

    dL/dt = sum_b -(t/e) K((z-t)/e) dL/df - (1/e) K((z-t)/e) dL/d1[z>t], for a dead feature the
    share of tokens with z < t, and the frequency penalty's own estimate.
    """
    p = problem(name)
    out = np.zeros_like(p.arrays["threshold"])
    for n, c in enumerate(p.group.coders):
        q, r = c.loss, reference(p, p.arrays, n)[1]
        ends, target = p.group.ends, p.target[n]
        for i, b, k in np.ndindex(*r["z"].shape):
            z, t = r["z"][i, b, k], r["t"][i, b, k]
            if z < t:
                out[n, i, k] += q.dead_weight * p.dead[n, i, k] / B
            if abs(z - t) >= q.bandwidth / 2:
                continue
            df = 0.0
            for j in range(i, p.group.X):
                for m, end in enumerate(ends):
                    if k < end:
                        pull = r["residual"][j, m, b] @ p.arrays["w_dec"][j][n, i, k]
                        df -= 2 * r["weight"][j, b] * pull / (B * len(ends))
            mean_l0 = r["l0"].mean()
            slope = {
                "step": 1.0,
                "tanh": 0.0,
                "quadratic": 4 / target * ((r["l0"][b] if q.per_token else mean_l0) - target),
            }
            don = q.l0_weight * slope[q.sparsity] / B
            if q.sparsity == "tanh":
                df += q.l0_weight * q.tanh_scale / np.cosh(q.tanh_scale * r["f"][i, b, k]) ** 2 / B
            out[n, i, k] -= t / q.bandwidth * df + don / q.bandwidth
        for i, k in np.ndindex(*r["z"].shape[::2]):
            on, t = r["on"][i, :, k], r["t"][i, 0, k]
            if on.any() and q.frequency_weight:
                mean = max(np.mean(r["z"][i, on, k] - t), q.bandwidth)
                over = max(0, on.mean() / q.frequency_limit - 1)
                out[n, i, k] -= q.frequency_weight * 2 * over * on.mean() / mean
    return out


@functools.cache
def compiled(name, capacity, kernels):
    """`gradients` of a group as one program of weights (`kernels` are only part of the key)."""
    p = problem(name)
    x, y, dead, target = (jnp.asarray(v, jnp.float32) for v in (p.x, p.y, p.dead, p.target))
    dials = Dials(p.group.of("l0_weight"), target, dead)
    return jax.jit(lambda w: gradients(w, x, y, dials, p.group, capacity))


def close(got, wanted, rtol):
    """Equal within a share of the largest entry."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())
