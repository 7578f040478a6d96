"""A `Backend` in plain jax.numpy, for machines without C++ or GPU kernels.

It also holds what all backends share.

`active.Backend` documents the functions. XLA writes gathered rows to memory before it multiplies
them, so tokens are processed in chunks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 2**24  # floats gathered at a time
# Estimated: five gathers of 4 D bytes per slot, 6 D flop per feature, 130 flop per byte.
FEATURES_A_SLOT: int = 512

Pairs = tuple[tuple[int, int], ...]  # source and target of each decoder
Ends = tuple[int, ...]  # where groups of features end


class Layout(NamedTuple):
    """The static arguments of `active.decode_active`."""

    pairs: Pairs
    targets: int
    ends: Ends


def separate(coders: int, width: int) -> Layout:
    """The layout of separate coders, each with one group of `width` features."""
    return Layout(tuple((i, i) for i in range(coders)), coders, (width,))


def used_slots(count: jax.Array, slots: int) -> jax.Array:
    """bool [S,B,K]: which slots hold entries, for counts [S,B]."""
    return jnp.arange(slots, dtype=jnp.int32)[None, None, :] < count[..., None]


def compact(z, b_enc, low, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    z = z + b_enc[:, None, :]
    feature, count = first_above(z, low, capacity)
    used = used_slots(count, capacity)
    feature = jnp.where(used, feature, 0)
    return jnp.where(used, jnp.take_along_axis(z, feature, -1), 0.0), feature, count


def largest(z, b_enc, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    values, feature = jax.lax.top_k(z + b_enc[:, None, :], k)
    order = jnp.argsort(jnp.where(values > 0, feature, z.shape[-1]), -1)
    values, feature = (jnp.take_along_axis(a, order, -1) for a in (values, feature))
    count = jnp.sum(values > 0, -1, dtype=jnp.int32)
    used = used_slots(count, k)
    return jnp.where(used, values, 0.0), jnp.where(used, feature, 0), count


def first_above(z, low, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(feature int32 [S,B,K], count int32 [S,B]): the first K entries above `low`, then rubbish.

    Packs one bit per entry, then finds slot k in the running count of bits: z is read once, where a
    sort or top_k reads it many times.
    """
    s, b, f = z.shape
    words = -(-f // 32)
    above = jnp.pad(z > low[:, None, :], ((0, 0), (0, 0), (0, 32 * words - f)))
    place = jnp.arange(32, dtype=jnp.uint32)
    bits = above.reshape(s, b, words, 32).astype(jnp.uint32) << place[None, None, None, :]
    bits = jnp.sum(bits, -1, dtype=jnp.uint32)
    ones = jax.lax.population_count(bits).astype(jnp.int32)
    ends = jnp.cumsum(ones, -1)
    slot = jnp.arange(capacity, dtype=jnp.int32)
    find = jax.vmap(partial(jnp.searchsorted, v=slot, side="right"))
    word = jnp.minimum(find(ends.reshape(s * b, words)).reshape(s, b, -1), words - 1)
    take = lambda a: jnp.take_along_axis(a, word, -1)
    rank, rest = slot[None, None, :] - take(ends - ones), take(bits)
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):  # the bit of this rank is in the lower or the upper half
        lower = rest & jnp.uint32((1 << width) - 1)
        inside = jax.lax.population_count(lower).astype(jnp.int32)
        upper = rank >= inside
        rank = jnp.where(upper, rank - inside, rank)
        rest = jnp.where(upper, rest >> jnp.uint32(width), lower)
        place = place + jnp.where(upper, width, 0)
    return 32 * word + place, ends[..., -1]


def split(a: jax.Array, axis: int, size: int) -> jax.Array:
    """[.., B, ..] as [B / size, .., size, ..], padded with zeros."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, -a.shape[axis] % size)
    a = jnp.pad(a, pad)
    a = a.reshape(*a.shape[:axis], -1, size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)


def join(a: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `split`."""
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
    return jax.lax.slice_in_dim(a, 0, length, axis=axis)


def _chunk(feature: jax.Array, e: int) -> int:
    _, b, k = feature.shape
    return max(1, min(b, CHUNK // (k * e)))


def _members(feature, count, ends) -> jax.Array:
    """float32 [S,B,K,M]: 1 where an entry belongs to the group; unused slots belong to none."""
    group = jnp.sum(feature[..., None] >= jnp.asarray(ends, jnp.int32)[None, None, None, :], -1)
    used = used_slots(count, feature.shape[-1])
    return jax.nn.one_hot(jnp.where(used, group, -1), len(ends), dtype=jnp.float32)


def decode(f, feature, count, w_dec, layout: Layout) -> jax.Array:
    pairs, targets, ends = layout

    def some(tokens):
        f, feature, count = tokens
        scale = f[..., None] * _members(feature, count, ends)
        y = [jnp.zeros((len(ends), f.shape[1], w_dec.shape[2]), f.dtype)] * targets
        for p, (s, t) in enumerate(pairs):
            rows = w_dec[p].at[feature[s]].get(mode="clip")
            y[t] = y[t] + jnp.einsum("bkm,bke->mbe", scale[s], rows)
        return jnp.stack(y)

    size = _chunk(feature, w_dec.shape[2])
    y = jax.lax.map(some, tuple(split(a, 1, size) for a in (f, feature, count)))
    return join(y, 2, f.shape[1])


def decode_values(feature, count, w_dec, g, layout: Layout) -> jax.Array:
    pairs, _, ends = layout

    def some(tokens):
        feature, count, g = tokens
        members = _members(feature, count, ends)
        df = [jnp.zeros(feature.shape[1:], g.dtype)] * feature.shape[0]
        for p, (s, t) in enumerate(pairs):
            rows = w_dec[p].at[feature[s]].get(mode="clip")
            df[s] = df[s] + jnp.sum(jnp.einsum("mbe,bke->bkm", g[t], rows) * members[s], -1)
        return jnp.stack(df)

    size = _chunk(feature, w_dec.shape[2])
    tokens = (split(feature, 1, size), split(count, 1, size), split(g, 2, size))
    return join(jax.lax.map(some, tokens), 1, feature.shape[1])


def decode_rows(f, feature, count, g, layout: Layout) -> tuple[jax.Array, jax.Array]:
    pairs, _, ends = layout

    def some(sums, tokens):
        f, feature, count, g = tokens
        dw, total = sums
        scale = f[..., None] * _members(feature, count, ends)
        for p, (s, t) in enumerate(pairs):
            dw = dw.at[p, feature[s]].add(jnp.einsum("bkm,mbe->bke", scale[s], g[t]), mode="drop")
            total = total.at[p, feature[s]].add(jnp.sum(scale[s], -1), mode="drop")
        return (dw, total), None

    size = _chunk(feature, g.shape[-1])
    tokens = (*(split(a, 1, size) for a in (f, feature, count)), split(g, 2, size))
    width = (len(pairs), ends[-1])
    zeros = jnp.zeros((*width, g.shape[-1]), f.dtype), jnp.zeros(width, f.dtype)
    return jax.lax.scan(some, zeros, tokens)[0]


def per_feature(values, feature, count, width: int) -> jax.Array:
    s, b, _ = values.shape
    nothing = jnp.zeros((s, 1, b, 1), values.dtype)
    return decode_rows(values, feature, count, nothing, separate(s, width))[1]


def kth_largest(z: jax.Array, k: int) -> jax.Array:
    """The k-th largest value of z, found bit by bit."""
    top = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    order = jnp.where(bits >= top, ~bits, bits | top)  # sorts as the floats do

    def try_bit(i, best):
        more = best | (top >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(order >= more, dtype=jnp.int32) >= k, more, best)

    best = jax.lax.fori_loop(0, 32, try_bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(jnp.where(best >= top, best ^ top, ~best), jnp.float32)
