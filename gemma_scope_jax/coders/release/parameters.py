"""The tensors of the published parameter files: headers, streamed reading, single rows.

Tensors are read in chunks of rows, and every value is checked: NaN, infinite values and negative
thresholds raise `InputError` instead of turning up in a result.

A matrix may also be int8, which none of the release is: NAME_rows[:, None] * NAME * NAME_columns,
the scales float32. On both sides, since inputs and outputs differ in size, a few a hundredfold.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gemma_scope_jax.coders.coder import WEIGHTS, Coder
from gemma_scope_jax.coders.multi_layer_coder import block_index
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.safetensors_files import open_safetensors

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TENSORS = {name: name for name in WEIGHTS} | {"w_skip": "affine_skip_connection"}  # in the files
SCALES = ("_rows", "_columns")  # what ends the names of an int8 matrix's scales
MATRICES = ("w_enc", "w_dec", "w_skip")  # may be int8
CHUNK = 32 * 2**20  # bytes of a tensor read or written at once
Dtype = DTypeLike | None  # None: as stored
Header = dict[str, jax.ShapeDtypeStruct]  # by field


@contextmanager
def errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Prefix `InputError`s with `path` unless they name it already."""
    try:
        yield
    except InputError as error:
        known = os.fspath(path) in str(error)
        raise (error if known else InputError(f"{os.fspath(path)}: {error}")) from error


def read_header(file: Any, path: Path) -> Header:
    """Shape and dtype of the tensors of a parameter file, or `InputError`.

    Unknown tensors are refused, since they may change the function. A TopK coder's file has no
    thresholds, so nobody can mistake it for a JumpReLU coder's.
    """
    header, present = {}, set(file.keys())
    int8 = {name for name in (TENSORS[f] for f in MATRICES) if _is_int8(file, present, name)}
    scales = {name + end for name in int8 for end in SCALES}
    if others := sorted(present - set(TENSORS.values()) - scales):
        raise InputError(
            f"{path}: unknown tensor {others[0]!r:.60}, expected only {', '.join(TENSORS.values())}"
        )
    for field, name in TENSORS.items():
        if name not in present:
            if field in ("w_skip", "threshold"):
                continue
            raise InputError(f"{path}: no tensor {name!r}{nearest(name, present)}")
        stored = file.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if name in int8:
            _check_scales(file, path, name, present)
            dtype = "BF16"
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} is {dtype}, not {', '.join(DTYPES)}")
        header[field] = jax.ShapeDtypeStruct(shape, jnp.dtype(DTYPES[dtype]))
    return header


def _is_int8(file: Any, present: set[str], name: str) -> bool:
    return name in present and file.get_slice(name).get_dtype() == "I8"


def _check_scales(file: Any, path: Path, name: str, present: set[str]) -> None:
    """Raise `InputError` unless an int8 matrix has its scales."""
    shape = file.get_slice(name).get_shape()
    for end, length in zip(SCALES, shape, strict=True):
        if name + end not in present:
            raise InputError(f"{path}: {name} is I8, without its {name + end}")
        scale = file.get_slice(name + end)
        got = scale.get_dtype(), list(scale.get_shape())
        if got != ("F32", [length]):
            raise InputError(f"{path}: {name + end} is {got[0]} {got[1]}, not F32 [{length}]")


class Stored:
    """A tensor of an open parameter file, read by rows; int8 times its scales, as bfloat16."""

    def __init__(self, file: Any, name: str):
        self._values, self._scales = file.get_slice(name), None
        if self._values.get_dtype() == "I8":
            self._scales = [file.get_tensor(name + end) for end in SCALES]

    def __getitem__(self, at: Any) -> np.ndarray:
        values = self._values[at]
        if self._scales is None:
            return values
        rows, columns = self._scales
        return (rows[at, None] * values * columns).astype(jnp.bfloat16)


def as_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix [R, C] as int8, float32 scales [R] and [C], which make the largest value of rows and
    columns alike."""
    sizes = np.abs(np.asarray(matrix, np.float64))
    scales = [np.ones((len(sizes), 1)), np.ones((1, sizes.shape[1]))]
    for _ in range(8):  # alternately, each by half of what is left
        for i in (0, 1):
            largest = (sizes / scales[0] / scales[1]).max(1 - i, keepdims=True)
            scales[i] *= np.where(largest > 0, largest, 1) ** 0.5
    most = (sizes / scales[0] / scales[1]).max(0, keepdims=True)
    scales[1] *= np.where(most > 0, most, 1) / 127
    rows, columns = (scale.astype(np.float32) for scale in scales)
    values = np.rint(np.asarray(matrix, np.float32) / rows / columns)
    return np.clip(values, -127, 127).astype(np.int8), rows[:, 0], columns[0]


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialised, 64-byte aligned array, which `jax.device_put` to a CPU does not copy."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def row_chunks(shape: Sequence[int], itemsize: int) -> Iterator[slice]:
    """Slices of the first axis, of at most CHUNK bytes, but at least one row."""
    rows = max(1, CHUNK // max(1, itemsize * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _read_into(out: np.ndarray, file: Any, path: Path, name: str) -> None:
    """Fill `out` with a tensor, cast to its dtype, and check the values."""
    stored = Stored(file, name)
    for rows in row_chunks(out.shape, 4):
        with np.errstate(over="ignore"):
            out[rows] = stored[rows]
        check_finite(out[rows], f"{path}: {name}")
        if name == "threshold" and (out[rows] < 0).any():
            raise InputError(f"{path}: threshold holds negative values")


def check_finite(tensor: jax.Array | np.ndarray, name: str) -> None:
    """Raise `InputError` for NaN and infinite values, in chunks of rows."""
    for rows in row_chunks(tensor.shape, tensor.dtype.itemsize):
        if not np.isfinite(np.asarray(tensor[rows])).all():
            raise InputError(f"{name} holds NaN or infinite values (as {tensor.dtype})")


def check_values(coder: Coder) -> None:
    """Raise `InputError` for weights that readers refuse: NaN and infinite values, thresholds below
    0, and thresholds of a TopK coder, whose files have none.
    """
    for name in TENSORS:
        if (array := getattr(coder, name)) is not None:
            check_finite(array, name)
    threshold = np.asarray(coder.threshold)
    if (threshold < 0).any():
        raise InputError("threshold holds negative values")
    if coder.k is not None and threshold.any():
        raise InputError(f"a TopK coder (k {coder.k}) has no thresholds: set them to 0")


def read_single_layer(path: Path, dtype: Dtype) -> dict[str, jax.Array]:
    """All tensors of a file."""
    with open_safetensors(path) as file:
        header = read_header(file, path)
    # one at a time: only one tensor is in the host's memory
    one = lambda name: _stacked([path], {name: header[name]}, dtype)[name][0]
    return {name: jax.device_put(one(name)) for name in header}


def read_multi_layer(files: list[Path], dtype: Dtype, decoder: bool) -> dict[str, jax.Array | None]:
    """All tensors of the files, stacked; `w_dec` None unless `decoder`."""
    with open_safetensors(files[0]) as file:
        header = read_header(file, files[0])
    w_dec = header.pop("w_dec")
    arrays = {k: jax.device_put(a) for k, a in _stacked(files, header, dtype).items()}
    if not decoder:
        return {**arrays, "w_dec": None}
    F, _, D = w_dec.shape
    return {**arrays, "w_dec": jax.device_put(read_triangle(files, F, D, dtype or w_dec.dtype))}


def _stacked(files: list[Path], header: Header, dtype: Dtype) -> dict[str, np.ndarray]:
    """The tensors in `header`, stacked over the files [X, ...], in their own dtype by default."""
    arrays = {k: aligned_empty((len(files), *v.shape), dtype or v.dtype) for k, v in header.items()}
    for i, path in enumerate(files):
        with open_safetensors(path) as file:
            for field, out in arrays.items():
                _read_into(out[i], file, path, TENSORS[field])
    return arrays


def read_triangle(files: list[Path], F: int, D: int, dtype: DTypeLike) -> np.ndarray:
    """The decoder blocks [P, F, D], without reading what the files hold for earlier layers."""
    X = len(files)
    out = aligned_empty((X * (X + 1) // 2, F, D), dtype)
    for i, path in enumerate(files):
        blocks = out[block_index(i, i, X) :][: X - i]
        with open_safetensors(path) as file:
            stored = Stored(file, "w_dec")
            for rows in row_chunks((F, X, D), 4):
                with np.errstate(over="ignore"):
                    blocks[:, rows] = stored[rows, i:].transpose(1, 0, 2)
                check_finite(blocks[:, rows], f"{path}: w_dec")
    return out


def feature_index(features: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    index = np.asarray(features)
    if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
        raise InputError(f"features must be a list of whole numbers, got {features!r:.80}")
    if index.size and (index.min() < 0 or index.max() >= width):
        raise InputError(f"features must be 0 to {width - 1}, not {index.min()} to {index.max()}")
    return index.astype(np.int64)


def gather(read: Callable[[int, int], np.ndarray], index: np.ndarray, row: tuple) -> np.ndarray:
    """Rows by number, by one `read(start, stop)` for each run of neighbours."""
    wanted, inverse = np.unique(index, return_inverse=True)
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1) if wanted.size else []
    found = [read(int(run[0]), int(run[-1]) + 1) for run in runs] or [read(0, 1)[:0]]
    return np.concatenate(found)[inverse].reshape(len(index), *row)
