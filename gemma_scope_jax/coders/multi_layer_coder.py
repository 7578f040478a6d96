"""Coders that read and write several layers: weakly causal crosscoders and cross-layer transcoders.

A feature is read at one source layer and may write to that layer and to every later one:

    f[i] = JumpReLU(x[i] @ w_enc[i] + b_enc[i])
    y[j] = sum over i <= j of f[i] @ decoder(i, j) + b_dec[j] [+ x[j] @ w_skip[j]]

Both kinds share this parameterisation (Gemma Scope 2 technical paper, section 2.6). Only the
triangle j >= i of the decoder exists, so only it is stored: for the 1b CLT, 13.5 instead of 26
blocks per layer.

A TopK coder (`k`) keeps the k largest features of a token over all of its layers together, as in
training: which features of one layer it keeps depends on the others, later ones included.
"""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from gemma_scope_jax.coders import coder as shared
from gemma_scope_jax.coders.coder import Coder, Encoder, Index, along_last, float32, matmul
from gemma_scope_jax.errors import InputError


def block_index(i: Any, j: Any, layers: int) -> Any:
    """The number of the decoder block from source layer `i` to output layer `j` >= `i` in `w_dec`.

    Source-major: all of layer 0's blocks, then layer 1's. Integers or traced integers.
    """
    return i * layers - i * (i - 1) // 2 + (j - i)


def triangle(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """The source and the output layer of every block of `w_dec`, int32 [P] each."""
    source, target = np.triu_indices(layers)
    return source.astype(np.int32), target.astype(np.int32)


@flax.struct.dataclass
class MultiLayerCoder(Coder):
    """A coder of X layers; i and j are its own layers, 0 to X - 1, which are `layers` of the model.

    w_enc [X, D, F], b_enc and threshold [X, F], w_dec [P, F, D] (P = X (X + 1) / 2 blocks in the
    order of `block_index`), b_dec [X, D], w_skip [X, D, D] (same layer only) or None. `w_dec` is
    None if left on disk, because a CLT's decoder is most of its tens of gigabytes: everything but
    decoding works, and `load_decoder` loads it.
    """

    multi_layer = True
    axes = ("X D F", "X F", "X F", "P F D", "X D", "X D D")
    layers: tuple[int, ...] = shared.static_field()

    @property
    def kind(self) -> str:
        """ "crosscoder" if it writes where it reads, else "clt"."""
        return "crosscoder" if self.reads == self.writes else "clt"

    def pre_activations(self, x: ArrayLike) -> jax.Array:
        x = self._input(x)
        flat = matmul(x.reshape(len(self.layers), -1, self.d_in), self.w_enc)
        flat = flat + float32(self.b_enc)[:, None, :]
        return flat.reshape(*x.shape[:-1], self.width)

    @jax.named_scope("encode")
    def encode(self, x: ArrayLike) -> jax.Array:
        z = self.pre_activations(x)
        X, threshold = len(self.layers), float32(self.threshold)
        f = shared.jump_relu(z, threshold.reshape(X, *(1,) * (z.ndim - 2), self.width))
        if self.k is None:
            return f
        together = jnp.moveaxis(f, 0, -2)
        kept = shared.largest(together.reshape(*together.shape[:-2], X * self.width), self.k)
        return jnp.moveaxis(kept.reshape(together.shape), -2, 0)

    @jax.named_scope("encode")
    def encode_layer(self, i: Index, x: ArrayLike) -> jax.Array:
        shared.by_layer(self)
        encoder = self.encoder(i)
        z = matmul(self._input_of_one(x), encoder.w_enc)
        z = z + along_last(encoder.b_enc, z)
        return shared.jump_relu(z, along_last(encoder.threshold, z))

    @jax.named_scope("decode")
    def decode(self, f: ArrayLike, x: ArrayLike | None = None) -> jax.Array:
        X = len(self.layers)
        f = self._layered(f, self.width, "feature activations")
        flat = f.reshape(X, -1, self.width)

        # One block of the triangle per step, sliced by the scan itself: differentiating keeps no
        # copies of the decoder, and its gradient comes out in its own layout.
        @jax.checkpoint
        def add_block(y, block):
            w, i, j = block
            return y.at[j].add(matmul(at_layer(flat, i), w)), None

        y = jnp.broadcast_to(float32(self.b_dec)[:, None, :], (X, flat.shape[1], self.d_out))
        y, _ = jax.lax.scan(add_block, y, (self._decoder(), *triangle(X)))
        if self.w_skip is not None:
            x = self._input(self._skip_input(x))
            y = y + matmul(x.reshape(X, -1, self.d_in), self.w_skip)
        return y.reshape(*f.shape[:-1], self.d_out)

    @jax.named_scope("decode")
    def contributions(self, i: Index, f: ArrayLike) -> jax.Array:
        """What source layer `i`'s features f [..., F] write to every output layer: [X, ..., D].

        Zero for outputs before `i`; without biases and skip. Only the blocks of the triangle are
        computed, even for a traced `i`, and reverse-mode gradients work.
        """
        X = len(self.layers)
        i = self._own(i)
        f = shared.expect_last_axis(f, self.width, "feature activations")
        w_dec = self._decoder()

        @jax.checkpoint  # or differentiating would keep a copy of every block
        def write_to(f, w_dec, j):
            return jax.lax.cond(
                j >= i,
                lambda: matmul(f, at_layer(w_dec, block_index(i, j, X))),
                lambda: jnp.zeros((*f.shape[:-1], self.d_out), jnp.float32),
            )

        step = lambda _, j: (None, write_to(f, w_dec, j))
        return jax.lax.scan(step, None, jnp.arange(X, dtype=jnp.int32))[1]

    def skip_layer(self, i: Index, x: ArrayLike) -> jax.Array:
        """x @ w_skip[i]: x [..., D] -> [..., D]; zeros without a skip. `i` may be traced."""
        i = self._own(i)
        x = self._input_of_one(x)
        if self.w_skip is None:
            return jnp.zeros((*x.shape[:-1], self.d_out), jnp.float32)
        return matmul(x, at_layer(self.w_skip, i))

    def encoder(self, i: Index) -> Encoder:
        i = self._own(i)
        return Encoder(*(at_layer(a, i) for a in (self.w_enc, self.b_enc, self.threshold)))

    def decoder(self, i: Index, j: Index) -> jax.Array:
        i, j = self._own(i), self._own(j)
        if not isinstance(i, Tracer) and not isinstance(j, Tracer) and j < i:
            raise InputError(f"features of layer {i} do not write to the earlier layer {j}")
        return at_layer(self._decoder(), block_index(i, j, len(self.layers)))

    def written(self, i: Index, j: Index, features: ArrayLike) -> jax.Array:
        block = block_index(self._own(i), self._own(j), len(self.layers))
        return float32(jnp.asarray(self._decoder())[block, jnp.asarray(features)])

    def full_decoder(self) -> jax.Array:
        """The decoder with its full output axis, as in the files: [X, F, X, D], zeros above."""
        X, w_dec = len(self.layers), jnp.asarray(self._decoder())
        full = jnp.zeros((X, X, self.width, self.d_out), w_dec.dtype).at[triangle(X)].set(w_dec)
        return full.transpose(0, 2, 1, 3)

    def _decoder(self) -> jax.Array:
        if self.w_dec is None:
            raise InputError(
                f"the decoder of this {self.kind} was left on disk: load it with "
                "load_decoder(coder), or read single rows with decoder_rows"
            )
        return self.w_dec

    def _input(self, x: ArrayLike) -> jax.Array:
        return self._layered(x, self.d_in, f"{self.reads} of layers {self.layers}")

    def _input_of_one(self, x: ArrayLike) -> jax.Array:
        return shared.expect_last_axis(x, self.d_in, f"{self.reads} of one layer")

    def _layered(self, x: ArrayLike, size: int, what: str) -> jax.Array:
        shape, X = np.shape(x), len(self.layers)
        if len(shape) < 2 or shape[0] != X:
            raise InputError(f"expected {what} of shape [{X}, ..., {size}], got {list(shape)}")
        return shared.expect_last_axis(x, size, what)

    def unplaced(self) -> Self:
        return self.replace(layers=tuple(range(len(self.layers))), first=0)

    def check_shapes(self) -> None:
        super().check_shapes()
        X, layers = self.w_enc.shape[0], self.layers
        if len(layers) != X or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise InputError(f"layers {layers} are not {X} model layers in increasing order")

    __repr__ = Coder.__repr__


def at_layer(stacked: ArrayLike, i: Index) -> jax.Array:
    """Entry `i`, which may be traced, of the first axis."""
    return jax.lax.dynamic_index_in_dim(jnp.asarray(stacked), i, keepdims=False)
