"""What a change does to the model's predictions: loss, KL divergence and top-1 agreement.

Logits are computed from final residuals, a chunk of tokens at a time, for the model's own run and
the changed runs together: [B T, V] never exists whole, and the model's own logits serve all runs.

    loss       -log p(next token), nats
    KL         sum_v p(v) (log p(v) - log q(v)), p the model's, q the changed run's
    agreement  whether the model's most likely token is the changed run's too
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.kernels import xla
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import forward, unembed
from gemma_scope_jax.model.intercept import Context, Intercept, capture, token_mask, write

LOGIT_CHUNK = 128  # tokens whose logits [128, V] exist at a time, of the model and of one run


class Predictions(NamedTuple):
    """Per token, float32: `clean` [B, T], the others [R, B, T] for R changed runs."""

    clean: jax.Array  # the model's own loss
    loss: jax.Array
    kl: jax.Array
    same: jax.Array  # 1 where the most likely token is the same


def predicts(batch: TokenBatch, first: int) -> jax.Array:
    """bool [B, T]: tokens of `batch.counted(first)` whose next token is of the same document."""
    following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
    return batch.counted(first) & (following == batch.segments)


@jax.jit
def compare(model: Model, clean: jax.Array, changed: jax.Array, tokens: jax.Array) -> Predictions:
    """Predictions from final residuals: the model's own [B, T, D], those of R runs [R, B, T, D].

    Values are meaningless where a token predicts nothing, see `predicts`.
    """
    B, T, D = clean.shape
    N = B * T
    size = min(LOGIT_CHUNK, N)
    targets = jnp.pad(tokens[:, 1:].astype(jnp.int32), ((0, 0), (0, 1))).reshape(N)
    states = jnp.moveaxis(changed.reshape(-1, N, D), 0, 1)

    def logs(state):
        logits = unembed(model.config, model.params, state[None])[0]
        return logits, jax.nn.logsumexp(logits, axis=-1)

    def chunk(args):
        own, others, target = args
        logits, total = logs(own)
        log_p = logits - total[:, None]
        best = jnp.argmax(logits, -1)
        pick = lambda a, ids: jnp.take_along_axis(a, ids[:, None], -1)[:, 0]

        def run(state):
            logits, total = logs(state)
            kl = (jnp.exp(log_p) * (log_p - (logits - total[:, None]))).sum(-1)
            same = pick(logits, best) >= logits.max(-1)
            return total - pick(logits, target), kl, same.astype(jnp.float32)

        return -pick(log_p, target), *jax.lax.map(run, jnp.moveaxis(others, 1, 0))

    chunks = tuple(xla.split(a, 0, size) for a in (clean.reshape(N, D), states, targets))
    own, *others = jax.lax.map(chunk, chunks)
    own, *others = xla.join(own, 0, N), *(xla.join(a, 1, N) for a in others)
    return Predictions(own.reshape(B, T), *(a.reshape(-1, B, T) for a in others))


@jax.jit
def final_residual(model: Model, batch: TokenBatch, intercepts: tuple[Intercept, ...]) -> jax.Array:
    """The last residual [B, T, D] of a run under `intercepts`, before the final norm."""
    reads = [*intercepts, capture("resid_final")]
    out = forward(model, batch, reads, logits="none")
    return out.reads["resid_final"]


def ablated(
    config: GemmaConfig, coders: tuple[Coder, ...], means: tuple[np.ndarray, ...] | None = None
) -> tuple[Intercept, ...]:
    """Zeros in place of what the coders write, or `means`: [X, D] for each coder's X layers."""
    found: dict[tuple[str, int], tuple[jax.Array, jax.Array]] = {}
    for i, coder in enumerate(coders):
        key, layers = (coder.writes, coder.first), jnp.asarray(coder.layers)
        none = jnp.zeros((config.layers, coder.d_out), jnp.float32), jnp.zeros(config.layers, bool)
        values, at = found.get(key, none)
        if means is not None:
            values = values.at[layers].set(float32(means[i]))
        found[key] = values, at.at[layers].set(True)
    return tuple(write(s, None, _set_to, *data, first=n) for (s, n), data in found.items())


def _set_to(x: jax.Array, ctx: Context, values: jax.Array, at: jax.Array, *, first: int):
    value = values[ctx.layer].astype(x.dtype)[None, None, :]
    return jnp.where(at[ctx.layer] & token_mask(ctx, x, first), value, x)
