"""Documents of our own: what is refused, in which words, and digests that may never change."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.manifest import Format, digest
from gemma_scope_jax.storage.safetensors_files import array_bytes, map_safetensors
from gemma_scope_jax.storage.safetensors_layout import lay_out
from gemma_scope_jax.storage.strict_json import field

STORE = Format(
    "the manifest of a store",
    {"format": "acme", "version": 1},
    lambda content, path: field(content, "rows", int, path, least=1),
    "write it again",
    ("rows", "sites"),
)
WHOLE = {"format": "acme", "version": 1, "rows": 3, "sites": [], "more": None}


def test_a_document_that_fits_is_given_as_it_is(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(WHOLE))
    assert STORE.read(path) == WHOLE == STORE.parse(path.read_bytes(), path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "m.json: not usable as JSON .*; write it again"),
        ("[]", "m.json: not the manifest of a store; write it again"),
        ({"format": "other"}, "not the manifest of a store .format is 'other', not 'acme'.; write"),
        ({"format": None}, "format is None, not 'acme'"),
        ({"version": 2}, "version is 2, not 1.; write it again"),
        ({"version": True}, "version is True, not 1"),
        ({"rows": 0}, "m.json: rows is 0, expected at least 1; write it again"),
        ({"rows": ...}, "m.json: lacks rows; write it again"),
    ],
)
def test_anything_else_is_one_line_with_advice(tmp_path, text, said):
    path = tmp_path / "m.json"
    if isinstance(text, dict):
        text = json.dumps({k: v for k, v in (WHOLE | text).items() if v is not ...})
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        STORE.read(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_not_to_be_written_again(tmp_path):
    with pytest.raises(InputError, match=r"m\.json: no such file$"):
        STORE.read(tmp_path / "m.json")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)$"):
        STORE.read(tmp_path)


def test_digests_are_those_on_disk():
    """Stores, results and runs are found again by them: `b2sum -l 64` of the bytes."""
    assert digest("") == digest(b"") == "e4a6a0577479b2b4"
    assert digest("abc") == "d8bb14d833d59559"
    assert digest({"b": [1, 2.5], "a": None}) == digest('{"a": null, "b": [1, 2.5]}')
    assert digest("abc", 4) != digest("abc")[:8] and len(digest("abc", 4)) == 8


def test_files_are_those_of_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "values": rng.integers(-127, 128, (2, 5, 3)).astype(np.int8),
        "scale": rng.random((2, 5)).astype(np.float32),
    }
    wanted = {name: (a.dtype.name, a.shape) for name, a in tensors.items()}
    header, places = lay_out(wanted)
    data = header + b"".join(array_bytes(tensors[name]) for name in places)
    assert data == save(tensors)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(map_safetensors(path, wanted)[name], array)
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        map_safetensors(path, wanted)
