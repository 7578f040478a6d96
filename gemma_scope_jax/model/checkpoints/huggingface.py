"""Gemma 3 as a Hugging Face folder: config.json and safetensors, one file or many.

Reads the text-only repositories (270m, 1b), the multimodal ones (4b and up: the vision tower and
the projector stay on disk) and what transformers 4 and 5 save. Every tensor is used, known not to
matter, or refused. Each tensor opens its file anew, so that mapped pages are released.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError, disk_error
from gemma_scope_jax.model.checkpoints.huggingface_config import (
    PADDED_VOCAB,
    TEXT_VOCAB,
    config_json,
    huggingface_config,
)
from gemma_scope_jax.model.checkpoints.shapes import LAYER, NAMES, TOP, ours, stored_shape
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.storage.atomic import write_folder
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.safetensors_files import (
    StreamedTensor,
    open_safetensors,
    write_safetensors,
)
from gemma_scope_jax.storage.strict_json import field, read_json

COMPARED = 4 << 20  # numbers of embedding and head compared at a time
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
FLOATS = {"F64", "F32", "F16", "BF16"}
# Tensors that do not change what the text model computes, and why.
HARMLESS = {
    r"(.+\.)?(vision_tower|multi_modal_projector)\..+": "images, which the text model never sees",
    r"(.+\.)?rotary_emb(_local)?\.inv_freq": "recomputed from config.json",
}
_HARMLESS = re.compile("|".join(HARMLESS))
_ADAPTER = re.compile(r".*(lora_|base_layer\.|modules_to_save\.).*")
SHARDS = r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
_SUPERSEDED = re.compile(SHARDS)


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder: names, shapes and dtypes of all tensors checked, no weight read."""

    path: str
    config: GemmaConfig
    prefix: str  # what precedes "layers.0..." in the tensors' names
    files: Mapping[str, str]  # tensor name -> path of the safetensors file that holds it
    head: str | None  # the tensor of the unembedding, if there is one


def open_huggingface(folder: str | os.PathLike) -> HuggingFaceFolder:
    """Open a folder with config.json and model.safetensors or model.safetensors.index.json.

    Checks every tensor's name, shape and dtype from the headers (and that an unembedding equals the
    embedding if config.json ties them). Raises `InputError`.
    """
    folder = os.fspath(folder)
    refuse_adapters(epath.Path(folder))
    config = huggingface_config(folder)
    files = _tensor_files(folder)
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in files), None)
    if prefix is None:
        raise InputError(f"{folder}: no tensor embed_tokens.weight; not a Gemma 3 language model")
    heads = [name for name in files if re.fullmatch(r"(.+\.)?lm_head\.weight", name)]
    opened = HuggingFaceFolder(folder, config, prefix, files, heads[0] if heads else None)
    _check_tensors(opened)
    return opened


def huggingface_leaf(
    file: HuggingFaceFolder, leaf: str, layer: int | None = None, rows: slice = slice(None)
) -> np.ndarray:
    """One layer of `leaf` in our layout without L, in the file's dtype (a strided view).

    `embed`, `head` and `final_norm` have no layer. Of `embed` and `head`, only the `rows` are read.
    float64 becomes float32.
    """
    name = _tensor_name(file, leaf, layer)
    with open_safetensors(file.files[name]) as opened:
        tensor = opened.get_slice(name)
        if leaf in ("embed", "head"):
            start, stop, _ = rows.indices(file.config.vocab)
            return _no_double(tensor[start:stop])
        return ours(file.config, leaf, _no_double(tensor[:]))


def _no_double(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float64:
        return x
    with np.errstate(over="ignore"):  # to infinity, which the loader refuses
        return x.astype(np.float32)


def save_huggingface(
    model: Model,
    folder: str | os.PathLike,
    more: Mapping[str, bytes] | None = None,
    superseded: re.Pattern[str] = _SUPERSEDED,
) -> None:
    """Write `model` as config.json and model.safetensors, which transformers 4 and 5 load.

    more        further files of the folder, by name
    superseded  names of files of a model saved there before that are removed: its shards

    The weights keep their dtype (norms are float32). The whole model passes through host memory.
    Raises `InputError` if the folder cannot be written, and leaves it unchanged then.
    """
    folder, params, config = expanded(folder), model.params, model.config
    tensors = {
        f"model.{NAMES[leaf][0]}.weight": StreamedTensor.whole(getattr(params, leaf))
        for leaf in ("embed", "final_norm")
    }
    if params.head is not None:
        tensors["lm_head.weight"] = StreamedTensor.whole(params.head)
    for leaf in LAYER:
        stacked, shape = np.asarray(getattr(params.blocks, leaf)), stored_shape(config, leaf)
        for layer in range(config.layers):
            name = f"model.layers.{layer}.{NAMES[leaf][0]}.weight"
            tensors[name] = StreamedTensor.whole(stacked[layer].reshape(shape[::-1]).T)

    text = json.dumps(config_json(config, model.dtype), indent=2).encode()
    writers: dict[str, Callable[[BinaryIO], Any]] = {
        "model.safetensors": lambda file: write_safetensors(file, tensors, {"format": "pt"}),
        "config.json": lambda file: file.write(text),
    }
    for name, data in (more or {}).items():
        writers[name] = functools.partial(_write, data=data)
    write_folder(folder, writers)
    try:
        for path in folder.iterdir():
            if superseded.fullmatch(path.name):
                path.unlink()
    except OSError as error:
        raise disk_error(folder, error) from error


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _tensor_name(file: HuggingFaceFolder, leaf: str, layer: int | None = None) -> str:
    if leaf == "head":
        return file.head or "lm_head.weight"
    within = "" if layer is None else f"layers.{layer}."
    return f"{file.prefix}{within}{NAMES[leaf][0]}.weight"


def _tensor_files(folder: str) -> dict[str, str]:
    """Tensor name -> path of its file: model.safetensors if it exists, else the index's shards.

    transformers uses the same order: it leaves an old index behind when it saves a single file. All
    tensors of a shard are included, whether the index lists them or not.
    """
    single = os.path.join(folder, "model.safetensors")
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(single):
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not os.path.isfile(index):
        raise InputError(f"{folder}: holds neither model.safetensors nor {index}{_instead(folder)}")
    weight_map = field(read_json(epath.Path(index)), "weight_map", dict, index)
    for name, file in weight_map.items():
        # the index is foreign data: it must not point outside its folder
        if not isinstance(file, str) or file != os.path.basename(file) or not file.isprintable():
            raise InputError(f"{index}: the file of tensor {name!r} is {str(file)[:60]!r}")
    found: dict[str, str] = {}
    for path in (os.path.join(folder, shard) for shard in dict.fromkeys(weight_map.values())):
        with open_safetensors(path) as file:
            for name in list(file.keys()):
                if name in found:
                    raise InputError(f"{folder}: {name} is both in {found[name]} and in {path}")
                found[name] = path
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(f"{folder}: tensor {name} is missing from {shard}; download it again")
    return found


def _instead(folder: str) -> str:
    """What a folder without usable weights holds, and what to do about it."""
    names = sorted(os.listdir(folder))
    if any(n.startswith("pytorch_model") and n.endswith((".bin", ".json")) for n in names):
        return (
            ", but pytorch_model.bin, which can run code when it is read; save it as safetensors "
            "(transformers: save_pretrained)"
        )
    others = [n for n in names if n.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth"))]
    if others and others[0].endswith(".gguf"):
        return f"; pass the file {others[0]} itself"
    return f", but {', '.join(others[:4])}" if others else "; download the folder again"


def refuse_adapters(folder: epath.Path) -> None:
    """Raise `InputError` if `folder` holds an adapter: transformers would apply it to the model."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise InputError(
                f"{folder}: holds an unmerged LoRA adapter ({name}); merge it into its base model "
                "(peft: merge_and_unload, then save_pretrained) and pass the saved folder"
            )


def _check_tensors(file: HuggingFaceFolder) -> None:
    """Check that every tensor exists with its shape and a float dtype, and that no other tensor
    might change what the model computes."""
    if adapted := next((name for name in file.files if _ADAPTER.fullmatch(name)), None):
        advice = "merge it (peft: merge_and_unload) and save the model again"
        raise InputError(f"{file.path}: {adapted} belongs to an unmerged adapter; {advice}")
    leaves = [(leaf, None) for leaf in TOP if leaf != "head" or not file.config.tied]
    leaves += [(leaf, layer) for layer in range(file.config.layers) for leaf in LAYER]
    wanted: dict[str, dict[str, str]] = {}  # path -> tensor name -> leaf
    known = {file.head}
    for leaf, layer in leaves:
        name = _tensor_name(file, leaf, layer)
        if name not in file.files:
            raise InputError(f"{file.path}: tensor {name} is missing; download the folder again")
        wanted.setdefault(file.files[name], {})[name] = leaf
        known.add(name)
    layers = file.config.layers
    if (extra := _tensor_name(file, "w_q", layers)) in file.files:
        raise InputError(f"{file.path}: {extra} is beyond config.json's {layers} layers")
    for name in file.files:
        if name not in known and not _HARMLESS.fullmatch(name):
            unknown = "is not one of Gemma 3's and may change what it computes"
            raise InputError(
                f"{file.path}: tensor {name} {unknown}; save the folder without it if it does not"
            )
    for path, names in wanted.items():
        with open_safetensors(path) as opened:
            for name, leaf in names.items():
                _check_tensor(path, name, leaf, file.config, opened.get_slice(name))
    if file.head is not None and file.config.tied:
        _check_head(file)


def _check_tensor(path: str, name: str, leaf: str, config: GemmaConfig, tensor: Any) -> None:
    shape, expected = tuple(tensor.get_shape()), stored_shape(config, leaf)
    if leaf in ("embed", "head") and expected[0] == TEXT_VOCAB and shape[:1] == (PADDED_VOCAB,):
        shape = (TEXT_VOCAB, *shape[1:])
    if shape != expected:
        raise InputError(f"{path}: {name} is {shape}, but config.json makes it {expected}")
    if tensor.get_dtype() not in FLOATS:
        advice = "load an unquantised folder or a .gguf file"
        raise InputError(f"{path}: {name} is {tensor.get_dtype()}; {advice}")


def _check_head(file: HuggingFaceFolder) -> None:
    """A head that config.json ties to the embedding must equal it."""
    embed, head = _tensor_name(file, "embed"), _tensor_name(file, "head")
    with open_safetensors(file.files[embed]) as one, open_safetensors(file.files[head]) as other:
        ours, theirs = one.get_slice(embed), other.get_slice(head)
        rows, width = ours.get_shape()
        step = max(1, COMPARED // width)
        parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        alike = list(theirs.get_shape()) == [rows, width] and theirs.get_dtype() in FLOATS
        if alike and all(np.array_equal(_bits(ours[i]), _bits(theirs[i])) for i in parts):
            return
    raise InputError(
        f"{file.path}: {head} is not the embedding, but config.json ties the two; set "
        "tie_word_embeddings to false if the model unembeds with it, or save without it"
    )


def _bits(x: np.ndarray) -> np.ndarray:
    """For comparing: a NaN equals itself, and is refused when it is read."""
    return _no_double(x).astype(np.float32).view(np.uint32)
