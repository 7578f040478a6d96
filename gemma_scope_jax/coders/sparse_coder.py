"""A coder of one layer: SAE, transcoder or skip-transcoder.

    z = x @ w_enc + b_enc                       x raw: not normalised, b_dec not subtracted
    f = z * (z > threshold)                     JumpReLU, strict; never relu(z - threshold)
    y = f @ w_dec + b_dec [+ x @ w_skip]

A TopK coder (`k`) keeps only the k largest features of a token; its thresholds are 0.

Source: Gemma Scope 2 technical paper, sections 2.1-2.3 and 3.1-3.2, and the official tutorial.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gemma_scope_jax.coders import coder as shared
from gemma_scope_jax.coders.coder import (
    Coder,
    Encoder,
    Index,
    along_last,
    float32,
    matmul,
    static_field,
)
from gemma_scope_jax.errors import InputError


@flax.struct.dataclass
class SparseCoder(Coder):
    """A coder of one layer. D inputs, F features, D_out outputs; weights float32 or bfloat16.

    Arrays and methods have no X axis: w_enc [D, F], b_enc and threshold [F], w_dec [F, D_out],
    b_dec [D_out], w_skip [D, D_out] or None. `reads` and `writes` are sites of the model: equal for
    an SAE, `mlp_in` and `mlp_out` for a transcoder. `first` and `k`: see `Coder`.
    """

    multi_layer = False
    axes = ("D F", "F", "F", "F D_out", "D_out", "D D_out")
    layer: int = static_field()

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layer, as a tuple."""
        return (self.layer,)

    @property
    def kind(self) -> str:
        """ "sae", "transcoder" or "skip_transcoder"."""
        if self.w_skip is not None:
            return "skip_transcoder"
        return "sae" if self.reads == self.writes else "transcoder"

    def pre_activations(self, x: ArrayLike) -> jax.Array:
        z = matmul(self._input(x), self.w_enc)
        return z + along_last(self.b_enc, z)

    @jax.named_scope("encode")
    def encode(self, x: ArrayLike) -> jax.Array:
        z = self.pre_activations(x)
        f = shared.jump_relu(z, along_last(self.threshold, z))
        return f if self.k is None else shared.largest(f, self.k)

    def encode_layer(self, i: Index, x: ArrayLike) -> jax.Array:
        self._own(i)
        return self.encode(x)

    @jax.named_scope("decode")
    def decode(self, f: ArrayLike, x: ArrayLike | None = None) -> jax.Array:
        y = matmul(shared.expect_last_axis(f, self.width, "feature activations"), self.w_dec)
        y = y + along_last(self.b_dec, y)
        if self.w_skip is None:
            return y
        return y + matmul(self._input(self._skip_input(x)), self.w_skip)

    def _input(self, x: ArrayLike) -> jax.Array:
        return shared.expect_last_axis(x, self.d_in, f"{self.reads} of layer {self.layer}")

    def encoder(self, i: Index) -> Encoder:
        self._own(i)
        return Encoder(self.w_enc, self.b_enc, self.threshold)

    def decoder(self, i: Index, j: Index) -> jax.Array:
        for own in (i, j):
            self._own(own)
        return self.w_dec

    def written(self, i: Index, j: Index, features: ArrayLike) -> jax.Array:
        return float32(jnp.take(self.decoder(i, j), jnp.asarray(features), axis=0))

    def unplaced(self) -> Self:
        return self.replace(layer=0, first=0)

    def check_shapes(self) -> None:
        super().check_shapes()
        if self.reads == self.writes and self.d_in != self.d_out:
            raise InputError(
                f"w_dec writes {self.d_out} values, but {self.writes}, which this coder reads and "
                f"writes, has {self.d_in}"
            )
        if self.layer < 0 or self.first < 0:
            raise InputError(f"layer {self.layer} and first {self.first} must not be negative")

    __repr__ = Coder.__repr__
