"""What holds for coders of one layer and of several alike."""

import dataclasses
import os

import numpy as np

from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.release.parameters import row_chunks
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.model.identity import checksum
from gemma_scope_jax.storage.strict_json import legible

Coder = SparseCoder | MultiLayerCoder


def layers_of(coder: Coder) -> tuple[int, ...]:
    """The model's layers that a coder reads and writes."""
    return coder.layers if isinstance(coder, MultiLayerCoder) else (coder.layer,)


def weights_identity(coder: Coder) -> str:
    """Tells a coder's weights from any others: 16 hexadecimal digits.

    Without the decoder of several layers, which may still be on disk: whatever trains it moves the
    biases, too.
    """
    whole = isinstance(coder, SparseCoder)
    weights = coder if whole else dataclasses.replace(coder, w_dec=None)
    return checksum(weights if coder.k is None else (weights, np.array([coder.k], np.float32)))


def check_values(coder: Coder) -> None:
    """Raise `InputError` for weights that no reader takes: NaN and infinite ones, thresholds below
    0, and thresholds beside a `k`, which the files of TopK coders do not hold.
    """
    for name in ("w_enc", "b_enc", "threshold", "w_dec", "b_dec", "w_skip"):
        array = getattr(coder, name)
        if array is None:
            continue
        for rows in row_chunks(array.shape, array.dtype.itemsize):
            if not np.isfinite(np.asarray(array[rows])).all():
                raise InputError(f"{name} holds NaN or infinite values, which no reader takes")
    threshold = np.asarray(coder.threshold)
    if (threshold < 0).any():
        raise InputError("threshold holds negative values")
    if coder.k is not None and threshold.any():
        raise InputError(f"a TopK coder (k {coder.k}) has no thresholds: set them to 0")


def public_name(coder: Coder) -> str:
    """The coder's address, or the name of its folder: no paths of this machine."""
    path = coder.info.path or coder.kind
    return legible(os.path.basename(path) if os.path.isabs(path) else path)


def check_fits(config: GemmaConfig, coder: Coder) -> None:
    """Raise `InputError` unless the model has the coder's layers and its sites the right widths."""
    last = max(layers_of(coder))
    if last >= config.layers:
        raise InputError(
            f"the coder is for layer {last}, but {config.name} has layers 0 to {config.layers - 1}"
        )
    for site, size, verb in (
        (coder.reads, coder.d_in, "reads"),
        (coder.writes, coder.d_out, "writes"),
    ):
        width = site_width(config, site)
        if size != width:
            raise InputError(
                f"the coder {verb} {size} values at {site}, where {config.name} has {width}: "
                "it is for another model"
            )
