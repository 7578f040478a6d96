"""Gemma 3 out of a GGUF file: its architecture, and its weights in our layout.

Every key under gemma3. and every tensor is used, known not to matter, or refused by name: skipping
one could mean running a different model than the file describes.

Source: the tensor names and conventions of llama.cpp's Gemma 3 converter and graph.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import GGUFFile
from gemma_scope_jax.model.checkpoints.huggingface_config import PADDED_VOCAB, TEXT_VOCAB
from gemma_scope_jax.model.checkpoints.shapes import LAYER, NAMES, TOP, ours, positive, stored_shape
from gemma_scope_jax.model.config import PRESETS, GemmaConfig

UNUSED_TOKEN = 5  # the type of a padding token
IMAGE = "<image_soft_token>"  # beyond the text model's vocabulary

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
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
    "global_every": "attention.sliding_window_pattern",
}
# Ollama's names for some of them.
_ALSO = {"rope.global.freq_base": "global_rope_base", "rope.local.freq_base": "local_rope_base"}
_ROPE_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
# Keys of gemma3. that must equal a field of the config.
_HEAD_DIM = ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa")
_HEAD_DIM += ("rope.dimension_count", "rope.dimension_count_swa")
_EQUAL = dict.fromkeys(_HEAD_DIM, "head_dim") | {"attention.scale": "query_scale"}
# Keys that do not change what the text model computes, and why. Those outside gemma3. describe the
# file, its author and the tokenizer, which `tokenizer_files` reads.
HARMLESS_KEYS = {
    r"context_length": "only the length of the training texts",
    r"vocab_size": "the embedding has as many rows",
    r"rope\.scaling\.(original_context_length|finetuned)": "not used by linear scaling",
    r"(vision|mm)\..+": "images, which the text model never sees",
}
_HARMLESS_KEY = re.compile("|".join(HARMLESS_KEYS))
_HARMLESS_TENSOR = re.compile(r"(v|mm)\..+")  # images, too


def _positive(file: GGUFFile, key: str, kind: type) -> Any:
    """The positive number under gemma3.`key`, or None if the file has none."""
    value = file.metadata.get(f"gemma3.{key}")
    return None if value is None else positive(value, kind, f"{file.path}: gemma3.{key}")


def gguf_config(file: GGUFFile) -> GemmaConfig:
    """The architecture a file describes: the preset for a published size, else built from the file.

    The vocabulary is the embedding's rows, without those that pad the multimodal models' 262,208.
    Raises `InputError` for another architecture, an adapter, missing keys, keys and tensors that
    may change what the model computes, or a published size whose other numbers (window, RoPE, ...)
    contradict its preset.
    """
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind != "gemma3":
        raise InputError(f"{file.path}: holds a {kind!r:.40} model, not Gemma 3 ('gemma3')")
    what = file.metadata.get("general.type", "model")
    if what != "model" or any(key.startswith("adapter.") for key in file.metadata):
        raise InputError(
            f"{file.path}: holds an adapter or other part ({what!r:.40}), not a model; merge it "
            "into its base model (llama-export-lora) and pass that file"
        )
    sizes = {field: _positive(file, key, int) for field, key in _SIZES.items()}
    missing = [f"gemma3.{_SIZES[field]}" for field, value in sizes.items() if value is None]
    vocab = file.info("token_embd.weight").shape[0]
    if missing or sizes["heads"] % sizes["kv_heads"] or sizes["layers"] > len(file.tensors):
        raise InputError(f"{file.path}: metadata missing or contradictory: {missing or sizes}")
    options = _options(file)
    known = [c for c in PRESETS.values() if all(getattr(c, k) == v for k, v in sizes.items())]
    if known:
        config = known[0]
        for field, value in options.items():
            if value != (wanted := getattr(config, field)):
                key = _OPTIONS.get(field, _ROPE_FACTORS[0])
                published = f"{config.name} has {wanted}"
                raise InputError(f"{file.path}: gemma3.{key} is {value}, but {published}")
    else:
        options.setdefault("window", 1024)
        name = file.metadata.get("general.name")
        config = GemmaConfig(
            name=name if isinstance(name, str) else "gemma3",
            query_scale=sizes["head_dim"] ** -0.5,
            context=_positive(file, "context_length", int) or GemmaConfig.context,
            **sizes,
            **options,
        )
    if vocab == PADDED_VOCAB and named_tokens(file.metadata) <= TEXT_VOCAB:
        vocab = TEXT_VOCAB
    head = "output.weight"  # some files repeat the embedding there
    tied = head not in file.tensors or file.same_bytes(head, "token_embd.weight")
    config = dataclasses.replace(config, vocab=vocab, tied=tied)
    _check_keys(file, config)
    _check_tensors(file, config)
    return config


def _options(file: GGUFFile) -> dict[str, Any]:
    """What the file states beside the sizes, by our fields."""
    options: dict[str, Any] = {}
    for key, field in [*((key, field) for field, key in _OPTIONS.items()), *_ALSO.items()]:
        integer = field in ("window", "global_every")
        value = _positive(file, key, int if integer else float)
        if value is None:
            continue
        value = value if integer else _rounded(value)
        if options.setdefault(field, value) != value:
            raise InputError(f"{file.path}: gemma3.{key} is {value}, elsewhere {options[field]}")
    kind = file.metadata.get("gemma3.rope.scaling.type", "linear")  # llama.cpp's default
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise InputError(f"{file.path}: gemma3.rope.scaling.type {kind!r:.40} is not supported")
    factors = [_positive(file, key, float) for key in _ROPE_FACTORS]
    said = {_rounded(value) for value in factors if value is not None}
    if len(said) > 1:
        raise InputError(f"{file.path}: RoPE has several scaling factors: {sorted(said)}")
    if said or kind == "none":
        options["global_rope_divisor"] = 1.0 if kind == "none" else said.pop()
    return options


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # float32 metadata: 1e-6 is stored as 9.99999997e-07


def _check_keys(file: GGUFFile, config: GemmaConfig) -> None:
    read = {*_SIZES.values(), *_OPTIONS.values(), *_ALSO, *_ROPE_FACTORS, "rope.scaling.type"}
    for full, value in file.metadata.items():
        key = full.removeprefix("gemma3.")
        if key == full or key in read or _HARMLESS_KEY.fullmatch(key):
            continue
        if key in _EQUAL:
            wanted = _rounded(getattr(config, _EQUAL[key]))
            if not isinstance(value, (int, float)) or _rounded(value) != wanted:
                only = f"only {wanted} is supported"
                raise InputError(f"{file.path}: {full} is {value!r:.40}, {only}")
        elif key != "attention.causal" or value is not True:
            unknown = "is not known to Gemma 3 and may change what it computes"
            raise InputError(f"{file.path}: {full} = {value!r:.40} {unknown}")


def _check_tensors(file: GGUFFile, config: GemmaConfig) -> None:
    """Refuse tensors of unknown effect: biases, LoRA, RoPE factors, ..."""
    known = {_tensor_name(leaf, None) for leaf in TOP}
    known |= {_tensor_name(leaf, i) for i in range(config.layers) for leaf in LAYER}
    for name in file.tensors:
        if name not in known and not _HARMLESS_TENSOR.fullmatch(name):
            raise InputError(
                f"{file.path}: tensor {name} is not one of Gemma 3's ({config.layers} layers) and "
                "may change what it computes"
            )


def named_tokens(metadata: dict[str, Any]) -> int:
    """The number of real tokens: without padding and the placeholder for images."""
    tokens, types = (metadata.get(f"tokenizer.ggml.{x}") for x in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, np.ndarray):
        return 0
    n = min(len(tokens), len(types))
    while n and (types[n - 1] == UNUSED_TOKEN or tokens[n - 1] == IMAGE):
        n -= 1
    return n


def _tensor_name(leaf: str, layer: int | None) -> str:
    within = "" if layer is None else f"blk.{layer}."
    return f"{within}{NAMES[leaf][1]}.weight"


def gguf_leaf(
    file: GGUFFile, config: GemmaConfig, leaf: str, layer: int | None, rows: slice = slice(None)
) -> np.ndarray:
    """One weight as `Block` or `Params` names it, float32, in our layout without the layer axis.

    Matrices are transposed views ([in, out], heads split). The converter added 1 to the norms,
    which we store as w with gain 1 + w. `embed` and `head` have as many rows as the vocabulary; the
    rest is padding. Raises `InputError` for a tensor that is missing, of another shape, of an
    unsupported quantisation, or not finite.
    """
    name, wanted = _tensor_name(leaf, layer), stored_shape(config, leaf)
    table = leaf in ("embed", "head")
    found = file.info(name).shape
    padded = table and len(found) == 2 and found[0] >= wanted[0] and found[1] == wanted[1]
    if found != wanted and not padded:
        needs = f"{config.name} needs {list(wanted)}"
        raise InputError(f"{file.path}: {name} has shape {list(found)}, {needs}")
    if table:
        return file.read(name, slice(*rows.indices(config.vocab)))
    x = file.read(name)
    return ours(config, leaf, x - np.float32(1) if leaf.endswith("norm") else x)
