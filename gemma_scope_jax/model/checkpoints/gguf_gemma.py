"""Gemma 3 out of a GGUF file: its architecture, and its weights in our layout.

Every key under gemma3. and every tensor is used, known not to matter, or refused by name: what is
skipped is a model that computes something else than the file says.

Source: the tensor names and conventions of llama.cpp's Gemma 3 converter and graph.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.gguf import GGUFFile
from gemma_scope_jax.model.checkpoints.huggingface_config import PADDED_VOCAB, TEXT_VOCAB
from gemma_scope_jax.model.config import PRESETS, GemmaConfig

UNUSED_TOKEN = 5  # the type of a token that pads
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
# Ollama's names of some of them.
_ALSO = {"rope.global.freq_base": "global_rope_base", "rope.local.freq_base": "local_rope_base"}
_ROPE_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
# Keys of gemma3 that must say what Gemma 3 does anyway, and the field that tells it.
_EQUAL = {
    "attention.value_length": "head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.value_length_swa": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.dimension_count_swa": "head_dim",
    "attention.scale": "query_scale",
}
# Keys that the text model's function does not depend on, and why. Those outside of gemma3. tell of
# the file, its author and the tokenizer, which `tokenizer_files` reads.
HARMLESS_KEYS = {
    r"context_length": "no more than what it was trained on",
    r"vocab_size": "the embedding's rows tell it",
    r"rope\.scaling\.(original_context_length|finetuned)": "not used by linear scaling",
    r"(vision|mm)\..+": "images, which the text model never sees",
}
# The same for tensors.
HARMLESS_TENSORS = {r"(v|mm)\..+": "images, which the text model never sees"}
_HARMLESS_KEY = re.compile("|".join(HARMLESS_KEYS))
_HARMLESS_TENSOR = re.compile("|".join(HARMLESS_TENSORS))


def _positive(file: GGUFFile, key: str, kind: type) -> Any:
    """The positive number under gemma3.`key`, or None where the file has none."""
    value = file.metadata.get(f"gemma3.{key}")
    if value is None:
        return None
    allowed = (int,) if kind is int else (int, float)
    least, most = (1, 2**31 - 1) if kind is int else (1e-20, 1e20)
    if isinstance(value, bool) or not isinstance(value, allowed) or not least <= value <= most:
        raise InputError(
            f"{file.path}: gemma3.{key} is {value!r:.40}, not a positive {kind.__name__}"
        )
    return kind(value)


def gguf_config(file: GGUFFile) -> GemmaConfig:
    """The architecture a file describes: the preset for a published size, else built as told.

    The vocabulary is the embedding's rows, but for those that pad the multimodal models' 262,208.
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
    embed = file._info("token_embd.weight").shape
    if missing or sizes["heads"] % sizes["kv_heads"] or sizes["layers"] > len(file.tensors):
        raise InputError(f"{file.path}: metadata missing or contradictory: {missing or sizes}")
    options = _options(file)
    known = [c for c in PRESETS.values() if all(getattr(c, k) == v for k, v in sizes.items())]
    if known:
        for field, value in options.items():
            if value != getattr(known[0], field):
                raise InputError(
                    f"{file.path}: gemma3.{_OPTIONS.get(field, _ROPE_FACTORS[0])} is {value}, but "
                    f"{known[0].name} has {getattr(known[0], field)}"
                )
        config = known[0]
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
    vocab = embed[0]
    if vocab == PADDED_VOCAB and _named_tokens(file) <= TEXT_VOCAB:
        vocab = TEXT_VOCAB
    config = dataclasses.replace(config, vocab=vocab, tied=not _has_head(file))
    _check_keys(file, config)
    _check_tensors(file, config)
    return config


def _options(file: GGUFFile) -> dict[str, Any]:
    """What the file says beside the sizes, by our fields."""
    options: dict[str, Any] = {}
    spelled = [*((key, field) for field, key in _OPTIONS.items()), *_ALSO.items()]
    for key, field in spelled:
        integer = field in ("window", "global_every")
        value = _positive(file, key, int if integer else float)
        if value is None:
            continue
        value = value if integer else _rounded(value)
        if options.setdefault(field, value) != value:
            raise InputError(f"{file.path}: gemma3.{key} is {value}, elsewhere {options[field]}")
    kind = file.metadata.get("gemma3.rope.scaling.type", "linear")  # as llama.cpp takes it
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise InputError(f"{file.path}: gemma3.rope.scaling.type {kind!r:.40} is not supported")
    factors = [_positive(file, key, float) for key in _ROPE_FACTORS]
    said = {_rounded(value) for value in factors if value is not None}
    if len(said) > 1:
        raise InputError(f"{file.path}: RoPE is scaled by {sorted(said)} at once")
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
            if isinstance(value, (int, float)) and _rounded(value) == wanted:
                continue
            raise InputError(f"{file.path}: {full} is {value!r:.40}, only {wanted} is supported")
        if key == "attention.causal" and value is True:
            continue
        raise InputError(
            f"{file.path}: {full} = {value!r:.40} is not known to Gemma 3 and may change what it "
            "computes"
        )


def _check_tensors(file: GGUFFile, config: GemmaConfig) -> None:
    """Refuse tensors of which none knows what they do: biases, LoRA, RoPE factors, ..."""
    stems = [stem for leaf, stem in _LEAVES.items() if leaf not in _TOP]
    known = {f"blk.{i}.{stem}.weight" for i in range(config.layers) for stem in stems}
    known |= {f"{_LEAVES[leaf]}.weight" for leaf in _TOP}
    for name in file.tensors:
        if name not in known and not _HARMLESS_TENSOR.fullmatch(name):
            raise InputError(
                f"{file.path}: tensor {name} is none of Gemma 3's {config.layers} layers and may "
                "change what it computes"
            )


def _has_head(file: GGUFFile) -> bool:
    """Whether the file unembeds with another matrix than its embedding."""
    return "output.weight" in file.tensors and not file.same_bytes(
        "output.weight", "token_embd.weight"
    )


def _named_tokens(file: GGUFFile) -> int:
    """How many of the tokens stand for something: without padding and the images' placeholder."""
    tokens, types = (file.metadata.get(f"tokenizer.ggml.{x}") for x in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, np.ndarray):
        return 0
    n = min(len(tokens), len(types))
    while n and (types[n - 1] == UNUSED_TOKEN or tokens[n - 1] == IMAGE):
        n -= 1
    return n


_TOP = ("embed", "head", "final_norm")
_LEAVES = {
    "embed": "token_embd",
    "head": "output",
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


def gguf_leaf(
    file: GGUFFile, config: GemmaConfig, leaf: str, layer: int | None, rows: slice = slice(None)
) -> np.ndarray:
    """One weight as `Block` or `Params` names it, float32, in our layout without the layer axis.

    Matrices are transposed views ([in, out], heads split). The converter added 1 to the norms,
    which we store as w with gain 1 + w. Of `embed` and `head` come as many rows as the vocabulary
    has; the rest pads the multimodal models'. Raises `InputError` for a tensor that is missing, of
    another shape, of an unsupported quantisation, or not finite.
    """
    c = config
    D, N, K, H, M = c.d_model, c.heads, c.kv_heads, c.head_dim, c.d_mlp
    stem = _LEAVES[leaf]
    name = f"{stem}.weight" if layer is None else f"blk.{layer}.{stem}.weight"
    wanted = {
        "embed": (c.vocab, D),
        "head": (c.vocab, D),
        "w_q": (N * H, D),
        "w_k": (K * H, D),
        "w_v": (K * H, D),
        "w_o": (D, N * H),
        "w_gate": (M, D),
        "w_up": (M, D),
        "w_down": (D, M),
        "q_norm": (H,),
        "k_norm": (H,),
    }.get(leaf, (D,))
    found = file._info(name).shape
    padded = leaf in ("embed", "head") and len(found) == 2 and found[0] >= c.vocab and found[1] == D
    if found != wanted and not padded:
        raise InputError(
            f"{file.path}: {name} has shape {list(found)}, {c.name} needs {list(wanted)}"
        )
    if leaf in ("embed", "head"):
        return file.read_rows(name, *rows.indices(c.vocab)[:2])
    x = file.read(name)
    if leaf.endswith("norm"):
        return x - np.float32(1)
    if leaf in ("w_q", "w_k", "w_v"):
        return x.T.reshape(D, -1, H)
    return x.T.reshape(N, H, D) if leaf == "w_o" else x.T
