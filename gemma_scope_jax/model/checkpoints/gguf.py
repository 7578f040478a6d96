"""GGUF files (llama.cpp, Ollama, LM Studio): a direct, memory-mapped reader.

Most people who run Gemma at home have it as one quantised GGUF file. The header is parsed in a
fraction of a second although it holds 262,144 token strings, and a tensor is dequantised only when
it is read. Everything in a file is checked: a broken or foreign file raises `InputError`.

A quantised tensor is a row of blocks; a block holds a few scales and 1 to 8 bits per weight. The
gguf package, published by llama.cpp's authors, dequantises exactly as ggml does. It gets a few
blocks at a time: its temporaries then stay in the processor's cache, which is 2.5 times faster.

Sources: the GGUF specification (ggml/docs/gguf.md), the block layouts in ggml/src/ggml-common.h.
"""

import dataclasses
import functools
import itertools
import math
import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np

from gemma_scope_jax.errors import InputError, nearest

CHUNK = 1 << 16  # weights dequantised at a time
# the types of metadata
_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "?"]))
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


class BlockType(NamedTuple):
    """The name of a ggml type, and the weights and bytes of its block; 0 bytes: unknown."""

    name: str
    weights: int
    bytes: int


@functools.cache
def block_types() -> dict[int, BlockType]:
    """All types of known size, by their numbers in files."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): BlockType(kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}


def dequantize(data: np.ndarray, kind: BlockType) -> np.ndarray:
    """Bytes (uint8, whole blocks of a type) -> float32 weights, flat; exact.

    Raises `NotImplementedError` for a type that the gguf package cannot dequantise.
    """
    if not kind.bytes:
        raise NotImplementedError
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    blocks = data.reshape(-1, kind.bytes)
    out = np.empty((len(blocks), kind.weights), np.float32)
    step = max(1, CHUNK // kind.weights)
    with np.errstate(all="ignore"):  # scales may be nan or inf; the reader checks for them
        for start in range(0, len(blocks), step):
            one_row = blocks[start : start + step].reshape(1, -1)  # it splits several, 16 at a time
            found = quants.dequantize(one_row, GGMLQuantizationType[kind.name])
            out[start : start + step] = found.reshape(-1, kind.weights)
    return out.reshape(-1)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: `shape` in numpy order (rows first), `offset` from the file's start."""

    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def size(self) -> int:
        """Bytes in the file; 0 if they are unknown for this type."""
        return math.prod(self.shape) // self.type.weights * self.type.bytes


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file. `metadata` values are str, int, float, bool, list[str] or an array."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _bytes: np.ndarray = dataclasses.field(repr=False)  # the mapped file, uint8

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A whole tensor, or some rows of a matrix, dequantised: float32 of its shape.

        Raises `InputError` if the tensor does not exist, the quantisation is not supported, or the
        values include nan or inf.
        """
        info = self.info(name)
        start, stop, _ = rows.indices(info.shape[0])
        row, t = math.prod(info.shape[1:]), info.type
        first, last = (info.offset + i * row // t.weights * t.bytes for i in (start, stop))
        try:
            out = dequantize(self._bytes[first:last], t)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: {name} is quantised as {t.name}, which is not supported; use a "
                "Q4_K_M, Q5_K_M, Q6_K, Q8_0 or unquantised file"
            ) from None
        for i in range(0, len(out), CHUNK):
            if not np.isfinite(out[i : i + CHUNK]).all():
                raise InputError(f"{self.path}: {name} holds nan or inf; download the file again")
        return out.reshape(stop - start, *info.shape[1:])

    def same_bytes(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same matrix in the same quantisation."""
        one, two = self.info(name), self.info(other)
        if (one.shape, one.type) != (two.shape, two.type) or not one.size:
            return False
        ours, theirs = (self._bytes[x.offset : x.offset + one.size] for x in (one, two))
        parts = [slice(i, i + CHUNK) for i in range(0, one.size, CHUNK)]
        return all(np.array_equal(ours[part], theirs[part]) for part in parts)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is. Raises `InputError` if the file has none of this name."""
        if name not in self.tensors:
            raise InputError(f"{self.path}: no tensor {name!r}{nearest(name, self.tensors)}")
        return self.tensors[name]


class _Cursor:
    """Reads the header front to back; every length is checked against the rest of the file."""

    def __init__(self, path: str, data: mmap.mmap):
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; not a complete GGUF file: download it again")

    def need(self, count: int) -> int:
        """Move past `count` bytes and return where they start."""
        if count > self.end - self.at:
            raise self.fail(f"the header runs past the end of the file (byte {self.end})")
        start, self.at = self.at, self.at + count
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.need(struct.calcsize(form)))[0]

    def count(self, what: str, smallest: int) -> int:
        """A count of items of at least `smallest` bytes each, bounded by the rest of the file."""
        n = self.number("<Q")
        if n > (self.end - self.at) // smallest:
            raise self.fail(f"{what} of {n} does not fit into the file")
        return n

    def text(self) -> str:
        n = self.count("a text", 1)
        start = self.need(n)
        try:
            return self.data[start : start + n].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"a text at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise self.fail(f"unknown metadata type {kind}")
        item = self.number("<I")
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            n = self.count("an array", dtype.itemsize)
            return np.frombuffer(self.data, dtype, n, self.need(n * dtype.itemsize)).copy()
        if item != _TEXT:
            raise self.fail(f"an array of metadata type {item}")
        return [self.text() for _ in range(self.count("an array", 8))]


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Map a GGUF file (version 2 or 3, little-endian) and parse its header.

    Raises `InputError` unless header, offsets and sizes agree with each other and the file.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InputError(f"{path}: cannot be read ({error})") from error
    cursor = _Cursor(path, data)
    if data[:4] != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (it starts with {data[:4]!r})")
    cursor.need(4)
    version = cursor.number("<I")
    if version not in (2, 3):
        hint = "a big-endian file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise InputError(f"{path}: {hint}; only little-endian versions 2 and 3 are supported")
    tensor_count = cursor.count("a tensor count", 24)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("a metadata count", 13)):
        key = cursor.text()
        if key in metadata:
            raise cursor.fail(f"metadata {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise InputError(f"{path}: one of {parts} parts; merge them (llama-gguf-split --merge)")
    tensors = _tensor_table(cursor, tensor_count, metadata.get("general.alignment", 32))
    return GGUFFile(path, metadata, tensors, np.frombuffer(data, np.uint8))


def _tensor_table(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"an alignment of {alignment}")
    found: dict[str, TensorInfo] = {}
    for _ in range(count):
        name = cursor.text()
        axes = cursor.number("<I")
        if not 1 <= axes <= 4 or name in found:
            raise cursor.fail(f"tensor {name!r} with {axes} axes, or listed twice")
        shape = tuple(cursor.number("<Q") for _ in range(axes))[::-1]
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        if 0 in shape or offset % alignment:
            raise cursor.fail(f"tensor {name} has shape {list(shape)} and offset {offset}")
        type = block_types().get(kind, BlockType(f"ggml type {kind}", 1, 0))
        if shape[-1] % type.weights:
            raise cursor.fail(f"tensor {name} {list(shape)} is not whole {type.name} blocks")
        found[name] = TensorInfo(shape, type, offset)
    start = -(-cursor.at // alignment) * alignment
    for name, info in found.items():
        found[name] = info = dataclasses.replace(info, offset=start + info.offset)
        if info.offset + (info.size or 1) > cursor.end:
            raise cursor.fail(f"tensor {name} runs past the end of the file (byte {cursor.end})")
    order = sorted(found.items(), key=lambda item: item[1].offset)
    for (name, info), (after, following) in itertools.pairwise(order):
        end = info.offset + info.size
        if info.size and following.offset - end not in range(alignment):
            between = "overlaps" if following.offset < end else "leaves a gap to"
            raise cursor.fail(f"tensor {name} {between} tensor {after}")
    return found
