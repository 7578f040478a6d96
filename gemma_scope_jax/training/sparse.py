"""A JumpReLU step that pays for the features that are active, not for all of them.

Of F features a token has some tens that are active or near their threshold; every other entry of
the dense step is zero, and so is its gradient. Exactly the same values and gradients come from one
dense product, x with the encoder (2 D F flop a token), and lists of the active entries: the decoder
gathers rows, and so do all gradients.

XLA writes gathered rows to memory before it multiplies them, which on a CPU costs several times the
dense product itself. So there are three forms of everything here. "kernels": C++ for CPUs, compiled
at the first use with the machine's compiler and kept in a cache folder. "triton": Pallas kernels
for NVIDIA GPUs (`sparse_triton`). "xla": plain jax.numpy, chunked over tokens, for other backends
and for machines without a compiler. `sparse_form` chooses.

Axes: S sources (coders, or the layers a coder reads), B tokens, K entries a token, D inputs,
F features, P decoders, T targets, M groups of features, E outputs. All floats are float32.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from gemma_scope_jax.buckets import cache_folder
from gemma_scope_jax.errors import InputError

SOURCE = Path(__file__).with_name("sparse_kernels.cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
NAMES = ("compact", "decode", "decode_values", "decode_rows", "kth_largest")
TOKENS = 256  # that the kernels' form encodes at a time
CHUNK = 2**24  # floats that the XLA form gathers at a time
# Features a slot from which a sparse step is faster than a dense one. "triton" was measured on an
# H100 in TF32 at D 640: dense wins at 79 (3.3 against 4.8 ms), sparse at 315 (8.5 against 10.9). Of
# "xla" it is arithmetic: five gathers of 4 D bytes a slot, 6 D flop a feature, 130 flop a byte.
FEATURES_A_SLOT = {"kernels": 2, "triton": 192, "xla": 512}

Pairs = tuple[tuple[int, int], ...]  # source and target of each decoder


@flax.struct.dataclass
class Active:
    """The entries of z above `low`: of each token the first K, in order of feature."""

    z: jax.Array  # float32 [S, B, K]; 0 in slots that are not used
    feature: jax.Array  # int32 [S, B, K]; 0 in slots that are not used
    count: jax.Array  # int32 [S, B]: how many there are; above K: the entries are incomplete


# ---- the compiled kernels ------------------------------------------------------------------------


def sparse_form() -> str:
    """ "kernels" on CPUs where they compile, "triton" on NVIDIA GPUs, else "xla"."""
    if jax.default_backend() == "cpu":
        return "kernels" if kernels() else "xla"
    return "triton" if jax.default_backend() == "gpu" and triton() else "xla"


@functools.cache
def triton() -> bool:
    """Whether the GPU kernels compile here; where not, a line on standard error says why."""
    try:
        slots = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
        count = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        values = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
        jax.jit(partial(_gpu().per_feature, width=2)).lower(values, slots, count).compile()
    except Exception as error:  # whatever Pallas, Triton or the driver say
        reason = " ".join(str(error).split())[:200]
        print(f"no GPU kernels, wide coders train slower: {reason}", file=sys.stderr)
        return False
    return True


@functools.cache
def kernels() -> bool:
    """Whether the CPU kernels are there; compiles and registers them at the first call.

    Where that fails, one line on standard error says why. $CXX chooses the compiler.
    """
    try:
        _register(_library())
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        text = getattr(error, "stderr", None) or str(error)
        lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
        reason = " ".join((lines or ["unknown error"])[0].split())
        print(f"no CPU kernels, training runs slower: {reason}", file=sys.stderr)
        return False
    return True


def _gpu() -> Any:
    """`sparse_triton`, imported only where it is used: Pallas' Triton backend may not be there."""
    from gemma_scope_jax.training import sparse_triton

    return sparse_triton


def _library() -> Path:
    """The compiled kernels for this machine, compiler and jaxlib; compiled if not there yet."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({', '.join(wanted)}) found; set CXX to one")
    run = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=600)
    version = run([compiler, "--version"]).stdout
    key = (SOURCE.read_text(), FLAGS, version, jaxlib.__version__, _cpu())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    file = cache_folder() / "kernels" / f"{name}.so"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another process may compile the same: each writes its own file, and the last rename wins.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        run([compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)])
        os.replace(made, file)
    return file


def _cpu() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    kinds = ("model name", "flags", "features")
    return platform.machine() + str(sorted({x for x in lines if x.lower().startswith(kinds)}))


@functools.cache
def _register(library: Path) -> None:
    handlers = ctypes.CDLL(str(library))
    for name in NAMES:
        handler = jax.ffi.pycapsule(getattr(handlers, f"gemma_scope_{name}"))
        jax.ffi.register_ffi_target(f"gemma_scope_{name}", handler, platform="cpu")


def _call(name: str, *shapes):
    """A kernel as a function; each shape is (dtype, *sizes)."""
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in shapes]
    return jax.ffi.ffi_call(f"gemma_scope_{name}", results, vmap_method="sequential")


# ---- the encoder ---------------------------------------------------------------------------------


def encode_active(
    x: jax.Array,
    w_enc: jax.Array,
    b_enc: jax.Array,
    low: jax.Array,
    capacity: int,
    form: str | None = None,
) -> Active:
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
def _encode(x, w_enc, b_enc, low, capacity: int, form: str) -> Active:
    some = lambda x: _encode_some(x, w_enc, b_enc, low, capacity, form)
    b = x.shape[1]
    if form == "xla":
        return some(x)
    # A fifth faster than all at once, and all of z is never there: 1 GB for 4096 tokens at 65k.
    chunks = max(1, -(-b // TOKENS))
    active = jax.lax.map(some, _split(x, 1, -(-b // chunks)))
    return jax.tree.map(lambda a: _join(a, 1, b), active)


def _encode_some(x, w_enc, b_enc, low, capacity: int, form: str) -> Active:
    z = jnp.einsum("sbd,sfd->sbf", x, w_enc)
    s, b, f = z.shape
    if form == "kernels":
        slots = (s, b, capacity)
        call = _call("compact", (jnp.float32, *slots), (jnp.int32, *slots), (jnp.int32, s, b))
        return Active(*call(z, b_enc, low))
    z = z + b_enc[:, None, :]
    feature, count = _first_above(z, low, capacity)
    used = jnp.arange(capacity, dtype=jnp.int32)[None, None, :] < count[..., None]
    feature = jnp.where(used, feature, 0)
    return Active(jnp.where(used, jnp.take_along_axis(z, feature, -1), 0.0), feature, count)


def _first_above(z, low, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(feature int32 [S,B,K], count int32 [S,B]): the first K entries above `low`; rubbish after.

    One bit an entry, then slot k is found in the running count of bits: z is read once, where a
    sort or top_k goes through it many times.
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


def _encode_fwd(x, w_enc, b_enc, low, capacity, form):
    active = _encode(x, w_enc, b_enc, low, capacity, form)
    return active, (x, low, active.feature, active.count)


def _encode_bwd(capacity, form, saved, cotangent):
    x, low, feature, count = saved
    s, f = low.shape
    pairs = tuple((i, i) for i in range(s))
    dw, db = _rows(cotangent.z, feature, count, x[:, None], pairs, (f,), form)
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
    if form == "xla":
        return _decode_xla(f, feature, count, w_dec, pairs, targets, ends)
    if form == "triton":
        return _gpu().decode(f, feature, count, w_dec, pairs, targets, ends)
    call = _call("decode", (jnp.float32, targets, len(ends), f.shape[1], w_dec.shape[2]))
    return call(f, feature, count, w_dec, **_static(pairs, ends))[0]


def _decode_fwd(f, feature, count, w_dec, pairs, targets, ends, form):
    y = _decode(f, feature, count, w_dec, pairs, targets, ends, form)
    return y, (f, feature, count, w_dec)


def _decode_bwd(pairs, targets, ends, form, saved, g):
    f, feature, count, w_dec = saved
    if form == "xla":
        df = _values_xla(feature, count, w_dec, g, pairs, ends)
    elif form == "triton":
        df = _gpu().decode_values(feature, count, w_dec, g, pairs, ends)
    else:
        call = _call("decode_values", (jnp.float32, *f.shape))
        df = call(feature, count, w_dec, g, **_static(pairs, ends))[0]
    dw, _ = _rows(f, feature, count, g, pairs, ends, form)
    return df, None, None, dw


_decode.defvjp(_decode_fwd, _decode_bwd)


def _static(pairs: Pairs, ends: tuple[int, ...]) -> dict:
    return {
        "pairs": np.asarray(pairs, np.int64).reshape(-1),
        "ends": np.asarray(ends, np.int64),
    }


def _rows(f, feature, count, g, pairs: Pairs, ends, form: str) -> tuple[jax.Array, jax.Array]:
    """The gradient of the decoder's rows [P,F,E], and the sum of f of each row [P,F]."""
    if form == "xla":
        return _rows_xla(f, feature, count, g, pairs, ends)
    if form == "triton":
        return _gpu().decode_rows(f, feature, count, g, pairs, ends)
    p, width = len(pairs), ends[-1]
    call = _call("decode_rows", (jnp.float32, p, width, g.shape[-1]), (jnp.float32, p, width))
    dw, total = call(f, feature, count, g, **_static(pairs, ends))
    return dw, total


# ---- the decoder in XLA --------------------------------------------------------------------------


def _split(a: jax.Array, axis: int, size: int) -> jax.Array:
    """[.., B, ..] as [B / size, .., size, ..], padded with zeros."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, -a.shape[axis] % size)
    a = jnp.pad(a, pad)
    a = a.reshape(*a.shape[:axis], -1, size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)


def _join(a: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_split`."""
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])
    return jax.lax.slice_in_dim(a, 0, length, axis=axis)


def _chunk(feature: jax.Array, e: int) -> int:
    _, b, k = feature.shape
    return max(1, min(b, CHUNK // (k * e)))


def _members(feature, count, ends) -> jax.Array:
    """float32 [S,B,K,M]: 1 where an entry belongs to the group; no group has the empty slots."""
    group = jnp.sum(feature[..., None] >= jnp.asarray(ends, jnp.int32)[None, None, None, :], -1)
    used = jnp.arange(feature.shape[-1], dtype=jnp.int32)[None, None, :] < count[..., None]
    return jax.nn.one_hot(jnp.where(used, group, -1), len(ends), dtype=jnp.float32)


def _decode_xla(f, feature, count, w_dec, pairs: Pairs, targets: int, ends):
    def some(tokens):
        f, feature, count = tokens
        scale = f[..., None] * _members(feature, count, ends)
        y = [jnp.zeros((len(ends), f.shape[1], w_dec.shape[2]), f.dtype)] * targets
        for p, (s, t) in enumerate(pairs):
            rows = w_dec[p].at[feature[s]].get(mode="clip")
            y[t] = y[t] + jnp.einsum("bkm,bke->mbe", scale[s], rows)
        return jnp.stack(y)

    size = _chunk(feature, w_dec.shape[2])
    y = jax.lax.map(some, tuple(_split(a, 1, size) for a in (f, feature, count)))
    return _join(y, 2, f.shape[1])


def _values_xla(feature, count, w_dec, g, pairs: Pairs, ends):
    def some(tokens):
        feature, count, g = tokens
        members = _members(feature, count, ends)
        df = [jnp.zeros(feature.shape[1:], g.dtype)] * feature.shape[0]
        for p, (s, t) in enumerate(pairs):
            rows = w_dec[p].at[feature[s]].get(mode="clip")
            df[s] = df[s] + jnp.sum(jnp.einsum("mbe,bke->bkm", g[t], rows) * members[s], -1)
        return jnp.stack(df)

    size = _chunk(feature, w_dec.shape[2])
    tokens = (_split(feature, 1, size), _split(count, 1, size), _split(g, 2, size))
    return _join(jax.lax.map(some, tokens), 1, feature.shape[1])


def _rows_xla(f, feature, count, g, pairs: Pairs, ends):
    def some(sums, tokens):
        f, feature, count, g = tokens
        dw, total = sums
        scale = f[..., None] * _members(feature, count, ends)
        for p, (s, t) in enumerate(pairs):
            dw = dw.at[p, feature[s]].add(jnp.einsum("bkm,mbe->bke", scale[s], g[t]), mode="drop")
            total = total.at[p, feature[s]].add(jnp.sum(scale[s], -1), mode="drop")
        return (dw, total), None

    size = _chunk(feature, g.shape[-1])
    tokens = (*(_split(a, 1, size) for a in (f, feature, count)), _split(g, 2, size))
    width = (len(pairs), ends[-1])
    zeros = jnp.zeros((*width, g.shape[-1]), f.dtype), jnp.zeros(width, f.dtype)
    return jax.lax.scan(some, zeros, tokens)[0]


# ---- sums and lookups by feature -----------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def per_feature(values: jax.Array, feature: jax.Array, count: jax.Array, width: int, form: str):
    """The sum of each feature's entries: values [S,B,K] -> [S, width]."""
    if form == "triton":
        return _gpu().per_feature(values, feature, count, width)
    pairs = tuple((i, i) for i in range(values.shape[0]))
    nothing = jnp.zeros((values.shape[0], 1, values.shape[1], 1), values.dtype)
    return _rows(values, feature, count, nothing, pairs, (width,), form)[1]


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
    if (form or sparse_form()) == "kernels":
        return _call("kth_largest", (jnp.float32,))(z, k=np.int64(k))[0]
    top = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    order = jnp.where(bits >= top, ~bits, bits | top)  # sorts as the floats do

    def try_bit(i, best):
        more = best | (top >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(order >= more, dtype=jnp.int32) >= k, more, best)

    best = jax.lax.fori_loop(0, 32, try_bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(jnp.where(best >= top, best ^ top, ~best), jnp.float32)


def _check(where: str, **arrays) -> None:
    for name, (array, rank) in arrays.items():
        if array.dtype != jnp.float32 or rank not in (None, array.ndim):
            wanted = "float32" if rank is None else f"float32 of {rank} axes"
            raise InputError(
                f"{where}: {name} must be {wanted}, not {array.dtype} {tuple(array.shape)}"
            )
