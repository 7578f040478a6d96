"""A coder of one layer (SAE, transcoder, skip-transcoder): a pytree that knows where it belongs.

    z = x @ w_enc + b_enc                       x raw: not normalised, b_dec not subtracted
    f = z * (z > threshold)                     JumpReLU, strict; never relu(z - threshold)
    y = f @ w_dec + b_dec [+ x @ w_skip]

A TopK coder has a `k`: of f only the k largest of a token stay (`largest`); its thresholds
are 0.

Source: Gemma Scope 2 technical paper, sections 2.1-2.3 and 3.1-3.2, and the official tutorial.
"""

from typing import Any, Self

import flax.struct
import jax

from gemma_scope_jax.coders.coder import (
    Coder,
    CoderInfo,
    Encoder,
    along_last,
    check_k,
    expect_last_axis,
    expect_rank,
    expect_shapes,
    jump_relu,
    largest,
    matmul,
    static_field,
)
from gemma_scope_jax.errors import InputError


@flax.struct.dataclass
class SparseCoder(Coder):
    """One layer's coder. D inputs, F features, D_out outputs; weights float32 or bfloat16.

    `reads` and `writes` are sites of the model: equal for an SAE, `mlp_in` and `mlp_out` for a
    transcoder. `first` and `k`: see `Coder`.
    """

    multi_layer = False
    w_enc: Any  # [D, F]
    b_enc: Any  # [F]
    threshold: Any  # [F]
    w_dec: Any  # [F, D_out]
    b_dec: Any  # [D_out]
    w_skip: Any = None  # [D, D_out], applied as x @ w_skip
    layer: int = static_field()
    reads: str = static_field(default="resid_post")
    writes: str = static_field(default="resid_post")
    first: int = static_field(default=1)
    k: int | None = static_field(default=None)  # how many features of a token are kept; None: all
    info: CoderInfo = static_field(default=CoderInfo())

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

    def pre_activations(self, x: Any) -> jax.Array:
        """x [..., D] -> z [..., F], float32."""
        x = expect_last_axis(x, self.d_in, f"{self.reads} of layer {self.layer}")
        z = matmul(x, self.w_enc)
        return z + along_last(self.b_enc, z)

    @jax.named_scope("encode")
    def encode(self, x: Any) -> jax.Array:
        """x [..., D], the raw activation at site `reads` -> feature activations [..., F], float32.

        Whatever token x is of: features of `<bos>` and padding mean nothing, and `gs.encode(coder,
        x, batch)` and `gs.features(coder)` leave them out. Raises `InputError` if the last axis is
        not D.
        """
        z = self.pre_activations(x)
        f = jump_relu(z, along_last(self.threshold, z))
        return f if self.k is None else largest(f, self.k)

    def encode_layer(self, i: Any, x: Any) -> jax.Array:
        """`encode`: there is no layer but 0."""
        self._own(i)
        return self.encode(x)

    @jax.named_scope("decode")
    def decode(self, f: Any, x: Any = None) -> jax.Array:
        """f [..., F] -> the reconstruction [..., D_out] at site `writes`, float32.

        A skip-transcoder also needs `x` [..., D], what `encode` was given; others ignore it.
        """
        f = expect_last_axis(f, self.width, "feature activations")
        y = matmul(f, self.w_dec)
        y = y + along_last(self.b_dec, y)
        if self.w_skip is None:
            return y
        if x is None:
            raise InputError(
                f"this skip-transcoder adds x @ w_skip: call decode(f, x) with the {self.reads} of "
                f"layer {self.layer} that was encoded"
            )
        x = expect_last_axis(x, self.d_in, f"{self.reads} of layer {self.layer}")
        return y + matmul(x, self.w_skip)

    def encoder(self, i: Any) -> Encoder:
        """All of it: there is no layer but 0."""
        self._own(i)
        return Encoder(self.w_enc, self.b_enc, self.threshold)

    def decoder(self, i: Any, j: Any) -> Any:
        """`w_dec` [F, D_out]: there is no layer but 0."""
        for own in (i, j):
            self._own(own)
        return self.w_dec

    def unplaced(self) -> Self:
        """The same coder at layer 0 and from position 0 on."""
        return self.replace(layer=0, first=0)

    def check_shapes(self) -> None:
        """Raise `InputError` unless the fields' shapes agree. Looks at no values."""
        d_in, width = expect_rank(self, "w_enc", "D F")
        _, d_out = expect_rank(self, "w_dec", "F D_out")
        expected = {"w_enc": (d_in, width), "b_enc": (width,), "threshold": (width,)}
        expected |= {"w_dec": (width, d_out), "b_dec": (d_out,)}
        if self.w_skip is not None:
            expected["w_skip"] = (d_in, d_out)
        expect_shapes(self, expected)
        if self.reads == self.writes and d_in != d_out:
            raise InputError(
                f"w_dec writes {d_out} values, but {self.writes}, which this coder reads and "
                f"writes, has {d_in}"
            )
        if self.layer < 0 or self.first < 0:
            raise InputError(f"layer {self.layer} and first {self.first} must not be negative")
        check_k(self.k, width)

    __repr__ = Coder.__repr__
