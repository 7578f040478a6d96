"""What a change does to the model's predictions: loss, KL divergence and top-1 agreement.

Logits are made a chunk of tokens at a time from final residuals, the model's own and those of each
changed run beside each other, so that of [B T, V] only a chunk ever exists and the model's own are
made once for all runs.

    loss       -log p(next token), nats
    KL         sum_v p(v) (log p(v) - log q(v)), p the model's, q the changed run's
    agreement  whether the model's most likely token is the changed run's too
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import Coder, layers_of
from gemma_scope_jax.coders.sparse_coder import SparseCoder, float32
from gemma_scope_jax.coders.splice import splice
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import forward, unembed
from gemma_scope_jax.model.intercept import Context, Intercept, capture, token_mask, write

LOGIT_CHUNK = 128  # tokens whose logits [128, V] exist at a time, of the model and of one run


class Predictions(NamedTuple):
    """Per token, float32: `clean` [B, T], the others [R, B, T], R changed runs."""

    clean: Any  # the model's own loss
    loss: Any
    kl: Any
    same: Any  # 1 where the most likely token is the same


def predicts(batch: TokenBatch, first: int) -> jax.Array:
    """bool [B, T]: tokens of `batch.counted(first)` whose next token is of the same document."""
    following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
    return batch.counted(first) & (following == batch.segments)


@jax.jit
def compare(model: Model, clean: jax.Array, changed: jax.Array, tokens: jax.Array) -> Predictions:
    """Predictions from final residuals: the model's own [B, T, D], those of R runs [R, B, T, D].

    The last token of a row predicts nothing: what stands there means nothing. See `predicts`.
    """
    B, T, D = clean.shape
    N = B * T
    size = min(LOGIT_CHUNK, N)
    targets = jnp.pad(tokens[:, 1:].astype(jnp.int32), ((0, 0), (0, 1))).reshape(N)
    pad = -N % size
    cut = lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, size, *a.shape[1:])
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

    own, *others = jax.lax.map(chunk, (cut(clean.reshape(N, D)), cut(states), cut(targets)))
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)[:, :N].reshape(-1, B, T)
    return Predictions(own.reshape(-1)[:N].reshape(B, T), *map(join, others))


# -------------------------------------------------------------------------------------------------
# The runs


@jax.jit
def final_residual(model: Model, batch: TokenBatch, intercepts: tuple[Intercept, ...]) -> jax.Array:
    """The last residual [B, T, D] of a run under `intercepts`, before the final norm."""
    reads = [*intercepts, capture("resid_final")]
    out = forward(model, batch, reads, logits="none")
    return out.reads["resid_final"]


def replaced(coders: tuple[Coder, ...]) -> tuple[Intercept, ...]:
    """Every coder's reconstruction in place of what it writes, without its error, all at once.

    The same as `splice(coder, error=False)` of each, as one program for any layers: which layer a
    coder belongs to is data, and of several coders each layer branches to its own. Raises
    `InputError` if two write the same activation.
    """
    intercepts, by_site, taken = [], {}, {}
    for coder in coders:
        for layer in layers_of(coder):
            if (coder.writes, layer) in taken:
                raise InputError(
                    f"two coders write {coder.writes} of layer {layer}: a replacement model takes "
                    "one for each place"
                )
            taken[coder.writes, layer] = coder
        if isinstance(coder, SparseCoder):
            by_site.setdefault(coder.writes, []).append(coder)
        else:
            intercepts.append(splice(coder, error=False))
    for site, some in by_site.items():
        layers = jnp.asarray([coder.layer for coder in some], jnp.int32)
        bare = tuple(dataclasses.replace(coder, layer=0) for coder in some)
        intercepts.append(write(site, None, _replaced, bare, layers))
    return tuple(intercepts)


def _replaced(x: jax.Array, ctx: Context, coders: tuple[SparseCoder, ...], layers: jax.Array):
    here = layers == ctx.layer
    which = jnp.where(here.any(), 1 + jnp.argmax(here), 0)
    keep = lambda: x
    return jax.lax.switch(which, [keep, *(_reconstructed(x, ctx, coder) for coder in coders)])


def _reconstructed(x: jax.Array, ctx: Context, coder: SparseCoder):
    def branch():
        source = x if coder.reads == coder.writes else ctx.seen[coder.reads]
        y = coder.reconstruct(source).astype(x.dtype)
        return jnp.where(token_mask(ctx, x, coder.first), y, x)

    return branch


def ablated(
    config: GemmaConfig, coders: tuple[Coder, ...], means: tuple[Any, ...] | None = None
) -> tuple[Intercept, ...]:
    """Zeros in place of what the coders write, or `means`: [X, D] of each coder's X layers."""
    values: dict[tuple[str, int], Any] = {}
    at: dict[tuple[str, int], Any] = {}
    for i, coder in enumerate(coders):
        key, layers = (coder.writes, coder.first), jnp.asarray(layers_of(coder))
        if key not in values:
            values[key] = jnp.zeros((config.layers, coder.d_out), jnp.float32)
            at[key] = jnp.zeros(config.layers, bool)
        at[key] = at[key].at[layers].set(True)
        if means is not None:
            values[key] = values[key].at[layers].set(float32(means[i]))
    return tuple(
        write(site, None, _set_to, values[site, first], at[site, first], first=first)
        for site, first in values
    )


def _set_to(x: jax.Array, ctx: Context, values: jax.Array, at: jax.Array, *, first: int):
    value = values[ctx.layer].astype(x.dtype)[None, None, :]
    return jnp.where(at[ctx.layer] & token_mask(ctx, x, first), value, x)
