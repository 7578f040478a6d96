"""A JumpReLU step that pays for the features that are active, not for all of them.

Of F features a token has some tens that are active or near their threshold; every other entry of
the dense step is zero, and so is its gradient. Exactly the same values and gradients come from one
dense product, x with the encoder (2 D F flop a token), and lists of the active entries: the decoder
gathers rows, and so do all gradients.

The products come in three forms: "cpu", C++ compiled at the first use (`sparse_cpu`); "triton",
Pallas kernels for NVIDIA GPUs (`sparse_triton`); "xla", jax.numpy for other backends and machines
without a compiler (`sparse_xla`). `sparse_form` chooses.

Axes: S sources (coders, or the layers a coder reads), B tokens, K entries a token, D inputs,
F features, P decoders, T targets, M groups of features, E outputs. All floats are float32.
"""

import functools
import logging
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.kernels import cpu, xla

LOG = logging.getLogger(__name__)
TOKENS = 256  # encoded at a time, but by the form "xla"
# Features a slot from which a sparse step is faster than a dense one. "triton" was measured on an
# H100 in TF32 at D 640: dense wins at 79 (3.3 against 4.8 ms), sparse at 315 (8.5 against 10.9). Of
# "xla" it is arithmetic: five gathers of 4 D bytes a slot, 6 D flop a feature, 130 flop a byte.
FEATURES_A_SLOT = {"cpu": 2, "triton": 192, "xla": 512}

Pairs = tuple[tuple[int, int], ...]  # source and target of each decoder


@flax.struct.dataclass
class ActiveEntries:
    """The entries of z above `low`: of each token the first K, in order of feature."""

    z: jax.Array  # float32 [S, B, K]; 0 in slots that are not used
    feature: jax.Array  # int32 [S, B, K]; 0 in slots that are not used
    count: jax.Array  # int32 [S, B]: how many there are; above K: the entries are incomplete


# ---- the forms -----------------------------------------------------------------------------------


def sparse_form() -> str:
    """ "cpu" on CPUs where it compiles, "triton" on NVIDIA GPUs, else "xla"."""
    if jax.default_backend() == "cpu":
        return "cpu" if cpu.available() else "xla"
    return "triton" if jax.default_backend() == "gpu" and triton() else "xla"


@functools.cache
def triton() -> bool:
    """Whether the GPU kernels compile here; where not, a warning says why."""
    try:
        slots = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
        count = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        values = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
        jax.jit(partial(_form("triton").per_feature, width=2)).lower(values, slots, count).compile()
    except Exception as error:  # whatever Pallas, Triton or the driver say
        LOG.warning("no GPU kernels, wide coders train slower: %s", reason(error))
        return False
    return True


def _form(name: str) -> Any:
    """The module of a form."""
    if name == "triton":  # imported only where used: Pallas' Triton backend may not be there
        from gemma_scope_jax.kernels import triton as sparse_triton

        return sparse_triton
    return cpu if name == "cpu" else xla


# ---- the encoder ---------------------------------------------------------------------------------


def encode_active(
    x: jax.Array,
    w_enc: jax.Array,
    b_enc: jax.Array,
    low: jax.Array,
    capacity: int,
    form: str | None = None,
) -> ActiveEntries:
    """The entries of z = x w_enc^T + b_enc above `low`, `capacity` of them a token.

    x [S,B,D]; w_enc [S,F,D], a row a feature; b_enc, low [S,F]. Gradients go from the entries' z to
    w_enc and b_enc, none to x or low: subtract a trained decoder bias from the input as
    b_enc - w_enc b_dec. Where any count is above `capacity`, use the dense step instead.
    """
    _check("encode_active", x=(x, 3), w_enc=(w_enc, 3), b_enc=(b_enc, 2), low=(low, 2))
    s, f, d = w_enc.shape
    if x.shape[::2] != (s, d) or b_enc.shape != (s, f) or low.shape != (s, f):
        shapes = f"x {x.shape}, w_enc {w_enc.shape}, b_enc {b_enc.shape}, low {low.shape}"
        raise InputError(f"encode_active: shapes do not fit: {shapes}")
    if not 1 <= capacity <= f:
        raise InputError(f"encode_active: capacity {capacity} must be 1 to {f}, the features")
    return _encode(x, w_enc, b_enc, low, capacity, form or sparse_form())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _encode(x, w_enc, b_enc, low, capacity: int, form: str) -> ActiveEntries:
    some = lambda x: _encode_some(x, w_enc, b_enc, low, capacity, form)
    b = x.shape[1]
    if form == "xla":
        return some(x)
    # A fifth faster than all at once, and all of z is never there: 1 GB for 4096 tokens at 65k.
    chunks = max(1, -(-b // TOKENS))
    active = jax.lax.map(some, xla.split(x, 1, -(-b // chunks)))
    return jax.tree.map(lambda a: xla.join(a, 1, b), active)


def _encode_some(x, w_enc, b_enc, low, capacity: int, form: str) -> ActiveEntries:
    z = jnp.einsum("sbd,sfd->sbf", x, w_enc)
    if form == "cpu":
        return ActiveEntries(*cpu.compact(z, b_enc, low, capacity))
    z = z + b_enc[:, None, :]
    feature, count = xla.first_above(z, low, capacity)
    used = jnp.arange(capacity, dtype=jnp.int32)[None, None, :] < count[..., None]
    feature = jnp.where(used, feature, 0)
    return ActiveEntries(jnp.where(used, jnp.take_along_axis(z, feature, -1), 0.0), feature, count)


def _encode_fwd(x, w_enc, b_enc, low, capacity, form):
    active = _encode(x, w_enc, b_enc, low, capacity, form)
    return active, (x, low, active.feature, active.count)


def _encode_bwd(capacity, form, saved, cotangent):
    x, low, feature, count = saved
    s, f = low.shape
    pairs = tuple((i, i) for i in range(s))
    dw, db = _form(form).decode_rows(cotangent.z, feature, count, x[:, None], pairs, (f,))
    return None, dw, db, None


_encode.defvjp(_encode_fwd, _encode_bwd)


# ---- the decoder ---------------------------------------------------------------------------------


def decode_active(
    f: jax.Array,
    feature: jax.Array,
    count: jax.Array,
    w_dec: jax.Array,
    pairs: Pairs | None = None,
    targets: int | None = None,
    ends: tuple[int, ...] | None = None,
    form: str | None = None,
) -> jax.Array:
    """y [T,M,B,E]: what the entries of each group of features write to each target.

    f, feature [S,B,K], of which the first count [S,B] are entries; w_dec [P,F,E], where decoder p
    takes source pairs[p][0] to target pairs[p][1]: pairs (0,0), (1,1).. are separate coders
    (the default), triangular ones a cross-layer transcoder. Group m holds the features from
    ends[m-1] to ends[m] - 1: Matryoshka prefixes are sums of groups; the default is one group.
    Gradients go to w_dec and, also where f is 0, to the entries of f.
    """
    _check("decode_active", f=(f, 3), w_dec=(w_dec, 3))
    pairs = tuple((i, i) for i in range(f.shape[0])) if pairs is None else pairs
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
    return _decode(f, feature, count, w_dec, pairs, targets, ends, form or sparse_form())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _decode(f, feature, count, w_dec, pairs: Pairs, targets: int, ends, form: str):
    return _form(form).decode(f, feature, count, w_dec, pairs, targets, ends)


def _decode_fwd(f, feature, count, w_dec, pairs, targets, ends, form):
    y = _decode(f, feature, count, w_dec, pairs, targets, ends, form)
    return y, (f, feature, count, w_dec)


def _decode_bwd(pairs, targets, ends, form, saved, g):
    f, feature, count, w_dec = saved
    df = _form(form).decode_values(feature, count, w_dec, g, pairs, ends)
    dw, _ = _form(form).decode_rows(f, feature, count, g, pairs, ends)
    return df, None, None, dw


_decode.defvjp(_decode_fwd, _decode_bwd)


# ---- sums and lookups by feature -----------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def per_feature(values: jax.Array, feature: jax.Array, count: jax.Array, width: int, form: str):
    """The sum of each feature's entries: values [S,B,K] -> [S, width]."""
    if form == "triton":
        return _form(form).per_feature(values, feature, count, width)
    pairs = tuple((i, i) for i in range(values.shape[0]))
    nothing = jnp.zeros((values.shape[0], 1, values.shape[1], 1), values.dtype)
    return _form(form).decode_rows(values, feature, count, nothing, pairs, (width,))[1]


def _per_feature_fwd(values, feature, count, width, form):
    return per_feature(values, feature, count, width, form), (feature, count)


def _per_feature_bwd(width, form, saved, g):
    return lookup(g, *saved, 0.0, form), None, None


per_feature.defvjp(_per_feature_fwd, _per_feature_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lookup(table: jax.Array, feature: jax.Array, count: jax.Array, fill: float, form: str):
    """table [S,F] at the entries' features: [S,B,K], `fill` in slots that are not used."""
    S, B, K = feature.shape
    found = jnp.take_along_axis(table, feature.reshape(S, B * K), 1).reshape(S, B, K)
    used = jnp.arange(K, dtype=jnp.int32)[None, None, :] < count[..., None]
    return jnp.where(used, found, jnp.asarray(fill, table.dtype))


def _lookup_fwd(table, feature, count, fill, form):
    return lookup(table, feature, count, fill, form), (feature, count, table)


def _lookup_bwd(fill, form, saved, g):
    feature, count, table = saved
    return per_feature(g, feature, count, table.shape[1], form), None, None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


# ---- the k-th largest ----------------------------------------------------------------------------


def kth_largest(z: jax.Array, k: int, form: str | None = None) -> jax.Array:
    """The k-th largest of all values of z (any shape), exact: the threshold of BatchTopK."""
    _check("kth_largest", z=(z, None))
    if not 1 <= k <= z.size:
        raise InputError(f"kth_largest: k {k} must be 1 to {z.size}, the values there are")
    z = jax.lax.stop_gradient(z)
    on_cpu = (form or sparse_form()) == "cpu"
    return (cpu if on_cpu else xla).kth_largest(z, k)


def _check(where: str, **arrays) -> None:
    for name, (array, rank) in arrays.items():
        if array.dtype != jnp.float32 or rank not in (None, array.ndim):
            wanted = "float32" if rank is None else f"float32 of {rank} axes"
            raise InputError(
                f"{where}: {name} must be {wanted}, not {array.dtype} {tuple(array.shape)}"
            )
