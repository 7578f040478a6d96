"""Coders in SAELens' folders (`cfg.json` and `sae_weights.safetensors`), read and written.

With z = (x - b_dec) @ W_enc + b_enc, where b_dec is subtracted only with `apply_b_dec_to_input`,
SAELens computes relu(z) * (z > threshold), relu(z) or the k largest of relu(z). All of these are a
`SparseCoder`: relu is threshold 0, and the subtraction folds into b_enc. What cannot be folded
exactly is refused, as is every tensor and every key of cfg.json that is neither consulted nor known
to change nothing (`saelens_keys`).

Source: sae-lens 6.54 (`saes/sae.py`, `saes/transcoder.py`, `loading/pretrained_sae_loaders.py`,
`training/activation_scaler.py`), and its cfg.json before 6.0, which was flat.
"""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, CoderInfo, float32
from gemma_scope_jax.coders.interop import hooks
from gemma_scope_jax.coders.interop.hooks import text_of
from gemma_scope_jax.coders.interop.saelens_keys import check_keys
from gemma_scope_jax.coders.release import config as published
from gemma_scope_jax.coders.release.parameters import check_values, errors_name
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import normalise_model_name
from gemma_scope_jax.storage.atomic import write_folder, write_json
from gemma_scope_jax.storage.safetensors_files import StreamedTensor, write_safetensors
from gemma_scope_jax.storage.strict_json import read_object

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
TOPK = "topk"
ARCHITECTURES = ("standard", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder")
ARCHITECTURES += ("jumprelu_skip_transcoder",)
KEPT = ("neuronpedia_id", "dataset_path", "context_size", "prepend_bos", "exclude_special_tokens")


def is_saelens_folder(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder with SAELens' two files."""
    return all(os.path.isfile(os.path.join(path, name)) for name in (CONFIG, WEIGHTS))


def load_saelens(folder: Path, path: str) -> SparseCoder:
    """The coder of a SAELens folder known as `path`, with its input transformations folded into the
    weights.

    Raises `InputError` for damaged files and what is unsupported, nonlinear or ambiguous.
    """
    config = read_object(folder / CONFIG)
    with errors_name(folder / CONFIG):
        metadata = config.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise InputError(f"metadata is a {type(metadata).__name__}, not an object")
        check_keys(config, metadata)
        flat = {**metadata, **config}
        architecture, k = _architecture(flat)
        model_name = normalise_model_name(text_of(flat, "model_name"))
        reads, writes, layer = _place(flat, architecture)
        first = _first(flat, model_name)
    with errors_name(folder):
        tensors = _weights(folder / WEIGHTS, architecture, flat)
        _fold(tensors, flat, folder)
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].T
        weights = {name.lower(): jnp.asarray(tensor) for name, tensor in tensors.items()}
        kind = "transcoder" if "transcoder" in architecture else "sae"
        width, about = weights["w_enc"].shape[1], {"sae_lens": config}
        own = os.path.abspath(folder)
        info = CoderInfo(model_name, kind, width=width, path=path, config=about, folder=own)
        place: dict[str, Any] = dict(layer=layer, reads=reads, writes=writes, first=first, k=k)
        coder = SparseCoder(**weights, **place, info=info)
        coder.check_shapes()
        for key, size in (("d_in", coder.d_in), ("d_sae", coder.width), ("d_out", coder.d_out)):
            if flat.get(key, size) != size and (key != "d_out" or kind == "transcoder"):
                raise InputError(f"{CONFIG} has {key} {flat[key]!r}, {WEIGHTS} has {size}")
    return coder


def _architecture(config: dict[str, Any]) -> tuple[str, int | None]:
    """The architecture and its k, or `InputError` for anything that encodes differently."""
    activation = text_of(config, "activation_fn") or text_of(config, "activation_fn_str") or "relu"
    architecture = text_of(config, "architecture") or "standard"
    arguments, k = config.get("activation_fn_kwargs"), config.get("k")
    if k is None and isinstance(arguments, dict):
        k = arguments.get("k")
    if activation == TOPK and architecture == "standard" and k is not None:
        architecture = TOPK  # as it was written before version 6
    if architecture == TOPK and activation in ("relu", TOPK):
        activation, known = "relu", type(k) is int  # `check_shapes` limits its size
    else:
        known = architecture in ARCHITECTURES
    if not known or activation != "relu":
        what = architecture if activation == "relu" else f"{architecture} with {activation}"
        what += f" with k {k!r:.40}" if architecture == TOPK and k is not None else ""
        raise InputError(
            f"architecture {what} is not supported, only {', '.join(ARCHITECTURES)}, and topk with "
            "its k, a whole number"
        )
    if architecture != TOPK and config.get("rescale_acts_by_decoder_norm") not in (None, False):
        raise InputError(f"rescale_acts_by_decoder_norm of a {architecture} is not supported")
    if any(config.get(key) is not None for key in ("hook_head_index", "hook_point_head_index")):
        raise InputError("a coder of a single head (hook_head_index) is not supported")
    return architecture, k if architecture == TOPK else None


def _first(config: dict[str, Any], model_name: str) -> int:
    """The leading positions it was not trained on: by the model, or by `seqpos_slice`."""
    where = config.get("seqpos_slice")
    if where in (None, [], [None], [None, None]):
        return published.untrained_positions(model_name)
    whole = isinstance(where, list) and 1 <= len(where) <= 3 and where[2:] in ([], [None], [1])
    start = where[0] if whole else None
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < 1 << 17:
        raise InputError(f"seqpos_slice is {where!r:.60}, expected [start, end] or null")
    return max(start, published.untrained_positions(model_name))


def _place(config: dict[str, Any], architecture: str) -> tuple[str, str, int]:
    """Sites and layer, by the Hugging Face names if present, else by TransformerLens'."""
    hook = text_of(config, "hook_name") or text_of(config, "hook_point")
    names = {"hf_hook_name": text_of(config, "hf_hook_name") or hook}
    if "transcoder" in architecture:
        out = text_of(config, "hf_hook_name_out") or text_of(config, "hook_name_out")
        names["hf_hook_name_out"] = out
    places = []
    for key, name in names.items():
        if not name:
            raise InputError(f"{key} or {key.removeprefix('hf_')} must say where the coder is")
        try:
            places.append(hooks.site_and_layer(name))
        except InputError as error:
            example = "model.layers.12.pre_feedforward_layernorm.output"
            raise InputError(f"{error}; set {key} to the module, such as {example}") from error
    (reads, layer), (writes, out_layer) = places[0], places[-1]
    if layer != out_layer:
        raise InputError(f"it reads layer {layer} and writes layer {out_layer}: not supported")
    reshape = config.get("reshape_activations")  # hook_z: heads side by side, as our z is
    if reshape not in (None, "none") and (reshape, reads, writes) != ("hook_z", "z", "z"):
        raise InputError(f"reshape_activations is {reshape!r:.40}, but it reads {reads}")
    return reads, writes, layer


def _weights(path: Path, architecture: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    ranks = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
    if "jumprelu" in architecture:
        ranks["threshold"] = 1
    if "skip" in architecture:
        ranks["W_skip"] = 2
    tensors = hooks.read_tensors(path, ranks, {"scaling_factor": 1})
    finetuned = config.get("finetuning_scaling_factor")
    if finetuned not in (None, False) and "scaling_factor" not in tensors:
        wanted = f"finetuning_scaling_factor is {finetuned!r:.40}"
        raise InputError(f"{wanted}, but {path.name} has no scaling_factor")
    scale = tensors.pop("scaling_factor", np.ones(1, np.float32))
    if (scale != 1).any():
        raise InputError("a finetuned scaling_factor other than 1 is not supported")
    b_enc, shape = tensors["b_enc"], tensors["W_enc"].shape
    threshold = tensors.get("threshold", np.zeros_like(b_enc))
    tensors["threshold"] = np.maximum(threshold, 0)  # relu(z) is 0 below 0 anyway
    if shape[1] != len(b_enc):
        raise InputError(f"W_enc has shape {list(shape)}, b_enc {len(b_enc)} features")
    return tensors


def _fold(tensors: dict[str, np.ndarray], config: dict[str, Any], folder: Path) -> None:
    """Fold what SAELens does to the input into the weights, in place.

    apply_b_dec_to_input: (x - b_dec) @ W_enc = x @ W_enc - b_dec @ W_enc. Features rescaled by the
    norms n of their decoder rows: W_enc n, b_enc n, W_dec / n. A fixed scale s of all activations
    (expected_average_only_in): W_enc s, W_dec / s, b_dec / s, after the others.
    """
    transcoder = "transcoder" in str(config.get("architecture"))
    subtract = config.get("apply_b_dec_to_input")
    subtract = not transcoder if subtract is None else subtract
    normalise = config.get("normalize_activations") or "none"
    scale = _input_scale(normalise, folder)
    if subtract and transcoder:
        raise InputError(f"{CONFIG} has apply_b_dec_to_input, which a transcoder cannot do")
    if scale != 1 and transcoder:
        raise InputError(f"normalize_activations {normalise!r} of a transcoder is undefined")
    with np.errstate(all="ignore"):  # damaged weights hold anything
        if subtract:
            w_enc, b_enc, b_dec = (tensors[name] for name in ("W_enc", "b_enc", "b_dec"))
            if w_enc.shape[0] != len(b_dec):
                raise InputError(f"b_dec has {len(b_dec)} values, W_enc {w_enc.shape[0]} inputs")
            starts, mean = range(0, w_enc.shape[1], 4096), b_dec.astype(np.float64)
            parts = [mean @ w_enc[:, i : i + 4096].astype(np.float64) for i in starts]  # in pieces
            shifted = b_enc.astype(np.float64) - np.concatenate(parts)
            tensors["b_enc"] = shifted.astype(np.float32)
        if config.get("rescale_acts_by_decoder_norm"):
            w_dec = tensors["W_dec"].astype(np.float32)
            norms = np.linalg.norm(w_dec.astype(np.float64), axis=1).astype(np.float32)
            for name in ("W_enc", "b_enc"):
                tensors[name] = tensors[name].astype(np.float32) * norms
            tensors["W_dec"] = w_dec / np.where(norms > 0, norms, 1)[:, None]
        if scale != 1:
            for name, factor in (("W_enc", scale), ("W_dec", 1 / scale), ("b_dec", 1 / scale)):
                tensors[name] = tensors[name].astype(np.float32) * np.float32(factor)


def _input_scale(normalise: Any, folder: Path) -> float:
    """The factor by which SAELens scales activations, 1 for none, or `InputError`."""
    if normalise in ("none", False):
        return 1.0
    if normalise not in ("expected_average_only_in", True):
        supported = "only none and expected_average_only_in are supported"
        raise InputError(f"normalize_activations {normalise!r} does not fold: {supported}")
    if not (folder / SCALER).is_file():
        fold = "fold it in SAELens (fold_activation_norm_scaling_factor) first"
        raise InputError(f"{SCALER} is missing (it holds the factor of activations); {fold}")
    scaler = read_object(folder / SCALER)
    if other := [key for key in scaler if key not in ("scaling_factor", "has_whitening")]:
        raise InputError(f"{folder / SCALER}: unknown key {other[0]!r:.60}")
    scale = scaler.get("scaling_factor")
    number = scale if isinstance(scale, int | float) else 0.0
    if scale is True or not 1e-30 < number < 1e30 or scaler.get("has_whitening"):
        raise InputError(f"{folder / SCALER}: scaling_factor {scale!r} is not a sensible factor")
    return float(number)


def save_saelens(coder: Coder, folder: str | os.PathLike) -> None:
    """Write `folder` so that SAELens 6 loads it with the same encodings, in float32.

    Hook names are those of SAELens' own Gemma Scope 2 loader, including `hook_mlp_in` for
    transcoders: use `hf_hook_name`, which is right for every site. Both files appear together or
    not at all. Raises `InputError` for sites and kinds that SAELens does not have.
    """
    if coder.multi_layer:
        raise InputError("SAELens holds coders of one layer: save_saelens takes a SparseCoder")
    coder.check_shapes()
    check_values(coder)
    config = _config(coder)
    weights = {"W_enc": coder.w_enc, "b_enc": coder.b_enc}
    weights |= {"W_dec": coder.w_dec, "b_dec": coder.b_dec}
    if coder.k is None:
        weights["threshold"] = coder.threshold
    if coder.w_skip is not None:
        weights["W_skip"] = coder.w_skip.T
    tensors = {name: StreamedTensor.whole(float32(weight)) for name, weight in weights.items()}
    write_weights = lambda file: write_safetensors(file, tensors)
    write_config = lambda file: write_json(file, config)
    write_folder(folder, {WEIGHTS: write_weights, CONFIG: write_config})


def _config(coder: Coder) -> dict[str, Any]:
    """cfg.json as SAELens 6.54 writes it."""
    kind = "jumprelu" if coder.kind == "sae" else f"jumprelu_{coder.kind}"
    if coder.k is not None:
        if coder.kind != "sae":
            raise InputError(f"SAELens has no TopK {coder.kind}: convert it with as_jump_relu")
        kind = TOPK
    before = hooks.config_from(coder.info, "sae_lens")
    before = {**before, **(before.get("metadata") or {})}
    metadata = {
        "sae_lens_version": "6.54.0",  # of the format; below 6 means the old, flat one
        "sae_lens_training_version": None,
        "model_name": coder.info.model_name or None,
        "hook_name": _saelens_hook(coder.reads, coder.layers[0]),
        "hook_head_index": None,
        "hf_hook_name": published.hook_point(coder.reads, coder.layers, False),
        "prepend_bos": True,
        **{key: before[key] for key in KEPT if key in before},
    }
    unused = {"normalize_activations": "none", "reshape_activations": "none"}
    unused |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
    config = {"architecture": kind, "d_in": coder.d_in, "d_sae": coder.width, **unused}
    config["metadata"] = metadata
    if coder.k is not None:
        config |= {"k": coder.k, "rescale_acts_by_decoder_norm": False}
    if coder.kind != "sae":
        config["d_out"] = coder.d_out
        metadata["hook_name_out"] = _saelens_hook(coder.writes, coder.layers[0])
        metadata["hf_hook_name_out"] = published.hook_point(coder.writes, coder.layers, False)
    return config


def _saelens_hook(site: str, layer: int) -> str:
    return f"blocks.{layer}.{'hook_mlp_in' if site == 'mlp_in' else hooks.hook_of_site(site)}"
