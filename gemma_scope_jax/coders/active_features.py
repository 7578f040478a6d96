"""The device's half of extraction: one program from tokens to the active features of every coder.

The model runs to the last layer that is read. At each layer read, the encoder's product is reduced
at once to the active entries, so that of [tokens, F] activations only those leave the device.
Coders of one shape and site are stacked and share the loop over layers: the program of 26 of them
compiles as fast as that of one.

A token has room for `slots` entries; the few tokens with more (outlier tokens have thousands) are
`spilled`: their whole rows are returned. On a mesh the features are split over its axis "model",
and each part finds its own entries.

Axes: B sequences of T tokens, N = B T, D inputs, F features, K slots, R spilled, d x m the mesh.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.coders.coder import Coder, Encoder, by_layer, float32, largest
from gemma_scope_jax.kernels import active, cpu, xla
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import Context, per_layer, read, token_mask
from gemma_scope_jax.model.sharding import mesh_of

ON_CPU, ELSEWHERE = 256, 2048  # tokens encoded at a time, which bounds their [tokens, F] floats
SPILL = 128  # one token in this many may have more features than slots
PRECISIONS = ("highest", "high", "default")
P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class CoderStack:
    """Coders' layers that run as one read: same site and shape, each at another model layer.

    members: (name of the coder, own layer), in the order of `layers`.
    k: the features kept per token, for TopK coders.
    """

    site: str
    layers: tuple[int, ...]
    first: int
    members: tuple[tuple[str, int], ...]
    width: int
    k: int | None = None


@flax.struct.dataclass
class ActiveFeatures:
    """The active features of a group's X layers, in m parts of F / m features each.

    values   float32 [X, N, m K]: the first `count` entries of each part, in order of feature
    features int [X, N, m K], counted from the part's first
    count    int32 [X, N, m]: the number of entries; above K, the token is spilled
    spilled_tokens  int32 [X, d, m, R]: numbers within the data shard; N / d: none
    spilled  float32 [X, d, R, F]: all activations of those tokens
    overflow bool [X]: more tokens had too many features than can be spilled
    finite   bool [X]: all activations that were read are finite
    """

    values: Any
    features: Any
    count: Any
    spilled_tokens: Any
    spilled: Any
    overflow: Any
    finite: Any


@dataclasses.dataclass(frozen=True)
class Search:
    """How to find the active features of a stack: the static options of `_active`."""

    slots: int
    k: int | None
    using: active.Backend
    precision: str
    axes: tuple[str, ...] = ()  # of the mesh, over which a part's results are joined
    split: str | None = None  # the mesh axis that splits the features


def grouped(coders: Mapping[str, Coder]) -> tuple[CoderStack, ...]:
    """`coders` in as few stacks as possible, each with every layer at most once.

    Raises `InputError` for TopK coders of several layers, see `by_layer`.
    """
    rounds: dict[tuple, list[dict[int, tuple[str, int]]]] = {}
    for name, coder in coders.items():
        by_layer(coder)
        alike = (coder.reads, coder.d_in, coder.width, coder.first, coder.k)
        stacks = rounds.setdefault(alike, [])
        for own, layer in enumerate(coder.layers):
            free = next((stack for stack in stacks if layer not in stack), None)
            if free is None:
                stacks.append(free := {})
            free[layer] = (name, own)
    groups = []
    for (site, _, width, first, k), stacks in rounds.items():
        for stack in stacks:
            layers = tuple(sorted(stack))
            members = tuple(stack[layer] for layer in layers)
            groups.append(CoderStack(site, layers, first, members, width, k))
    return tuple(groups)


def encoders(group: CoderStack, coders: Mapping[str, Coder], mesh: Mesh | None = None) -> Encoder:
    """The weights of a group, stacked, float32: w_enc [X, D, F], b_enc and threshold [X, F]; on a
    mesh split by feature over its axis "model".
    """
    split = mesh is not None and group.width % mesh.shape["model"] == 0

    def stacked(*parts: jax.Array) -> jax.Array:
        if mesh is None:
            return jnp.stack([float32(part) for part in parts])
        whole = np.stack([np.asarray(part, np.float32) for part in parts])
        spec = P(*(None,) * (whole.ndim - 1), "model" if split else None)
        place = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(stacked, *(coders[name].encoder(own) for name, own in group.members))


def slots_for(coders: Sequence[Coder]) -> int:
    """Room for four times the largest target L0, or 256 if none is known; a multiple of 32.

    The target of a coder of several layers is taken as their sum. TopK coders need their k.
    """
    known = [4 * c.info.l0 / len(c.layers) for c in coders if c.info.l0 and c.k is None]
    known += [c.k for c in coders if c.k is not None]
    return -(-int(max(known, default=256)) // 32) * 32


@partial(jax.jit, static_argnames=("groups", "slots", "using", "precision"))
def active_features(
    model: Model,
    weights: tuple[Encoder, ...],
    batch: TokenBatch,
    *,
    groups: tuple[CoderStack, ...],
    slots: int,
    using: active.Backend | None = None,
    precision: str = "highest",
) -> list[ActiveFeatures]:
    """The active features of every group, at the tokens of the batch's mask.

    `precision` is that of the encoders' products, as `jax.lax.Precision`; `using` names the kernels
    (default: C++ on CPUs where it compiles, XLA elsewhere) when compiling for another device.
    """
    mesh, mask = mesh_of(model.params.embed), batch.counted(0)
    using = using or (active.backend() if jax.default_backend() == "cpu" else xla)
    reads = []
    for i, (group, w) in enumerate(zip(groups, weights)):
        how = Search(min(slots, group.width), group.k, using, precision)
        where: dict[str, Any] = dict(name=str(i), first=group.first, how=how, mesh=mesh)
        reads.append(read(group.site, group.layers, _active, per_layer(w), mask, **where))
    stop = 1 + max(max(group.layers) for group in groups)
    out = forward(model, batch, reads, stop_at_layer=stop, logits="none", remat=None)
    return [out.reads[str(i)] for i in range(len(groups))]


def specs(rows: str | None, split: str | None) -> ActiveFeatures:
    """One layer's results on the mesh: tokens over its axis `rows`, features over `split`."""
    each = P(rows, split)
    return ActiveFeatures(each, each, each, P(rows, split, None), P(rows, None, split), P(), P())


def _active(x, ctx: Context, w: Encoder, mask, *, first: int, how: Search, mesh) -> ActiveFeatures:
    """The active features of one layer: x [B, T, D]."""
    keep = token_mask(ctx, x, first)[..., 0] & mask
    if mesh is None:
        return _find(x, keep, w, how=how)
    width = w.w_enc.shape[1]
    split = "model" if width % mesh.shape["model"] == 0 else None
    rows = "data" if x.shape[0] % mesh.shape["data"] == 0 else None
    parts = mesh.shape["model"] if split else 1
    slots = -(-2 * how.slots // parts) if split else how.slots  # some parts are fuller than others
    axes = tuple(axis for axis in (rows, split) if axis)
    how = dataclasses.replace(how, slots=min(slots, width // parts), axes=axes, split=split)
    where = (P(rows, None, None), P(rows, None), Encoder(P(None, split), P(split), P(split)))
    places: dict[str, Any] = dict(mesh=mesh, in_specs=where, out_specs=specs(rows, split))
    return jax.shard_map(partial(_find, how=how), **places, check_vma=False)(x, keep, w)


def _find(x, keep, w: Encoder, *, how: Search) -> ActiveFeatures:
    """x [b, T, D], w of f features: the part on one device."""
    x, keep = x.reshape(-1, x.shape[-1]), keep.reshape(-1)
    w = w._replace(threshold=jnp.maximum(w.threshold, 0.0))  # JumpReLU is also a ReLU
    size = min(ON_CPU if how.using is cpu else ELSEWHERE, x.shape[0])
    parts = jax.lax.map(partial(_compact, w=w, how=how), xla.split(x, 0, size))
    values, features, count = (xla.join(a, 0, x.shape[0]) for a in parts)
    count = jnp.where(keep, count, 0)
    over, room = count > how.slots, max(8, x.shape[0] // SPILL)
    none = jnp.full(room, x.shape[0], jnp.int32)
    spill = lambda: _spill(x, over, w, room, how)
    nothing = lambda: (none, jnp.zeros((room, w.w_enc.shape[1]), jnp.float32))
    spilled_tokens, spilled = jax.lax.cond(over.any(), spill, nothing)
    overflow = over.sum(dtype=jnp.int32) > room
    finite = jnp.isfinite(jnp.where(keep[:, None], x, jnp.zeros_like(x))).all()
    if how.axes:
        overflow = jax.lax.psum(overflow.astype(jnp.int32), how.axes) > 0
        finite = jax.lax.psum((~finite).astype(jnp.int32), how.axes) == 0
    count, spilled_tokens, spilled = count[:, None], spilled_tokens[None, None], spilled[None]
    return ActiveFeatures(values, features, count, spilled_tokens, spilled, overflow, finite)


@jax.named_scope("encode")
def _product(x, w: Encoder, precision: str):
    return jnp.matmul(float32(x), w.w_enc, precision=jax.lax.Precision(precision))


def _encode(x, w: Encoder, how: Search):
    """All activations [n, f] of x [n, D], as `SparseCoder.encode` gives them.

    Where the features of TopK coders are split over a mesh, each part sends its largest to all.
    They are sorted, so those among the k largest of all come first.
    """
    z = _product(x, w, how.precision) + w.b_enc[None, :]
    f = jnp.where(z > w.threshold[None, :], z, 0.0)
    if how.k is None:
        return f
    if how.split is None:
        return largest(f, how.k)
    values, index = jax.lax.top_k(f, min(how.k, f.shape[-1]))
    every = jax.lax.all_gather(values, how.split, axis=1, tiled=True)
    _, places = jax.lax.top_k(every, min(how.k, every.shape[-1]))
    mine = jax.lax.axis_index(how.split) == places // values.shape[-1]
    rank = jnp.arange(values.shape[-1], dtype=jnp.int32)[None, :]
    kept = jnp.where(rank < mine.sum(-1, dtype=jnp.int32)[:, None], values, 0.0)
    return jnp.put_along_axis(jnp.zeros_like(f), index, kept, axis=-1, inplace=False)


def _compact(x, *, w: Encoder, how: Search):
    """values and features [n, K], count [n] of x [n, D]."""
    if how.k is None:
        z, bias, low = _product(x, w, how.precision), w.b_enc, w.threshold
    else:
        z, bias, low = _encode(x, w, how), 0 * w.b_enc, jnp.zeros_like(w.threshold)
    found = how.using.compact(z[None], bias[None], low[None], how.slots)
    values, features, count = (a[0] for a in found)
    return values, features.astype(jnp.uint16 if low.shape[0] <= 1 << 16 else jnp.int32), count


def _spill(x, over, w: Encoder, room: int, how: Search):
    """The first `room` tokens with too many features, and all their activations [R, f]."""
    (which,) = jnp.nonzero(over, size=room, fill_value=x.shape[0])
    rows = x.at[which].get(mode="fill", fill_value=0)
    return which.astype(jnp.int32), _encode(rows, w, how)
