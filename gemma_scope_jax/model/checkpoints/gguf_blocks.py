"""The block quantisations of ggml, undone exactly and vectorised in numpy.

A quantised tensor is a row of blocks; a block holds a few float16 scales and 4 to 8 bits a weight.
Every function here maps the bytes of n blocks, uint8 [n, bytes a block], to float32
[n, weights a block], in the order of operations of ggml's own dequantisation, so the results agree
bit for bit. Source: ggml/src/ggml-common.h (layouts) and ggml-quants.c.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


def _half(two_bytes: np.ndarray) -> np.ndarray:
    return two_bytes.view(np.float16).astype(np.float32)  # [n, 1]


def _nibbles(qs: np.ndarray, group: int) -> np.ndarray:
    """uint8 [n, G * group] -> [n, G, 2, group]: the low nibbles of a group, then its high ones."""
    grouped = qs.reshape(len(qs), -1, 1, group)
    return np.concatenate([grouped & 15, grouped >> 4], axis=2)


def _bits(qh: np.ndarray, shifts: range, mask: int) -> np.ndarray:
    """uint8 [n, G * 32] -> [n, G, len(shifts), 32]: the `mask` bits of every byte at each shift."""
    shift = np.array(shifts, np.uint8)[None, None, :, None]
    return (qh.reshape(len(qh), -1, 1, 32) >> shift) & np.uint8(mask)


def _q4_0(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 2:], 16).reshape(-1, 32).astype(np.float32)
    return _half(b[:, :2]) * (q - np.float32(8))


def _q4_1(b: np.ndarray) -> np.ndarray:
    q = _nibbles(b[:, 4:], 16).reshape(-1, 32).astype(np.float32)
    return _half(b[:, :2]) * q + _half(b[:, 2:4])


def _five_bits(qh: np.ndarray, qs: np.ndarray) -> np.ndarray:
    high = np.unpackbits(qh, axis=1, bitorder="little")  # [n, 32]
    return (_nibbles(qs, 16).reshape(-1, 32) | (high << np.uint8(4))).astype(np.float32)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * (_five_bits(b[:, 2:6], b[:, 6:]) - np.float32(16))


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * _five_bits(b[:, 4:8], b[:, 8:]) + _half(b[:, 2:4])


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _half(b[:, :2]) * b[:, 2:].view(np.int8)


def _scales_and_mins(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minimums [n, 8, 1] of K-quant blocks: six bits each in bytes 4 to 16."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    scale, minimum = _half(b[:, :2]) * scale, _half(b[:, 2:4]) * minimum
    return scale[:, :, None], minimum[:, :, None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    scale, minimum = _scales_and_mins(b)
    q = _nibbles(b[:, 16:], 32).reshape(-1, 8, 32).astype(np.float32)
    return (scale * q - minimum).reshape(-1, 256)


def _q5_k(b: np.ndarray) -> np.ndarray:
    scale, minimum = _scales_and_mins(b)
    low = _nibbles(b[:, 48:], 32).reshape(-1, 8, 32)
    high = _bits(b[:, 16:48], range(8), 1).reshape(-1, 8, 32)
    q = (low | (high << np.uint8(4))).astype(np.float32)
    return (scale * q - minimum).reshape(-1, 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = _nibbles(b[:, :128], 64).reshape(-1, 8, 32)
    high = _bits(b[:, 128:192], range(0, 8, 2), 3).reshape(-1, 8, 32)
    q = (low | (high << np.uint8(4))).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scale = _half(b[:, 208:]) * b[:, 192:208].view(np.int8)
    return (scale[:, :, None] * q).reshape(-1, 256)


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A ggml tensor type: its name, its block size, and how blocks become weights."""

    name: str
    weights: int  # in a block
    bytes: int  # of a block
    blocks: Callable[[np.ndarray], np.ndarray]


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, lambda b: b.view(np.float32)),
    1: BlockType("F16", 1, 2, _half),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    30: BlockType(
        "BF16", 1, 2, lambda b: (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    ),
}
BY_NAME = {t.name: t for t in BLOCK_TYPES.values()}
CHUNK = 1 << 16  # weights dequantised at a time: the temporaries stay in the cache


def dequantize(data: np.ndarray, type: str) -> np.ndarray:
    """Bytes (uint8, whole blocks of `type`, such as "Q4_K") -> float32 weights, flat; exact."""
    t = BY_NAME[type]
    blocks = data.reshape(-1, t.bytes)
    out = np.empty((len(blocks), t.weights), np.float32)
    step = max(1, CHUNK // t.weights)
    with np.errstate(all="ignore"):  # scales may be nan or inf; the reader looks for those
        for start in range(0, len(blocks), step):
            out[start : start + step] = t.blocks(blocks[start : start + step])
    return out.reshape(-1)
