"""A `Backend` in C++ for CPUs (`active.cc`); `active.Backend` documents the functions.

The source is compiled on first use with the machine's own compiler and kept in a cache folder that
only this user can write to. A kept library ends in its own digest: a damaged one is compiled again.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.kernels.xla import Layout, separate
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.paths import private_cache

LOG = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("active.cc")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
FEATURES_A_SLOT: int = 2
NAMES = ("compact", "largest", "decode", "decode_values", "decode_rows", "kth_largest", "adam_rows")
_registered: set[str] = set()


@functools.cache
def available() -> bool:
    """Whether the CPU kernels exist; compiles and registers them at the first call.

    Logs a warning with the reason if that fails. $CXX chooses the compiler.
    """
    try:
        file = _library()
        try:
            _register(file)
        except (OSError, AttributeError):  # complete, but made for another system
            file.unlink(missing_ok=True)
            _register(_library())
    except (InputError, OSError, subprocess.SubprocessError, AttributeError) as error:
        lines = (getattr(error, "stderr", None) or str(error) or "unknown error").splitlines()
        first = next((line for line in lines if "error" in line), lines[0])
        LOG.warning("no CPU kernels, training runs slower: %s", " ".join(first.split()))
        return False
    return True


def _library() -> Path:
    """The compiled kernels for this machine, compiler and jaxlib; compiled if not in the cache."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler ({', '.join(wanted)}) found; set CXX to one")
    run = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=600)
    version = run([compiler, "--version"]).stdout
    key = (SOURCE.read_text(), FLAGS, version, jaxlib.__version__, _cpu())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    file = private_cache("kernels") / f"{name}.so"
    if _is_whole(file):
        return file
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / file.name
        run([compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)])
        write_bytes(file, _with_digest(made.read_bytes()))  # of two processes, the last one wins
    return file


def _with_digest(program: bytes) -> bytes:
    return program + hashlib.sha256(program).digest()  # the loader ignores trailing bytes


def _is_whole(file: Path) -> bool:
    """Whether `file` is this user's and complete: loading a truncated library kills the process."""
    try:
        content, mine = file.read_bytes(), file.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
    return mine and not file.is_symlink() and content == _with_digest(content[:-32])


def _cpu() -> str:
    """The hardware that -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    kinds = ("model name", "flags", "features")
    return platform.machine() + str(sorted({x for x in lines if x.lower().startswith(kinds)}))


def _register(library: Path) -> None:
    handlers = ctypes.CDLL(str(library))
    for name in NAMES:
        handler = jax.ffi.pycapsule(getattr(handlers, f"gemma_scope_{name}"))
        if name not in _registered:  # XLA takes a name once, whatever file it comes from
            jax.ffi.register_ffi_target(f"gemma_scope_{name}", handler, platform="cpu")
            _registered.add(name)


def compact(z, b_enc, low, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    slots = (*z.shape[:2], capacity)
    call = _call("compact", (jnp.float32, *slots), (jnp.int32, *slots), (jnp.int32, *z.shape[:2]))
    values, feature, count = call(z, b_enc, low)
    return values, feature, count


def largest(z, b_enc, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    slots = (*z.shape[:2], k)
    call = _call("largest", (jnp.float32, *slots), (jnp.int32, *slots), (jnp.int32, *z.shape[:2]))
    values, feature, count = call(z, b_enc)
    return values, feature, count


def decode(f, feature, count, w_dec, layout: Layout) -> jax.Array:
    groups = len(layout.ends)
    call = _call("decode", (jnp.float32, layout.targets, groups, f.shape[1], w_dec.shape[2]))
    return call(f, feature, count, w_dec, **_static(layout))[0]


def decode_values(feature, count, w_dec, g, layout: Layout) -> jax.Array:
    call = _call("decode_values", (jnp.float32, *feature.shape))
    return call(feature, count, w_dec, g, **_static(layout))[0]


def decode_rows(f, feature, count, g, layout: Layout) -> tuple[jax.Array, jax.Array]:
    p, width = len(layout.pairs), layout.ends[-1]
    call = _call("decode_rows", (jnp.float32, p, width, g.shape[-1]), (jnp.float32, p, width))
    dw, total = call(f, feature, count, g, **_static(layout))
    return dw, total


def per_feature(values, feature, count, width: int) -> jax.Array:
    s, b, _ = values.shape
    nothing = jnp.zeros((s, 1, b, 1), values.dtype)
    return decode_rows(values, feature, count, nothing, separate(s, width))[1]


def kth_largest(z: jax.Array, k: int) -> jax.Array:
    return _call("kth_largest", (jnp.float32,))(z, k=np.int64(k))[0]


def adam_rows(
    w, m, v, g, scalars, *, b1: float, b2: float, epsilon: float, most: float, unit: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of Adam on rows w, v, g [N, .., D], in one pass over memory: (w, m, v).

    m is [N, .., D], or of any other size without first moments. scalars [4, N]: the rate, 1 / (1 -
    b1^t), 1 / (1 - b2^t), the factor of the gradients. most: the largest root mean square of a
    row's change before the rate; 0: any. unit: rows have unit norm and keep it.
    """
    results = [(a.dtype, *a.shape) for a in (w, m, v)]
    call = _call("adam_rows", *results, aliases={0: 0, 1: 1, 2: 2})
    sizes = {"b1": b1, "b2": b2, "epsilon": epsilon, "most": most}
    w, m, v = call(w, m, v, g, scalars, **{k: np.float32(x) for k, x in sizes.items()}, unit=unit)
    return w, m, v


def _static(layout: Layout) -> dict[str, np.ndarray]:
    pairs = np.asarray(layout.pairs, np.int64).reshape(-1)
    return {"pairs": pairs, "ends": np.asarray(layout.ends, np.int64)}


def _call(name: str, *shapes, aliases: dict[int, int] | None = None):
    """A kernel as a function; each shape is (dtype, *sizes). aliases: results written over inputs,
    as {input: result}."""
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in shapes]
    how = {"vmap_method": "sequential", "input_output_aliases": aliases}
    return jax.ffi.ffi_call(f"gemma_scope_{name}", results, **how)
