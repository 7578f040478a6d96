"""What edits need of the coders, gathered on the device: encoder columns and decoder rows.

An edit touches one feature, so nothing of the coders' width is computed for it. A set of coders
with a layer each and a CLT give the same arrays: a feature writes W rows, to the layers named.
The rows of a CLT whose decoder was left on disk are read from there, before the program runs.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.interventions import Edits
from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.coders.load import decoder_rows
from gemma_scope_jax.coders.multi_layer_coder import block_index


@flax.struct.dataclass
class EditRows:
    """Edits [B, E] with what they need of the coders, float32."""

    edits: Edits
    w_enc: jax.Array  # [B, E, D]
    b_enc: jax.Array  # [B, E]
    threshold: jax.Array  # [B, E]
    rows: jax.Array  # [B, E, W, D]: what a feature of activation 1 writes
    layers: jax.Array  # int32 [B, E, W]: where; -1: nowhere


def own_layers(coders: tuple[Coder, ...], layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each of the model's layers the number of its coder, -1 if none, and the coder's own
    number of that layer: static."""
    which, own = [-1] * layers, [0] * layers
    for n, coder in enumerate(coders):
        for i, layer in enumerate(coder.layers):
            which[layer], own[layer] = n, i
    return tuple(which), tuple(own)


def of_layer(coders, own, layer, x, fn):
    """`fn(coder, i, x)` of the layer's coder; zeros for a layer without one."""
    which, i = (jnp.asarray(table, jnp.int32)[layer] for table in own)
    nothing = lambda: jnp.zeros((*x.shape[:-1], coders[0].d_out), jnp.float32)
    branches = [lambda coder=coder: fn(coder, i, x) for coder in coders]
    return jax.lax.switch(which + 1, [nothing, *branches])


def columns(coder: Coder, i, ids):
    """Encoder columns [..., D], biases and thresholds [...] of the features `ids` [...], `i` the
    coder's own layers [...]."""
    if coder.multi_layer:
        found = (a[i, ..., ids] for a in (coder.w_enc, coder.b_enc, coder.threshold))
    else:
        w = jnp.moveaxis(coder.w_enc[:, ids], 0, -1)
        found = (w, coder.b_enc[ids], coder.threshold[ids])
    return tuple(map(float32, found))


def columns_of_layer(coders, own, layer: int, ids):
    """`columns` of the features `ids` [R] of one layer; zeros where no coder is."""
    if own[0][layer] < 0:
        zeros = jnp.zeros(ids.shape, jnp.float32)
        return jnp.zeros((*ids.shape, coders[0].d_in), jnp.float32), zeros, zeros
    return columns(coders[own[0][layer]], jnp.full_like(ids, own[1][layer]), ids)


def gathered(coders, own, edits: Edits, noise, stored: tuple[Any, ...] = ()) -> EditRows:
    """The edits with their encoder columns and with what they write.

    noise   (whether features write the directions of others, a seed, the numbers [B] of the sets)
    stored  of each coder None, or what its edits write, see `rows_on_disk`
    """
    swap, numbers = noise[0], drawn(edits.layer.shape[1], *noise[1:])
    which, i = (jnp.asarray(table, jnp.int32)[edits.layer] for table in own)
    which, zeros = jnp.where(edits.layer < 0, -1, which), partial(jnp.zeros, dtype=jnp.float32)
    W, shape = max(len(coder.layers) for coder in coders), which.shape
    w_enc, b_enc, threshold = zeros((*shape, coders[0].d_in)), zeros(shape), zeros(shape)
    rows = zeros((*shape, W, coders[0].d_out))
    layers = jnp.full((*shape, W), -1, jnp.int32)
    for n, coder in enumerate(coders):
        here = which == n
        ids, source = jnp.where(here, edits.feature, 0), jnp.where(here, i, 0)
        w, b, t = columns(coder, source, ids)
        w_enc = jnp.where(here[..., None], w, w_enc)
        b_enc, threshold = jnp.where(here, b, b_enc), jnp.where(here, t, threshold)
        names = _written_layers(coder, source, W)
        if coder.w_dec is None:
            written = jnp.pad(stored[n], [(0, 0)] * 2 + [(0, W - len(coder.layers)), (0, 0)])
        else:
            written = _decoder_rows(coder, source, ids, W)
            direction = _decoder_rows(coder, source, another(coder, ids, numbers), W)
            written = jnp.where(swap, _resized(direction, written), written)
        names = jnp.where(here[..., None], names, -1)
        layers = jnp.where(names < 0, layers, names)
        rows = jnp.where((names < 0)[..., None], rows, written)
    return EditRows(edits, w_enc, b_enc, threshold, rows, layers)


def rows_on_disk(coders: tuple[Coder, ...], edits: Edits, noise) -> tuple[Any, ...]:
    """Of each coder None, or, if its decoder was left on disk, what its edits write: float32
    [B, E, X, D], zeros for the edits of other coders. `noise` as in `gathered`."""
    if all(coder.w_dec is not None for coder in coders):
        return (None,) * len(coders)
    numbers = np.asarray(drawn(edits.layer.shape[1], *noise[1:])) if noise[0] else None
    return tuple(None if c.w_dec is not None else _from_disk(c, edits, numbers) for c in coders)


def _from_disk(coder: Coder, edits: Edits, numbers: np.ndarray | None) -> np.ndarray:
    found = np.zeros((*edits.layer.shape, len(coder.layers), coder.d_out), np.float32)
    for i, layer in enumerate(coder.layers):
        mine = edits.layer == layer
        if mine.any():
            ids = edits.feature[mine]
            rows = _distinct_rows(coder, i, ids)
            if numbers is not None:
                direction = _distinct_rows(coder, i, another(coder, ids, numbers[mine]))
                rows = np.asarray(_resized(direction, rows))
            found[mine] = rows
    return found


def _distinct_rows(coder: Coder, i: int, ids: np.ndarray) -> np.ndarray:
    """Decoder rows [n, X, D] of features of the coder's layer i, each read once."""
    unique, where = np.unique(ids, return_inverse=True)
    return decoder_rows(coder, unique, layer=i).astype(np.float32)[where.reshape(-1)]


def another(coder: Coder, ids, numbers):
    """Other features of the same layers, by numbers `drawn`."""
    return (ids + 1 + numbers % max(1, coder.width - 1)) % coder.width


def _written_layers(coder: Coder, i, size: int):
    """The layers that features of the coder's layers `i` write to, int32 [..., size]; -1: none."""
    names = jnp.broadcast_to(jnp.asarray(coder.layers, jnp.int32), (*i.shape, len(coder.layers)))
    if coder.multi_layer:
        names = jnp.where(_own_numbers(coder, i) >= i[..., None], names, -1)
    room = [(0, 0)] * i.ndim + [(0, size - names.shape[-1])]
    return jnp.pad(names, room, constant_values=-1)


def _own_numbers(coder: Coder, like):
    """The coder's layers as it counts them, 0 to X - 1: [..., X] with the axes of `like`."""
    return jnp.arange(len(coder.layers), dtype=jnp.int32).reshape(*(1,) * like.ndim, -1)


def _decoder_rows(coder: Coder, i, ids, size: int):
    """What features write [..., size, D]: to each layer of their coder, as far as they do."""
    X = len(coder.layers)
    if not coder.multi_layer:
        rows = coder.w_dec[ids][..., None, :]
    else:
        j = _own_numbers(coder, ids)
        later = j >= i[..., None]
        rows = coder.w_dec[jnp.where(later, block_index(i[..., None], j, X), 0), ids[..., None]]
    return jnp.pad(float32(rows), [(0, 0)] * ids.ndim + [(0, size - X), (0, 0)])


def drawn(size: int, seed, numbers):
    """Numbers from 0 on, int32 [B, size], by seed and set."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers.astype(jnp.uint32))
    draw = lambda key: jax.random.randint(key, (size,), 0, 2**31 - 1, jnp.int32)
    return jax.vmap(draw)(keys)


def _resized(rows, like):
    """`rows` with the norms of `like`; zeros stay zeros."""
    norm = lambda a: jnp.linalg.norm(a, axis=-1, keepdims=True)
    return rows * (norm(like) / jnp.maximum(norm(rows), 1e-30))
