"""What holds for coders of one layer and of several alike."""

import dataclasses
import os

from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.model.identity import checksum

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
    return checksum(coder if whole else dataclasses.replace(coder, w_dec=None))


def public_name(coder: Coder) -> str:
    """The coder's address, or the name of its folder: no paths of this machine."""
    path = coder.info.path or coder.kind
    return os.path.basename(path) if os.path.isabs(path) else path
