"""A JumpReLU step that pays only for the active features.

A token has some tens of features that are active or near their threshold. All other entries of the
dense step are zero, and so are their gradients. One dense product, x with the encoder (2 D F flop a
token), and lists of the active entries give exactly the same values and gradients: the decoder
gathers rows, and so do all gradients.

A `Backend` computes the products: `kernels.cpu` is C++, compiled on first use; `kernels.triton`
holds Pallas kernels for NVIDIA GPUs; `kernels.xla` is jax.numpy, for TPUs and machines without a
compiler. `backend` chooses.

Axes: S sources (coders, or the layers a coder reads), B tokens, K entries per token, D inputs,
F features, P decoders, T targets, M groups of features, E outputs. All floats are float32.
"""

import functools
import logging
from functools import partial
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.kernels import cpu, xla
from gemma_scope_jax.kernels.xla import Ends, Layout, Pairs, separate

LOG = logging.getLogger(__name__)
TOKENS = 256  # tokens encoded at a time; XLA encodes all at once


@flax.struct.dataclass
class ActiveEntries:
    """The entries of z above `low` in lists of up to K, in order of feature: one list for each of B
    tokens, then others for tokens that need several and leave their own empty. L lists in all."""

    z: Array  # float32 [S, L, K]; 0 in unused slots
    feature: Array  # int32 [S, L, K]; 0 in unused slots
    count: Array  # int32 [S, L]: entries above `low`; if more than K, the list is incomplete
    token: Array  # int32 [L]: whose list it is
    complete: Array  # bool: whether all entries are in the lists


class Backend(Protocol):
    """What a module of kernels computes. It has no gradients; the functions below do."""

    __name__: str
    FEATURES_A_SLOT: int  # features per slot from which a sparse step beats a dense one

    def compact(
        self, z: Array, b_enc: Array, low: Array, capacity: int
    ) -> tuple[Array, Array, Array]:
        """`ActiveEntries` of z [S,B,F] + b_enc [S,F]: the first `capacity` above `low` [S,F]."""
        ...

    def largest(self, z: Array, b_enc: Array, k: int) -> tuple[Array, Array, Array]:
        """Likewise: the k largest of z + b_enc of each token, as far as they are above zero."""
        ...

    def decode(self, f: Array, feature: Array, count: Array, w_dec: Array, layout: Layout) -> Array:
        """y [T,M,B,E]: what the entries of each group of features write to each target."""
        ...

    def decode_values(
        self, feature: Array, count: Array, w_dec: Array, g: Array, layout: Layout
    ) -> Array:
        """The gradient of f [S,B,K]: each entry's decoder rows times the gradients g [T,M,B,E]."""
        ...

    def decode_rows(
        self, f: Array, feature: Array, count: Array, g: Array, layout: Layout
    ) -> tuple[Array, Array]:
        """The gradient of the decoder's rows [P,F,E], and the sum of f of each row [P,F]."""
        ...

    def per_feature(self, values: Array, feature: Array, count: Array, width: int) -> Array:
        """The sum of each feature's entries: values [S,B,K] -> [S,F]."""
        ...

    def kth_largest(self, z: Array, k: int) -> Array:
        """The k-th largest value of z."""
        ...


@functools.cache
def backend() -> Backend:
    """This process's kernels: C++ on CPUs and Triton on GPUs if they compile, else XLA.

    Logs a warning with the reason if they do not compile.
    """
    if jax.default_backend() == "cpu":
        return cpu if cpu.available() else xla
    if jax.default_backend() != "gpu":
        return xla
    try:
        from gemma_scope_jax.kernels import triton  # Pallas may lack its Triton backend

        slots = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
        count = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        values = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
        jax.jit(partial(triton.per_feature, width=2)).lower(values, slots, count).compile()
    except Exception as error:  # whatever Pallas, Triton or the driver raise
        LOG.warning("no GPU kernels, wide coders train slower: %s", reason(error))
        return xla
    return triton


def encode_active(
    x: Array,
    w_enc: Array,
    b_enc: Array,
    low: Array | None,
    capacity: int,
    more: tuple[int, int] = (0, 0),
    *,
    using: Backend | None = None,
) -> ActiveEntries:
    """The entries of z = x w_enc^T + b_enc above `low`, in lists of `capacity`; or, with `low`
    None, the `capacity` largest of each token that are above zero.

    x [S,B,D]; w_enc [S,F,D], one row per feature; b_enc, low [S,F]. `more`: how many tokens may
    need several lists, and how many such lists there are. Gradients flow from the entries' z to
    w_enc and b_enc, not to x or low: subtract a trained decoder bias from the input as b_enc -
    w_enc b_dec. If the lists are not `complete`, use the dense step instead. `using` replaces the
    kernels of `backend`.
    """
    bar = b_enc if low is None else low
    _check("encode_active", x=(x, 3), w_enc=(w_enc, 3), b_enc=(b_enc, 2), low=(bar, 2))
    s, f, d = w_enc.shape
    if x.shape[::2] != (s, d) or b_enc.shape != (s, f) or bar.shape != (s, f):
        shapes = f"x {x.shape}, w_enc {w_enc.shape}, b_enc {b_enc.shape}, low {bar.shape}"
        raise InputError(f"encode_active: shapes do not fit: {shapes}")
    if not 1 <= capacity <= f:
        raise InputError(f"encode_active: capacity {capacity} must be 1 to {f}, the features")
    return _encode(x, w_enc, b_enc, low, capacity, more, using or backend())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _encode(x, w_enc, b_enc, low, capacity: int, more, using: Backend) -> ActiveEntries:
    def some(x, capacity=capacity):
        z = jnp.einsum("sbd,sfd->sbf", x, w_enc)
        if low is None:
            return using.largest(z, b_enc, capacity)
        return using.compact(z, b_enc, low, capacity)

    b, (tokens, lists) = x.shape[1], more
    if using is xla:
        z, feature, count = some(x)
    else:
        # A fifth faster than all at once, and z never exists whole: 1 GB for 4096 tokens at 65k.
        chunks = max(1, -(-b // TOKENS))
        found = jax.lax.map(some, xla.split(x, 1, -(-b // chunks)))
        z, feature, count = jax.tree.map(lambda a: xla.join(a, 1, b), found)
    over = jnp.any(count > capacity, 0)  # [B]: the same for all sources
    token = jnp.arange(b, dtype=jnp.int32)
    if not lists:
        return ActiveEntries(z, feature, count, token, ~jnp.any(over))
    # The tokens with too many entries once more, whole; then cut into lists, one after another.
    who = jnp.argsort(~over, stable=True)[:tokens].astype(jnp.int32)
    pieces = -(-w_enc.shape[1] // capacity)
    whole = some(x[:, who], pieces * capacity)
    each = jnp.where(over[who], -(-jnp.max(whole[2], 0) // capacity), 0)
    ends = jnp.cumsum(each)
    number = jnp.arange(lists, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, number, side="right"), tokens - 1)
    piece = number - (ends - each)[row]
    cut = lambda a: a.reshape(*a.shape[:2], pieces, capacity)[
        :, row, jnp.minimum(piece, pieces - 1)
    ]
    own = jnp.clip(whole[2][:, row] - (piece * capacity)[None, :], 0, capacity)
    own = jnp.where(number < ends[-1], own, 0)
    used = xla.used_slots(own, capacity)
    count = jnp.where(over[None, :], 0, count)
    kept = xla.used_slots(count, capacity)
    join = lambda a, b: jnp.concatenate([a, b], 1)
    return ActiveEntries(
        join(jnp.where(kept, z, 0.0), jnp.where(used, cut(whole[0]), 0.0)),
        join(jnp.where(kept, feature, 0), jnp.where(used, cut(whole[1]), 0)),
        join(count, own),
        jnp.concatenate([token, who[row]]),
        (jnp.sum(over) <= tokens) & (ends[-1] <= lists),
    )


def _encode_fwd(x, w_enc, b_enc, low, capacity, more, using):
    found: ActiveEntries = _encode(x, w_enc, b_enc, low, capacity, more, using)
    return found, (x, b_enc, found.feature, found.count, found.token)


def _encode_bwd(capacity, more, using, saved, cotangent):
    x, b_enc, feature, count, token = saved
    s, f = b_enc.shape
    x = jnp.concatenate([x, x[:, token[x.shape[1] :]]], 1) if more[1] else x
    dw, db = using.decode_rows(cotangent.z, feature, count, x[:, None], separate(s, f))
    return None, dw, db, None


_encode.defvjp(_encode_fwd, _encode_bwd)


def decode_active(
    f: Array,
    feature: Array,
    count: Array,
    w_dec: Array,
    pairs: Pairs | None = None,
    targets: int | None = None,
    ends: Ends | None = None,
    *,
    using: Backend | None = None,
) -> Array:
    """y [T,M,B,E]: what the entries of each group of features write to each target.

    f, feature [S,B,K], whose first count [S,B] slots are entries; w_dec [P,F,E]. Decoder p maps
    source pairs[p][0] to target pairs[p][1]: pairs (0,0), (1,1).. are separate coders (the
    default), triangular ones a cross-layer transcoder. Group m holds the features from ends[m-1] to
    ends[m] - 1 (default: one group); Matryoshka prefixes are sums of groups. Gradients flow to
    w_dec and to the entries of f, also where f is 0.
    """
    _check("decode_active", f=(f, 3), w_dec=(w_dec, 3))
    pairs = separate(f.shape[0], 0).pairs if pairs is None else pairs
    targets = 1 + max(t for _, t in pairs) if targets is None else targets
    ends = w_dec.shape[1:2] if ends is None else ends
    if feature.shape != f.shape or count.shape != f.shape[:2]:
        shapes = f"f {f.shape}, feature {feature.shape}, count {count.shape}"
        raise InputError(f"decode_active: shapes do not fit: {shapes}")
    inside = all(0 <= s < f.shape[0] and 0 <= t < targets for s, t in pairs)
    if len(pairs) != w_dec.shape[0] or not inside:
        sizes = f"{f.shape[0]} sources, {targets} targets, {w_dec.shape[0]} decoders"
        raise InputError(f"decode_active: pairs {pairs} do not fit {sizes}")
    if ends[-1] != w_dec.shape[1] or any(a >= b for a, b in zip((0, *ends), ends)):
        raise InputError(f"decode_active: ends {ends} must increase to {w_dec.shape[1]}")
    return _decode(f, feature, count, w_dec, Layout(pairs, targets, ends), using or backend())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _decode(f, feature, count, w_dec, layout: Layout, using: Backend) -> Array:
    return using.decode(f, feature, count, w_dec, layout)


def _decode_fwd(f, feature, count, w_dec, layout, using):
    return _decode(f, feature, count, w_dec, layout, using), (f, feature, count, w_dec)


def _decode_bwd(layout, using, saved, g):
    f, feature, count, w_dec = saved
    df = using.decode_values(feature, count, w_dec, g, layout)
    return df, None, None, using.decode_rows(f, feature, count, g, layout)[0]


_decode.defvjp(_decode_fwd, _decode_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def per_feature(
    values: Array, feature: Array, count: Array, width: int, using: Backend | None = None
) -> Array:
    """The sum of each feature's entries: values [S,B,K] -> [S, width]."""
    return (using or backend()).per_feature(values, feature, count, width)


def _per_feature_fwd(values, feature, count, width, using):
    return per_feature(values, feature, count, width, using), (feature, count)


def _per_feature_bwd(width, using, saved, g):
    return lookup(g, *saved, 0.0, using), None, None


per_feature.defvjp(_per_feature_fwd, _per_feature_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lookup(
    table: Array, feature: Array, count: Array, fill: float, using: Backend | None = None
) -> Array:
    """table [S,F] at the entries' features: [S,B,K], with `fill` in unused slots."""
    S, B, K = feature.shape
    found = jnp.take_along_axis(table, feature.reshape(S, B * K), 1).reshape(S, B, K)
    return jnp.where(xla.used_slots(count, K), found, jnp.asarray(fill, table.dtype))


def _lookup_fwd(table, feature, count, fill, using):
    return lookup(table, feature, count, fill, using), (feature, count, table)


def _lookup_bwd(fill, using, saved, g):
    feature, count, table = saved
    return per_feature(g, feature, count, table.shape[1], using), None, None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def kth_largest(z: Array, k: int, *, using: Backend | None = None) -> Array:
    """The exact k-th largest value of z (any shape): the threshold of BatchTopK."""
    _check("kth_largest", z=(z, None))
    if not 1 <= k <= z.size:
        raise InputError(f"kth_largest: k {k} must be 1 to {z.size}, the number of values")
    return (using or backend()).kth_largest(jax.lax.stop_gradient(z), k)


def _check(where: str, **arrays) -> None:
    for name, (array, rank) in arrays.items():
        if array.dtype != jnp.float32 or rank not in (None, array.ndim):
            wanted = "float32" if rank is None else f"float32 of {rank} axes"
            got = f"{array.dtype} {tuple(array.shape)}"
            raise InputError(f"{where}: {name} must be {wanted}, not {got}")
