"""Grouped-query attention: exact patterns if an intercept needs them, otherwise never kept whole.

Queries and keys carry an absolute position and the number of their document (0 is padding or an
empty cache slot). A query sees the keys of its own document at positions p_q - window < p_k <= p_q:
one rule for padded and packed batches, prefill and decoding. `by_document` numbers documents so
that no two in a row share a number and positions grow within each: no query sees later tokens.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

QUERY_CHUNK = 256  # queries scored at a time, against only the keys that they can see
MOST_CHUNKS = 16  # unrolled; longer sequences get longer chunks
LOWEST = -2.3819763e38  # Gemma's mask value: finite, so that rows of padding stay free of NaN


@flax.struct.dataclass
class Tokens:
    """Positions and segments of tokens, int32 [B, T] (segment 0: padding).

    Attention takes document numbers as segments: see `by_document`.
    """

    positions: Array
    segments: Array

    def __getitem__(self, index: slice) -> "Tokens":
        return Tokens(self.positions[:, index], self.segments[:, index])


def by_document(given: Tokens, slot: Array | int, last: Array) -> tuple[Tokens, Array]:
    """`given`, its segment ids replaced by numbers that no two documents of a row share.

    A document begins where the segment id differs from the token before, or where the position does
    not grow; padding in between is skipped. Its number is 1 + the slot where it begins; `slot` is
    the slot of the first column. `last` int32 [B, 3] holds the position, segment id and document of
    each row's token before these, zeros if none. Also returns the same of the last token `given`.
    """
    positions, ids = given.positions, given.segments
    real = ids > 0
    index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    latest = jax.lax.cummax(jnp.where(real, index, -1), axis=1)  # the last token up to here
    before = jnp.concatenate([jnp.full_like(latest[:, :1], -1), latest[:, :-1]], 1)

    def at(x, where, first):
        found = jnp.take_along_axis(x, jnp.maximum(where, 0), axis=1)
        return jnp.where(where < 0, first[:, None], found)

    follows = (ids == at(ids, before, last[:, 1])) & (positions > at(positions, before, last[:, 0]))
    starts = jnp.where(real & ~follows, slot + index + 1, last[:, 2:])
    documents = jnp.where(real, jax.lax.cummax(starts, axis=1), 0)
    columns = zip((positions, ids, documents), last.T, strict=True)
    ends = jnp.concatenate([at(x, latest[:, -1:], first) for x, first in columns], 1)
    return Tokens(positions, documents), ends


def visible(queries: Tokens, keys: Tokens, window: Array | int) -> Array:
    """bool [B, T, S]: which keys each query sees under a window of `window` positions."""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    return same & (distance >= 0) & (distance < window) & (keys.segments[:, None, :] > 0)


def _probabilities(q, k, scale: float, mask) -> Array:
    """float32 [B, K, T, G, S]: the heads of a group side by side, so that no kv head is copied."""
    B, T, N, H = q.shape
    K = k.shape[2]
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 2, 1).reshape(B, K, T * (N // K), H)
    scores = jnp.einsum("bkqh,bskh->bkqs", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, T, N // K, k.shape[1])
    scores = jnp.where(mask[:, None, :, None, :], scores * scale, LOWEST)
    return jax.nn.softmax(scores, -1)


def _mix(probs: Array, v: Array) -> Array:
    """[B, K, T, G, S] applied to values [B, S, K, H]: z [B, T, N, H]."""
    B, K, T, G, S = probs.shape
    flat = probs.astype(v.dtype).reshape(B, K, T * G, S)
    z = jnp.einsum("bkqs,bskh->bkqh", flat, v, preferred_element_type=jnp.float32)
    z = jnp.moveaxis(z.astype(v.dtype).reshape(B, K, T, G, -1), 1, 2)
    return z.reshape(B, T, K * G, -1)


def pattern(q: Array, k: Array, scale: float, mask: Array) -> Array:
    """Attention probabilities float32 [B, N, T, S]; queries that see nothing get zeros."""
    probs = _probabilities(q, k, scale, mask)
    probs = jnp.where(mask[:, None, :, None, :], probs, 0.0)
    B, K, T, G, S = probs.shape
    return jnp.moveaxis(probs, 3, 2).reshape(B, K * G, T, S)


def mix(probs: Array, v: Array) -> Array:
    """Values weighted by a pattern: [B, N, T, S] and [B, S, K, H] to z [B, T, N, H]."""
    B, N, T, S = probs.shape
    K = v.shape[2]
    return _mix(jnp.moveaxis(probs.reshape(B, K, N // K, T, S), 2, 3), v)


def attend(
    q: Array, k: Array, v: Array, scale: float, queries: Tokens, keys: Tokens, window, causal: bool
) -> Array:
    """z [B, T, N, H] of q [B, T, N, H] over k, v [B, S, K, H]; the pattern is never kept whole.

    `causal`: queries and keys are the same tokens in the same order, so a chunk of queries needs no
    keys beyond its own end.
    """
    T = q.shape[1]
    chunk = max(QUERY_CHUNK, -(-T // MOST_CHUNKS))

    @jax.checkpoint
    def some(q, k, v, queries, keys):
        mask = visible(queries, keys, window)
        z = _mix(_probabilities(q, k, scale, mask), v)
        return jnp.where((queries.segments > 0)[:, :, None, None], z, jnp.zeros((), z.dtype))

    parts = []
    for start in range(0, T, chunk):
        mine = slice(start, min(start + chunk, T))
        seen = slice(0, mine.stop if causal else k.shape[1])
        parts.append(some(q[:, mine], k[:, seen], v[:, seen], queries[mine], keys[seen]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
