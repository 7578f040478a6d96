"""GGUF's quantised blocks, weight by weight after ggml-quants.c, from the bytes as integers."""

import numpy as np
import pytest

from gemma_scope_jax.model.checkpoints import gguf
from gemma_scope_jax.model.checkpoints.gguf import block_types, dequantize


def half(block, at):
    return np.frombuffer(bytes(block[at : at + 2]), np.float16)[0].astype(np.float32)


def scale_and_minimum(block, j):
    """`get_scale_min_k4` of ggml-quants.c."""
    q = block[4:16]
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4


def k_block(block, five):
    """Q4_K and Q5_K, weight by weight."""
    low = block[48:] if five else block[16:]
    for i in range(256):
        q = low[i // 64 * 32 + i % 32] >> (4 * (i // 32 % 2)) & 15
        q |= (block[16 + i % 32] >> i // 32 & 1) << 4 if five else 0
        scale, minimum = scale_and_minimum(block, i // 32)
        yield half(block, 0) * np.float32(scale) * np.float32(q) - half(block, 2) * np.float32(
            minimum
        )


def q6_k(block):
    for i in range(256):
        n, l, part = i // 128, i % 32, i % 128 // 32
        low = block[64 * n + l + 32 * (part % 2)] >> 4 * (part // 2) & 15
        q = low | (block[128 + 32 * n + l] >> 2 * part & 3) << 4
        scale = np.int8(np.uint8(block[192 + i // 16]))
        yield half(block, 208) * np.float32(scale) * np.float32(q - 32)


def q2_k(block):
    for i in range(256):
        q = block[16 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        d, m = half(block, 80) * np.float32(block[i // 16] & 15), block[i // 16] >> 4
        yield d * np.float32(q) - half(block, 82) * np.float32(m)


def q5_0(block):
    high = int.from_bytes(bytes(block[2:6]), "little")
    for i in range(32):
        q = block[6 + i % 16] >> 4 * (i // 16) & 15 | (high >> i & 1) << 4
        yield np.float32(q - 16) * half(block, 0)


# Weight by weight after ggml-quants.c; the bytes come as Python's integers.
BY_HAND = {
    "Q4_0": lambda b: (
        np.float32((b[2 + i % 16] >> 4 * (i // 16) & 15) - 8) * half(b, 0) for i in range(32)
    ),
    "Q5_0": q5_0,
    "Q8_0": lambda b: (np.float32(np.int8(np.uint8(x))) * half(b, 0) for x in b[2:]),
    "Q2_K": q2_k,
    "Q4_K": lambda b: k_block(b, False),
    "Q5_K": lambda b: k_block(b, True),
    "Q6_K": q6_k,
    "BF16": lambda b: [np.frombuffer(bytes([0, 0, *b]), np.float32)[0]],
    "F16": lambda b: [half(b, 0)],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_dequantisation_is_exact(monkeypatch, name):
    kind = next(kind for kind in block_types().values() if kind.name == name)
    rng = np.random.default_rng(7)
    monkeypatch.setattr(gguf, "CHUNK", 7 * kind.weights)  # 40 blocks are several chunks
    blocks = rng.integers(0, 256, (40, kind.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = np.array([w for b in blocks.tolist() for w in BY_HAND[name](b)])
    got = dequantize(blocks.reshape(-1), kind)
    assert got.dtype == expected.dtype == np.float32
    nan = np.isnan(expected)  # random scales: some are nan, and a nan's sign bit means nothing
    assert nan.mean() < 0.5
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_every_quantisation_in_use_is_read():
    cannot = []
    for kind in block_types().values():
        try:
            assert dequantize(np.zeros(4 * kind.bytes, np.uint8), kind).shape == (4 * kind.weights,)
        except NotImplementedError:
            cannot.append(kind.name)
    # intermediates of products, and types that no model's weights have
    assert set(cannot) <= {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}
