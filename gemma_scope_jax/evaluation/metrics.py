"""What is measured about a coder: L0, FVU, MSE, firing densities and the loss on the next token.

A batch becomes sums on the device (float32, about the batch's own mean, so nothing cancels) and the
sums of all batches are merged on the host in float64. Sums of the same text cut into other batches
merge to the same figures.

    FVU = E||r||^2 / (E||y||^2 - ||E y||^2)      r = y - reconstruction

A few tokens of Gemma 3's residual stream have several times the usual norm and most of the
variance, so every figure also comes "typical": without the tokens whose norm at the site written is
more than `OUTLIER` times the median norm of their batch.

Source: Gemma Scope 2 technical paper, section 4.1 (FVU, delta loss).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder, float32
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import counted, unembed

OUTLIER = 3.0
TOKEN_CHUNK = 256  # features [256, F] and logits [256, V] exist at a time, never more

Coder = SparseCoder | MultiLayerCoder


class Moments(NamedTuple):
    """Sums over tokens, for each of a coder's X layers. Mergeable: see `merge`."""

    tokens: Any  # [X] how many
    mean: Any  # [X, D] of the target y
    spread: Any  # [X] sum of ||y - mean||^2
    error: Any  # [X] sum of ||y - reconstruction||^2
    active: Any  # [X] sum of the number of active features


def merge(a: Moments | None, b: Moments) -> Moments:
    """The sums over the tokens of both, float64 on the host (Chan et al. 1979)."""
    b = Moments(*(np.asarray(v, np.float64) for v in b))
    if a is None:
        return b
    tokens = a.tokens + b.tokens
    share = b.tokens / np.maximum(tokens, 1.0)
    apart = b.mean - a.mean
    between = (apart * apart).sum(-1) * a.tokens * share
    mean = a.mean + apart * share[:, None]
    spread = a.spread + b.spread + between
    return Moments(tokens, mean, spread, a.error + b.error, a.active + b.active)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How sparse and how faithful a coder is. Means over the layers of a multi-layer coder."""

    tokens: int
    l0: float  # active features a token (and layer)
    fvu: float  # fraction of variance unexplained: 0 is perfect, 1 no better than the mean
    mse: float  # mean ||r||^2, summed over D
    fvu_by_layer: tuple[float, ...]


def fit(moments: Moments) -> Fit:
    """The figures of merged sums; NaN where no token was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        fvu = moments.error / moments.spread
        l0, mse = moments.active / moments.tokens, moments.error / moments.tokens
    return Fit(
        int(moments.tokens.max()), float(l0.mean()), float(fvu.mean()), float(mse.mean()),
        tuple(map(float, fvu)),
    )  # fmt: skip


def layers_of(coder: Coder) -> tuple[int, ...]:
    """The model's layers that a coder reads and writes."""
    return coder.layers if isinstance(coder, MultiLayerCoder) else (coder.layer,)


def median_norm(y: jax.Array, mask: jax.Array) -> jax.Array:
    """The median over the tokens in `mask` [N] of ||y||, y [X, N, D] -> [X]; 0 without tokens."""
    norms = jnp.linalg.norm(float32(y), axis=-1)
    middle = jnp.nanmedian(jnp.where(mask[None, :], norms, jnp.nan), axis=-1)
    return jnp.where(jnp.isnan(middle), 0.0, middle)


def coder_sums(coder: Coder, x: jax.Array, y: jax.Array, mask: jax.Array):
    """Sums of one batch: inputs x [X, N, D], targets y [X, N, D_out], the tokens to count [N].

    Returns the `Moments` of all counted tokens, those of the typical ones, and how often each
    feature fired among all, int32 [X, F]. X is 1 for a `SparseCoder`.
    """
    single = isinstance(coder, SparseCoder)
    N = mask.shape[0]
    size = min(TOKEN_CHUNK, N)
    chunks = -(-N // size)

    def split(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, chunks * size - N)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], chunks, size, *a.shape[2:]), 1, 0)

    def step(fired, chunk):
        x, y, here = chunk
        f = coder.encode(x[0])[None] if single else coder.encode(x)
        back = coder.decode(f[0], x[0])[None] if single else coder.decode(f, x)
        on = (f > 0) & here[0][None, :, None]
        residual = y - back
        fired = fired + on.sum(1, dtype=jnp.int32)
        return fired, ((residual * residual).sum(-1), on.sum(-1, dtype=jnp.int32))

    x, y = float32(x), float32(y)
    fired = jnp.zeros((x.shape[0], coder.width), jnp.int32)
    fired, (error, active) = jax.lax.scan(step, fired, (split(x), split(y), split(mask[None])))
    error, active = (jnp.moveaxis(a, 0, 1).reshape(x.shape[0], -1)[:, :N] for a in (error, active))
    everything = jnp.broadcast_to(mask[None, :], error.shape)
    usual = jnp.linalg.norm(y, axis=-1) <= OUTLIER * median_norm(y, mask)[:, None]
    moments = [_moments(y, error, active, m) for m in (everything, everything & usual)]
    return *moments, fired


def _moments(y: jax.Array, error: jax.Array, active: jax.Array, mask: jax.Array) -> Moments:
    """y [X, N, D]; error, active and mask [X, N]."""
    tokens = mask.sum(-1, dtype=jnp.int32)
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    mean = jnp.where(mask[..., None], y, 0.0).sum(1) / count[:, None]
    apart = jnp.where(mask[..., None], y - mean[:, None, :], 0.0)
    return Moments(
        tokens,
        mean,
        (apart * apart).sum((1, 2)),
        jnp.where(mask, error, 0.0).sum(-1),
        jnp.where(mask, active, 0).sum(-1),
    )


# -------------------------------------------------------------------------------------------------
# The loss on the next token


def predicts(segments: jax.Array, first: int) -> jax.Array:
    """bool [B, T]: counted tokens (see `counted`) whose next token is of the same document."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return counted(segments, first) & (following == segments)


def next_token_loss(model: Model, resid_final: jax.Array, tokens: jax.Array, valid: jax.Array):
    """-log p(next token), float32 [B, T], at the tokens in `valid` bool [B, T]; 0 at the others.

    resid_final [B, T, D]. The logits [B, T, V] are made `TOKEN_CHUNK` tokens at a time, so that
    no more than a chunk of them is ever in memory; differentiating makes them again.
    """
    B, T, D = resid_final.shape
    size = min(TOKEN_CHUNK, B * T)
    pad = -(B * T) % size
    targets = jnp.pad(tokens[:, 1:].astype(jnp.int32), ((0, 0), (0, 1)))
    states = jnp.pad(resid_final.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, 1, size, D)
    wanted = jnp.pad(targets.reshape(B * T), (0, pad)).reshape(-1, size)

    @jax.checkpoint
    def chunk(state_and_target):
        state, target = state_and_target
        logits = unembed(model.config, model.params, state)[0]
        chosen = jnp.take_along_axis(logits, target[:, None], -1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    loss = jax.lax.map(chunk, (states, wanted)).reshape(-1)[: B * T].reshape(B, T)
    return jnp.where(valid, loss, 0.0)
