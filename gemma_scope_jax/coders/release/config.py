"""What a published folder holds, from its config.json and, where that has gaps, from its path.

Some folders of the release have no config.json, some lack keys, and models are spelled in four
ways. This module turns all of that into one `FolderConfig`, and a coder into a config.json.

Source: the eight keys of the release's config.json files (`hf_hook_point_in, hf_hook_point_out,
width, model_name, architecture, l0, affine_connection, type`). Hook points are names of Hugging
Face modules and decide the sites; other libraries' hook names are never consulted.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from gemma_scope_jax.coders.coder import Coder, CoderInfo
from gemma_scope_jax.coders.release import catalog
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.config import PRESETS, GemmaConfig, normalise_model_name

# Hugging Face module and its input or output -> site. The release uses the first four.
SITES = {
    "output": "resid_post",
    "self_attn.o_proj.input": "z",
    "post_attention_layernorm.output": "attn_out",
    "post_feedforward_layernorm.output": "mlp_out",
    "pre_feedforward_layernorm.output": "mlp_in",
    "input": "resid_pre",
    "pre_feedforward_layernorm.input": "resid_mid",
    "mlp.down_proj.input": "mlp_act",
}
ARCHITECTURES = ("jump_relu", "jumprelu")  # as published
TOPK = "topk"  # our own architecture, with a `k`
Layers = tuple[int, ...] | None  # None: "{all}", every layer of the model


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """What config.json and path give; None where neither does."""

    type: str  # sae, transcoder, crosscoder or clt
    layers: tuple[int, ...]
    reads: str
    writes: str
    first: int  # leading token positions the coder was not trained on
    affine: bool | None
    k: int | None  # for a TopK coder
    info: CoderInfo

    @property
    def multi_layer(self) -> bool:
        return self.type in ("crosscoder", "clt")


def architecture(model_name: str) -> GemmaConfig | None:
    """The preset of a normalised model name, None if it is not a Gemma 3."""
    return PRESETS.get(re.sub("-(pt|it)$", "", model_name.removeprefix("google/")))


def untrained_positions(model_name: str) -> int:
    """The leading positions that the release's coders of this model were not trained on."""
    return 4 if instruction_tuned(model_name) else 1


def instruction_tuned(model_name: str) -> bool:
    """Whether a model's name marks it so, in any spelling: -it, -IT, _it, -it-qat-q4_0."""
    return re.search(r"[-_]it(?![a-z0-9])", model_name.lower()) is not None


def parse_hook_point(text: str) -> tuple[str, Layers]:
    """`model.layers.{5,9}.output` -> ("resid_post", (5, 9)); None for the layers of `{all}`."""
    layers = r"(\d{1,4}|\{\d{1,4}(?:, ?\d{1,4})*\}|\{all\})"
    match = re.fullmatch(rf"(?:model\.|language_model\.)*layers\.{layers}\.(.+)", text)
    if not match:
        raise InputError(f"hook point {text!r} is not of the form model.layers.12.output")
    layers, module = match.groups()
    if module not in SITES:
        raise InputError(f"unknown hook point {text!r}{nearest(module, SITES)}")
    if layers == "{all}":
        return SITES[module], None
    return SITES[module], tuple(int(layer) for layer in layers.strip("{}").split(","))


def hook_point(site: str, layers: Layers, multi_layer: bool) -> str:
    """The inverse of `parse_hook_point`."""
    modules = {site: module for module, site in SITES.items()}
    if site not in modules:
        raise InputError(f"no published hook point for site {site!r}, only {', '.join(modules)}")
    where = "all" if layers is None else ",".join(map(str, layers))
    return f"model.layers.{f'{{{where}}}' if multi_layer else where}.{modules[site]}"


def config_from_path(path: str, kind: str = "") -> dict[str, Any]:
    """The keys of config.json that the end of a path, `{repository}/{category}/{folder}`, implies.

    `kind`, a config's `type`, replaces a category missing in the path. The repository may be
    `gemma-scope-2-1b-pt` or, in the hub's cache, `models--google--gemma-scope-2-1b-pt/snapshots/
    ...`. {} for a folder whose name does not follow the grammar.
    """
    parts = [part for part in path.replace(os.sep, "/").split("/") if part]
    match = re.fullmatch(catalog.FOLDER, parts[-1]) if parts else None
    if not match:
        return {}
    config: dict[str, Any] = {"affine_connection": True} if match["affine"] else {}
    layers = tuple(map(int, match["layers"].split("_"))) if match["layers"] else None
    repository = re.findall(r"gemma-scope-2-(\d+[mb])-(pt|it)(?=/)", "/".join(parts))
    size, variant = repository[-1] if repository else (None, "pt")
    if size in catalog.SIZES:
        config["model_name"] = normalise_model_name(f"gemma-3-{size}-{variant}")
    known = (name for name in (*parts[-2:-1], kind) if name.removesuffix("_all") in catalog.SITES)
    if (category := next(known, None)) is None:
        return config
    every = tuple(range(catalog.SIZES[size][0])) if size in catalog.SIZES else (0,)
    names = match["width"], match["label"]
    address = catalog.Address(size or "270m", variant, category, layers or every, *names)
    multi_layer = address.kind in ("crosscoder", "clt")
    if address.kind == "clt" or (layers and (multi_layer or len(layers) == 1)):
        config["hf_hook_point_in"] = hook_point(address.reads, layers, multi_layer)
        config["hf_hook_point_out"] = hook_point(address.writes, layers, multi_layer)
    config["type"] = address.kind
    if match["width"] in (catalog.CLT_WIDTHS if address.kind == "clt" else catalog.WIDTHS):
        config["width"] = address.width_exact
    if size in catalog.SIZES and match["label"] in catalog.LABELS:
        config["l0"] = address.l0
    return config


_TEXTS = ("hf_hook_point_in", "hf_hook_point_out", "model_name", "architecture", "type")
_NUMBERS = dict.fromkeys(("width", "first", "k"), int)
_TYPES = {**dict.fromkeys(_TEXTS, str), **_NUMBERS, "l0": (int, float), "affine_connection": bool}
LONGEST, MOST = 1 << 17, 1 << 31  # the most positions of a Gemma 3 text; the most features

# `_TYPES` has the published keys of a config.json and ours, all of which are consulted. Any other
# key is a note by its writer (`config_extra`): kept, never consulted. But a key whose name contains
# one of these words may describe what the coder computes, so ignoring it could change the function.
_COMPUTED = {
    "act", "activation", "activations", "apply", "bias", "center", "centre", "centred", "centered",
    "clip", "fold", "fn", "gate", "gated", "head", "jump", "noise", "norm", "normalise",
    "normalize", "normalised", "normalized", "normalisation", "normalization", "relu", "rescale",
    "reshape", "scale", "scaler", "scaling", "shift", "subtract", "subtraction", "temperature",
    "threshold", "tied", "topk", "transpose", "transposed", "whiten", "whitening",
}  # fmt: skip
HARMLESS = {  # SAELens' keys, which a converted coder may have, with values that change nothing
    **dict.fromkeys(("normalize_activations", "reshape_activations"), "none"),
    **dict.fromkeys(("apply_b_dec_to_input", "finetuning_scaling_factor"), False),
    "rescale_acts_by_decoder_norm": False,
}


def folder_config(config: Mapping[str, Any], path: str, files: int = 1) -> FolderConfig:
    """The meaning of a config.json ({} if there is none) found at `path`, an address or a folder.

    Missing keys are inferred from the path. "All layers" are the model's or, if the model is
    unknown, as many as there are parameter `files`. Raises `InputError`, without the file's name,
    for unknown hook points, values of the wrong type and contradictions.
    """
    given = {key: value for key, value in config.items() if value is not None and value != ""}
    for key, expected in _TYPES.items():
        value = given.get(key)
        wrong_bool = isinstance(value, bool) and expected is not bool
        if key in given and (not isinstance(value, expected) or wrong_bool):
            kinds = {str: "text", int: "whole number", bool: "true or false"}
            raise InputError(f"{key} is {value!r}, not a {kinds.get(expected, 'number')}")
    for key in sorted(set(given) - set(_TYPES)):
        words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
        if not _COMPUTED.isdisjoint(words) and given[key] != HARMLESS.get(key, ...):
            why = "may be part of what the coder computes; remove it if it is not"
            raise InputError(f"unknown key {key!r} ({given[key]!r:.40}), which {why}")
    merged = {**config_from_path(path, given.get("type", "")), **given}
    for key, least, most in (("width", 1, MOST), ("first", 0, LONGEST), ("l0", 0, MOST)):
        if merged.get(key) is not None and not least <= merged[key] <= most:
            raise InputError(f"{key} is {merged[key]}, expected {least} to {most}")
    name, k = merged.get("architecture", "jump_relu"), merged.get("k")
    if name not in (*ARCHITECTURES, TOPK):
        raise InputError(f"architecture {name!r} is not jump_relu or {TOPK}")
    if (name == TOPK) != (k is not None):
        raise InputError(f"architecture {name!r} and k {k!r}: {TOPK} needs a k, others have none")
    model_name = normalise_model_name(merged.get("model_name", ""))
    kind, layers, reads, writes = _sites(merged)
    model = architecture(model_name)
    if model and layers and max(layers) >= model.layers:
        raise InputError(f"layer {max(layers)} is not in {model_name}: it has {model.layers}")
    if layers is None:
        layers = tuple(range(model.layers if model else files))
    info = CoderInfo(model_name, kind, merged.get("l0"), merged.get("width"), path, config=config)
    first = merged.get("first", untrained_positions(model_name))
    affine = merged.get("affine_connection")
    return FolderConfig(kind, layers, reads, writes, first, affine, k, info)


def _sites(config: Mapping[str, Any]) -> tuple[str, Layers, str, str]:
    """Type, layers and sites of a merged config, or `InputError` if they contradict each other."""
    missing = [key for key in ("hf_hook_point_in", "hf_hook_point_out") if key not in config]
    if missing:
        path = "a path of the form resid_post/layer_12_width_16k_l0_medium"
        raise InputError(
            f"{missing[0]} is missing in config.json, and can be inferred only from {path}"
        )
    source, target = config["hf_hook_point_in"], config["hf_hook_point_out"]
    (reads, layers), (writes, out_layers) = parse_hook_point(source), parse_hook_point(target)
    if layers != out_layers:
        raise InputError(f"{source} and {target} differ in their layers")
    if layers and list(layers) != sorted(set(layers)):
        raise InputError(f"layers {layers} of {source} are not increasing")
    names = ("crosscoder", "clt") if "{" in source else ("sae", "transcoder")
    expected = names[reads != writes]
    kind = config.get("type", expected)
    if kind not in catalog.KINDS:
        raise InputError(f"type {kind!r} is unknown{nearest(kind, catalog.KINDS)}")
    if kind != expected:
        hooks = f"the hook points {source} -> {target} of a {expected}"
        raise InputError(f"type {kind!r} contradicts {hooks}")
    return kind, layers, reads, writes


def config_of(coder: Coder, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a coder: the eight published keys, those it came with, and `extra`.

    A TopK coder has a `k` and the architecture "topk", which other readers refuse. Keys that it
    came with keep their spelling if they still mean the same; `extra` overrides all others.
    """
    info, layers = coder.info, coder.layers
    model = architecture(info.model_name)
    every = layers == tuple(range(model.layers if model else len(layers)))
    where: Layers = None if coder.kind == "clt" and every else layers
    config: dict[str, Any] = {
        "hf_hook_point_in": hook_point(coder.reads, where, coder.multi_layer),
        "hf_hook_point_out": hook_point(coder.writes, where, coder.multi_layer),
        "width": coder.width * len(layers),
        "model_name": info.model_name,
        "architecture": "jump_relu" if coder.k is None else TOPK,
        "l0": info.l0,
        "affine_connection": coder.w_skip is not None,
        "type": coder.kind.removeprefix("skip_"),
    }
    if coder.first != untrained_positions(info.model_name):
        config["first"] = coder.first
    if coder.k is not None:
        config["k"] = coder.k
    kept = {key: value for key, value in info.config.items() if key not in ("first", "k")}
    for key, value in config.items():
        if key not in kept or _meaning(key, kept[key]) != _meaning(key, value):
            kept[key] = value
    return {**kept, **extra}


def _meaning(key: str, value: Any) -> Any:
    """A config value in one spelling, for comparison; unchanged if it cannot be understood."""
    try:
        if key.startswith("hf_hook_point"):
            return parse_hook_point(value)
        if key == "model_name":
            return normalise_model_name(value)
        if key == "architecture":
            return "jump_relu" if value in ARCHITECTURES else value
    except (InputError, TypeError, AttributeError):
        pass
    return value
