"""Coders of any size that take no memory: shapes in place of arrays."""

import jax
import jax.numpy as jnp

import gemma_scope_jax as gs
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.coders.sparse_coder import SparseCoder


def abstract_transcoders(config, width=16_384, l0=60.0, dtype=jnp.bfloat16) -> gs.CoderSet:
    """An affine transcoder for each layer of a model."""
    D, array = config.d_model, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return gs.CoderSet(
        SparseCoder(
            w_enc=array(D, width),
            b_enc=array(width),
            threshold=array(width),
            w_dec=array(width, D),
            b_dec=array(D),
            w_skip=array(D, D),
            layer=layer,
            reads="mlp_in",
            writes="mlp_out",
            info=CoderInfo(l0=l0),
        )
        for layer in range(config.layers)
    )
