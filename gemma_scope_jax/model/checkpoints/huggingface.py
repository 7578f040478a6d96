"""Gemma 3 as a Hugging Face folder: config.json and safetensors, one file or many.

Works for the text-only repositories (270m, 1b), for the multimodal ones (4b and up: the vision
tower and the projector are left on disk) and for what transformers 4 and 5 save. A file is opened
for each tensor anew, so that its mapped pages are let go again.

Source: `Gemma3TextConfig` of transformers 4.57 and 5, and the google/gemma-3-* repositories.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.safetensors_file import open_safetensors
from gemma_scope_jax.model.config import PRESETS, GemmaConfig, Model, abstract_params

TEXT_VOCAB = 262_144  # the multimodal repositories pad it to 262,208
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
NAMES = {
    "pre_attn_norm": "input_layernorm",
    "w_q": "self_attn.q_proj",
    "w_k": "self_attn.k_proj",
    "w_v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "w_o": "self_attn.o_proj",
    "post_attn_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
    "post_mlp_norm": "post_feedforward_layernorm",
}
FLOATS = {"F32", "F16", "BF16"}
# What Gemma3TextConfig assumes for keys that config.json leaves out.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256.0,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
# Variants of the architecture that the forward pass does not have, by the value that means "off".
FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder: names, shapes and dtypes of all tensors checked, no weight read."""

    path: str
    config: GemmaConfig
    prefix: str  # what precedes "layers.0..." in the tensors' names
    files: Mapping[str, str]  # tensor name -> path of the safetensors file that holds it


def open_huggingface(folder: str | os.PathLike) -> HuggingFaceFolder:
    """Open a folder with config.json and model.safetensors or model.safetensors.index.json.

    Checks every tensor's name, shape and dtype from the headers alone. Raises `InputError`.
    """
    folder = os.fspath(folder)
    config = huggingface_config(folder)
    files = _tensor_files(folder)
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in files), None)
    if prefix is None:
        raise InputError(f"{folder}: no tensor embed_tokens.weight; not a Gemma 3 language model")
    opened = HuggingFaceFolder(folder, config, prefix, files)
    _check_tensors(opened)
    return opened


def huggingface_leaf(
    file: HuggingFaceFolder, leaf: str, layer: int | None = None, rows: slice = slice(None)
) -> np.ndarray:
    """One layer of `leaf` in our layout without L, in the file's dtype (a strided view).

    `embed` and `final_norm` have no layer; `rows` selects rows of `embed`, and only these are read.
    """
    name = _tensor_name(file.prefix, leaf, layer)
    with open_safetensors(file.files[name]) as opened:
        tensor = opened.get_slice(name)
        if leaf == "embed":
            start, stop, _ = rows.indices(file.config.vocab)
            return tensor[start:stop]
        return tensor[:].T.reshape(_our_shape(file.config, leaf))


def huggingface_config(folder: str | os.PathLike) -> GemmaConfig:
    """The architecture that `folder`/config.json describes; the name is the preset's if it is one.

    Reads flat (text-only) and nested (`text_config`) files of transformers 4 and 5. A vocabulary
    padded beyond 262,144 is cut there. Raises `InputError` for anything but a Gemma 3.
    """
    where = os.path.join(os.fspath(folder), "config.json")
    raw = _read_json(where)
    if raw.get("model_type") not in ("gemma3", "gemma3_text"):
        raise InputError(
            f"{where}: model_type is {raw.get('model_type')!r}; only Gemma 3 (gemma3, gemma3_text) "
            "can be loaded"
        )
    text = raw.get("text_config", {}) if raw["model_type"] == "gemma3" else raw
    if not isinstance(text, dict):
        raise InputError(f"{where}: text_config is not an object")
    for key, only in FIXED.items():
        for holder in (text, raw):
            # False, null and a missing key all mean "off"; everything else must be the known value.
            if (holder.get(key, only) or None) != (only or None):
                raise InputError(f"{where}: {key} = {str(holder[key])[:60]} is not supported")

    def number(key: str) -> Any:
        return _positive(text, key, DEFAULTS[key], where)

    global_base, local_base, divisor = _rope(text, where)
    config = GemmaConfig(
        name=os.path.basename(os.path.abspath(folder)),
        layers=number("num_hidden_layers"),
        d_model=number("hidden_size"),
        d_mlp=number("intermediate_size"),
        heads=number("num_attention_heads"),
        kv_heads=number("num_key_value_heads"),
        head_dim=number("head_dim"),
        window=number("sliding_window"),
        query_scale=number("query_pre_attn_scalar") ** -0.5,
        global_rope_divisor=divisor,
        vocab=min(number("vocab_size"), TEXT_VOCAB),
        context=number("max_position_embeddings"),
        local_rope_base=local_base,
        global_rope_base=global_base,
        global_every=_global_every(text, number("num_hidden_layers"), where),
        norm_epsilon=number("rms_norm_eps"),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise InputError(
            f"{where}: {config.heads} query heads over {config.kv_heads} key/value heads of "
            f"{config.head_dim} dimensions do not divide"
        )
    for known in PRESETS.values():
        if dataclasses.replace(config, name=known.name, context=known.context) == known:
            return dataclasses.replace(config, name=known.name)
    return config


def save_huggingface(model: Model, folder: str | os.PathLike) -> None:
    """Write `model` as config.json and model.safetensors, which transformers 4 and 5 load.

    The weights keep their dtype (norms are float32). All of the model passes through host memory.
    """
    from safetensors.numpy import save_file

    folder, config = os.fspath(folder), model.config
    os.makedirs(folder, exist_ok=True)
    tensors = {
        "model.embed_tokens.weight": np.asarray(model.params.embed),
        "model.norm.weight": np.asarray(model.params.final_norm),
    }
    for leaf in NAMES:
        stacked = np.asarray(getattr(model.params.blocks, leaf))
        shape = _file_shape(config, leaf)
        for layer in range(config.layers):
            tensor = stacked[layer].reshape(shape[::-1]).T
            tensors[_tensor_name("model.", leaf, layer)] = np.ascontiguousarray(tensor)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(_config_json(config, model.dtype), file, indent=2)


def _tensor_name(prefix: str, leaf: str, layer: int | None) -> str:
    if leaf in ("embed", "final_norm"):
        return prefix + {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}[leaf]
    return f"{prefix}layers.{layer}.{NAMES[leaf]}.weight"


def _our_shape(config: GemmaConfig, leaf: str) -> tuple[int, ...]:
    shapes = abstract_params(config)
    if leaf in ("embed", "final_norm"):
        return getattr(shapes, leaf).shape
    return getattr(shapes.blocks, leaf).shape[1:]


def _file_shape(config: GemmaConfig, leaf: str) -> tuple[int, ...]:
    """The shape in the file: norms as ours, matrices (out, in): ours is `.T.reshape(ours)`."""
    shape = _our_shape(config, leaf)
    if leaf == "w_o":
        return shape[-1], math.prod(shape[:-1])
    if len(shape) > 1 and leaf != "embed":
        return math.prod(shape[1:]), shape[0]
    return shape


def _tensor_files(folder: str) -> dict[str, str]:
    """Tensor name -> path of its file, from the index if there is one, else from the one file."""
    single = os.path.join(folder, "model.safetensors")
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.isfile(index):
        if not os.path.isfile(single):
            raise InputError(f"{folder}: holds neither model.safetensors nor {index}")
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        # The index is foreign data: it may not point out of its folder.
        if not isinstance(file, str) or file != os.path.basename(file) or not file.isprintable():
            raise InputError(f"{index}: the file of tensor {name!r} is {str(file)[:60]!r}")
    return {name: os.path.join(folder, file) for name, file in weight_map.items()}


def _check_tensors(file: HuggingFaceFolder) -> None:
    """Every tensor that the config asks for is there, with its shape and a float dtype."""
    wanted: dict[str, dict[str, str]] = {}  # path -> tensor name -> leaf
    leaves = [("embed", None), ("final_norm", None)]
    layered = ((leaf, layer) for layer in range(file.config.layers) for leaf in NAMES)
    for leaf, layer in itertools.chain(leaves, layered):
        name = _tensor_name(file.prefix, leaf, layer)
        if name not in file.files:
            raise InputError(f"{file.path}: tensor {name} is missing; download the folder again")
        wanted.setdefault(file.files[name], {})[name] = leaf
    extra = _tensor_name(file.prefix, "w_q", file.config.layers)
    if extra in file.files:
        raise InputError(
            f"{file.path}: {extra} is beyond config.json's {file.config.layers} layers"
        )
    for path, names in wanted.items():
        with open_safetensors(path) as opened:
            held = set(opened.keys())
            for name, leaf in names.items():
                if name not in held:
                    raise InputError(f"{path}: tensor {name} is missing; download it again")
                tensor = opened.get_slice(name)
                _check_tensor(path, name, leaf, file.config, tensor)


def _check_tensor(path: str, name: str, leaf: str, config: GemmaConfig, tensor: Any) -> None:
    shape, expected = tuple(tensor.get_shape()), _file_shape(config, leaf)
    if leaf == "embed" and config.vocab == TEXT_VOCAB and len(shape) == 2:
        shape = (min(shape[0], TEXT_VOCAB), shape[1])
    if shape != expected:
        raise InputError(f"{path}: {name} is {shape}, but config.json makes it {expected}")
    if tensor.get_dtype() not in FLOATS:
        raise InputError(
            f"{path}: {name} is {tensor.get_dtype()}; load an unquantised folder or a .gguf file"
        )


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; not a complete Hugging Face folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def _positive(mapping: dict[str, Any], key: str, default: Any, where: str) -> Any:
    """A positive number of the default's type; a missing key or null means the default."""
    value = default if mapping.get(key) is None else mapping[key]
    number = isinstance(value, (int, type(default))) and not isinstance(value, bool)
    if not number or not 0 < value < 2**40:
        raise InputError(f"{where}: {key} is {str(value)[:60]!r}, not a positive number")
    return type(default)(value)


def _rope(text: dict[str, Any], where: str) -> tuple[float, float, float]:
    """(global base, local base, global divisor) from either generation of keys.

    transformers 4: rope_theta, rope_local_base_freq, rope_scaling (of the global layers only);
    transformers 5: rope_parameters with one entry for each kind of layer.
    """
    keys = ("rope_theta", "rope_local_base_freq")
    bases = [_positive(text, key, DEFAULTS[key], where) for key in keys]
    scaling = [text.get("rope_scaling") or {}, {}]
    parameters = text.get("rope_parameters") or {}
    if isinstance(parameters, dict) and {"full_attention", "sliding_attention"} & set(parameters):
        kinds = ("full_attention", "sliding_attention")
        scaling = [parameters.get(kind) or {} for kind in kinds]
    elif parameters:
        scaling[0] = parameters
    divisors = []
    for i, entry in enumerate(scaling):
        if not isinstance(entry, dict):
            raise InputError(f"{where}: RoPE parameters are {str(entry)[:60]!r}, not an object")
        kind = entry.get("rope_type", entry.get("type")) or "default"
        if kind not in ("default", "linear"):
            raise InputError(f"{where}: RoPE scaling of type {str(kind)[:60]!r} is not supported")
        bases[i] = _positive(entry, "rope_theta", bases[i], where)
        divisors.append(_positive(entry, "factor", 1.0, where) if kind == "linear" else 1.0)
    if divisors[1] != 1.0:
        raise InputError(f"{where}: RoPE scaling of the local layers is not supported")
    return bases[0], bases[1], divisors[0]


def _global_every(text: dict[str, Any], layers: int, where: str) -> int:
    """The period of the global layers: from the pattern's key, or from layer_types."""
    key = "sliding_window_pattern"
    usual = {key: text.get(key) or text.get(f"_{key}")}
    period = _positive(usual, key, DEFAULTS[key], where)
    types = text.get("layer_types")
    if types is None:
        return period
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{where}: layer_types is not a list of {layers} kinds")
    kinds = ("sliding_attention", "full_attention")
    first = types.index(kinds[1]) if kinds[1] in types else layers
    for every in (period, first + 1):
        if types == [kinds[(i + 1) % every == 0] for i in range(layers)]:
            return every
    raise InputError(f"{where}: layer_types is not a repeated 'sliding..., full_attention' pattern")


def _config_json(config: GemmaConfig, dtype: Any) -> dict[str, Any]:
    """config.json as transformers 4.57 writes it; version 5 converts it on loading."""
    scalar = config.query_scale**-2
    if round(scalar) ** -0.5 == config.query_scale:
        scalar = round(scalar)  # the files hold an integer
    divisor = config.global_rope_divisor
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": str(dtype),
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "sliding_window": config.window,
        "sliding_window_pattern": config.global_every,
        "layer_types": [kinds[config.is_global(i)] for i in range(config.layers)],
        "rms_norm_eps": config.norm_epsilon,
        "query_pre_attn_scalar": scalar,
        "rope_theta": config.global_rope_base,
        "rope_local_base_freq": config.local_rope_base,
        "rope_scaling": None if divisor == 1.0 else {"rope_type": "linear", "factor": divisor},
        **{key: value for key, value in FIXED.items() if key != "quantization_config"},
    }
