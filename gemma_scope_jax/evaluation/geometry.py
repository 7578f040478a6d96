"""How a coder's features lie: norms, how alike encoder and decoder are, and the nearest neighbour.

Cosines between all pairs of features are made a block of rows at a time and only their largest
leaves the device: F x F numbers never exist at once.

Source: SAEBench 0.6, `evals/core/main.py` (feature-wise weight-based metrics).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder, float32
from gemma_scope_jax.evaluation.results import plain

BLOCK = 512  # features whose cosines with all others exist at a time


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Float32 arrays [F], or [X, F] of a coder of several layers, whose neighbours are those of
    the same source layer and whose decoder row is what it writes to all its layers, as one vector.
    """

    encoder_bias: np.ndarray
    encoder_norm: np.ndarray
    decoder_norm: np.ndarray
    threshold: np.ndarray
    encoder_decoder_cosine: np.ndarray  # with what it writes to the layer that it reads
    max_encoder_cosine: np.ndarray  # with the encoder of another feature
    max_decoder_cosine: np.ndarray
    decoder_norms_by_layer: np.ndarray | None = None  # [X, F, X], zero above the diagonal

    def averages(self) -> dict[str, Any]:
        """The means, under SAEBench's names where it has them."""
        mean = lambda a: float(np.mean(a, dtype=np.float64))
        return plain(
            {
                "average_max_encoder_cosine_sim": mean(self.max_encoder_cosine),
                "average_max_decoder_cosine_sim": mean(self.max_decoder_cosine),
                "average_encoder_decoder_cosine_sim": mean(self.encoder_decoder_cosine),
                "average_encoder_norm": mean(self.encoder_norm),
                "average_decoder_norm": mean(self.decoder_norm),
            }
        )


def geometry(coder: Coder) -> Geometry:
    """The geometry of a coder's features. A zero vector has cosine 0 with everything.

    A transcoder's encoder and decoder lie at different sites: their cosine is of the numbers.
    """
    if isinstance(coder, SparseCoder):
        parts = _one_layer(coder.w_enc, coder.w_dec)
        norms = None
    else:
        each = [_of_layer(coder, i) for i in range(len(coder.layers))]
        parts = [jnp.stack(a) for a in zip(*(e[:-1] for e in each))]
        norms = np.stack([np.asarray(e[-1]) for e in each])
    enc_norm, dec_norm, same, near_enc, near_dec = map(np.asarray, parts)
    bias, threshold = (np.asarray(float32(a)) for a in (coder.b_enc, coder.threshold))
    return Geometry(bias, enc_norm, dec_norm, threshold, same, near_enc, near_dec, norms)


def _of_layer(coder: MultiLayerCoder, i: int):
    """`_one_layer` of a source layer, and its features' norms at each layer they write, [F, X]."""
    X = len(coder.layers)
    blocks = jnp.stack([float32(coder.decoder(i, j)) for j in range(i, X)], 1)
    norms = jnp.linalg.norm(blocks, axis=-1)
    whole = blocks.reshape(blocks.shape[0], -1)
    padded = jnp.pad(norms, ((0, 0), (i, 0)))
    return *_one_layer(coder.w_enc[i], whole), padded


@partial(jax.jit)
def _one_layer(w_enc: jax.Array, w_dec: jax.Array):
    """w_enc [D, F], w_dec [F, E]: norms, their cosine (the first D of a row), nearest others."""
    enc, dec = float32(w_enc).T, float32(w_dec)
    D = enc.shape[1]
    enc_norm, dec_norm = jnp.linalg.norm(enc, axis=1), jnp.linalg.norm(dec, axis=1)
    if dec.shape[1] >= D and dec.shape[1] % D == 0:
        own = dec[:, :D]
        scale = enc_norm * jnp.linalg.norm(own, axis=1)
        same = (enc * own).sum(1) / jnp.where(scale == 0, 1.0, scale)
    else:
        same = jnp.full(enc.shape[0], jnp.nan)
    return enc_norm, dec_norm, same, _nearest(enc, enc_norm), _nearest(dec, dec_norm)


def _nearest(rows: jax.Array, norms: jax.Array) -> jax.Array:
    """The largest cosine of each row [F, D] with another; NaN if there is only one row."""
    F = rows.shape[0]
    unit = rows / jnp.where(norms == 0, 1.0, norms)[:, None]
    size = min(BLOCK, F)
    pad = -F % size
    blocks = jnp.pad(unit, ((0, pad), (0, 0))).reshape(-1, size, unit.shape[1])
    numbers = jnp.arange(F + pad, dtype=jnp.int32).reshape(-1, size)

    def block(args):
        some, which = args
        cosines = jnp.matmul(some, unit.T, precision=jax.lax.Precision.HIGHEST)
        other = which[:, None] != jnp.arange(F, dtype=jnp.int32)[None, :]
        return jnp.where(other, cosines, -jnp.inf).max(1)

    best = jax.lax.map(block, (blocks, numbers)).reshape(-1)[:F]
    return jnp.where(jnp.isfinite(best), best, jnp.nan)
