"""Logistic regression for probes: many small problems at once, solved to machine precision.

    minimise  |w|^2 / 2 + C sum_n weight_n log(1 + exp(-s_n (x_n w + b))),   s_n = +-1, b free

This is scikit-learn's objective. Activations have norms of 15,000 with a third of the variance in
one dimension, and C ranges from 1e-5 to 1e5, which is too much for float32. So columns are centred
and scaled (with the penalty, so the optimum stays) and Newton's method runs in float64, always on
the CPU. One program solves the problems in turn, from the strongest penalty to the weakest, each
starting at the solution before: a few steps suffice, and products of whole matrices are several
times faster on CPUs than batches of small ones.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from gemma_scope_jax.errors import InputError

STEPS = 100  # of Newton; a dozen suffice unless the classes are separable and C is large
TOLERANCE = 1e-9  # of the mean gradient, in scaled coordinates
ROWS = 256  # examples are padded to a multiple of this: few shapes are compiled
_limiting = threading.Lock()


class Fitted(NamedTuple):
    """Probes of P problems on each of G designs; x @ w + b is positive for y = 1."""

    w: np.ndarray  # float64 [G, P, K]
    b: np.ndarray  # float64 [G, P]

    def scores(self, x: np.ndarray) -> np.ndarray:
        """x [G, N, K] -> float64 [G, P, N]."""
        return np.einsum("gnk,gpk->gpn", np.asarray(x, np.float64), self.w) + self.b[..., None]


def fit_logistic(
    x: ArrayLike,
    y: ArrayLike,
    c: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> Fitted:
    """Fit P problems, which differ in C, labels or weights, on each of G designs.

    x [G, N, K] features, y [G, N] or [G, P, N] in {0, 1}, c [P], weight [G, P, N] >= 0 (default
    all 1; 0 leaves an example out). A column of zeros gets weight 0, so designs of unequal K can
    be padded. tolerance: of the mean gradient, with columns of unit spread. Raises `InputError` for
    a problem whose weighted examples are all of one class.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    c = np.atleast_1d(np.asarray(c, np.float64))
    shape = (x.shape[0], len(c), x.shape[1])
    weight = np.broadcast_to(1.0 if weight is None else np.asarray(weight, np.float64), shape)
    y = np.broadcast_to(y[:, None, :] if y.ndim == 2 else y, shape)
    positive = (weight * y).sum(-1)
    if not ((positive > 0) & (positive < weight.sum(-1))).all():
        raise InputError("a probe needs examples of both classes")
    if x.shape[2] > x.shape[1]:  # the optimum lies in the examples' span: fit in its coordinates
        with _one_blas_thread():
            basis, spanned = zip(*(np.linalg.qr(a.T) for a in x))
        inner = fit_logistic(np.stack([s.T for s in spanned]), y, c, weight, tolerance=tolerance)
        return Fitted(np.einsum("gkn,gpn->gpk", np.stack(basis), inner.w), inner.b)
    pad = -x.shape[1] % ROWS
    x = np.pad(x, ((0, 0), (0, pad), (0, 0)))
    y, weight = (np.pad(a, ((0, 0), (0, 0), (0, pad))) for a in (y, weight))
    order = np.argsort(c, kind="stable")
    with jax.enable_x64(True), jax.default_device(_cpu()), _one_blas_thread():
        w, b = map(np.asarray, _fit(x, y[:, order], c[order], weight[:, order], tolerance))
    back = np.argsort(order)
    return Fitted(w[:, back], b[:, back])


@functools.cache
def _blas() -> Any:
    import scipy.linalg  # noqa: F401  (its OpenBLAS factors the matrices of XLA's CPU backend)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """OpenBLAS's threads wait for each other in a spin: on shared cores, factoring a 640 x 640
    matrix took 1.1 s with them and 4 ms without. The limit is the process's, hence the lock."""
    with _limiting, _blas().limit(limits=1, user_api="blas"):
        yield


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise InputError(
            "probes are fitted on the CPU, which JAX_PLATFORMS excludes: add ',cpu' to it"
        ) from error


@jax.jit
def _fit(x: jax.Array, y: jax.Array, c: jax.Array, weight: jax.Array, tolerance: float):
    def path(design):
        x, y, weight = design

        def one(start, problem):
            w, b = _newton(x, problem, start, tolerance)
            return (w, b), (w, b)

        nothing = (jnp.zeros(x.shape[1], x.dtype), jnp.zeros((), x.dtype))
        return jax.lax.scan(one, nothing, (c, weight, y))[1]

    return jax.lax.map(path, (x, y, weight))


def _newton(x: jax.Array, problem: tuple, start: tuple, tolerance: float) -> tuple:
    """One problem (c [], weight [N], y [N]) on x [N, K], from and to (w [K], b [])."""
    (c, weight, y), (w, b) = problem, start
    total = weight.sum()
    share = weight / total
    mean = share @ x
    spread = jnp.sqrt(share @ jnp.square(x - mean[None, :]))
    used = spread > 1e-10 * jnp.abs(x).max(0)
    spread = jnp.where(used, spread, 1.0)
    z = jnp.where(used[None, :], (x - mean[None, :]) / spread[None, :], 0.0)
    z = jnp.concatenate([z, jnp.ones((x.shape[0], 1), x.dtype)], 1)
    ridge = jnp.append(1.0 / (jnp.square(spread) * c * total), 0.0)

    def loss(theta):
        margin = z @ theta
        return share @ (jax.nn.softplus(margin) - y * margin) + 0.5 * ridge @ (theta * theta)

    def gradient(theta):
        return z.T @ (share * (jax.nn.sigmoid(z @ theta) - y)) + ridge * theta

    def step(state):
        n, theta, slope, _ = state
        p = jax.nn.sigmoid(z @ theta)
        curve = z.T @ ((share * p * (1.0 - p))[:, None] * z) + jnp.diag(ridge)
        curve = curve + jnp.eye(z.shape[1], dtype=z.dtype) * (1e-13 * jnp.diag(curve).max())
        move = jax.scipy.linalg.solve(curve, slope, assume_a="pos")
        here, decrease = loss(theta), slope @ move
        too_far = lambda t: (t > 1e-9) & ~(loss(theta - t * move) <= here - 1e-4 * t * decrease)
        t = jax.lax.while_loop(too_far, lambda t: 0.5 * t, jnp.asarray(1.0, z.dtype))
        theta = jnp.where(t > 1e-9, theta - t * move, theta)
        return n + 1, theta, gradient(theta), t <= 1e-9

    def unfinished(state):
        n, _, slope, stuck = state
        return (n < STEPS) & ~stuck & (jnp.abs(slope).max() > tolerance)

    theta = jnp.append(w * spread, b + mean @ w)
    _, theta, _, _ = jax.lax.while_loop(unfinished, step, (0, theta, gradient(theta), False))
    w = jnp.where(used, theta[:-1] / spread, 0.0)
    return w, theta[-1] - mean @ w


@functools.partial(jax.jit, static_argnames="steps")
def l1_logistic(
    x: ArrayLike, y: ArrayLike, weight: ArrayLike, decay: float, *, steps: int = 2000
) -> jax.Array:
    """Weights float32 [F, L] of L probes that share x [N, F]: for each of them

        mean_n weight_n log(1 + exp(-s_n (x_n w + b))) + decay |w|_1

    y and weight [N, L]. Proximal gradient steps, accelerated and restarted (Beck and Teboulle 2009,
    O'Donoghue and Candes 2015), with a bound on the curvature for each coordinate, so that features
    of unequal scale converge alike. Ends when no weight moves by 1e-5 of the largest.
    """
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    x, y, weight = (jnp.asarray(a, jnp.float32) for a in (x, y, weight))
    x = jnp.concatenate([x, jnp.ones((x.shape[0], 1), jnp.float32)], 1)
    weight = weight / x.shape[0]
    size = jnp.abs(x)
    bound = 0.25 * dot(size.T, weight * size.sum(1, keepdims=True))  # of row sums of the Hessian
    rate = jnp.where(bound > 0, 1.0 / bound, 0.0)
    shrink = (decay * rate).at[-1].set(0.0)  # the last row is the intercept

    def step(state):
        n, w, ahead, momentum, _ = state
        slope = dot(x.T, weight * (jax.nn.sigmoid(dot(x, ahead)) - y))
        new = ahead - rate * slope
        new = jnp.sign(new) * jnp.maximum(jnp.abs(new) - shrink, 0.0)
        following = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * momentum * momentum))
        uphill = (bound * (ahead - new) * (new - w)).sum(0) > 0  # [L]: restart these
        carried = jnp.where(uphill, 0.0, (momentum - 1.0) / following)
        following = jnp.where(uphill, 1.0, following)
        moved = jnp.abs(new - w).max() / jnp.maximum(jnp.abs(new).max(), 1e-30)
        return n + 1, new, new + carried[None, :] * (new - w), following, moved

    def unfinished(state):
        return (state[0] < steps) & (state[4] > 1e-5)

    w = jnp.zeros((x.shape[1], y.shape[1]), jnp.float32)
    first = jnp.ones(y.shape[1], jnp.float32)
    state = jax.lax.while_loop(unfinished, step, (0, w, w, first, jnp.float32(jnp.inf)))
    return state[1][:-1]


def accuracy(y: np.ndarray, scores: np.ndarray) -> float:
    """The share of examples whose score [N] is positive if and only if y [N] is true."""
    return float(((scores > 0) == (y > 0)).mean())


def f1(y: np.ndarray, scores: np.ndarray) -> float:
    """F1 of the positive class; 0 without true positives."""
    y, found = y > 0, scores > 0
    hits = int((y & found).sum())
    total = int(y.sum() + found.sum())
    return 2 * hits / total if total else 0.0


def weighted_f1(y: np.ndarray, scores: np.ndarray) -> float:
    """F1 of both classes, weighted by their numbers of examples; a score of 0 is negative."""
    share = float((y > 0).mean())
    return share * f1(y, scores) + (1 - share) * f1(1 - (y > 0), 0.5 - (scores > 0))
