"""A TopK coder as a JumpReLU coder, for readers that know no other: another function, on request.

TopK gives each token its k features, JumpReLU each feature its threshold. A token of twice the norm
has the same k features of the one and far more of the other, so the figures of a converted coder
are its own and have to be measured anew.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.errors import InputError

TOKENS = 256  # encoded at a time


def as_jump_relu(coder: Coder, x: Any) -> Coder:
    """The JumpReLU coder nearest to a TopK coder: one threshold for all features, never below 0.

    x: raw activations at `reads`, [N, D] or, of several layers, [X, N, D]; a few thousand tokens
    that are as the coder's future ones, without <bos>. On these its mean L0 is k, as far as so many
    pre-activations are positive. Raises `InputError` for a coder without k and an x without tokens.
    """
    if coder.k is None:
        raise InputError("this coder is no TopK coder: it has thresholds of its own")
    several = isinstance(coder, MultiLayerCoder)
    x = np.asarray(x, np.float32)
    x = x.reshape(*x.shape[:several], -1, x.shape[-1]) if x.ndim > several else x
    tokens = x.shape[-2] if x.ndim == 2 + several else 0
    if not tokens:
        raise InputError(f"no activations to set a threshold by, x has shape {list(x.shape)}")
    wanted = coder.k * tokens
    found = np.zeros(0, np.float32)
    for start in range(0, tokens, TOKENS):
        z = np.asarray(coder.pre_activations(x[..., start : start + TOKENS, :])).reshape(-1)
        found = np.concatenate([found, z[z > 0]])
        if found.size > wanted:
            found = np.partition(found, found.size - wanted)[found.size - wanted :]
    edge = found.min(initial=np.inf) if found.size == wanted else 0.0
    threshold = max(float(np.nextafter(np.float32(edge), np.float32(-1))), 0.0)  # it is strict
    return dataclasses.replace(
        coder,
        k=None,
        threshold=jnp.full_like(jnp.asarray(coder.threshold), threshold),
        info=dataclasses.replace(coder.info, l0=coder.info.l0 or coder.k),
    )
