"""The geometry of a coder's features: norms, the cosine of encoder and decoder, nearest neighbours.

Source: SAEBench 0.6, `evals/core/main.py` (feature-wise weight-based metrics).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.coders.directions import most_similar, written
from gemma_scope_jax.evaluation.results import plain


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Float32 arrays [F], or [X, F] for a coder of several layers: there, neighbours are features
    of the same source layer, and a decoder row joins what a feature writes to all its layers.
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
        mean = lambda name: float(np.mean(getattr(self, name), dtype=np.float64))
        ours = (name for name in NAMES if name not in ("encoder_bias", "threshold"))
        return plain({f"average_{NAMES[name]}": mean(name) for name in ours})


# of the fields, SAEBench's names, and names like them
NAMES = {
    f.name: f.name + "_sim" * f.name.endswith("cosine")
    for f in dataclasses.fields(Geometry)
    if f.name != "decoder_norms_by_layer"
}


def geometry(coder: Coder) -> Geometry:
    """The geometry of a coder's features. A zero vector has cosine 0 with everything.

    The cosine of a transcoder's encoder and decoder compares vectors of different sites.
    """
    X, shape = len(coder.layers), np.shape(coder.b_enc)
    norms = np.zeros((X, coder.width, X), np.float32)
    each = []
    for i, layer in enumerate(coder.layers):
        enc, dec = float32(coder.encoder(i).w_enc).T, written(coder, layer)
        *found, norms[i, :, i:] = map(np.asarray, _norms(enc, dec, outputs=X - i))
        each.append([*found, _nearest(enc), _nearest(dec)])
    enc_norm, dec_norm, *cosines = (np.stack(a).reshape(shape) for a in zip(*each))
    bias, threshold = (np.asarray(float32(a)) for a in (coder.b_enc, coder.threshold))
    by_layer = {"decoder_norms_by_layer": norms} if coder.multi_layer else {}
    return Geometry(bias, enc_norm, dec_norm, threshold, *cosines, **by_layer)


@partial(jax.jit, static_argnames="outputs")
def _norms(enc: jax.Array, dec: jax.Array, *, outputs: int):
    """Norms of enc [F, D] and dec [F, outputs D_out], the cosine of enc and the first D of dec, and
    norms of the outputs [F, outputs]."""
    blocks = dec.reshape(len(dec), outputs, -1)
    enc_norm, dec_norm = jnp.linalg.norm(enc, axis=1), jnp.linalg.norm(dec, axis=1)
    own_norm = jnp.linalg.norm(blocks, axis=-1)
    if blocks.shape[-1] == enc.shape[1]:
        scale = enc_norm * own_norm[:, 0]
        same = (enc * blocks[:, 0]).sum(1) / jnp.where(scale == 0, 1.0, scale)
    else:
        same = jnp.full(len(enc), jnp.nan)
    return enc_norm, dec_norm, same, own_norm


def _nearest(rows: jax.Array) -> np.ndarray:
    """The largest cosine of each row [F, D] with another; NaN if there is only one row."""
    ids, cosines = most_similar(rows, None, 1)
    return np.where(ids < 0, np.nan, cosines)[:, 0]
