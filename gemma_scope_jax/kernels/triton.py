"""A `Backend` of Pallas kernels for GPUs, through Triton; `active.Backend` documents the functions.

A program reads the rows it sums 16 at a time and keeps the sum in registers, so gathered rows are
never written to memory. The gradient of a decoder's rows sums over the tokens of each feature in
sorted order: no atomic additions, and the same bits every time.

JAX has deprecated this Pallas backend; where it is missing, `active.backend` falls back to XLA.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gemma_scope_jax.kernels import xla

ROWS = 16  # rows that a program adds at a time
COLUMNS = 128  # columns of those rows, at most
# H100, TF32, D 640: dense wins at 79 (3.3 against 4.8 ms), sparse at 315 (8.5 against 11).
FEATURES_A_SLOT: int = 192

compact, largest, kth_largest = xla.compact, xla.largest, xla.kth_largest


def decode(f, feature, count, w_dec, layout: xla.Layout) -> jax.Array:
    pairs, targets, ends = layout
    (_, b, k), e = f.shape, w_dec.shape[2]
    groups, blocks, columns = len(ends), *_blocks(e)

    def kernel(begin, decoder, source, f, feature, count, w_dec, y):
        t, token, block = _places(b, blocks)
        column, inside = _columns(block, columns, e)

        def add_pair(i, sums):
            p, s = decoder[i], source[i]
            n = jnp.minimum(count[s, token], k)

            def add_rows(j, sums):
                slot, used = _slots(j, n)
                ids = plgpu.load(feature.at[s, token, slot], mask=used, other=0)
                values = plgpu.load(f.at[s, token, slot], mask=used, other=0.0)
                rows = _rows(w_dec.at[p, ids[:, None], column[None, :]], used, inside)
                group = _group(ids, ends)
                mine = (jnp.where(group == m, values, 0.0) for m in range(groups))
                return tuple(a + jnp.sum(v[:, None] * rows, 0) for a, v in zip(sums, mine))

            return jax.lax.fori_loop(0, pl.cdiv(n, ROWS), add_rows, sums)

        zeros = (jnp.zeros(columns, jnp.float32),) * groups
        sums = jax.lax.fori_loop(begin[t], begin[t + 1], add_pair, zeros)
        for m, a in enumerate(sums):
            plgpu.store(y.at[t, m, token, column], a, mask=inside)

    begin, order = _by(1, pairs, targets)
    source = np.asarray([pairs[p][0] for p in order], np.int32)
    call = _call(kernel, targets * b * blocks, (targets, groups, b, e))
    return call(begin, order, source, f, feature, count, w_dec)[0]


def decode_values(feature, count, w_dec, g, layout: xla.Layout) -> jax.Array:
    pairs, _, ends = layout
    (s, b, k), e = feature.shape, w_dec.shape[2]
    tiles, blocks, columns = -(-k // ROWS), *_blocks(e)

    def kernel(begin, decoder, target, feature, count, w_dec, g, df):
        s, token, tile = _places(b, tiles)
        n = jnp.minimum(count[s, token], k)
        slot, used = _slots(tile, n)
        ids = plgpu.load(feature.at[s, token, slot], mask=used, other=0)
        group = _group(ids, ends)

        def add_pair(i, sums):
            p, t = decoder[i], target[i]

            def add_columns(j, sums):
                column, inside = _columns(j, columns, e)
                rows = _rows(w_dec.at[p, ids[:, None], column[None, :]], used, inside)
                for m in range(len(ends)):
                    row = plgpu.load(g.at[t, m, token, column], mask=inside, other=0.0)
                    product = jnp.sum(rows * row[None, :], 1)
                    sums = sums + jnp.where(group == m, product, 0.0)
                return sums

            return jax.lax.fori_loop(0, blocks, add_columns, sums)

        some = tile * ROWS < n
        last = jnp.where(some, begin[s + 1], begin[s])  # nothing to add if no slot is used
        sums = jax.lax.fori_loop(begin[s], last, add_pair, jnp.zeros(ROWS, jnp.float32))
        slot = tile * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        plgpu.store(df.at[s, token, slot], sums, mask=slot < k)

    begin, order = _by(0, pairs, s)
    target = np.asarray([pairs[p][1] for p in order], np.int32)
    call = _call(kernel, s * b * tiles, (s, b, k))
    return call(begin, order, target, feature, count, w_dec, g)[0]


def decode_rows(f, feature, count, g, layout: xla.Layout) -> tuple[jax.Array, jax.Array]:
    pairs, _, ends = layout
    k, e, width = f.shape[2], g.shape[-1], ends[-1]
    blocks, columns = _blocks(e)
    start, slots = _tokens_of_features(feature, count, width)

    def kernel(source, target, start, slots, f, g, dw, total):
        p, feature, block = _places(width, blocks)
        s, t = source[p], target[p]
        first, stop = start[s, feature], start[s, feature + 1]
        column, inside = _columns(block, columns, e)
        group = _group(feature, ends)

        def add_tokens(j, sums):
            slot, used = _slots(j, stop - first)
            slot = plgpu.load(slots.at[s, first + slot], mask=used, other=0)
            token = slot // k
            values = plgpu.load(f.at[s, token, slot % k], mask=used, other=0.0)
            rows = _rows(g.at[t, group, token[:, None], column[None, :]], used, inside)
            return sums[0] + jnp.sum(values[:, None] * rows, 0), sums[1] + jnp.sum(values)

        zeros = jnp.zeros(columns, jnp.float32), jnp.float32(0.0)
        row, value = jax.lax.fori_loop(0, pl.cdiv(stop - first, ROWS), add_tokens, zeros)
        plgpu.store(dw.at[p, feature, column], row, mask=inside)
        total[p, feature, block] = value

    source, target = np.asarray(pairs, np.int32).T
    n = len(pairs)
    call = _call(kernel, n * width * blocks, (n, width, e), (n, width, blocks))
    dw, total = call(source, target, start, slots, f, g)
    return dw, total[:, :, 0]


def per_feature(values, feature, count, width: int) -> jax.Array:
    s, _, k = values.shape
    start, slots = _tokens_of_features(feature, count, width)

    def kernel(start, slots, values, total):
        s, feature, _ = _places(width, 1)
        first, stop = start[s, feature], start[s, feature + 1]

        def add_tokens(j, sums):
            slot, used = _slots(j, stop - first)
            slot = plgpu.load(slots.at[s, first + slot], mask=used, other=0)
            return sums + plgpu.load(values.at[s, slot // k, slot % k], mask=used, other=0.0)

        zeros = jnp.zeros(ROWS, jnp.float32)
        sums = jax.lax.fori_loop(0, pl.cdiv(stop - first, ROWS), add_tokens, zeros)
        total[s, feature] = jnp.sum(sums)

    return _call(kernel, s * width, (s, width))(start, slots, values)[0]


def _tokens_of_features(feature, count, width: int) -> tuple[jax.Array, jax.Array]:
    """Slots sorted by feature, then token: the start of each feature [S,F+1], slots [S,B*K]."""
    s, b, k = feature.shape
    key = jnp.where(xla.used_slots(count, k), feature, width)
    key = key.reshape(s, b * k).astype(jnp.uint32)
    slot = jnp.broadcast_to(jnp.arange(b * k, dtype=jnp.uint32), key.shape)
    key, slot = jax.lax.sort((key, slot), num_keys=1, is_stable=True)
    find = partial(jnp.searchsorted, v=jnp.arange(width + 1, dtype=jnp.uint32))
    return jax.vmap(find)(key).astype(jnp.int32), slot.astype(jnp.int32)


def _blocks(e: int) -> tuple[int, int]:
    """How many blocks, each of how many columns (a power of two), cover a row of E."""
    columns = min(COLUMNS, max(16, 1 << (e - 1).bit_length()))
    return -(-e // columns), columns


def _columns(block, columns: int, e: int) -> tuple[jax.Array, jax.Array]:
    """The columns of a block, and which of them are within a row of E."""
    column = block * columns + jnp.arange(columns, dtype=jnp.int32)
    return column, column < e


def _rows(at, used, inside) -> jax.Array:
    return plgpu.load(at, mask=used[:, None] & inside[None, :], other=0.0)


def _places(b: int, c: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A program's number as indices on three axes, the last two of sizes b and c.

    A CUDA grid can be long only along its first axis.
    """
    i = pl.program_id(0)
    return i // (b * c), i // c % b, i % c


def _slots(tile, n) -> tuple[jax.Array, jax.Array]:
    """A tile's slots, and which of them are among the first n; the others become slot 0."""
    slot = tile * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    return jnp.where(slot < n, slot, 0), slot < n


def _group(feature, ends):
    """Which group of features (see `active.decode_active`) each feature belongs to."""
    group = jnp.zeros_like(feature)
    for end in ends[:-1]:
        group = group + (feature >= end).astype(jnp.int32)
    return group


def _by(side: int, pairs, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the decoders of each source (0) or target (1) begin, and the decoders in that order."""
    keys = np.asarray([pair[side] for pair in pairs])
    order = np.argsort(keys, kind="stable").astype(np.int32)
    return np.searchsorted(keys[order], np.arange(count + 1)).astype(np.int32), order


def _call(kernel: Callable, programs: int, *shapes: tuple[int, ...]) -> Callable:
    """A kernel as a function of arrays with float32 results; interpreted if there is no GPU."""
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=jax.default_backend() != "gpu",
    )
