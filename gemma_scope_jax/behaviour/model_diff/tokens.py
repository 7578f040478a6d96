"""Two models on the same tokens: where their next-token distributions part, and by how much.

Both run once over the text. Per token the KL divergence, the log-probabilities of the token that
follows, and the size of the difference of the residual stream at every layer are computed on the
device; no logits leave it.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.measure import like_lengths
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import check_ids, padded
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import unembed
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.progress import Report

TOKENS = 1024  # of a batch: the residuals of all layers of both models are on the device
CHUNK = 64  # tokens whose logits [64, V] of both models exist at a time


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDifferences:
    """For each text of n tokens, arrays over its positions.

    kl      KL(base || other) of the distributions of the next token, in nats, float64 [n]
    loss_base, loss_other  -log p of the token that follows, [n - 1]
    moved   size of the difference of resid_post over the size of base's, [L, n]
    """

    kl: list[np.ndarray]
    loss_base: list[np.ndarray]
    loss_other: list[np.ndarray]
    moved: list[np.ndarray]


def check_alike(base: Model, other: Model) -> None:
    """Raise `InputError` unless both models have one architecture."""
    for field in dataclasses.fields(base.config):
        if (name := field.name) in ("name", "context", "tied"):
            continue
        one, two = getattr(base.config, name), getattr(other.config, name)
        if one != two:
            raise InputError(f"the models cannot be compared: {name} is {one} and {two}")


def token_differences(
    base: Model,
    other: Model,
    texts: Sequence[np.ndarray],
    report: Report | None = None,
    *,
    starts: Sequence[int] | None = None,
) -> TokenDifferences:
    """Compare two models of one architecture on `texts`, int ids [n] each with <bos>.

    starts  the first position of each text at which KL and losses are computed; 0 before
    """
    check_alike(base, other)
    for number, ids in enumerate(texts):
        check_ids(base.config, np.asarray(ids), f"text {number}: ")
    empty = [np.zeros(0)] * len(texts)
    found = TokenDifferences(list(empty), list(empty), list(empty), list(empty))
    done, total = 0, sum(map(len, texts))
    reads = (capture("resid_post"), capture("resid_final"))
    for which, rows, width in like_lengths(base, texts, TOKENS, 1):
        batch = padded([texts[i] for i in which], rows, width)
        given = {"segments": batch.segments, "logits": "none", "pad": False}
        states = [run(m, batch.tokens, reads, **given).reads for m in (base, other)]
        begins = np.zeros(rows, int)
        if starts is not None:
            begins[: len(which)] = [starts[i] for i in which]
        asked = (batch.segments > 0) & (np.arange(width) >= begins[:, None])
        real = np.flatnonzero(asked)
        size = -(-batch.tokens.size // CHUNK) * CHUNK  # the number of real tokens is data
        places = np.pad(real, (0, size - len(real))).astype(np.int32)
        at = np.int32(len(real))
        *flat, moved = _apart(base, other, states, batch.tokens, places, at)
        kl, loss_base, loss_other = np.zeros((3, batch.tokens.size))
        for whole, some in zip((kl, loss_base, loss_other), flat):
            whole[real] = np.asarray(some)[: len(real)]
        kl, loss_base, loss_other = (a.reshape(rows, width) for a in (kl, loss_base, loss_other))
        moved = np.asarray(moved, np.float64)
        for row, i in enumerate(which):
            n = len(texts[i])
            found.kl[i], found.moved[i] = kl[row, :n], moved[:, row, :n]
            found.loss_base[i] = loss_base[row, : n - 1]
            found.loss_other[i] = loss_other[row, : n - 1]
        done += sum(len(texts[i]) for i in which)
        if report is not None:
            report(done, total)
    return found


@jax.jit
def _apart(base: Model, other: Model, states: list, tokens: jax.Array, places, count):
    """KL and both losses at flat `places` [N], float32; only the first `count` are computed. The
    relative size of the difference of the residual streams, [L, B, T]."""
    norm = partial(jnp.linalg.norm, axis=-1)
    x, y = (float32(s["resid_post"]) for s in states)
    moved = norm(x - y) / jnp.maximum(norm(x), 1e-30)
    following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], 1).reshape(-1)
    final = [s["resid_final"].reshape(-1, x.shape[-1]) for s in states]

    def step(number, found):
        start = number * CHUNK
        some = jax.lax.dynamic_slice_in_dim(places, start, CHUNK)
        logs = [
            jax.nn.log_softmax(float32(unembed(m.config, m.params, h[some][None])[0]))
            for m, h in ((base, final[0]), (other, final[1]))
        ]
        kl = jnp.maximum(jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), -1), 0.0)
        ids = following[some][:, None]
        losses = [-jnp.take_along_axis(log, ids, -1)[:, 0] for log in logs]
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(f, new, start, 0) for f, new in zip(found, (kl, *losses)))

    zeros = jnp.zeros(places.shape, jnp.float32)
    chunks = (count + CHUNK - 1) // CHUNK
    return *jax.lax.fori_loop(0, chunks, step, (zeros,) * 3), moved
