"""Features of captured activations, zero at the tokens that a coder was not trained on.

A coder is a function of an activation and does not know which token that is of. Of `<bos>` and of
padding `coder.encode` gives features that mean nothing, and often many, large ones: averaged with
the others they spoil every figure.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import as_batch


def encode(coder: Coder, activations: Any, batch: Any, *, first: int | None = None) -> jax.Array:
    """`coder.encode`, zero on padding and on the first tokens of each document: [B, T, F].

    activations  what the coder reads, [B, T, D], as `capture(coder.reads, coder.layer)` has it; of
                 a coder of several layers [X, B, T, D], which gives [X, B, T, F]
    batch        the `TokenBatch` that was run, or its tokens [B, T]
    first        how many tokens to skip of each document; default: the coder's own

    The same as `run(model, batch, [features(coder)])` reads. To average over the tokens that are
    left, or those that the batch's mask keeps of them, use `batch.counted(coder.first)`. Raises
    `InputError` for activations of other tokens.
    """
    batch, f = as_batch(batch), coder.encode(activations)
    B, T = batch.tokens.shape
    if f.ndim < 3 or f.shape[-3:-1] != (B, T):
        raise InputError(
            f"activations {list(jnp.shape(activations))} are not of a batch of {B} x {T} tokens: "
            f"give [..., {B}, {T}, {coder.d_in}], as captured when this batch was run"
        )
    skipped = coder.first if first is None else whole_number("first", first, 0)
    mask = batch.plain.counted(skipped).reshape(*(1,) * (f.ndim - 3), B, T, 1)
    return jnp.where(mask, f, 0.0)
