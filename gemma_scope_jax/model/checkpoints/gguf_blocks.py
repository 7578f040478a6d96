"""The tensor types of ggml: their sizes, and their blocks as weights.

A quantised tensor is a row of blocks; a block holds a few scales and 1 to 8 bits per weight. The
gguf package, published by llama.cpp's authors, dequantises exactly as ggml does. It gets a few
blocks at a time: its temporaries then stay in the processor's cache, which is 2.5 times faster.
"""

import functools
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 16  # weights dequantised at a time


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
