"""The interface that SAEs, transcoders, crosscoders and CLTs share.

Code built on coders takes a `Coder` and never asks which class it is. Coders of several layers put
the layer axis first in activations, features and reconstructions: [X, ..., D] and [X, ..., F]. A
coder of one layer takes any leading axes, so code that always puts an X axis first runs on every
coder.

All coder arithmetic is float32 at full precision, whatever the dtype of the input or the weights:
residual norms reach 25,000, and bfloat16 coder maths visibly bends the dose-response of steering.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import TokenBatch, as_batch
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.model.identity import checksum
from gemma_scope_jax.storage.strict_json import legible

WEIGHTS = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec", "w_skip")
TOKENS = 256  # encoded at a time by `as_jump_relu`
Index = int | jax.Array  # one of a coder's own layers, 0 to X - 1; may be traced


@dataclasses.dataclass(frozen=True, eq=False)
class CoderInfo:
    """Where a coder comes from. Metadata only: it never changes a compiled program.

    Any two `CoderInfo` are equal and hash alike, so coders that differ only in weights and in this
    share one program. The price: a coder *returned* by a jitted function carries the info of the
    call that compiled it; restore the right one with `coder.replace(info=...)`.
    """

    model_name: str = ""  # "google/gemma-3-270m", "google/gemma-3-4b-it"; "" if unknown
    type: str = ""  # as published: "sae", "transcoder", "crosscoder", "clt"
    l0: float | None = None  # the target L0 in training
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
    """The encoder of one source layer; stacked over layers, each array has X first."""

    w_enc: Any  # [D, F]
    b_enc: Any  # [F]
    threshold: Any  # [F]


@flax.struct.dataclass
class Coder:
    """A frozen pytree that encodes activations at `reads` and reconstructs those at `writes`.

    The arrays of a `MultiLayerCoder` have a leading layer axis X, those of a `SparseCoder` do not.
    i and j are the coder's own layers, 0 to X - 1; `layers` are the corresponding model layers.
    """

    multi_layer: ClassVar[bool]
    axes: ClassVar[tuple[str, ...]]  # of the arrays in `WEIGHTS`, see `check_shapes`
    w_enc: jax.Array  # [X, D, F]
    b_enc: jax.Array  # [X, F]
    threshold: jax.Array  # [X, F]
    w_dec: Any  # [F, D_out]; several layers: blocks [P, F, D], or None if left on disk
    b_dec: jax.Array  # [X, D_out]
    w_skip: jax.Array | None = None  # [X, D, D_out], applied as x @ w_skip
    reads: str = static_field(default="resid_post")
    writes: str = static_field(default="resid_post")
    first: int = static_field(default=1)  # positions not trained on: 1 (`<bos>`), for chats 4
    k: int | None = static_field(default=None)  # TopK: features kept per token, over all layers
    info: CoderInfo = static_field(default=CoderInfo())

    if TYPE_CHECKING:  # a field of one subclass and a property of the other

        @property
        def layers(self) -> tuple[int, ...]: ...

        def replace(self, **changes: Any) -> Self: ...

    @property
    def kind(self) -> str:
        """ "sae", "transcoder", "skip_transcoder", "crosscoder" or "clt"."""
        raise NotImplementedError

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

    def pre_activations(self, x: ArrayLike) -> jax.Array:
        """x [X, ..., D] -> z [X, ..., F], float32."""
        raise NotImplementedError

    def encode(self, x: ArrayLike) -> jax.Array:
        """x [X, ..., D], raw activations at `reads` -> feature activations [X, ..., F], float32.

        Every token is encoded, although the features of `<bos>` and padding are meaningless;
        `gs.encode(coder, x, batch)` and `gs.features(coder)` leave those tokens out.
        """
        raise NotImplementedError

    def encode_layer(self, i: Index, x: ArrayLike) -> jax.Array:
        """The features of source layer `i` alone: x [..., D] -> [..., F].

        Raises `InputError` for TopK coders of several layers, see `by_layer`.
        """
        raise NotImplementedError

    def decode(self, f: ArrayLike, x: ArrayLike | None = None) -> jax.Array:
        """f [X, ..., F] -> reconstructions [X, ..., D_out] at `writes`, float32.

        A coder with `w_skip` also needs `x` [X, ..., D], the input of `encode`; others ignore it.
        """
        raise NotImplementedError

    def encoder(self, i: Index) -> Encoder:
        """The encoder of source layer `i`, as stored."""
        raise NotImplementedError

    def decoder(self, i: Index, j: Index) -> jax.Array:
        """What the features of layer `i` write to layer `j` >= `i`: [F, D_out], as stored."""
        raise NotImplementedError

    def written(self, i: Index, j: Index, features: ArrayLike) -> jax.Array:
        """The rows of `decoder(i, j)` of `features` [n]: float32 [n, D_out]."""
        raise NotImplementedError

    def unplaced(self) -> Self:
        """The same coder at layers 0 to X - 1, from position 0 on: one program for all places."""
        raise NotImplementedError

    def reconstruct(self, x: ArrayLike) -> jax.Array:
        """decode(encode(x), x): x [X, ..., D] -> [X, ..., D_out], float32."""
        return self.decode(self.encode(x), x)

    __call__ = reconstruct

    def check_shapes(self) -> None:
        """Raise `InputError` unless the fields agree in shape. Values are not read."""
        optional = ("w_skip", "w_dec") if self.multi_layer else ("w_skip",)
        sizes: dict[str, int] = {}
        for name, axes in zip(WEIGHTS, self.axes):
            array = getattr(self, name)
            if array is None and name in optional:
                continue
            shape, dtype = tuple(getattr(array, "shape", ())), getattr(array, "dtype", object)
            if len(shape) == len(axes.split()) and 0 not in shape:
                sizes = {**dict(zip(axes.split(), shape)), **sizes}
            expected = [sizes.get(axis, axis) for axis in axes.split()]
            if list(shape) != expected:
                wanted = ", ".join(map(str, expected))
                raise InputError(f"{name} has shape {list(shape)}, expected [{wanted}]")
            if not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"{name} has dtype {dtype}, expected a float")
            X = sizes.get("X", 1)
            sizes["P"] = X * (X + 1) // 2
        k, features = self.k, sizes.get("X", 1) * self.width
        if k is not None and not (type(k) is int and 0 < k <= features):
            raise InputError(f"k is {k!r:.40}, expected a whole number from 1 to {features}")

    def source(self, layer: int | None) -> int:
        """The own layer i of the model's `layer`; None: the only one. Raises `InputError`."""
        if layer is None and len(self.layers) == 1:
            return 0
        if layer not in self.layers:
            own = ", ".join(map(str, self.layers))
            raise InputError(f"layer {layer}: this coder has features of {own}")
        return self.layers.index(layer)

    def _own(self, i: Index) -> Index:
        """`i` itself if traced, else a checked int: dynamic indexing would silently clamp it."""
        if isinstance(i, Tracer):
            return i
        if not 0 <= (i := whole_number("layer", i)) < len(self.layers):
            raise InputError(f"this {self.kind} has layers 0 to {len(self.layers) - 1}, not {i}")
        return i

    def _skip_input(self, x: ArrayLike | None) -> ArrayLike:
        """The `x` that `decode` needs for the skip, or `InputError`."""
        if x is None:
            raise InputError(
                f"this {self.kind} adds x @ w_skip: call decode(f, x), where x is the "
                f"{self.reads} of {named_layers(self.layers)} that was encoded"
            )
        return x

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


# --- Maths ---------------------------------------------------------------------------------------


def float32(x: ArrayLike) -> jax.Array:
    """`x` as a float32 array; the identity (no copy) if it is one."""
    return jnp.asarray(x).astype(jnp.float32)


def matmul(x: jax.Array, w: ArrayLike) -> jax.Array:
    """x [..., A] @ w [A, B] in full float32 -> [..., B]."""
    return jnp.matmul(x, float32(w), precision=jax.lax.Precision.HIGHEST)


def along_last(v: ArrayLike, template: jax.Array) -> jax.Array:
    """A vector [A], float32, with the unit axes that broadcast it over `template` [..., A]."""
    return float32(v).reshape((1,) * (template.ndim - 1) + (-1,))


def jump_relu(z: jax.Array, threshold: jax.Array) -> jax.Array:
    """z * (z > threshold), z and threshold of the same rank. Strict: a tie is not active.

    The product mask * relu(z) is the official form; unlike a `where` it lets a NaN through.
    """
    return (z > threshold).astype(z.dtype) * jax.nn.relu(z)


def largest(f: jax.Array, k: int) -> jax.Array:
    """f [..., F], not negative, with all but the k largest of each row set to 0.

    Of equal values the first are kept. Gradients go to the kept values.
    """
    if k >= f.shape[-1]:
        return f
    values, index = jax.lax.top_k(f, k)
    return jnp.put_along_axis(jnp.zeros_like(f), index, values, axis=-1, inplace=False)


def encode(
    coder: Coder, activations: ArrayLike, batch: TokenBatch | ArrayLike, *, first: int | None = None
) -> jax.Array:
    """`coder.encode`, zero on padding and on the first tokens of each document: [B, T, F].

    A coder cannot see which token an activation belongs to. On `<bos>` and padding `coder.encode`
    gives meaningless features, often many and large: averaged with the others they spoil figures.

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


def as_jump_relu(coder: Coder, x: ArrayLike) -> Coder:
    """The JumpReLU coder nearest to a TopK coder: one threshold for all features, at least 0.

    It is another function, to be measured anew: TopK keeps k features of every token, while with a
    threshold a token of twice the norm has far more.

    x: raw activations at `reads`, [N, D] or, for several layers, [X, N, D]: a few thousand typical
    tokens without <bos>. On these the mean L0 becomes k, if enough pre-activations are positive.
    Raises `InputError` for a coder without k and an x without tokens.
    """
    if coder.k is None:
        raise InputError("this coder is not a TopK coder: it has thresholds of its own")
    axes = 1 + coder.multi_layer
    x = np.asarray(x, np.float32)
    x = x.reshape(*x.shape[: axes - 1], -1, x.shape[-1]) if x.ndim >= axes else x
    tokens = x.shape[-2] if x.ndim == 1 + axes else 0
    if not tokens:
        raise InputError(f"no activations to set a threshold from: x has shape {list(x.shape)}")
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


# --- Identity and checks -------------------------------------------------------------------------


def weights_identity(coder: Coder) -> str:
    """16 hexadecimal digits that identify a coder's weights; of several layers without the decoder,
    which may be on disk: training that changes it changes the biases, too.
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
    sites = (coder.reads, coder.d_in, "reads"), (coder.writes, coder.d_out, "writes")
    for site, size, verb in sites:
        if size != (width := site_width(config, site)):
            raise InputError(
                f"the coder {verb} {size} values at {site}, where {config.name} has {width}: "
                "it is for another model"
            )


def by_layer(coder: Coder) -> None:
    """Raise `InputError` for a coder whose layers cannot be encoded one at a time."""
    if coder.multi_layer and coder.k is not None:
        raise InputError(
            f"this {coder.kind} keeps the {coder.k} largest features of a token over all of its "
            "layers, so a single layer cannot be encoded, as the model would need: encode all "
            "layers at once, or convert it with as_jump_relu"
        )


def expect_last_axis(x: ArrayLike, size: int, what: str) -> jax.Array:
    """`x` in float32; raises `InputError` unless it is `what` [..., size]."""
    shape = np.shape(x)
    if len(shape) < 1 or shape[-1] != size:
        raise InputError(f"expected {what} with last axis {size}, got an array of shape {shape}")
    return float32(x)
