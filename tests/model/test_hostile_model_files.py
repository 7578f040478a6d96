"""Whatever stands in a model's or tokenizer's files: one clear line, never another exception.

Each file that is read is given, at many of its places, each thing that JSON allows and nobody
means.
"""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from checkpoint_files import (
    edit_tensors,
    official_tree,
    random_model,
    save_orbax,
    split_into_shards,
    write_gguf,
)
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import open_gguf
from gemma_scope_jax.model.checkpoints.gguf_gemma import gguf_config
from gemma_scope_jax.model.checkpoints.huggingface import open_huggingface, save_huggingface
from gemma_scope_jax.model.checkpoints.official import open_official
from gemma_scope_jax.model.tokenizer import load_tokenizer
from gemma_scope_jax.storage.safetensors_files import open_safetensors
from tiny_tokenizer import hugging_face, tiny_proto, write_json, write_model

# What no file may hold: refused wherever it stands, also where nobody looks.
NEVER = ["NaN", "-Infinity", "1e400", "9" * 400, '"\\ud83d"', '{"a": 1, "a": 2}', "[" * 100_000]
# What JSON allows, and what may be right somewhere.
SOMETIMES = ["null", "true", "-1", "0", "0.5", str(2**39), '""', '"\\u001b[2J"', "[]", "{}",
             "[[1]]", '{"a": {"b": 1}}', "[null]", "1e-300", "1e300"]  # fmt: skip
MARK = "@@here@@"


def open_model(folder: Path) -> None:
    open_huggingface(folder)


def open_tokens(folder: Path) -> None:
    load_tokenizer(folder)


def open_orbax(folder: Path) -> None:
    open_official(folder, random_model().config)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root, model = tmp_path_factory.mktemp("sound"), random_model()
    save_huggingface(model, root / "hf")
    split_into_shards(root / "hf")
    for name in ("tokens", "json"):
        (root / name).mkdir()
    added = hugging_face(tiny_proto())["added_tokens"]
    write_model(root / "tokens" / "tokenizer.model", tiny_proto())
    write_json(root / "tokens" / "tokenizer.json", {"added_tokens": added[-2:]})
    decoder = {str(t["id"]): t for t in added[-2:]}
    write_json(root / "tokens" / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    write_json(root / "tokens" / "added_tokens.json", {t["content"]: t["id"] for t in added[-2:]})
    write_json(root / "json" / "tokenizer.json", hugging_face(tiny_proto()))
    save_orbax(root / "orbax", official_tree(model))
    return {path.name: path for path in root.iterdir()}


FILES = {
    ("hf", "config.json"): open_model,
    ("hf", "model.safetensors.index.json"): open_model,
    ("tokens", "tokenizer.json"): open_tokens,
    ("tokens", "tokenizer_config.json"): open_tokens,
    ("tokens", "added_tokens.json"): open_tokens,
    ("json", "tokenizer.json"): open_tokens,
    ("orbax", "_METADATA"): open_orbax,
}


def places(value, path=()):
    """The paths to every value in a JSON document, itself included."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def put(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


@pytest.mark.parametrize("source, name", FILES)
def test_hostile_json(sources, tmp_path, source, name):
    folder = shutil.copytree(sources[source], tmp_path / "x")
    sound = json.loads((folder / name).read_text())
    FILES[source, name](folder)
    everywhere, draw = list(places(sound)), random.Random(0)
    few = [(), *draw.sample(everywhere[1:], min(12, len(everywhere) - 1))]
    refused = 0
    for number, path in enumerate(few):
        text = json.dumps(put(sound, path, MARK))
        hostile = NEVER[number % len(NEVER)], *SOMETIMES
        for said in hostile:
            (folder / name).write_text(text.replace(json.dumps(MARK), said))
            try:
                FILES[source, name](folder)
            except InputError as error:
                refused += 1
                assert str(error).isprintable() and str(folder) in str(error), (path, said)
                assert len(str(error)) < 600
            else:
                assert said not in NEVER, (path, said)
    assert refused > len(few)


def header(text: str, data: int = 0) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + bytes(data)


def tensor(start: int, stop: int, shape: str = "[2]", name: str = "a") -> str:
    return f'"{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [{start}, {stop}]}}'


def listed(*tensors: str) -> str:
    return "{" + ", ".join(tensors) + "}"


HEADERS = {
    "overlap": header(listed(tensor(0, 8), tensor(4, 12, name="b")), 12),
    "gap": header(listed(tensor(0, 8), tensor(12, 20, name="b")), 20),
    "past the end": header(listed(tensor(0, 8)), 4),
    "data past the last": header(listed(tensor(0, 8)), 9),
    "one name twice": header(listed(tensor(0, 8), tensor(0, 8)), 8),
    "two shapes of one": header(listed(tensor(0, 8), tensor(0, 8, "[1, 2]")), 8),
    "shape and bytes": header(listed(tensor(0, 8, "[3]")), 8),
    "too large": header(listed(tensor(0, 8, f"[{2**62}, 4]")), 8),
    "huge": header(listed(tensor(0, 8, f"[{'9' * 400}]")), 8),
    "nan": header(listed(tensor(0, 8, "[NaN]")), 8),
    "a list": header("[1]"),
    "nested": header("[" * 50_000),
    "half a character": header(listed(tensor(0, 8, name="\\ud83d")), 8),
    "length": struct.pack("<Q", 2**60) + bytes(30),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors_files(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(HEADERS[kind])
    with pytest.raises(InputError) as caught, open_safetensors(path) as file:
        file.keys()
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    path.write_bytes(save({"a": np.ones(2, np.float32)}))  # a sound one in its place
    with open_safetensors(path) as file:
        assert list(file.keys()) == ["a"]


def test_a_tensor_name_of_control_characters_is_shown(tmp_path):
    save_huggingface(random_model(), tmp_path)
    edit_tensors(tmp_path, lambda t: t | {"\x1b[2J": np.ones(2, np.float32)})
    with pytest.raises(InputError, match=r"tensor \\x1b\[2J is not one of Gemma 3's"):
        open_huggingface(tmp_path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("attention__sliding_window", 0, "sliding_window is 0, not a positive whole number"),
        ("attention__sliding_window", 2**31, "not a positive whole number"),
        ("attention__layer_norm_rms_epsilon", 1e-30, "not a positive number"),
        ("rope__freq_base_swa", 1e30, "not a positive number"),
        ("rope__scaling__factor", -8.0, "not a positive number"),
        ("context_length", "long", "not a positive whole number"),
        ("attention__sliding_window_pattern", True, "not a positive whole number"),
    ],
)
def test_numbers_of_a_gguf_file(tmp_path, key, value, message):
    path = write_gguf(tmp_path / "x.gguf", random_model(), **{key: value})
    with pytest.raises(InputError, match=message):
        gguf_config(open_gguf(path))


def test_tensors_of_a_gguf_file_share_no_bytes(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", random_model())
    file = open_gguf(path)
    last = max(file.tensors, key=lambda name: file.tensors[name].offset)
    start = min(info.offset for info in file.tensors.values())
    data = bytearray(path.read_bytes())
    at = data.index(last.encode()) + len(last)
    (axes,) = struct.unpack_from("<I", data, at)
    at += 4 + 8 * axes + 4
    (offset,) = struct.unpack_from("<Q", data, at)
    assert offset == file.tensors[last].offset - start
    for moved, message in ((0, "overlaps"), (offset + 64, "leaves a gap to tensor|runs past")):
        struct.pack_into("<Q", data, at, moved)
        path.write_bytes(data + bytes(64))
        with pytest.raises(InputError, match=message):
            open_gguf(path)
