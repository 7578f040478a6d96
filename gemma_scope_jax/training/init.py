"""How coders start: at random, from the data, from a coder, from one coder a layer.

Random is the published start: decoders He-uniform and of unit norm, the encoder their transpose (a
transcoder's is drawn apart, as its two ends are different spaces), biases zero, thresholds given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training.recipe import CoderConfig
from gemma_scope_jax.training.weights import (
    CoderGroup,
    Weights,
    encoder_bias,
    unfold,
    unit_decoder,
    unit_rows,
)


def random_weights(group: CoderGroup, d_in: int, d_out: int, seed: int) -> Weights:
    """The published start, each coder from its own seed, so that grouping changes nothing."""
    one = [_random(c, d_in, d_out, jax.random.key(seed)) for c in group.coders]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)


def _random(config: CoderConfig, d_in: int, d_out: int, key: jax.Array) -> Weights:
    X, F = len(config.layer_tuple), config.width
    key = jax.random.fold_in(key, config.seed)
    dec, enc = jax.random.split(key)

    def he(key, *shape):
        bound = (6.0 / shape[-1]) ** 0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    w_dec = tuple(he(jax.random.fold_in(dec, j), 1, j + 1, F, d_out) for j in range(X))
    w_dec = tuple(w[0] for w in unit_decoder(w_dec))
    if config.target == config.reads:
        w_enc = jnp.stack([_unit(w_dec[i][i]) for i in range(X)])
    else:
        w_enc = _unit(he(enc, X, F, d_in))
    zeros = jnp.zeros((X, F))
    skip = jnp.zeros((X, d_in, d_out)) if config.skip else None
    threshold = zeros + (config.threshold or 0.0)
    return Weights(w_enc, zeros, threshold, w_dec, jnp.zeros((X, d_out)), skip)


def _unit(w: jax.Array) -> jax.Array:
    return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-20)


def from_data(w: Weights, group: CoderGroup, x: jax.Array, y: jax.Array) -> Weights:
    """Biases, skip and thresholds from a sample x [N, X, B, D], y [N, X, B, E], where asked for.

    With `threshold=None` the decoder bias starts at the mean, the affine skip at the ridge
    regression of y on x, and each threshold where its feature is active on target_l0 / (X F) of the
    tokens (of l0_start, where the target comes down from it): a short run then starts near its
    target L0 with nothing dead, instead of spending itself on getting there from half of all
    features.
    """
    if group.template.threshold is not None:
        return w
    mean_x, mean_y = jnp.mean(x, 2), jnp.mean(y, 2)
    b_dec = mean_y
    if w.w_skip is not None:
        centred = x - mean_x[:, :, None]
        cross = jnp.einsum("nxbd,nxbe->nxde", centred, y - mean_y[:, :, None]) / x.shape[2]
        cov = jnp.einsum("nxbd,nxbe->nxde", centred, centred) / x.shape[2]
        ridge = 1e-3 * jnp.trace(cov, axis1=2, axis2=3)[..., None, None] / cov.shape[-1]
        skip = jnp.linalg.solve(cov + ridge * jnp.eye(cov.shape[-1])[None, None], cross)
        b_dec = mean_y - jnp.einsum("nxd,nxde->nxe", mean_x, skip)
        w = dataclasses.replace(w, w_skip=skip)
    b_enc = w.b_enc
    if not group.template.apply_b_dec_to_input:
        b_enc = -jnp.einsum("nxfd,nxd->nxf", w.w_enc, mean_x)
    w = dataclasses.replace(w, b_dec=b_dec, b_enc=b_enc)
    starts = [c.loss.l0_start or c.target_l0 for c in group.coders]
    share = [l0 / (group.X * group.template.width) for l0 in starts]
    bias = encoder_bias(w, group.template.apply_b_dec_to_input)
    rows = [
        [_exceeded(w.w_enc[n, i] @ x[n, i].T, share[n]) for i in range(group.X)]
        for n in range(len(group.coders))
    ]
    threshold = jnp.stack([jnp.stack(r) for r in rows]) + bias
    return dataclasses.replace(w, threshold=jnp.maximum(threshold, 0.001))


def _exceeded(z: jax.Array, share: float) -> jax.Array:
    """What each row of z [F, B] exceeds in a share of its values.

    Halfway between two of them and, as many tokens may have the same value, a ten-thousandth below
    the upper one at least: whether a value on the threshold is above it would hang on rounding.
    Only the largest values are sorted, since few are asked for.
    """
    above = min(max(round(share * z.shape[1]), 1), z.shape[1] - 1)
    top = jax.lax.top_k(z, above + 1)[0]
    low, high = top[:, above], top[:, above - 1]
    return high - jnp.maximum((high - low) / 2, 1e-4 * jnp.abs(high))


def from_coders(
    coders: Sequence[Any], config: CoderConfig, scales: Mapping[str, Any]
) -> tuple[Weights, list[jax.Array]]:
    """A coder of several layers from one Matryoshka-ordered coder a layer; N = 1.

    From the earliest layer on, each layer takes the first `width` features not marked yet, and
    marks, for each, the most similar one of every later layer, similarity being the early decoder
    times the later encoder: it is the same feature, and should not be taken again. Where a feature
    was marked, the early one starts by writing what the later one wrote, times the similarity (that
    last rule is ours; the paper tells only the choice). Also returns the features taken, [F] ids a
    layer. Source: Gemma Scope 2 technical paper, section 3.3.
    """
    X = len(coders)
    single = [_alone(c, config, i, scales) for i, c in enumerate(coders)]
    free = [jnp.ones(c.width, bool) for c in coders]
    taken, blocks = [], {}
    for i, w in enumerate(single):
        if int(free[i].sum()) < config.width:
            raise InputError(
                f"{config.init_layers[i]}: {int(free[i].sum())} features are left to take after "
                f"those of earlier layers; {config.width} are needed"
            )
        ids = jnp.nonzero(free[i], size=config.width)[0]
        taken.append(ids)
        decoder = w.w_dec[0][0, 0][ids]
        blocks[i, i] = decoder
        for j in range(i + 1, X):
            later = single[j]
            similar = decoder @ later.w_enc[0, 0].T
            best = jnp.argmax(similar, 1)
            free[j] = free[j].at[best].set(False)
            strength = jax.nn.relu(jnp.max(similar, 1))[:, None]
            blocks[i, j] = strength * later.w_dec[0][0, 0][best]
    pick = lambda f: jnp.stack([f(w, ids) for w, ids in zip(single, taken)])[None]
    w_dec = tuple(jnp.stack([blocks[i, j] for i in range(j + 1)])[None] for j in range(X))
    skip = None
    if config.skip:
        has = all(w.w_skip is not None for w in single)
        d, e = single[0].w_enc.shape[-1], single[0].b_dec.shape[-1]
        skip = pick(lambda w, _: w.w_skip[0, 0]) if has else jnp.zeros((1, X, d, e))
    w = Weights(
        w_enc=pick(lambda w, ids: w.w_enc[0, 0][ids]),
        b_enc=pick(lambda w, ids: w.b_enc[0, 0][ids]),
        threshold=pick(lambda w, ids: w.threshold[0, 0][ids]),
        w_dec=w_dec,
        b_dec=pick(lambda w, _: w.b_dec[0, 0]),
        w_skip=skip,
    )
    return unit_rows(w), taken


def check_coders(coders: Sequence[Coder], config: CoderConfig) -> None:
    """Raise `InputError` unless there is a coder of one layer for each of the config's."""
    for coder, address, layer in zip(coders, config.init_layers, config.layer_tuple):
        if coder.multi_layer:
            raise InputError(f"{address}: a coder of one layer is needed here")
        got = (coder.layers[0], coder.reads, coder.writes)
        if got != (layer, config.reads, config.target):
            raise InputError(
                f"{address}: stands at layer {got[0]}, {got[1]} to {got[2]}, not at layer {layer}, "
                f"{config.reads} to {config.target}"
            )


def _alone(coder: Coder, config: CoderConfig, i: int, scales: Mapping[str, Any]) -> Weights:
    """Coder of layer `i` in training units."""
    one = dataclasses.replace(
        config,
        layers=config.layer_tuple[i],
        width=coder.width,
        skip=coder.w_skip is not None,
        init_layers=(),
        prefixes=(),
        target_l0=min(config.target_l0, coder.width - 1),
    )
    return unfold(coder, one, {k: v[i : i + 1] for k, v in scales.items()})


def expected_l0(w: Weights, group: CoderGroup, n: int, x: jax.Array) -> jax.Array:
    """The mean L0 of coder `n` of a group on x [X, B, D] of unit mean squared norm."""
    z = jnp.einsum("xbd,xfd->xbf", float32(x), w.w_enc[n])
    z = z + encoder_bias(w, group.template.apply_b_dec_to_input)[n][:, None, :]
    return jnp.mean(jnp.sum(z > w.threshold[n][:, None, :], (0, 2)))
