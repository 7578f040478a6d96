"""GGUF headers that lie about what follows them."""

import struct

import pytest

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import open_gguf


def header(tensors: int, metadata: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, metadata) + body + bytes(200)


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


NESTED = struct.pack("<IQ", 9, 1) * 100_000


U32 = struct.pack("<I", 1)


BOMBS = {
    "not a GGUF file": b"PK\x03\x04" + bytes(50),
    "cannot be read": b"",
    "runs past the end": b"GGUF\x03",
    "GGUF version 1": header(0, 0, version=1),
    "big-endian": header(0, 0, version=0x03000000),
    "a tensor count of 1152921504606846976": header(1 << 60, 0),
    "a metadata count of": header(0, 1 << 63),
    "a text of": header(0, 1, struct.pack("<Q", 1 << 62)),
    "not UTF-8": header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"),
    "unknown metadata type 77": header(0, 1, entry("a", 77, b"")),
    "an array of 4611686018427387904": header(0, 1, entry("a", 9, struct.pack("<IQ", 0, 1 << 62))),
    "an array of metadata type 9": header(0, 1, entry("a", 9, NESTED)),
    "occurs twice": header(0, 2, entry("a", 4, U32) * 2),
    "an alignment of 3": header(0, 1, entry("general.alignment", 4, struct.pack("<I", 3))),
    "one of 4 parts": header(0, 1, entry("split.count", 2, struct.pack("<H", 4))),
    "with 4294967295 axes": header(1, 0, text("w") + struct.pack("<I", 0xFFFFFFFF)),
    "listed twice": header(2, 0, tensor("w", [4]) * 2),
    r"has shape \[0\]": header(1, 0, tensor("w", [0])),
    "and offset 7": header(1, 0, tensor("w", [4], offset=7)),
    "not whole Q8_0 blocks": header(1, 0, tensor("w", [33], kind=8)),
    "tensor w runs past the end": header(1, 0, tensor("w", [1 << 62, 1 << 62, 1 << 62])),
    "tensor v runs past the end": header(1, 0, tensor("v", [4], kind=99, offset=1 << 40)),
}


@pytest.mark.parametrize("message", BOMBS)
def test_bad_headers(tmp_path, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BOMBS[message])
    with pytest.raises(InputError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            open_gguf(path)
