"""What the readers of other libraries' folders share: hook names, config texts, tensors of a file.

TransformerLens' `hook_mlp_in` is the residual stream before the norm, its `ln2.hook_normalized` the
norm without the (1 + w) gain; Gemma Scope 2's transcoders read neither, though SAELens' configs for
them have `hook_mlp_in`. A coder on the wrong tensor still runs, so ambiguous names are refused.
"""

import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.release.config import parse_hook_point
from gemma_scope_jax.coders.release.parameters import check_finite
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.storage.safetensors_files import open_safetensors

# TransformerLens name without `blocks.L.` -> site. `hook_*_out` come after the post-norm.
TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "z",
    "hook_attn_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_act",
    "hook_mlp_out": "mlp_out",
}
AMBIGUOUS = {
    "hook_mlp_in": "is the residual stream before the norm in TransformerLens, the normed input of "
    "the MLP in some configs",
    "ln2.hook_normalized": "is the norm without its (1 + w) gain, which is not a site",
    "ln1.hook_normalized": "is the norm without its (1 + w) gain, which is not a site",
    "mlp.hook_out": "is the output of the MLP before the post-norm, which is not a site",
}


def site_of_hook(name: str) -> str:
    """The site of a TransformerLens hook name without `blocks.L.`, or `InputError`."""
    if name in TRANSFORMER_LENS:
        return TRANSFORMER_LENS[name]
    if name in AMBIGUOUS:
        raise InputError(f"hook {name} {AMBIGUOUS[name]}")
    raise InputError(f"unknown hook {name!r}{nearest(name, TRANSFORMER_LENS)}")


def hook_of_site(site: str) -> str:
    """The TransformerLens hook name, without `blocks.L.`, of a site, or `InputError`."""
    names = {site: name for name, site in TRANSFORMER_LENS.items()}
    if site not in names:
        raise InputError(f"TransformerLens has no hook for site {site!r}, only {', '.join(names)}")
    return names[site]


def site_and_layer(name: str) -> tuple[str, int]:
    """`blocks.3.hook_resid_post` or `model.layers.3.output` -> ("resid_post", 3)."""
    if match := re.fullmatch(r"blocks\.([0-9]{1,4})\.(.+)", name):
        return site_of_hook(match[2]), int(match[1])
    site, layers = parse_hook_point(name)
    if layers is None or len(layers) != 1:
        raise InputError(f"hook point {name!r} is not of one layer")
    return site, layers[0]


def unknown_key(key: Any, value: Any, known: Iterable[str]) -> InputError:
    """The error for a key that may change the function, so that it cannot be ignored."""
    return InputError(
        f"unknown key {key!r:.60} ({value!r:.40}), which may be part of what the coder computes"
        f"{nearest(str(key), known)}; remove it if it is not"
    )


def text_of(config: dict[str, Any], key: str) -> str:
    """A text in a config, "" if absent or null. Raises `InputError` for other types."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{key} is a {type(value).__name__}, not a text")
    return value or ""


def read_tensors(
    path: str | os.PathLike, required: dict[str, int], optional: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """The named tensors (name -> rank) of a safetensors file, as float32 or bfloat16.

    Raises `InputError` for a tensor that is missing, unknown, empty, not a float or of another
    rank, and for NaN and values that float32 cannot hold.
    """
    ranks, found = {**required, **(optional or {})}, {}
    with open_safetensors(path) as file:
        names = list(file.keys())
        if missing := [name for name in required if name not in names]:
            raise InputError(f"{path}: no tensor {missing[0]!r}{nearest(missing[0], names)}")
        if unknown := [name for name in names if name not in ranks]:
            raise InputError(f"{path}: tensor {unknown[0]!r} is not one of {', '.join(ranks)}")
        for name in names:
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise InputError(f"{path}: {name} is {dtype}, expected a float")
            if len(shape) != ranks[name] or 0 in shape:
                raise InputError(f"{path}: {name} has shape {list(shape)}, not {ranks[name]} axes")
            with np.errstate(over="ignore"):
                tensor = file.get_tensor(name)
                tensor = tensor if dtype == "BF16" else tensor.astype(np.float32, copy=False)
            check_finite(tensor, f"{path}: {name}")
            found[name] = tensor
    return found


def config_from(info: CoderInfo, library: str) -> dict[str, Any]:
    """The config of a coder that was read from this library's folder; {} for others."""
    config = info.config.get(library)
    return dict(config) if isinstance(config, dict) else {}
