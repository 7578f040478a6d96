"""The device's half of extraction: one program from tokens to the active features of every coder.

The model runs to the last layer that is read; at each, the encoder's product is reduced at once to
the entries that are active, so that of [tokens, F] activations nothing but those leaves the device.
Coders of one shape and site are stacked and share the loop over layers: the program of 26 of them
compiles like that of one.

A token has room for `slots` entries; the few with more (outlier tokens have thousands)
are `spilled`: their whole rows are returned. On a mesh the features are split over its axis
"model", and each part finds its own entries.

Axes: B rows of T tokens, N = B T, D inputs, F features, K slots, R spilled, d x m the mesh.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma_scope_jax.coders.coder import Coder, Encoder, by_layer, float32, largest
from gemma_scope_jax.kernels import active, cpu, xla
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import per_layer, read, token_mask
from gemma_scope_jax.model.sharding import mesh_of

ON_CPU, ELSEWHERE = 256, 2048  # tokens encoded at a time: what their [tokens, F] floats may take
SPILL = 128  # of so many tokens one may have more features than there are slots
PRECISIONS = ("highest", "high", "default")
P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class CoderStack:
    """Coders' layers that run as one read: of one site and shape, a layer of the model each.

    members: (name of the coder, which of its own layers), in the order of `layers`.
    k: of TopK coders, how many features a token has at most.
    """

    site: str
    layers: tuple[int, ...]
    first: int
    members: tuple[tuple[str, int], ...]
    width: int
    k: int | None = None


@flax.struct.dataclass
class ActiveFeatures:
    """The active features of a group's X layers. With m parts of the features, of F / m each.

    values   float32 [X, N, m K], of each part the first `count`, in order of feature
    features int [X, N, m K], counted from the part's first
    count    int32 [X, N, m]: how many there are; above K, the token is spilled
    spilled_tokens  int32 [X, d, m, R]: which token of the data shard's; N / d: none
    spilled  float32 [X, d, R, F]: all activations of those
    overflow bool [X]: more tokens had too many features than can be spilled
    finite   bool [X]: all activations that were read are numbers
    """

    values: Any
    features: Any
    count: Any
    spilled_tokens: Any
    spilled: Any
    overflow: Any
    finite: Any


def grouped(coders: Mapping[str, Coder]) -> tuple[CoderStack, ...]:
    """How to run `coders` in as few reads as possible, each with every layer at most once.

    Raises `InputError` for TopK coders of several layers, see `by_layer`.
    """
    for coder in coders.values():
        by_layer(coder)
    piles: dict[tuple, list[dict[int, tuple[str, int]]]] = {}
    for name, coder in coders.items():
        for own, layer in enumerate(coder.layers):
            alike = (coder.reads, coder.d_in, coder.width, coder.first, coder.k)
            rounds = piles.setdefault(alike, [])
            free = next((r for r in rounds if layer not in r), None)
            if free is None:
                rounds.append(free := {})
            free[layer] = (name, own)
    groups = []
    for (site, _, width, first, k), rounds in piles.items():
        for members in rounds:
            layers = tuple(sorted(members))
            own = tuple(members[layer] for layer in layers)
            groups.append(CoderStack(site, layers, first, own, width, k))
    return tuple(groups)


def encoders(group: CoderStack, coders: Mapping[str, Coder], mesh: Any = None) -> Encoder:
    """The weights of a group, stacked, float32: w_enc [X, D, F], b_enc and threshold [X, F]; on a
    mesh split by feature over its axis "model".
    """
    split = mesh is not None and group.width % mesh.shape["model"] == 0

    def stacked(*parts: Any) -> jax.Array:
        if mesh is None:
            return jnp.stack([float32(part) for part in parts])
        whole = np.stack([np.asarray(part, np.float32) for part in parts])
        spec = P(*(None,) * (whole.ndim - 1), "model" if split else None)
        place = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(stacked, *(coders[name].encoder(own) for name, own in group.members))


def slots_for(coders: Sequence[Coder]) -> int:
    """Room for four times the largest target L0, a multiple of 32; 256 where no coder knows its.

    The target of a coder of several layers is taken as that of all. TopK coders need their k.
    """
    known = [4 * c.info.l0 / len(c.layers) for c in coders if c.info.l0 and c.k is None]
    known += [c.k for c in coders if c.k is not None]
    return -(-int(max(known, default=256)) // 32) * 32


def _kernels() -> active.Backend:
    """What finds the active entries here: C++ on CPUs where it compiles, XLA elsewhere."""
    return active.backend() if jax.default_backend() == "cpu" else xla


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
    when compiling for another device than this process's.
    """
    mesh, mask = mesh_of(model.params.embed), batch.counted(0)
    reads = [
        read(
            group.site,
            group.layers,
            _active,
            per_layer(w),
            mask,
            name=str(i),
            first=group.first,
            slots=min(slots, group.width),
            k=group.k,
            using=using or _kernels(),
            precision=precision,
            mesh=mesh,
        )
        for i, (group, w) in enumerate(zip(groups, weights))
    ]
    stop = 1 + max(max(group.layers) for group in groups)
    out = forward(model, batch, reads, stop_at_layer=stop, logits="none", remat=None)
    return [out.reads[str(i)] for i in range(len(groups))]


def specs(rows: str | None, split: str | None) -> ActiveFeatures:
    """Where one layer's results lie: rows over the mesh's axis `rows`, features over `split`."""
    each = P(rows, split)
    return ActiveFeatures(each, each, each, P(rows, split, None), P(rows, None, split), P(), P())


def _active(x, ctx, w: Encoder, mask, *, first, slots, k, using, precision, mesh) -> ActiveFeatures:
    """One layer: x [B, T, D]."""
    keep = token_mask(ctx, x, first)[..., 0] & mask
    find = partial(_find, slots=slots, k=k, using=using, precision=precision)
    width = w.w_enc.shape[1]
    if mesh is None:
        return find(x, keep, w)
    split = "model" if width % mesh.shape["model"] == 0 else None
    rows = "data" if x.shape[0] % mesh.shape["data"] == 0 else None
    slots = -(-2 * slots // mesh.shape["model"]) if split else slots  # parts differ in how full
    slots = min(slots, width // (mesh.shape["model"] if split else 1))
    axes = tuple(axis for axis in (rows, split) if axis)
    find = partial(find, slots=slots, axes=axes, split=split)
    shapes = Encoder(P(None, split), P(split), P(split))
    where = (P(rows, None, None), P(rows, None), shapes)
    return jax.shard_map(
        find, mesh=mesh, in_specs=where, out_specs=specs(rows, split), check_vma=False
    )(x, keep, w)


def _find(
    x, keep, w: Encoder, *, slots, k, using, precision, axes=(), split=None
) -> ActiveFeatures:
    """x [b, T, D], w of f features, as they lie on one device."""
    x, keep = x.reshape(-1, x.shape[-1]), keep.reshape(-1)
    low = jnp.maximum(w.threshold, 0.0)  # JumpReLU is a ReLU besides
    size = min(ON_CPU if using is cpu else ELSEWHERE, x.shape[0])
    chosen = (
        None if k is None else partial(_topk, w=w, low=low, k=k, precision=precision, split=split)
    )
    chunk = partial(
        _compact, w=w, low=low, slots=slots, using=using, precision=precision, chosen=chosen
    )
    parts = jax.lax.map(chunk, xla.split(x, 0, size))
    values, features, count = (xla.join(a, 0, x.shape[0]) for a in parts)
    count = jnp.where(keep, count, 0)
    over = count > slots
    room = max(8, x.shape[0] // SPILL)
    none = jnp.full(room, x.shape[0], jnp.int32)
    spill = lambda: _spill(x, over, w, low, room, precision, chosen)
    nothing = lambda: (none, jnp.zeros((room, w.w_enc.shape[1]), jnp.float32))
    spilled_tokens, spilled = jax.lax.cond(over.any(), spill, nothing)
    overflow = over.sum(dtype=jnp.int32) > room
    finite = jnp.isfinite(jnp.where(keep[:, None], x, jnp.zeros_like(x))).all()
    if axes:
        overflow = jax.lax.psum(overflow.astype(jnp.int32), axes) > 0
        finite = jax.lax.psum((~finite).astype(jnp.int32), axes) == 0
    return ActiveFeatures(
        values,
        features,
        count[:, None],
        spilled_tokens[None, None],
        spilled[None],
        overflow,
        finite,
    )


@jax.named_scope("encode")
def _product(x, w: Encoder, precision: str):
    return jnp.matmul(float32(x), w.w_enc, precision=jax.lax.Precision(precision))


def _topk(x, *, w: Encoder, low, k, precision, split):
    """All activations [n, f] of TopK coders on x [n, D], as `SparseCoder.encode` has them.

    Where features are split over a mesh, each part sends its largest to all. Sorted as they are,
    those of them that are among the k largest of all come first.
    """
    z = _product(x, w, precision) + w.b_enc[None, :]
    f = jnp.where(z > low[None, :], z, 0.0)
    if split is None:
        return largest(f, k)
    values, index = jax.lax.top_k(f, min(k, f.shape[-1]))
    every = jax.lax.all_gather(values, split, axis=1, tiled=True)
    _, places = jax.lax.top_k(every, min(k, every.shape[-1]))
    mine = jax.lax.axis_index(split) == places // values.shape[-1]
    rank = jnp.arange(values.shape[-1], dtype=jnp.int32)[None, :]
    kept = jnp.where(rank < mine.sum(-1, dtype=jnp.int32)[:, None], values, 0.0)
    return jnp.put_along_axis(jnp.zeros_like(f), index, kept, axis=-1, inplace=False)


def _compact(x, *, w: Encoder, low, slots, using, precision, chosen):
    """values and features [n, K], count [n] of x [n, D]; `chosen` is `_topk`, if k is."""
    z, bias = (_product(x, w, precision), w.b_enc) if chosen is None else (chosen(x), 0 * w.b_enc)
    low = low if chosen is None else jnp.zeros_like(low)
    found = using.compact(z[None], bias[None], low[None], slots)
    values, features, count = (a[0] for a in found)
    return values, features.astype(jnp.uint16 if low.shape[0] <= 1 << 16 else jnp.int32), count


def _spill(x, over, w: Encoder, low, room: int, precision: str, chosen):
    """The first `room` tokens with too many features, and all their activations [R, f]."""
    (which,) = jnp.nonzero(over, size=room, fill_value=x.shape[0])
    rows = x.at[which].get(mode="fill", fill_value=0)
    if chosen is not None:
        return which.astype(jnp.int32), chosen(rows)
    z = _product(rows, w, precision) + w.b_enc[None, :]
    return which.astype(jnp.int32), jnp.where(z > low[None, :], z, 0.0)
