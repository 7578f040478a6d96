"""How sparse and how faithful a coder is: sums of batches on the device, merged into figures.

A batch becomes sums on the device (float32, about the batch's own mean, so nothing cancels), which
are merged on the host in float64. Cutting a text into other batches gives the same figures. With y
the activation that a coder writes, r = y - reconstruction:

    FVU = E||r||^2 / (E||y||^2 - ||E y||^2),   explained variance = 1 - FVU

Other libraries define explained variance otherwise; `Fit` has each under a name of its own. A few
outlier tokens of Gemma 3's residual stream have several times the usual norm and most of the
variance. So every figure also exists as "typical": without the tokens whose norm at the written
site is more than `OUTLIER` times the median norm of their batch.

Sources: Gemma Scope 2 technical paper, section 4.1 (FVU); SAELens 6.54 `evals.py`; SAEBench 0.6
`evals/core/main.py`; dictionary_learning `evaluation.py`; Rajamanoharan et al. 2024 (arXiv
2404.16014), equation 10 (relative reconstruction bias).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.kernels import xla

OUTLIER = 3.0
TOKEN_CHUNK = 256  # only features [256, F] exist at a time
TINY_NORM = 1e-4  # below this norm of the activation, the L2 ratio is the reconstruction's norm

# What is summed over the tokens of a group, beside their number and the means of y and r.
COLUMNS = (
    "spread",  # ||y - mean y||^2
    "noise",  # ||r - mean r||^2
    "error",  # ||r||^2
    "active",  # features that are not zero
    "l1",  # sum of the features
    "norm_in",  # ||y||
    "norm_out",  # ||reconstruction||
    "ratio",  # norm_out / norm_in
    "cosine",  # of y and its reconstruction
    "dot",  # <y, reconstruction>
    "energy_out",  # ||reconstruction||^2
    "legacy",  # 1 - ||r||^2 / ||y - the batch's mean y||^2
)


class Sums(NamedTuple):
    """Sums over the tokens of G groups, for each of a coder's X layers.

    Group 0 holds every token in the mask, group 1 the typical ones; the caller defines the rest.
    """

    tokens: Any  # [G, X] how many
    mean: Any  # [G, X, D] of y
    bias: Any  # [G, X, D] mean of r
    columns: Any  # [G, X, C] sums of `COLUMNS`


def merge(a: Sums | None, b: Sums) -> Sums:
    """The sums over the tokens of both, float64 on the host (Chan et al. 1979)."""
    if a is None:
        return b
    tokens = a.tokens + b.tokens
    share = b.tokens / np.maximum(tokens, 1.0)
    columns = a.columns + b.columns
    means = []
    for column, one, other in ((0, a.mean, b.mean), (1, a.bias, b.bias)):
        apart = other - one
        columns[..., column] += (apart * apart).sum(-1) * a.tokens * share
        means.append(one + apart * share[..., None])
    return Sums(tokens, means[0], means[1], columns)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How sparse and how faithful a coder is on some tokens; for several layers, their mean.

    The conventions for explained variance, with y the activation and r its error:
        explained_variance  1 - E||r||^2 / (E||y||^2 - ||E y||^2) = 1 - FVU (SAELens 6.54)
        ..._per_token       mean of 1 - ||r||^2 / ||y - the batch's mean||^2 (SAELens' and
                            SAEBench's "legacy"; depends on the size of the batches)
        ..._scalar_mean     1 - E||r||^2 / (E||y||^2 - (E||y||^2 / D)^2) (SAEBench 0.6's
                            "explained_variance"; its total variance can be negative)
        ..._about_zero      1 - E||r||^2 / E||y||^2
        ..._of_the_rest     1 - sum_d Var r_d / sum_d Var y_d (dictionary_learning's frac_variance_
                            explained: forgives the mean of the error)
    """

    tokens: int
    l0: float  # active features a token (and layer)
    fvu: float  # fraction of variance unexplained: 0 is perfect, 1 no better than the mean
    mse: float  # mean ||r||^2, summed over D
    mse_per_element: float  # mse / D
    l1: float  # mean sum of feature activations
    cosine: float  # mean cosine of y and its reconstruction
    l2_norm_in: float  # mean ||y||
    l2_norm_out: float  # mean ||reconstruction||
    l2_ratio: float  # mean of the tokens' norm out / norm in: below 1, the coder shrinks
    relative_reconstruction_bias: float  # E||reconstruction||^2 / E<y, reconstruction>
    explained_variance: float
    explained_variance_per_token: float
    explained_variance_scalar_mean: float
    explained_variance_about_zero: float
    explained_variance_of_the_rest: float


def fits(sums: Sums, group: int = 0) -> tuple[Fit, ...]:
    """The figures of one group of merged sums, for each layer; NaN where there is no token."""
    n, D = sums.tokens[group], sums.mean.shape[-1]
    s = dict(zip(COLUMNS, np.moveaxis(sums.columns[group], -1, 0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        energy = s["spread"] / n + (sums.mean[group] ** 2).sum(-1)
        error = s["error"] / n
        fvu = s["error"] / s["spread"]
        values = {
            "l0": s["active"] / n,
            "fvu": fvu,
            "mse": error,
            "mse_per_element": error / D,
            "l1": s["l1"] / n,
            "cosine": s["cosine"] / n,
            "l2_norm_in": s["norm_in"] / n,
            "l2_norm_out": s["norm_out"] / n,
            "l2_ratio": s["ratio"] / n,
            "relative_reconstruction_bias": s["energy_out"] / s["dot"],
            "explained_variance": 1 - fvu,
            "explained_variance_per_token": s["legacy"] / n,
            "explained_variance_scalar_mean": 1 - error / (energy - (energy / D) ** 2),
            "explained_variance_about_zero": 1 - error / energy,
            "explained_variance_of_the_rest": 1 - s["noise"] / s["spread"],
        }
    return tuple(
        Fit(tokens=int(n[i]), **{name: float(v[i]) for name, v in values.items()})
        for i in range(len(n))
    )


def fit(sums: Sums, group: int = 0) -> Fit:
    """`fits`, averaged over a coder's layers."""
    tokens, *figures = zip(*(dataclasses.astuple(layer) for layer in fits(sums, group)))
    return Fit(max(tokens), *(float(np.mean(column)) for column in figures))


def median_norm(y: jax.Array, mask: jax.Array) -> jax.Array:
    """The median over the tokens in `mask` [N] of ||y||, y [X, N, D] -> [X]; 0 without tokens."""
    norms = jnp.linalg.norm(float32(y), axis=-1)
    middle = jnp.nanmedian(jnp.where(mask[None, :], norms, jnp.nan), axis=-1)
    return jnp.where(jnp.isnan(middle), 0.0, middle)


class BatchSums(NamedTuple):
    """The result of `coder_sums`, on the device."""

    centre: jax.Array  # [X, D] mean of y over the tokens in the mask
    groups: Sums  # with the means of y and "spread" relative to `centre`
    fired: jax.Array  # int32 [X, F] on how many tokens each feature is active
    pieces: jax.Array  # int32 [X, F] in how many pieces of documents


def coder_sums(
    coder: Coder, x: jax.Array, y: jax.Array, mask: jax.Array, groups: jax.Array, pieces: jax.Array
) -> BatchSums:
    """Sums of one batch: inputs x [X, N, D], targets y [X, N, D_out]; X is 1 for one layer.

    mask    bool [N]: the tokens to sum over
    groups  bool [G, N]: groups of tokens with sums of their own
    pieces  int32 [N]: the number of a token's piece of a document, in rising order
    """
    x, y = float32(x), float32(y)
    back, active, l1, fired, in_pieces = _reconstructions(coder, x, mask, pieces)
    here = mask[None, :, None]
    error = jnp.where(here, y - back, 0.0)
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    centre = jnp.where(here, y, 0.0).sum(1) / count
    apart = jnp.where(here, y - centre[:, None, :], 0.0)
    bias = error.sum(1) / count
    usual = jnp.linalg.norm(y, axis=-1) <= OUTLIER * median_norm(y, mask)[:, None]
    every = jnp.broadcast_to(mask, usual.shape)
    some = jnp.broadcast_to((groups & mask[None, :])[None], (len(y), *groups.shape))
    member = jnp.concatenate([every[:, None], (every & usual)[:, None], some], 1)

    square = lambda a: (a * a).sum(-1)
    norm_in, norm_out, spread = jnp.sqrt(square(y)), jnp.sqrt(square(back)), square(apart)
    dot, squared = (y * back).sum(-1), square(error)
    per = lambda a, b: a / jnp.where(b == 0, 1.0, b)
    ratio = norm_out / jnp.where(norm_in < TINY_NORM, 1.0, norm_in)
    columns = jnp.stack([
        spread, square(error - bias[:, None, :]), squared, active, l1, norm_in, norm_out, ratio,
        per(dot, norm_in * norm_out), dot, square(back), 1.0 - per(squared, spread),
    ], -1)  # fmt: skip
    total = lambda a: jnp.einsum(
        "xgn,xnc->gxc", member.astype(jnp.float32), jnp.where(here, a, 0.0),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    tokens = jnp.moveaxis(member.sum(-1, dtype=jnp.int32), 0, 1)
    n = jnp.maximum(tokens, 1).astype(jnp.float32)[..., None]
    off = total(error - bias[:, None, :]) / n + bias[None]
    sums = Sums(tokens, total(apart) / n, off, total(columns))
    return BatchSums(centre, sums, fired, in_pieces)


def on_host(batch: BatchSums) -> Sums:
    """The sums of a batch in float64, those of each group about its own means."""
    centre = np.asarray(batch.centre, np.float64)
    s = Sums(*(np.asarray(v, np.float64) for v in batch.groups))
    columns = s.columns.copy()
    for column, apart in ((0, s.mean), (1, s.bias - s.bias[:1])):
        columns[..., column] -= s.tokens * (apart * apart).sum(-1)
    columns[..., :2] = np.maximum(columns[..., :2], 0.0)
    return Sums(s.tokens, np.where(s.tokens[..., None] > 0, s.mean + centre, 0.0), s.bias, columns)


def _reconstructions(coder: Coder, x: jax.Array, mask: jax.Array, pieces: jax.Array):
    """back [X, N, D], active and l1 [X, N] float32, fired and in_pieces int32 [X, F]."""
    X, N = x.shape[0], mask.shape[0]
    size = min(TOKEN_CHUNK, N)

    def step(carry, chunk):
        x, here, piece = chunk
        f = coder.encode(x)
        back = coder.decode(f, x)
        on = (f > 0) & here[None, :, None]
        fired, *rest = carry
        rest = _count_pieces(on, piece, *rest)
        fired = fired + on.sum(1, dtype=jnp.int32)
        return (fired, *rest), (back, on.sum(-1, dtype=jnp.int32).astype(jnp.float32), f.sum(-1))

    zeros = jnp.zeros((X, coder.width), jnp.int32)
    carry = (zeros, zeros, zeros > 0, jnp.int32(-1))
    chunks = xla.split(x, 1, size), xla.split(mask, 0, size), xla.split(pieces, 0, size)
    (fired, in_pieces, *_), out = jax.lax.scan(step, carry, chunks)
    return *(xla.join(a, 1, N) for a in out), fired, in_pieces


def _count_pieces(on, piece, count, seen, last):
    """Add to `count` [X, F] the pieces in which a feature is `on` [X, n, F] for the first time.

    `seen` are the features that were on in piece `last`, which may continue here.
    """

    def one(p, carry):
        count, seen, last = carry
        before = seen & (p == last)
        hit = (on & (piece == p)[None, :, None]).any(1)
        return count + (hit & ~before).astype(jnp.int32), hit | before, p

    return jax.lax.fori_loop(piece[0], jnp.max(piece) + 1, one, (count, seen, last))
