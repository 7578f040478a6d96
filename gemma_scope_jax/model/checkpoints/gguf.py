"""Gemma 3 from GGUF files (llama.cpp, Ollama, LM Studio): a direct, memory-mapped reader.

Most people who run Gemma at home have it as one quantised GGUF file. The header is parsed in a
fraction of a second although it holds 262,144 token strings, and a tensor is dequantised only when
it is read. Everything a file says is checked before it is believed: a broken or foreign file
raises `InputError`.

Sources: the GGUF specification (ggml/docs/gguf.md), the block layouts in ggml/src/ggml-common.h,
the tensor names and conventions of llama.cpp's Gemma 3 converter and graph.
"""

import dataclasses
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.checkpoints.gguf_blocks import BLOCK_TYPES, BY_NAME, CHUNK, dequantize
from gemma_scope_jax.model.config import PRESETS, GemmaConfig

# ggml types that cannot be read, by the name users know them by; others are named by number.
_UNREADABLE = {10: "Q2_K", 11: "Q3_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}

# --- the file ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in numpy order (rows first), `offset` from the file's start."""

    shape: tuple[int, ...]
    type: str
    offset: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file. `metadata` values are str, int, float, bool, list[str] or an array."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _bytes: np.ndarray = dataclasses.field(repr=False)  # the mapped file, uint8

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, dequantised: float32 of its shape. Errors as in `read_rows`."""
        shape = self._info(name).shape
        if len(shape) == 1:
            return self._read(name, 0, shape[0]).reshape(shape)
        return self.read_rows(name, 0, shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a matrix, dequantised: float32 [stop - start, ...].

        Raises `InputError` if the file has no such tensor or rows, if its quantisation is not
        supported, or if it holds nan or inf.
        """
        shape = self._info(name).shape
        if len(shape) < 2 or not 0 <= start <= stop <= shape[0]:
            raise InputError(f"{self.path}: {name} {list(shape)} has no rows {start}:{stop}")
        row = math.prod(shape[1:])
        return self._read(name, start * row, stop * row).reshape(stop - start, *shape[1:])

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.path}: no tensor {name!r}{nearest(name, self.tensors)}")
        return self.tensors[name]

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self._info(name)
        t = BY_NAME.get(info.type)
        if t is None:
            raise InputError(
                f"{self.path}: {name} is quantised as {info.type}; supported are "
                f"{', '.join(BY_NAME)}: use a Q4_K_M, Q5_K_M, Q6_K, Q8_0 or unquantised file"
            )
        first, last = (info.offset + i // t.weights * t.bytes for i in (start, stop))
        out = dequantize(self._bytes[first:last], info.type)
        for i in range(0, len(out), CHUNK):
            if not np.isfinite(out[i : i + CHUNK]).all():
                raise InputError(f"{self.path}: {name} holds nan or inf; download the file again")
        return out


class _Cursor:
    """Reads the header front to back; every length is checked against what is left of the file."""

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
        """A count of things of at least `smallest` bytes each: bounded by what is left."""
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


_SCALARS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "?"]))
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


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
        type = (
            BLOCK_TYPES[kind].name
            if kind in BLOCK_TYPES
            else _UNREADABLE.get(kind, f"ggml type {kind}")
        )
        found[name] = TensorInfo(shape, type, offset)
    start = -(-cursor.at // alignment) * alignment
    for name, info in found.items():
        size = 1
        if t := BY_NAME.get(info.type):
            if info.shape[-1] % t.weights:
                raise cursor.fail(f"tensor {name} {list(info.shape)} is not whole {t.name} blocks")
            size = math.prod(info.shape) // t.weights * t.bytes
        if start + info.offset + size > cursor.end:
            raise cursor.fail(f"tensor {name} runs past the end of the file (byte {cursor.end})")
        found[name] = dataclasses.replace(info, offset=start + info.offset)
    return found


# --- Gemma 3 -------------------------------------------------------------------------------------

_SIZES = {
    "layers": "block_count",
    "d_model": "embedding_length",
    "d_mlp": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
_OPTIONS = {
    "window": "attention.sliding_window",
    "global_rope_base": "rope.freq_base",
    "local_rope_base": "rope.freq_base_swa",
    "global_rope_divisor": "rope.scaling.factor",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
    "global_every": "attention.sliding_window_pattern",
}


def _positive(file: GGUFFile, key: str, kind: type) -> Any:
    """The positive number under gemma3.`key`, or None where the file has none."""
    value = file.metadata.get(f"gemma3.{key}")
    if value is None:
        return None
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 2**31:
        raise InputError(
            f"{file.path}: gemma3.{key} is {value!r:.40}, not a positive {kind.__name__}"
        )
    return kind(value)


def gguf_config(file: GGUFFile) -> GemmaConfig:
    """The architecture a file describes: the preset for a published size, else built as told.

    Raises `InputError` for another architecture, missing keys, or a published size whose other
    numbers (window, RoPE, ...) contradict its preset.
    """
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind != "gemma3":
        raise InputError(f"{file.path}: holds a {kind!r:.40} model, not Gemma 3 ('gemma3')")
    if "output.weight" in file.tensors:
        raise InputError(f"{file.path}: unembeds with output.weight; Gemma 3 with its embedding")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if file.metadata.get(f"gemma3.{key}") is not None:
            raise InputError(f"{file.path}: has gemma3.{key}, which Gemma 3 does not use")
    sizes = {field: _positive(file, key, int) for field, key in _SIZES.items()}
    missing = [f"gemma3.{_SIZES[field]}" for field, value in sizes.items() if value is None]
    embed = file._info("token_embd.weight").shape
    if missing or sizes["heads"] % sizes["kv_heads"] or sizes["layers"] > len(file.tensors):
        raise InputError(f"{file.path}: metadata missing or contradictory: {missing or sizes}")
    options = {}
    for field, key in _OPTIONS.items():
        integer = field in ("window", "global_every")
        value = _positive(file, key, int if integer else float)
        if value is not None:  # float32 metadata: 1e-6 is stored as 9.99999997e-07
            options[field] = value if integer else float(f"{value:.6g}")
    known = [c for c in PRESETS.values() if all(getattr(c, k) == v for k, v in sizes.items())]
    if known:
        for field, value in options.items():
            if value != getattr(known[0], field):
                raise InputError(
                    f"{file.path}: gemma3.{_OPTIONS[field]} is {value}, but {known[0].name} has "
                    f"{getattr(known[0], field)}"
                )
        return known[0]
    options.setdefault("window", 1024)
    name = file.metadata.get("general.name")
    return GemmaConfig(
        name=name if isinstance(name, str) else "gemma3",
        query_scale=sizes["head_dim"] ** -0.5,
        vocab=embed[0],
        context=_positive(file, "context_length", int) or GemmaConfig.context,
        **sizes,
        **options,
    )


_LEAVES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "pre_attn_norm": "attn_norm",
    "w_q": "attn_q",
    "w_k": "attn_k",
    "w_v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "w_o": "attn_output",
    "post_attn_norm": "post_attention_norm",
    "pre_mlp_norm": "ffn_norm",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}


def gguf_leaf(file: GGUFFile, config: GemmaConfig, leaf: str, layer: int | None) -> np.ndarray:
    """One weight as `Block` or `Params` names it, float32, in our layout without the layer axis.

    Matrices are transposed views ([in, out], heads split). The converter added 1 to the norms,
    which we store as w with gain 1 + w. An embedding may have more rows than the vocabulary (image
    tokens, padding); they are dropped. Raises `InputError` for a tensor that is missing, of another
    shape, of an unsupported quantisation, or not finite.
    """
    c = config
    D, N, K, H, M = c.d_model, c.heads, c.kv_heads, c.head_dim, c.d_mlp
    stem = _LEAVES[leaf]
    name = f"{stem}.weight" if layer is None else f"blk.{layer}.{stem}.weight"
    wanted = {
        "embed": (c.vocab, D),
        "w_q": (N * H, D), "w_k": (K * H, D), "w_v": (K * H, D), "w_o": (D, N * H),
        "w_gate": (M, D), "w_up": (M, D), "w_down": (D, M),
        "q_norm": (H,), "k_norm": (H,),
    }.get(leaf, (D,))  # fmt: skip
    found = file._info(name).shape
    padded = leaf == "embed" and len(found) == 2 and found[0] >= c.vocab and found[1] == D
    if found != wanted and not padded:
        raise InputError(
            f"{file.path}: {name} has shape {list(found)}, {c.name} needs {list(wanted)}"
        )
    if leaf == "embed":
        return file.read_rows(name, 0, c.vocab)
    x = file.read(name)
    if leaf.endswith("norm"):
        return x - np.float32(1)
    if leaf in ("w_q", "w_k", "w_v"):
        return x.T.reshape(D, -1, H)
    return x.T.reshape(N, H, D) if leaf == "w_o" else x.T
