"""config.json of a Gemma 3: every key is used, known not to change the model, or refused by name.

A key that is skipped is a model that computes something else than it says, so there is no third
kind. Where one fact is spelled twice (transformers 4's keys beside 5's, top level beside
`text_config`), the spellings must agree.

Source: `Gemma3TextConfig` of transformers 4.57 and 5, and the google/gemma-3-* repositories.
"""

import dataclasses
import os
from typing import Any

from etils import epath

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import PRESETS, GemmaConfig
from gemma_scope_jax.storage.strict_json import field, read_json

TEXT_VOCAB = 262_144
PADDED_VOCAB = 262_208  # of the multimodal repositories: a placeholder for images, then padding
TOKENS = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")

# What Gemma3TextConfig assumes for keys that config.json leaves out.
DEFAULTS = {
    "vocab_size": PADDED_VOCAB,
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
MOST = {"num_hidden_layers": 10_000}  # of whole numbers, others end at 2**31; floats at 1e20
# Variants of the architecture that the forward pass does not have, by the value that means "off".
FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
# The same, in keys that older or other libraries write; null means that they say nothing.
FIXED_IF_SAID = {
    "hidden_act": "gelu_pytorch_tanh",
    "partial_rotary_factor": 1.0,
    "mlp_bias": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
READ = {
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "_sliding_window_pattern",
    "tie_word_embeddings",
}
# Keys that do not change what the text model computes, by the reason why.
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
    "the tokenizer says it": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
        "tokenizer_class", "decoder_start_token_id", "prefix",
    ),
    "how to generate when nothing is asked for": (
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
_KNOWN = {*DEFAULTS, *FIXED, *FIXED_IF_SAID, *READ, *(k for ks in HARMLESS.values() for k in ks)}


def huggingface_config(folder: str | os.PathLike) -> GemmaConfig:
    """The architecture that `folder`/config.json describes; the name is the preset's if it is one.

    Reads flat (text-only) and nested (`text_config`) files of transformers 4 and 5. The 64 rows
    that pad the multimodal repositories' vocabulary of 262,208 are cut, unless the folder's
    tokenizer has tokens of its own there; any other vocabulary is taken as it is. Raises
    `InputError` for anything but a Gemma 3, and for keys that might make it another one.
    """
    path = epath.Path(folder)
    where = str(path / "config.json")
    raw = read_json(path / "config.json")
    if not isinstance(raw, dict):
        raise InputError(f"{where}: not a JSON object")
    if raw.get("model_type") not in ("gemma3", "gemma3_text"):
        raise InputError(
            f"{where}: model_type is {raw.get('model_type')!r:.60}; only Gemma 3 (gemma3, "
            "gemma3_text) can be loaded"
        )
    text = (
        field(raw, "text_config", dict, where, default={}) if raw["model_type"] == "gemma3" else raw
    )
    _check_keys(raw, text, where)

    def number(key: str) -> Any:
        return _number(text, key, where)

    global_base, local_base, divisor = _rope(text, where)
    vocab = number("vocab_size")
    if vocab == PADDED_VOCAB and not _has_tokens_beyond(path, TEXT_VOCAB):
        vocab = TEXT_VOCAB
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
        vocab=vocab,
        context=number("max_position_embeddings"),
        local_rope_base=local_base,
        global_rope_base=global_base,
        global_every=_global_every(text, number("num_hidden_layers"), where),
        norm_epsilon=number("rms_norm_eps"),
        tied=_is_tied(raw, text, where),
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise InputError(
            f"{where}: {config.heads} query heads over {config.kv_heads} key/value heads of "
            f"{config.head_dim} dimensions do not divide"
        )
    for known in PRESETS.values():
        # a fine-tune with tokens or an unembedding of its own is still that model
        same = {key: getattr(known, key) for key in ("name", "context", "vocab", "tied")}
        if dataclasses.replace(config, **same) == known:
            return dataclasses.replace(config, name=known.name)
    return config


def _check_keys(raw: dict[str, Any], text: dict[str, Any], where: str) -> None:
    """Refuse what is not known, not supported, or said twice and differently."""
    if text is not raw and text.get("model_type", "gemma3_text") != "gemma3_text":
        raise InputError(f"{where}: text_config is of {text['model_type']!r:.60}, not gemma3_text")
    for holder in (text,) if text is raw else (text, raw):
        for key, value in holder.items():
            nested = holder is raw and text is not raw and key == "text_config"
            said = value is not None and value not in ("", [], {})
            if said and key not in _KNOWN and not nested:
                raise InputError(
                    f"{where}: {key} is not known to Gemma 3 and may change what it computes; "
                    "remove the key if it does not"
                )
        for key, only in FIXED.items():
            # False, null and a missing key all mean "off"; all else must be the known value.
            if (holder.get(key, only) or None) != (only or None):
                raise InputError(f"{where}: {key} = {str(holder[key])[:60]} is not supported")
        for key, only in FIXED_IF_SAID.items():
            if holder.get(key) not in (None, only):
                raise InputError(f"{where}: {key} = {str(holder[key])[:60]} is not supported")
    if text is raw:
        return
    for key in raw.keys() & {*DEFAULTS, *READ}:
        inner = text.get(key, DEFAULTS.get(key))
        if raw[key] != inner and not (key == "tie_word_embeddings" and inner is None):
            raise InputError(
                f"{where}: {key} is {str(raw[key])[:40]} at the top and {str(inner)[:40]} in "
                "text_config; leave the right one in text_config"
            )


def _is_tied(raw: dict[str, Any], text: dict[str, Any], where: str) -> bool:
    key = "tie_word_embeddings"
    return all(field(holder, key, bool, where, default=True) for holder in (raw, text))


def _number(mapping: dict[str, Any], key: str, where: str) -> Any:
    """A positive number of the default's type; a missing key means the default."""
    return (
        _positive(mapping[key], key, type(DEFAULTS[key]), where)
        if key in mapping
        else DEFAULTS[key]
    )


def _positive(value: Any, key: str, kind: type, where: str) -> Any:
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    least, most = (1, MOST.get(key, 2**31 - 1)) if kind is int else (1e-20, 1e20)
    if not number or not least <= value <= most:
        raise InputError(
            f"{where}: {key} is {str(value)[:60]!r}, not a positive number"
            + (f" up to {most}" if number and value > 0 else "")
        )
    return kind(value)


def _rope(text: dict[str, Any], where: str) -> tuple[float, float, float]:
    """(global base, local base, global divisor) from either generation of keys, or both alike.

    transformers 4: rope_theta, rope_local_base_freq, rope_scaling (of the global layers only);
    transformers 5: rope_parameters with one entry for each kind of layer.
    """
    kinds = ("full_attention", "sliding_attention")
    parameters = field(text, "rope_parameters", dict, where, default={})
    if unknown := [key for key, value in parameters.items() if value and key not in kinds]:
        raise InputError(
            f"{where}: RoPE parameters {str(unknown)[:60]} belong to no kind of layer; they go "
            "into full_attention or sliding_attention"
        )
    entries = [_rope_entry(parameters, kind, where) for kind in kinds]
    old = _rope_entry(text, "rope_scaling", where)
    found = []
    for key, values in {
        "rope_theta": [entries[0].get("rope_theta"), old.get("rope_theta"), text.get("rope_theta")],
        "rope_local_base_freq": [entries[1].get("rope_theta"), text.get("rope_local_base_freq")],
        "factor": [entries[0].get("factor"), old.get("factor")],
    }.items():
        said = {_positive(v, key, float, where) for v in values if v is not None}
        if key in text and text[key] is None and not said:
            raise InputError(f"{where}: {key} is None, not a positive number")
        if len(said) > 1:
            raise InputError(f"{where}: RoPE's {key} is said twice and differently: {sorted(said)}")
        found.append(said.pop() if said else DEFAULTS.get(key, 1.0))
    if entries[1].get("factor", 1.0) != 1.0:
        raise InputError(f"{where}: RoPE scaling of the local layers is not supported")
    return tuple(found)


def _rope_entry(holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """What `holder[key]` says, checked: rope_theta and factor, where it has them."""
    value = holder.get(key)
    if value is None or value == {}:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: RoPE parameters are {str(value)[:60]!r}, not an object")
    said = {k: v for k, v in value.items() if v is not None}
    types = {str(said[k]) for k in ("rope_type", "type") if k in said}
    if not types <= {"default", "linear"} or len(types) > 1:
        raise InputError(
            f"{where}: RoPE scaling of type {' and '.join(sorted(types))[:60]!r} is not supported"
        )
    kind = types.pop() if types else "default"
    # a linear scaling does not ask how long the texts were that the model was trained on
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if unknown := set(said) - known - {k for k, v in FIXED_IF_SAID.items() if said.get(k) == v}:
        raise InputError(f"{where}: RoPE parameter {min(unknown)[:60]} is not supported")
    if (kind == "linear") != ("factor" in said) and said.get("factor") != 1.0:
        raise InputError(f"{where}: RoPE scaling of type {kind!r} with factor {said.get('factor')}")
    return {k: _positive(said[k], k, float, where) for k in ("rope_theta", "factor") if k in said}


def _global_every(text: dict[str, Any], layers: int, where: str) -> int:
    """The period of the global layers: as layer_types lists it, else from the pattern's key."""
    key = "sliding_window_pattern"
    said = {
        _positive(text[k], key, int, where) for k in (key, f"_{key}") if text.get(k) is not None
    }
    if len(said) > 1:
        raise InputError(f"{where}: {key} is said twice and differently: {sorted(said)}")
    period = said.pop() if said else DEFAULTS[key]
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


def _has_tokens_beyond(folder: epath.Path, last: int) -> bool:
    """Whether a tokenizer in `folder` has a token with an id above `last`."""
    for name in TOKENS:
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        try:
            if name == "added_tokens.json":
                ids = list(content.values())
            elif name == "tokenizer_config.json":
                ids = [int(key) for key in content.get("added_tokens_decoder") or {}]
            else:
                ids = [token["id"] for token in content.get("added_tokens") or []]
            if max(ids, default=0) > last:
                return True
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / name}: its added tokens are malformed") from error
    return False


def config_json(config: GemmaConfig, dtype: Any) -> dict[str, Any]:
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
        "tie_word_embeddings": config.tied,
        **{key: value for key, value in FIXED.items() if key != "quantization_config"},
    }
