"""config.json of a Gemma 3: every key is used, known not to change the model, or refused by name.

Skipping a key could mean running a different model than the file describes, so there is no third
kind. If one fact is stated twice (transformers 4's keys beside 5's, top level beside
`text_config`), both must agree.

Source: `Gemma3TextConfig` of transformers 4.57 and 5, and the google/gemma-3-* repositories.
"""

import contextlib
import dataclasses
import json
import os
import re
from typing import Any

from etils import epath
from jax.typing import DTypeLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.shapes import positive
from gemma_scope_jax.model.config import PRESETS, GemmaConfig
from gemma_scope_jax.storage.strict_json import (
    field,
    parse_json,
    read_bytes,
    read_json,
    read_object,
)

TOKENS = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")  # may add some
TEXT_VOCAB = 262_144
PADDED_VOCAB = 262_208  # in the multimodal repositories: a placeholder for images, then padding
# Our field for each number of config.json, and Gemma3TextConfig's default for a missing key.
FIELDS = {
    "vocab_size": ("vocab", PADDED_VOCAB),
    "hidden_size": ("d_model", 2304),
    "intermediate_size": ("d_mlp", 9216),
    "num_hidden_layers": ("layers", 26),
    "num_attention_heads": ("heads", 8),
    "num_key_value_heads": ("kv_heads", 4),
    "head_dim": ("head_dim", 256),
    "max_position_embeddings": ("context", 131_072),
    "sliding_window": ("window", 4096),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
}
DEFAULTS = {key: default for key, (_, default) in FIELDS.items()} | {
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256.0,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
MOST_LAYERS = 10_000
# Variants of the architecture that the forward pass lacks, with the value that means "off".
FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
# The same for keys that older or other libraries write; null means not stated.
FIXED_IF_SAID = {
    "hidden_act": "gelu_pytorch_tanh",
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
TIED = "tie_word_embeddings"
READ = {"rope_scaling", "rope_parameters", "layer_types", "_sliding_window_pattern", TIED}
# Keys that do not change what the text model computes, by reason.
HARMLESS = {
    "images, which the text model never sees": (
        "vision_config", "mm_tokens_per_image", "image_token_id", "image_token_index",
        "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index",
    ),
    "only in training": (
        "attention_dropout", "initializer_range", "use_cache", "gradient_checkpointing",
        "problem_type", "id2label", "label2id", "num_labels", "finetuning_task",
        "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
    ),
    "stated by the tokenizer": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "tokenizer_class", "decoder_start_token_id", "prefix",
    ),
    "defaults of generation": (
        "cache_implementation", "max_length", "min_length", "do_sample", "early_stopping",
        "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
        "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id",
        "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values",
        "exponential_decay_length_penalty",
    ),
    "how the file or its weights were written, and what a call returns": (
        "model_type", "architectures", "dtype", "torch_dtype", "transformers_version",
        "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
        "attn_implementation", "chunk_size_feed_forward", "return_dict", "output_attentions",
        "output_hidden_states", "torchscript", "use_bfloat16", "is_decoder", "unsloth_fixed",
        "unsloth_version", "transformers.js_config", "model_name", "processor_class",
        "ignore_index", "model_max_length",
    ),
}  # fmt: skip
KINDS = ("sliding_attention", "full_attention")  # of layers
_KNOWN = {*DEFAULTS, *FIXED, *FIXED_IF_SAID, *READ, *(k for ks in HARMLESS.values() for k in ks)}


def huggingface_config(folder: str | os.PathLike) -> GemmaConfig:
    """The architecture in `folder`/config.json, with the name of the preset if it is one.

    Reads flat (text-only) and nested (`text_config`) files of transformers 4 and 5. The 64 rows
    that pad the multimodal repositories' vocabulary of 262,208 are cut, unless the folder's
    tokenizer has tokens of its own there; any other vocabulary is kept. Raises `InputError` for
    anything but a Gemma 3, and for keys that might change what it computes.
    """
    path = epath.Path(folder)
    where = str(path / "config.json")
    raw = read_object(path / "config.json")
    kind = raw.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        known = "only Gemma 3 (gemma3, gemma3_text) can be loaded"
        raise InputError(f"{where}: model_type is {kind!r:.60}; {known}")
    text = raw if kind == "gemma3_text" else field(raw, "text_config", dict, where, default={})
    _check_keys(raw, text, where)
    numbers = {name: _number(text, key, where) for key, (name, _) in FIELDS.items()}
    if numbers["vocab"] == PADDED_VOCAB and not _has_tokens_beyond(path, TEXT_VOCAB):
        numbers["vocab"] = TEXT_VOCAB
    global_base, local_base, divisor = _rope(text, where)
    config = GemmaConfig(
        name=os.path.basename(os.path.abspath(folder)),
        query_scale=_number(text, "query_pre_attn_scalar", where) ** -0.5,
        global_rope_divisor=divisor,
        local_rope_base=local_base,
        global_rope_base=global_base,
        global_every=_global_every(text, numbers["layers"], where),
        tied=all(field(holder, TIED, bool, where, default=True) for holder in (raw, text)),
        **numbers,
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        heads = f"{config.heads} query heads over {config.kv_heads} key/value heads"
        raise InputError(f"{where}: {heads} of {config.head_dim} dimensions do not divide")
    for known in PRESETS.values():
        # a fine-tune with tokens or an unembedding of its own is still that model
        same = {key: getattr(known, key) for key in ("name", "context", "vocab", "tied")}
        if dataclasses.replace(config, **same) == known:
            return dataclasses.replace(config, name=known.name)
    return config


def _check_keys(raw: dict[str, Any], text: dict[str, Any], where: str) -> None:
    """Refuse keys that are unknown, unsupported, or stated twice with different values."""
    nested = text is not raw
    if nested and text.get("model_type", "gemma3_text") != "gemma3_text":
        kind = text["model_type"]
        raise InputError(f"{where}: model_type of text_config is {kind!r:.60}, not gemma3_text")
    for holder in (text, raw) if nested else (text,):
        for key, value in holder.items():
            stated = value is not None and value not in ("", [], {})
            known = key in _KNOWN or (key == "text_config" and nested and holder is raw)
            if stated and not known:
                unknown = "is not known to Gemma 3 and may change what it computes"
                raise InputError(f"{where}: {key} {unknown}; remove it if it does not")
        # False, null and a missing key all mean "off"; all else must be the known value
        wrong = [k for k, only in FIXED.items() if (holder.get(k, only) or None) != (only or None)]
        wrong += [k for k, only in FIXED_IF_SAID.items() if holder.get(k) not in (None, only)]
        if wrong:
            said = f"{wrong[0]} = {str(holder[wrong[0]])[:60]}"
            raise InputError(f"{where}: {said} is not supported")
    if not nested:
        return
    for key in raw.keys() & {*DEFAULTS, *READ}:
        inner = text.get(key, DEFAULTS.get(key))
        if raw[key] != inner and not (key == TIED and inner is None):
            both = f"{str(raw[key])[:40]} at the top and {str(inner)[:40]} in text_config"
            raise InputError(f"{where}: {key} is {both}; keep the right one in text_config")


def _number(text: dict[str, Any], key: str, where: str) -> Any:
    """A positive number of the default's type; a missing key means the default."""
    most = MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
    return positive(text.get(key, DEFAULTS[key]), type(DEFAULTS[key]), f"{where}: {key}", most)


def _rope(text: dict[str, Any], where: str) -> tuple[float, float, float]:
    """(global base, local base, global divisor) from either generation of keys, or both alike.

    transformers 4: rope_theta, rope_local_base_freq, rope_scaling (of the global layers only);
    transformers 5: rope_parameters with one entry for each kind of layer.
    """
    parameters = field(text, "rope_parameters", dict, where, default={})
    if unknown := [key for key, value in parameters.items() if value and key not in KINDS]:
        stray = f"{str(unknown)[:60]} belong to no kind of layer"
        advice = "move them into full_attention or sliding_attention"
        raise InputError(f"{where}: RoPE parameters {stray}; {advice}")
    local, whole = (_rope_entry(parameters, kind, where) for kind in KINDS)
    old = _rope_entry(text, "rope_scaling", where)
    found = []
    for key, values in {
        "rope_theta": [whole.get("rope_theta"), old.get("rope_theta"), text.get("rope_theta")],
        "rope_local_base_freq": [local.get("rope_theta"), text.get("rope_local_base_freq")],
        "factor": [whole.get("factor"), old.get("factor")],
    }.items():
        said = {positive(v, float, f"{where}: {key}") for v in values if v is not None}
        if key in text and text[key] is None and not said:
            raise InputError(f"{where}: {key} is None, not a positive number")
        found.append(_only(said, f"RoPE's {key}", where, DEFAULTS.get(key, 1.0)))
    if local.get("factor", 1.0) != 1.0:
        raise InputError(f"{where}: RoPE scaling of the local layers is not supported")
    return tuple(found)


def _only(said: set, what: str, where: str, default: Any) -> Any:
    """The one value that a file states, or the default."""
    if len(said) > 1:
        raise InputError(f"{where}: {what} is stated twice with different values: {sorted(said)}")
    return next(iter(said), default)


def _rope_entry(holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """rope_theta and factor of `holder[key]`, checked, if it has them."""
    value = holder.get(key)
    if value is None or value == {}:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: RoPE parameters are {str(value)[:60]!r}, not an object")
    said = {k: v for k, v in value.items() if v is not None}
    types = {str(said[k]) for k in ("rope_type", "type") if k in said}
    if not types <= {"default", "linear"} or len(types) > 1:
        named = " and ".join(sorted(types))
        raise InputError(f"{where}: RoPE scaling of type {named[:60]!r} is not supported")
    kind = types.pop() if types else "default"
    # linear scaling does not depend on the length of the training texts
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if unknown := set(said) - known - {k for k, v in FIXED_IF_SAID.items() if said.get(k) == v}:
        raise InputError(f"{where}: RoPE parameter {min(unknown)[:60]} is not supported")
    if (kind == "linear") != ("factor" in said) and said.get("factor") != 1.0:
        raise InputError(f"{where}: RoPE scaling of type {kind!r} with factor {said.get('factor')}")
    numbers = [k for k in ("rope_theta", "factor") if k in said]
    return {k: positive(said[k], float, f"{where}: {k}") for k in numbers}


def _global_every(text: dict[str, Any], layers: int, where: str) -> int:
    """The period of the global layers, from layer_types or else from the pattern's key."""
    key = "sliding_window_pattern"
    given = [text[k] for k in (key, f"_{key}") if text.get(k) is not None]
    said = {positive(value, int, f"{where}: {key}") for value in given}
    period, types = _only(said, key, where, DEFAULTS[key]), text.get("layer_types")
    if types is None:
        return period
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{where}: layer_types is not a list of {layers} kinds")
    first = types.index(KINDS[1]) if KINDS[1] in types else layers
    for every in (period, first + 1):
        if types == [KINDS[(i + 1) % every == 0] for i in range(layers)]:
            return every
    raise InputError(f"{where}: layer_types is not a repeated 'sliding..., full_attention' pattern")


def declared_tokens(path: epath.Path) -> list[tuple[int, Any, dict[str, Any]]]:
    """(id, text, entry) of each token that one of the `TOKENS` files adds. Raises `InputError`."""
    try:
        if path.name == "added_tokens.json":
            return [(int(number), text, {}) for text, number in read_json(path).items()]
        if path.name == "tokenizer_config.json":
            entries = (read_json(path).get("added_tokens_decoder") or {}).items()
        else:
            entries = [(token["id"], token) for token in _added_list(path)]
        return [(int(number), token["content"], token) for number, token in entries]
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: its added tokens are malformed") from error


def _added_list(path: epath.Path) -> list[dict[str, Any]]:
    """added_tokens of a tokenizer.json, without its millions of merges if it comes before them."""
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    keys = list(re.finditer(r'"added_tokens":\s{0,100}', text))
    if len(keys) == 1:
        with contextlib.suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder().raw_decode(text, keys[0].end())
            return parse_json(text[keys[0].end() : end], path) or []
    return read_json(path).get("added_tokens") or []


def _has_tokens_beyond(folder: epath.Path, last: int) -> bool:
    """Whether a tokenizer in `folder` has a token with an id above `last`."""
    files = (folder / name for name in TOKENS if (folder / name).exists())
    return any(number > last for file in files for number, *_ in declared_tokens(file))


def config_json(config: GemmaConfig, dtype: DTypeLike) -> dict[str, Any]:
    """config.json as transformers 4.57 writes it; version 5 converts it on loading."""
    scalar, divisor = config.query_scale**-2, config.global_rope_divisor
    if round(scalar) ** -0.5 == config.query_scale:
        scalar = round(scalar)  # the published files hold an integer
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": str(dtype),
        **{key: getattr(config, name) for key, (name, _) in FIELDS.items()},
        "sliding_window_pattern": config.global_every,
        "layer_types": [KINDS[config.is_global(i)] for i in range(config.layers)],
        "query_pre_attn_scalar": scalar,
        "rope_theta": config.global_rope_base,
        "rope_local_base_freq": config.local_rope_base,
        "rope_scaling": None if divisor == 1.0 else {"rope_type": "linear", "factor": divisor},
        TIED: config.tied,
        **{key: value for key, value in FIXED.items() if key != "quantization_config"},
    }
