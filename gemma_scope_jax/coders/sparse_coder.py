"""A coder of one layer (SAE, transcoder, skip-transcoder): a pytree that knows where it belongs.

    z = x @ w_enc + b_enc                       x raw: not normalised, b_dec not subtracted
    f = z * (z > threshold)                     JumpReLU, strict; never relu(z - threshold)
    y = f @ w_dec + b_dec [+ x @ w_skip]

A TopK coder has a `k`: of f only the k largest of a token stay (`largest`); its thresholds
are 0.

Source: Gemma Scope 2 technical paper, sections 2.1-2.3 and 3.1-3.2, and the official tutorial. All
arithmetic is float32 at full precision whatever the dtype of `x` or of the weights: residual norms
reach 25,000, and bfloat16 coder maths visibly bends the dose-response of steering.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class CoderInfo:
    """Where a coder comes from. Metadata only: it never changes a compiled program.

    A coder's static fields are part of what `jax.jit` compiles for. Any two `CoderInfo` are equal
    and hash alike, so coders that differ only in weights and in this share one program. The price:
    a coder *returned* by a jitted function carries the info of the first call that compiled it; put
    the right one back with `coder.replace(info=...)`.
    """

    model_name: str = ""  # "google/gemma-3-270m", "google/gemma-3-4b-it"; "" if unknown
    type: str = ""  # as published: "sae", "transcoder", "crosscoder", "clt"
    l0: float | None = None  # the target L0 it was trained for
    width: int | None = None  # as published: the total over all layers
    path: str = ""  # the address or folder it was loaded from
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config.json as read
    folder: str = ""  # where its files are on this machine

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CoderInfo)

    def __hash__(self) -> int:
        return hash(CoderInfo)


def static_field(**kwargs) -> Any:
    """A keyword-only field that is part of the program, not of the data."""
    return flax.struct.field(pytree_node=False, kw_only=True, **kwargs)


def float32(x: Any) -> jax.Array:
    """`x` as a float32 array; the identity (no copy) if it is one."""
    return jnp.asarray(x).astype(jnp.float32)


def matmul(x: jax.Array, w: Any) -> jax.Array:
    """x [..., A] @ w [A, B] in full float32 -> [..., B]."""
    return jnp.matmul(x, float32(w), precision=jax.lax.Precision.HIGHEST)


def along_last(v: Any, like: jax.Array) -> jax.Array:
    """A vector [A], float32, with the unit axes that broadcast it over `like` [..., A]."""
    return float32(v).reshape((1,) * (like.ndim - 1) + (-1,))


def jump_relu(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """z * (z > threshold), z and threshold of the same rank. Strict: a tie is silent.

    The product mask * relu(z) is the official form; unlike a `where` it lets a NaN through.
    """
    return (z > threshold).astype(z.dtype) * jax.nn.relu(z)


def largest(f: jax.Array, k: int) -> jax.Array:
    """f [..., F], not negative, with all but the k largest of each row set to 0.

    Exactly k are kept, of equal ones the first; fewer where fewer are above 0. Gradients go to
    those that are kept.
    """
    if k >= f.shape[-1]:
        return f
    values, index = jax.lax.top_k(f, k)
    return jnp.put_along_axis(jnp.zeros_like(f), index, values, axis=-1, inplace=False)


def expect_last_axis(x: Any, size: int, what: str) -> jax.Array:
    """`x` in float32, or an `InputError` saying that `what` [..., size] was expected."""
    shape = np.shape(x)
    if len(shape) < 1 or shape[-1] != size:
        raise InputError(f"expected {what} with last axis {size}, got an array of shape {shape}")
    return float32(x)


@flax.struct.dataclass
class SparseCoder:
    """One layer's coder. D inputs, F features, D_out outputs; weights float32 or bfloat16.

    `reads` and `writes` are sites of the model: equal for an SAE, `mlp_in` and `mlp_out` for a
    transcoder. `first` is how many leading token positions the coder was not trained on: 1 for
    `<bos>`, 4 for the coders of instruction-tuned models (`<bos><start_of_turn>user\\n`).
    `k` makes it a TopK coder, whose features hang on all others': none can be computed alone.
    """

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
    def kind(self) -> str:
        """ "sae", "transcoder" or "skip_transcoder"."""
        if self.w_skip is not None:
            return "skip_transcoder"
        return "sae" if self.reads == self.writes else "transcoder"

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def width(self) -> int:
        """The number of features F."""
        return self.w_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.w_dec.shape[1]

    def pre_activations(self, x: Any) -> jax.Array:
        """x [..., D] -> z [..., F], float32."""
        x = expect_last_axis(x, self.d_in, f"{self.reads} of layer {self.layer}")
        z = matmul(x, self.w_enc)
        return z + along_last(self.b_enc, z)

    @jax.named_scope("encode")
    def encode(self, x: Any) -> jax.Array:
        """x [..., D], the raw activation at site `reads` -> feature activations [..., F], float32.

        Raises `InputError` if the last axis is not D.
        """
        z = self.pre_activations(x)
        f = jump_relu(z, along_last(self.threshold, z))
        return f if self.k is None else largest(f, self.k)

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

    def reconstruct(self, x: Any) -> jax.Array:
        """decode(encode(x), x): x [..., D] -> [..., D_out], float32."""
        return self.decode(self.encode(x), x)

    __call__ = reconstruct


def expect_shapes(coder: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` unless every named field of `coder` is a float array of that shape."""
    for name, shape in expected.items():
        array = getattr(coder, name)
        got = tuple(getattr(array, "shape", ()))
        if got != shape:
            raise InputError(f"{name} has shape {list(got)}, expected {list(shape)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{name} has dtype {array.dtype}, expected a float")


def expect_rank(coder: Any, name: str, axes: str) -> tuple[int, ...]:
    """The shape of a field, or `InputError` unless it has the axes named, none empty."""
    shape = tuple(getattr(getattr(coder, name), "shape", ()))
    if len(shape) != len(axes.split()) or 0 in shape:
        raise InputError(f"{name} has shape {list(shape)}, expected [{', '.join(axes.split())}]")
    return shape


def check_coder(coder: SparseCoder) -> None:
    """Raise `InputError` unless the shapes of a `SparseCoder` agree. Looks at no values."""
    d_in, width = expect_rank(coder, "w_enc", "D F")
    _, d_out = expect_rank(coder, "w_dec", "F D_out")
    expected = {"w_enc": (d_in, width), "b_enc": (width,), "threshold": (width,)}
    expected |= {"w_dec": (width, d_out), "b_dec": (d_out,)}
    if coder.w_skip is not None:
        expected["w_skip"] = (d_in, d_out)
    expect_shapes(coder, expected)
    if coder.reads == coder.writes and d_in != d_out:
        raise InputError(
            f"w_dec writes {d_out} values, but {coder.writes}, which this coder reads and writes, "
            f"has {d_in}"
        )
    if coder.layer < 0 or coder.first < 0:
        raise InputError(f"layer {coder.layer} and first {coder.first} must not be negative")
    check_k(coder.k, width)


def check_k(k: Any, features: int) -> None:
    """Raise `InputError` unless k is None or can be the number of features kept of so many."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= features):
        raise InputError(f"k is {k!r:.40}, expected a whole number from 1 to {features}")
