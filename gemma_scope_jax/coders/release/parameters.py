"""The tensors of the published parameter files: headers, streamed reading, rows, the writing order.

Tensors are read and written in chunks of rows, and every value that is read is checked: NaN,
infinite values and negative thresholds raise `InputError` instead of turning up in a result.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.multi_layer_coder import block_index
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.safetensors_files import open_safetensors

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TENSORS = {  # field of the coder -> tensor in the file
    "w_enc": "w_enc",
    "b_enc": "b_enc",
    "threshold": "threshold",
    "w_dec": "w_dec",
    "b_dec": "b_dec",
    "w_skip": "affine_skip_connection",
}
CHUNK = 32 * 2**20  # bytes of a tensor read or written at once
Header = dict[str, jax.ShapeDtypeStruct]  # by field


def read_header(file: Any, path: Path) -> Header:
    """Shape and dtype of the tensors of a parameter file, or `InputError`.

    A TopK coder's has no thresholds: whoever takes it for a JumpReLU coder's finds one missing.
    Tensors of other names are refused, as a coder without them may be another function.
    """
    header, present = {}, set(file.keys())
    if others := sorted(present - set(TENSORS.values())):
        raise InputError(
            f"{path}: tensor {others[0]!r:.60} is not one of "
            f"{', '.join(TENSORS.values())}: what it is for is not known"
        )
    for field, name in TENSORS.items():
        if name not in present:
            if field in ("w_skip", "threshold"):
                continue
            raise InputError(f"{path}: no tensor {name!r}{nearest(name, present)}")
        stored = file.get_slice(name)
        if stored.get_dtype() not in DTYPES:
            raise InputError(f"{path}: {name} is {stored.get_dtype()}, not {', '.join(DTYPES)}")
        dtype = jnp.dtype(DTYPES[stored.get_dtype()])
        header[field] = jax.ShapeDtypeStruct(tuple(stored.get_shape()), dtype)
    return header


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary, which `jax.device_put` to a CPU just adopts."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def row_chunks(shape: Sequence[int], itemsize: int) -> Iterator[slice]:
    """Slices of the first axis, of at most CHUNK bytes where a row is smaller than that."""
    rows = max(1, CHUNK // max(1, itemsize * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _read_into(out: np.ndarray, file: Any, path: Path, name: str) -> None:
    """Fill `out` with a tensor, cast to its dtype, and check the values."""
    stored = file.get_slice(name)
    for rows in row_chunks(out.shape, 4):
        with np.errstate(over="ignore"):
            out[rows] = stored[rows]
        _check_values(out[rows], path, name)


def check_finite(tensor: np.ndarray, path: Any, name: str) -> None:
    """Raise `InputError` for NaN and infinite values, looked for as they come from the file."""
    for rows in row_chunks(tensor.shape, tensor.dtype.itemsize):
        if not np.isfinite(tensor[rows]).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values (as {tensor.dtype})")


def check_values(coder: Coder) -> None:
    """Raise `InputError` for weights that no reader takes: NaN and infinite ones, thresholds below
    0, and thresholds beside a `k`, which the files of TopK coders do not hold.
    """
    for name in TENSORS:
        array = getattr(coder, name)
        if array is None:
            continue
        for rows in row_chunks(array.shape, array.dtype.itemsize):
            if not np.isfinite(np.asarray(array[rows])).all():
                raise InputError(f"{name} holds NaN or infinite values, which no reader takes")
    threshold = np.asarray(coder.threshold)
    if (threshold < 0).any():
        raise InputError("threshold holds negative values")
    if coder.k is not None and threshold.any():
        raise InputError(f"a TopK coder (k {coder.k}) has no thresholds: set them to 0")


def _check_values(values: np.ndarray, path: Path, name: str) -> None:
    check_finite(values, path, name)
    if name == "threshold" and (values < 0).any():
        raise InputError(f"{path}: threshold holds negative values")


def read_single_layer(path: Path, dtype: Any) -> dict[str, jax.Array]:
    arrays = {}
    with open_safetensors(path) as file:
        for field, abstract in read_header(file, path).items():
            out = aligned_empty(abstract.shape, dtype or abstract.dtype)
            _read_into(out, file, path, TENSORS[field])
            arrays[field] = jax.device_put(out)
    return arrays


def read_multi_layer(files: list[Path], dtype: Any, decoder: bool) -> dict[str, jax.Array | None]:
    """All stacked tensors, one file after the other; `w_dec` None unless `decoder`."""
    with open_safetensors(files[0]) as file:
        header = read_header(file, files[0])
    w_dec = header.pop("w_dec")
    arrays = {k: aligned_empty((len(files), *v.shape), dtype or v.dtype) for k, v in header.items()}
    for i, path in enumerate(files):
        with open_safetensors(path) as file:
            for field, out in arrays.items():
                _read_into(out[i], file, path, TENSORS[field])
    arrays = {field: jax.device_put(out) for field, out in arrays.items()}
    if not decoder:
        return {**arrays, "w_dec": None}
    F, _, D = w_dec.shape
    return {**arrays, "w_dec": jax.device_put(read_triangle(files, F, D, dtype or w_dec.dtype))}


def read_triangle(files: list[Path], F: int, D: int, dtype: Any) -> np.ndarray:
    """The decoder blocks [P, F, D]; never the part of the files that writes to earlier layers."""
    X = len(files)
    out = aligned_empty((X * (X + 1) // 2, F, D), dtype)
    for i, path in enumerate(files):
        blocks = out[block_index(i, i, X) :][: X - i]
        with open_safetensors(path) as file:
            stored = file.get_slice("w_dec")
            for rows in row_chunks((F, X, D), 4):
                with np.errstate(over="ignore"):
                    blocks[:, rows] = stored[rows, i:].transpose(1, 0, 2)
                _check_values(blocks[:, rows], path, "w_dec")
    return out


def feature_index(features: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    index = np.asarray(features)
    if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
        raise InputError(f"features must be a list of whole numbers, got {features!r:.80}")
    if index.size and (index.min() < 0 or index.max() >= width):
        raise InputError(f"features {index.min()} to {index.max()}: they go from 0 to {width - 1}")
    return index.astype(np.int64)


def gather(read: Callable[[int, int], np.ndarray], index: np.ndarray, row: tuple) -> np.ndarray:
    """Rows by number, through `read(start, stop)` of each run of neighbours."""
    wanted, inverse = np.unique(index, return_inverse=True)
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1) if wanted.size else []
    found = [read(int(run[0]), int(run[-1]) + 1) for run in runs] or [read(0, 1)[:0]]
    return np.concatenate(found)[inverse].reshape(len(index), *row)
