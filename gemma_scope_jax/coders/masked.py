"""Features of captured activations, zero at the tokens that a coder was not trained on.

A coder cannot see which token an activation belongs to. On `<bos>` and padding `coder.encode` gives
meaningless features, often many and large: averaged with the others they spoil every figure.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import TokenBatch, as_batch


def encode(
    coder: Coder, activations: ArrayLike, batch: TokenBatch | ArrayLike, *, first: int | None = None
) -> jax.Array:
    """`coder.encode`, zero on padding and on the first tokens of each document: [B, T, F].

    activations  the coder's captured input [B, T, D]; several layers: [X, B, T, D]
    batch        the `TokenBatch` that was run, or its tokens [B, T]
    first        tokens to skip in each document; default: the coder's own `first`

    Equals what `run(model, batch, [features(coder)])` reads. To average over the remaining tokens,
    use `batch.counted(coder.first)`. Raises `InputError` for activations of other tokens.
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
