"""The parameters in training, and their conversion to and from the published form.

Coders of the same shape form a *group*: their weights are stacked, so that one product serves all.
Axes here: N coders of the group, X layers of each (1 for an SAE), F features of a layer, D inputs,
E outputs, B activations, M prefixes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, CoderInfo, float32
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class CoderGroup:
    """Coders of a run that differ only in layers, targets, weights of losses and seeds."""

    coders: tuple[CoderConfig, ...]

    @property
    def template(self) -> CoderConfig:
        """The first coder, for all that the coders have in common."""
        return self.coders[0]

    @property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """[N][X] layers of the model."""
        return tuple(c.layer_tuple for c in self.coders)

    @property
    def X(self) -> int:
        return len(self.layers[0])

    @property
    def ends(self) -> tuple[int, ...]:
        """The ends of the M nested reconstructions; the last one is the whole."""
        return (*self.template.prefixes, self.template.width)

    @property
    def dead_limit(self) -> jax.Array:
        """The share of tokens below which a feature is dead: [N, 1, 1]."""
        mean = self.of("target_l0") / (self.X * self.template.width)
        return (self.template.loss.dead_below * mean)[:, None, None]

    def of(self, field: str) -> jax.Array:
        """A field of each coder's config, or of its loss, as float32 [N]."""
        values = [getattr(c if hasattr(c, field) else c.loss, field) for c in self.coders]
        return jnp.asarray(values, jnp.float32)


def groups(config: TrainConfig) -> tuple[CoderGroup, ...]:
    """The coders of a run, those of the same shape and program together."""
    found: dict[Any, list[CoderConfig]] = {}
    for c in config.coders:
        loss = dataclasses.replace(c.loss, l0_weight=0.0, frequency_weight=0.0, dead_weight=0.0)
        k = c.target_l0 if c.activation != "jumprelu" else 0  # a constant of the program
        uses = (c.loss.frequency_weight > 0, c.loss.dead_weight > 0)
        shape = (len(c.layer_tuple), c.is_multi_layer, c.reads, c.target, c.width, c.skip)
        key = (*shape, c.activation, k, c.apply_b_dec_to_input, c.prefixes, loss, uses)
        found.setdefault((*key, c.threshold is None), []).append(c)
    return tuple(CoderGroup(tuple(coders)) for coders in found.values())


@flax.struct.dataclass
class Weights:
    """The trained parameters of a group, float32, for activations of unit mean squared norm."""

    w_enc: jax.Array  # [N, X, F, D], one row for each feature
    b_enc: jax.Array  # [N, X, F]
    threshold: jax.Array  # [N, X, F]
    w_dec: tuple[jax.Array, ...]  # for output layer j, from the layers up to it: [N, j + 1, F, E]
    b_dec: jax.Array  # [N, X, E]; also subtracted from the input with `apply_b_dec_to_input`
    w_skip: jax.Array | None = None  # [N, X, D, E]


def decoder_norms(w_dec: tuple[jax.Array, ...]) -> jax.Array:
    """The norm of each feature's decoder over all output layers: [N, X, F]."""
    X = len(w_dec)
    squares = [sum(jnp.sum(w_dec[j][:, i] ** 2, -1) for j in range(i, X)) for i in range(X)]
    return jnp.sqrt(jnp.stack(squares, 1))


def unit_decoder(w_dec: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Every feature's decoder at unit norm."""
    norms = jnp.maximum(decoder_norms(w_dec), 1e-20)
    return tuple(w / norms[:, : w.shape[1], :, None] for w in w_dec)


def unit_rows(w: Weights) -> Weights:
    """The same coder with decoders of unit norm: the norm moves to encoders and thresholds."""
    norms = decoder_norms(w.w_dec)
    return dataclasses.replace(
        w,
        w_enc=w.w_enc * norms[..., None],
        b_enc=w.b_enc * norms,
        threshold=w.threshold * norms,
        w_dec=unit_decoder(w.w_dec),
    )


def encoder_bias(w: Weights, apply_b_dec_to_input: bool) -> jax.Array:
    """b_enc, with the effect of subtracting b_dec from the input if it is: [N, X, F]."""
    if not apply_b_dec_to_input:
        return w.b_enc
    return w.b_enc - jnp.einsum("nxfd,nxd->nxf", w.w_enc, w.b_dec)


def fold(
    w: Weights,
    n: int,
    config: CoderConfig,
    scales: Mapping[str, jax.Array],
    first: int = 1,
    info: CoderInfo | None = None,
) -> Coder:
    """Coder `n` of a group in the published form: for raw inputs, with nothing subtracted.

    `scales` maps "in" and "out" to root-mean-square norms C, D of raw activations [X] each. Decoder
    rows of one layer keep unit norm, so features become D times larger:

        w_enc' = w_enc D / C   b_enc' = D (b_enc - w_enc b_dec)   threshold' = D threshold
        b_dec' = D b_dec       w_skip' = w_skip D / C   w_dec'(i,j) = w_dec(i,j) D_j / D_i

    The features of a TopK coder compete over all layers: they all become mean D times larger, and
    w_dec' takes the rest.
    Source: Gemma Scope 2, section 3.2, generalised to targets other than the input.
    """
    c_in, c_out, units = scales["in"], scales["out"], _feature_units(config.k, scales["out"])
    w_enc = jnp.swapaxes(w.w_enc[n], -1, -2) * (units / c_in)[:, None, None]
    b_enc = encoder_bias(w, config.apply_b_dec_to_input)[n] * units[:, None]
    threshold, b_dec = w.threshold[n] * units[:, None], w.b_dec[n] * c_out[:, None]
    if config.k is not None:
        threshold = jnp.zeros_like(threshold)
    w_skip = None if w.w_skip is None else w.w_skip[n] * (c_out / c_in)[:, None, None]
    place: dict[str, Any] = {"reads": config.reads, "writes": config.target, "first": first}
    place |= {"k": config.k, "info": info or CoderInfo()}
    if not config.is_multi_layer:
        one = [a[0] for a in (w_enc, b_enc, threshold, w.w_dec[0][n], b_dec)]
        skip = None if w_skip is None else w_skip[0]
        return SparseCoder(*one, w_skip=skip, layer=config.layer_tuple[0], **place)
    X = len(config.layer_tuple)
    blocks = [w.w_dec[j][n, i] * (c_out[j] / units[i]) for i in range(X) for j in range(i, X)]
    parts = (w_enc, b_enc, threshold, jnp.stack(blocks), b_dec, w_skip)
    return MultiLayerCoder(*parts, layers=config.layer_tuple, **place)


def _feature_units(k: int | None, c_out: jax.Array) -> jax.Array:
    """The factor by which each layer's features become larger in a folded coder: [X]."""
    return c_out if k is None else jnp.broadcast_to(jnp.mean(c_out), c_out.shape)


def _check_activation(coder: Coder, config: CoderConfig) -> None:
    """Raise `InputError` for a TopK coder that training would turn into another function."""
    if coder.k is not None and config.activation != "topk":
        raise InputError(
            f"the coder to start from keeps the {coder.k} largest features of a token, which is "
            f'not {config.activation}: set activation="topk", or convert it with as_jump_relu'
        )
    if coder.k is not None and not coder.multi_layer:
        norms = np.linalg.norm(np.asarray(coder.w_dec, np.float32), axis=1)
        if np.ptp(norms) > 0.01 * norms.max():
            raise InputError(
                f"the coder to start from has decoder rows of norms {norms.min():.3g} to "
                f"{norms.max():.3g}: at unit norm, as in training, other features would be its "
                f"{coder.k} largest"
            )


def unfold(coder: Coder, config: CoderConfig, scales: Mapping[str, jax.Array]) -> Weights:
    """The inverse of `fold`, N = 1: any coder, published or own, as weights to train further.

    Raises `InputError` if it does not have the shape, sites, layers or kind of `config`.
    """
    _check_activation(coder, config)
    c_in, c_out, units = scales["in"], scales["out"], _feature_units(coder.k, scales["out"])
    for what, have, want in (
        ("layers", tuple(coder.layers), config.layer_tuple),
        ("reads", coder.reads, config.reads),
        ("writes", coder.writes, config.target),
        ("width", coder.width, config.width),
        ("skip", coder.w_skip is not None, config.skip),
    ):
        if have != want:
            raise InputError(f"the coder to start from has {what} {have}, the config {want}")
    stack = lambda x: float32(x) if coder.multi_layer else float32(x)[None]
    w_enc = jnp.swapaxes(stack(coder.w_enc), -1, -2) * (c_in / units)[:, None, None]
    b_dec = stack(coder.b_dec) / c_out[:, None]
    b_enc = stack(coder.b_enc) / units[:, None]
    if config.apply_b_dec_to_input:
        b_enc = b_enc + jnp.einsum("xfd,xd->xf", w_enc, b_dec)
    w_dec = tuple(
        jnp.stack([float32(coder.decoder(i, j)) * (units[i] / c_out[j]) for i in range(j + 1)])
        for j in range(len(config.layer_tuple))
    )
    w_skip = None if coder.w_skip is None else stack(coder.w_skip) * (c_in / c_out)[:, None, None]
    w = Weights(w_enc, b_enc, stack(coder.threshold) / units[:, None], w_dec, b_dec, w_skip)
    return unit_rows(jax.tree.map(lambda x: x[None], w))
