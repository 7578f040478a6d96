"""Coders that read and write several layers: weakly causal crosscoders and cross-layer transcoders.

A feature is read at one source layer and may write to that layer and to every later one:

    f[i] = JumpReLU(x[i] @ w_enc[i] + b_enc[i])
    y[j] = sum over i <= j of f[i] @ decoder(i, j) + b_dec[j] [+ x[j] @ w_skip[j]]

Both kinds share this parameterisation (Gemma Scope 2 technical paper, section 2.6). Only the
triangle j >= i of the decoder exists, so only it is stored: of the 1b CLT, 13.5 of 26 blocks a
layer. Layers come first in activations, features and reconstructions: [X, ..., D], [X, ..., F].

A TopK coder (`k`) keeps the k largest features of a token over all of its layers together, as it
was trained: what it keeps of one layer hangs on the others, later ones included.
"""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gemma_scope_jax.coders.coder import (
    Coder,
    CoderInfo,
    Encoder,
    along_last,
    by_layer,
    check_k,
    expect_last_axis,
    expect_rank,
    expect_shapes,
    float32,
    jump_relu,
    largest,
    matmul,
    static_field,
)
from gemma_scope_jax.errors import InputError


def block_index(i: Any, j: Any, layers: int) -> Any:
    """Where the decoder block from source layer `i` to output layer `j` >= `i` lies in `w_dec`.

    Source-major: all of layer 0's blocks, then layer 1's. Integers or traced integers.
    """
    return i * layers - i * (i - 1) // 2 + (j - i)


def triangle(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """The source and the output layer of every block of `w_dec`, int32 [P] each."""
    source, target = np.triu_indices(layers)
    return source.astype(np.int32), target.astype(np.int32)


@flax.struct.dataclass
class MultiLayerCoder(Coder):
    """X layers' coder; i and j count its own layers, 0 to X - 1, which are `layers` of the model.

    `w_dec` may be None: left on disk, because a CLT's decoder is most of its tens of gigabytes.
    Then everything but decoding works; `load_decoder` brings it in.
    """

    multi_layer = True
    w_enc: Any  # [X, D, F]
    b_enc: Any  # [X, F]
    threshold: Any  # [X, F]
    w_dec: Any  # [P, F, D], P = X (X + 1) / 2 blocks in the order of `block_index`; or None
    b_dec: Any  # [X, D]
    w_skip: Any = None  # [X, D, D], same layer only, applied as x @ w_skip
    layers: tuple[int, ...] = static_field()
    reads: str = static_field(default="resid_post")
    writes: str = static_field(default="resid_post")
    first: int = static_field(default=1)
    k: int | None = static_field(default=None)  # of a token's X F features, how many are kept
    info: CoderInfo = static_field(default=CoderInfo())

    @property
    def kind(self) -> str:
        """ "crosscoder" if it writes where it reads, else "clt"."""
        return "crosscoder" if self.reads == self.writes else "clt"

    def pre_activations(self, x: Any) -> jax.Array:
        """x [X, ..., D] -> z [X, ..., F], float32."""
        x = self._layered(x, self.d_in, f"{self.reads} of layers {self.layers}")
        flat = matmul(x.reshape(len(self.layers), -1, self.d_in), self.w_enc)
        flat = flat + float32(self.b_enc)[:, None, :]
        return flat.reshape(*x.shape[:-1], self.width)

    @jax.named_scope("encode")
    def encode(self, x: Any) -> jax.Array:
        """x [X, ..., D], raw activations at `reads` -> feature activations [X, ..., F], float32.

        Whatever token x is of: see `gs.encode`, which leaves out `<bos>` and padding.
        """
        z = self.pre_activations(x)
        X, threshold = len(self.layers), float32(self.threshold)
        f = jump_relu(z, threshold.reshape(X, *(1,) * (z.ndim - 2), self.width))
        if self.k is None:
            return f
        together = jnp.moveaxis(f, 0, -2)
        kept = largest(together.reshape(*together.shape[:-2], X * self.width), self.k)
        return jnp.moveaxis(kept.reshape(together.shape), -2, 0)

    @jax.named_scope("encode")
    def encode_layer(self, i: Any, x: Any) -> jax.Array:
        """The features of one source layer: x [..., D] -> [..., F]. `i` may be traced.

        Raises `InputError` for a TopK coder, see `by_layer`.
        """
        by_layer(self)
        encoder = self.encoder(i)
        x = expect_last_axis(x, self.d_in, f"{self.reads} of one layer")
        z = matmul(x, encoder.w_enc)
        z = z + along_last(encoder.b_enc, z)
        return jump_relu(z, along_last(encoder.threshold, z))

    @jax.named_scope("decode")
    def decode(self, f: Any, x: Any = None) -> jax.Array:
        """f [X, ..., F] -> reconstructions [X, ..., D] at `writes`, float32.

        A coder with `w_skip` also needs `x` [X, ..., D], what `encode` was given.
        """
        X = len(self.layers)
        f = self._layered(f, self.width, "feature activations")
        flat = f.reshape(X, -1, self.width)

        # One block of the triangle a step, sliced by the scan itself: differentiating keeps no
        # copies of the decoder, and its gradient comes out in its own layout.
        @jax.checkpoint
        def add_block(y, block):
            w, i, j = block
            return y.at[j].add(matmul(_at(flat, i), w)), None

        y = jnp.broadcast_to(float32(self.b_dec)[:, None, :], (X, flat.shape[1], self.d_out))
        y, _ = jax.lax.scan(add_block, y, (self._decoder(), *triangle(X)))
        if self.w_skip is not None:
            if x is None:
                raise InputError(
                    f"this {self.kind} adds x @ w_skip: call decode(f, x) with the {self.reads} "
                    "that was encoded"
                )
            x = self._layered(x, self.d_in, f"{self.reads} of layers {self.layers}")
            y = y + matmul(x.reshape(X, -1, self.d_in), self.w_skip)
        return y.reshape(*f.shape[:-1], self.d_out)

    @jax.named_scope("decode")
    def contributions(self, i: Any, f: Any) -> jax.Array:
        """What source layer `i`'s features f [..., F] write to every output layer: [X, ..., D].

        Zero for outputs before `i`; biases and skip are not in it. `i` may be traced: only the
        blocks of the triangle are computed all the same, and reverse-mode gradients work.
        """
        X = len(self.layers)
        i = self._own(i)
        f = expect_last_axis(f, self.width, "feature activations")
        w_dec = self._decoder()

        @jax.checkpoint  # or differentiating would keep a copy of every block
        def write_to(f, w_dec, j):
            return jax.lax.cond(
                j >= i,
                lambda: matmul(f, _at(w_dec, block_index(i, j, X))),
                lambda: jnp.zeros((*f.shape[:-1], self.d_out), jnp.float32),
            )

        step = lambda _, j: (None, write_to(f, w_dec, j))
        return jax.lax.scan(step, None, jnp.arange(X, dtype=jnp.int32))[1]

    def skip_layer(self, i: Any, x: Any) -> jax.Array:
        """x @ w_skip[i]: x [..., D] -> [..., D]; zeros if there is no skip. `i` may be traced."""
        i = self._own(i)
        x = expect_last_axis(x, self.d_in, f"{self.reads} of one layer")
        if self.w_skip is None:
            return jnp.zeros((*x.shape[:-1], self.d_out), jnp.float32)
        return matmul(x, _at(self.w_skip, i))

    def encoder(self, i: Any) -> Encoder:
        """The encoder of source layer `i`, as stored. `i` may be traced."""
        i = self._own(i)
        return Encoder(*(_at(a, i) for a in (self.w_enc, self.b_enc, self.threshold)))

    def decoder(self, i: Any, j: Any) -> jax.Array:
        """The decoder block [F, D] from source layer `i` to output layer `j` >= `i`, as stored."""
        i, j = self._own(i), self._own(j)
        if not isinstance(i, Tracer) and not isinstance(j, Tracer) and j < i:
            raise InputError(f"features of layer {i} do not write to the earlier layer {j}")
        return _at(self._decoder(), block_index(i, j, len(self.layers)))

    def full_decoder(self) -> jax.Array:
        """The decoder with its full output axis, as in the files: [X, F, X, D], zeros above."""
        X, w_dec = len(self.layers), jnp.asarray(self._decoder())
        full = jnp.zeros((X, X, self.width, self.d_out), w_dec.dtype).at[triangle(X)].set(w_dec)
        return full.transpose(0, 2, 1, 3)

    def _decoder(self) -> Any:
        if self.w_dec is None:
            raise InputError(
                f"the decoder of this {self.kind} was left on disk: bring it in with "
                "load_decoder(coder), or read single rows with decoder_rows"
            )
        return self.w_dec

    def _layered(self, x: Any, size: int, what: str) -> jax.Array:
        shape, X = np.shape(x), len(self.layers)
        if len(shape) < 2 or shape[0] != X:
            raise InputError(f"expected {what} of shape [{X}, ..., {size}], got {list(shape)}")
        return expect_last_axis(x, size, what)

    def unplaced(self) -> Self:
        """The same coder at layers 0 to X - 1 and from position 0 on."""
        return self.replace(layers=tuple(range(len(self.layers))), first=0)

    def check_shapes(self) -> None:
        """Raise `InputError` unless the fields' shapes agree. Looks at no values."""
        X, d, width = expect_rank(self, "w_enc", "X D F")
        expected = {"w_enc": (X, d, width), "b_enc": (X, width), "threshold": (X, width)}
        expected["b_dec"] = (X, d)
        if self.w_dec is not None:
            expected["w_dec"] = (X * (X + 1) // 2, width, d)
        if self.w_skip is not None:
            expected["w_skip"] = (X, d, d)
        expect_shapes(self, expected)
        check_k(self.k, X * width)
        layers = self.layers
        if len(layers) != X or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise InputError(f"layers {layers} are not {X} model layers in increasing order")

    __repr__ = Coder.__repr__


def _at(stacked: Any, i: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(jnp.asarray(stacked), i, keepdims=False)
