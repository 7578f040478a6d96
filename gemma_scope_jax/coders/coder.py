"""One type for all coders: what SAEs, transcoders, crosscoders and CLTs answer alike.

The rooms above take a `Coder` and never ask which class it is. Coders of several layers have the
layer axis first in activations, features and reconstructions: [X, ..., D] and [X, ..., F]. A coder
of one layer takes any leading axes, so also an X of 1: code that always puts the layers first runs
on every coder.

All coder arithmetic is float32 at full precision whatever the dtype of the input or the weights:
residual norms reach 25,000, and bfloat16 coder maths visibly bends the dose-response of steering.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.model.identity import checksum
from gemma_scope_jax.storage.strict_json import legible


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


class Encoder(NamedTuple):
    """What encoding one source layer takes; stacked over layers, each with X first."""

    w_enc: Any  # [D, F]
    b_enc: Any  # [F]
    threshold: Any  # [F]


class Coder:
    """A frozen pytree that encodes activations at `reads` and reconstructs those at `writes`.

    `SparseCoder` and `MultiLayerCoder` are the two there are. Their arrays have a leading layer
    axis X if `multi_layer`; i and j count the coder's own layers, 0 to X - 1, which are `layers` of
    the model. `first` is how many leading token positions the coder was not trained on: 1 for
    `<bos>`, 4 for the coders of instruction-tuned models (`<bos><start_of_turn>user\\n`). With a
    `k` it is a TopK coder: of a token's features only the k largest stay, over all layers.
    """

    multi_layer: ClassVar[bool]
    w_enc: Any  # [X, D, F]
    b_enc: Any  # [X, F]
    threshold: Any  # [X, F]
    w_dec: Any  # [F, D_out], of several layers blocks [P, F, D]; None if left on disk
    b_dec: Any  # [X, D_out]
    w_skip: Any  # [X, D, D_out] or None, applied as x @ w_skip
    layers: tuple[int, ...]
    reads: str
    writes: str
    first: int
    k: int | None
    info: CoderInfo
    kind: str  # "sae", "transcoder", "skip_transcoder", "crosscoder" or "clt"

    @property
    def d_in(self) -> int:
        """D, the width of the input."""
        return self.w_enc.shape[-2]

    @property
    def d_out(self) -> int:
        """D_out, the width of the reconstruction."""
        return self.b_dec.shape[-1]

    @property
    def width(self) -> int:
        """The number of features F of each source layer; the published width is the total, X F."""
        return self.w_enc.shape[-1]

    def pre_activations(self, x: Any) -> jax.Array:
        """x [X, ..., D] -> z [X, ..., F], float32."""
        raise NotImplementedError

    def encode(self, x: Any) -> jax.Array:
        """x [X, ..., D], raw activations at `reads` -> feature activations [X, ..., F], float32."""
        raise NotImplementedError

    def encode_layer(self, i: Any, x: Any) -> jax.Array:
        """The features of source layer `i` alone: x [..., D] -> [..., F]. `i` may be traced."""
        raise NotImplementedError

    def decode(self, f: Any, x: Any = None) -> jax.Array:
        """f [X, ..., F] -> reconstructions [X, ..., D_out]; with a skip it also needs `x`."""
        raise NotImplementedError

    def encoder(self, i: Any) -> Encoder:
        """The encoder of source layer `i`, as stored. `i` may be traced."""
        raise NotImplementedError

    def decoder(self, i: Any, j: Any) -> jax.Array:
        """What the features of layer `i` write to layer `j` >= `i`: [F, D_out], as stored."""
        raise NotImplementedError

    def check_shapes(self) -> None:
        """Raise `InputError` unless the fields' shapes agree. Looks at no values."""
        raise NotImplementedError

    def unplaced(self) -> Self:
        """The same maths at layers 0 to X - 1, from position 0 on: one program for all places."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in the fields named."""
        raise NotImplementedError

    def reconstruct(self, x: Any) -> jax.Array:
        """decode(encode(x), x): x [X, ..., D] -> [X, ..., D_out], float32."""
        return self.decode(self.encode(x), x)

    __call__ = reconstruct

    def source(self, layer: int | None) -> int:
        """Which own layer i the model's `layer` is; None: the only one. Raises `InputError`."""
        if layer is None and len(self.layers) == 1:
            return 0
        if layer not in self.layers:
            own = ", ".join(map(str, self.layers))
            raise InputError(f"layer {layer}: this coder has features of {own}")
        return self.layers.index(layer)

    def _own(self, i: Any) -> Any:
        """`i` itself if traced; else an int, checked, as dynamic indexing would silently clamp."""
        if isinstance(i, Tracer):
            return i
        if not 0 <= (i := whole_number("layer", i)) < len(self.layers):
            raise InputError(f"this {self.kind} has layers 0 to {len(self.layers) - 1}, not {i}")
        return i

    def __repr__(self) -> str:
        """One line without arrays."""
        count = "?" if not hasattr(self.w_enc, "shape") else str(self.width)
        count = f"{len(self.layers)} x {count}" if self.multi_layer else count
        parts = [self.kind, ends(self), named_layers(self.layers), f"{count} features"]
        for name, value in (("k", self.k), ("L0", self.info.l0)):
            parts += [] if value is None else [f"{name} {value:g}"]
        return f"{type(self).__name__}({', '.join(parts)})"


def ends(coder: Coder) -> str:
    """Its site, or "mlp_in -> mlp_out"."""
    return coder.reads if coder.reads == coder.writes else f"{coder.reads} -> {coder.writes}"


def named_layers(layers: Sequence[int]) -> str:
    """ "layer 12", "layers 0-17" or "layers 5, 9, 12"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    every = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"layers {f'{layers[0]}-{layers[-1]}' if every else ', '.join(map(str, layers))}"


# -------------------------------------------------------------------------------------------------
# Maths


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


TOKENS = 256  # encoded at a time by `as_jump_relu`


def as_jump_relu(coder: Coder, x: Any) -> Coder:
    """The JumpReLU coder nearest to a TopK coder: one threshold for all features, never below 0.

    Another function, for readers that know no TopK: TopK gives each token its k features, JumpReLU
    each feature its threshold, so a token of twice the norm has as many features of the one and far
    more of the other. The converted coder's figures have to be measured anew.

    x: raw activations at `reads`, [N, D] or, of several layers, [X, N, D]; a few thousand tokens
    that are as the coder's future ones, without <bos>. On these its mean L0 is k, as far as so many
    pre-activations are positive. Raises `InputError` for a coder without k and an x without tokens.
    """
    if coder.k is None:
        raise InputError("this coder is no TopK coder: it has thresholds of its own")
    axes = 1 + coder.multi_layer
    x = np.asarray(x, np.float32)
    x = x.reshape(*x.shape[: axes - 1], -1, x.shape[-1]) if x.ndim >= axes else x
    tokens = x.shape[-2] if x.ndim == 1 + axes else 0
    if not tokens:
        raise InputError(f"no activations to set a threshold by, x has shape {list(x.shape)}")
    wanted = coder.k * tokens
    found = np.zeros(0, np.float32)
    for start in range(0, tokens, TOKENS):
        z = np.asarray(coder.pre_activations(x[..., start : start + TOKENS, :])).reshape(-1)
        found = np.concatenate([found, z[z > 0]])
        if found.size > wanted:
            found = np.partition(found, found.size - wanted)[found.size - wanted :]
    edge = found.min(initial=np.inf) if found.size == wanted else 0.0
    threshold = max(float(np.nextafter(np.float32(edge), np.float32(-1))), 0.0)  # it is strict
    return coder.replace(
        k=None,
        threshold=jnp.full_like(jnp.asarray(coder.threshold), threshold),
        info=dataclasses.replace(coder.info, l0=coder.info.l0 or coder.k),
    )


# -------------------------------------------------------------------------------------------------
# Identity and checks


def weights_identity(coder: Coder) -> str:
    """Tells a coder's weights from any others: 16 hexadecimal digits.

    Without the decoder of several layers, which may still be on disk: whatever trains it moves the
    biases, too.
    """
    weights = coder.replace(w_dec=None) if coder.multi_layer else coder
    return checksum(weights if coder.k is None else (weights, np.array([coder.k], np.float32)))


def public_name(coder: Coder) -> str:
    """The coder's address, or the name of its folder: no paths of this machine."""
    path = coder.info.path or coder.kind
    return legible(os.path.basename(path) if os.path.isabs(path) else path)


def check_fits(config: GemmaConfig, coder: Coder) -> None:
    """Raise `InputError` unless the model has the coder's layers and its sites the right widths."""
    last = max(coder.layers)
    if last >= config.layers:
        raise InputError(
            f"the coder is for layer {last}, but {config.name} has layers 0 to {config.layers - 1}"
        )
    for site, size, verb in (
        (coder.reads, coder.d_in, "reads"),
        (coder.writes, coder.d_out, "writes"),
    ):
        width = site_width(config, site)
        if size != width:
            raise InputError(
                f"the coder {verb} {size} values at {site}, where {config.name} has {width}: "
                "it is for another model"
            )


def by_layer(coder: Coder) -> None:
    """Raise `InputError` for a coder whose layers cannot be encoded one at a time."""
    if coder.multi_layer and coder.k is not None:
        raise InputError(
            f"this {coder.kind} keeps the {coder.k} largest features of a token over all of its "
            "layers, so that none can be encoded alone, as inside the model: encode all layers at "
            "once, or make it a JumpReLU coder with as_jump_relu"
        )


def expect_last_axis(x: Any, size: int, what: str) -> jax.Array:
    """`x` in float32, or an `InputError` saying that `what` [..., size] was expected."""
    shape = np.shape(x)
    if len(shape) < 1 or shape[-1] != size:
        raise InputError(f"expected {what} with last axis {size}, got an array of shape {shape}")
    return float32(x)


def expect_shapes(coder: Coder, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` unless every named field of `coder` is a float array of that shape."""
    for name, shape in expected.items():
        array = getattr(coder, name)
        got = tuple(getattr(array, "shape", ()))
        if got != shape:
            raise InputError(f"{name} has shape {list(got)}, expected {list(shape)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{name} has dtype {array.dtype}, expected a float")


def expect_rank(coder: Coder, name: str, axes: str) -> tuple[int, ...]:
    """The shape of a field, or `InputError` unless it has the axes named, none empty."""
    shape = tuple(getattr(getattr(coder, name), "shape", ()))
    if len(shape) != len(axes.split()) or 0 in shape:
        raise InputError(f"{name} has shape {list(shape)}, expected [{', '.join(axes.split())}]")
    return shape


def check_k(k: Any, features: int) -> None:
    """Raise `InputError` unless k is None or can be the number of features kept of so many."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= features):
        raise InputError(f"k is {k!r:.40}, expected a whole number from 1 to {features}")
