"""How coders start: at random, from the data, from a coder, or from one coder for each layer.

Random is the published start: decoders are He-uniform with unit norm, encoders their transpose (a
transcoder's are drawn separately: its sites are different spaces), biases zero, thresholds given.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training.recipe import CoderConfig
from gemma_scope_jax.training.weights import (
    CoderGroup,
    Weights,
    decoder_norms,
    encoder_bias,
    unfold,
    unit_decoder,
    unit_rows,
)


def random_weights(group: CoderGroup, d_in: int, d_out: int, seed: int) -> Weights:
    """The published start; each coder has its own seed, so that grouping changes nothing."""
    one = [_random(c, d_in, d_out, jax.random.key(seed)) for c in group.coders]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)


def _random(config: CoderConfig, d_in: int, d_out: int, key: jax.Array) -> Weights:
    X, F = len(config.layer_tuple), config.width
    key = jax.random.fold_in(key, config.seed)
    dec, enc = jax.random.split(key)

    def he(key: jax.Array, *shape: int) -> jax.Array:
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


STEPS = 8  # of conjugate gradients, for a coder of one layer
SEEN = 16  # activations of each feature in the sample, below which there is nothing to fit


def _unit(w: jax.Array) -> jax.Array:
    return w / jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-20)


def from_data(w: Weights, group: CoderGroup, x: jax.Array, y: jax.Array) -> Weights:
    """With `threshold=None`: biases, skip and thresholds from a sample: x [N, X, B, D] and
    y [N, X, B, E].

    The decoder bias starts at the mean, the affine skip at the ridge regression of y on x, and each
    threshold where its feature is active on target_l0 / (X F) of the tokens (l0_start / (X F), if
    given). So even a short run starts near its target L0, with nothing dead. Decoders that write
    another site than is read start at a regression on the features' activations (`fitted`), unless
    the coder is so wide that each feature is active on a few tokens of the sample only.
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
    at = lambda n, i: _exceeded(w.w_enc[n, i] @ x[n, i].T, share[n])
    rows = [jnp.stack([at(n, i) for i in range(group.X)]) for n in range(len(starts))]
    w = dataclasses.replace(w, threshold=jnp.maximum(jnp.stack(rows) + bias, 0.001))
    if group.template.target == group.template.reads:
        return w
    outlier = group.template.loss.outlier
    one = lambda n: jax.tree.map(lambda leaf: leaf[n], w)
    fits = [
        fitted(one(n), x[n], y[n], outlier) if share[n] * x.shape[2] >= SEEN else one(n).w_dec
        for n in range(len(starts))
    ]
    return dataclasses.replace(w, w_dec=tuple(map(jnp.stack, zip(*fits))))


def fitted(w: Weights, x: jax.Array, y: jax.Array, outlier: float) -> list[jax.Array]:
    """Decoders of unit norm for random encoders: x [X, B, D], y [X, B, E] of one coder.

    Source by source, a few steps of conjugate gradients towards the regression of what skip and
    sources before leave on the activations at the start. With decoders at random half
    of the features would begin by making the error larger, and be driven below zero. A feature that
    is active nowhere keeps its decoder.
    """
    X = x.shape[0]
    left = y - w.b_dec[:, None, :]
    if w.w_skip is not None:
        left = left - jnp.einsum("xbd,xde->xbe", x, w.w_skip)
    norm = jnp.linalg.norm(y, axis=-1, keepdims=True)
    weight = jnp.minimum(1.0, outlier / jnp.maximum(norm, 1e-20))
    rows: list[list[jax.Array]] = [[] for _ in range(X)]
    for i in range(X):
        z = x[i] @ w.w_enc[i].T + w.b_enc[i][None]
        f = jnp.where(z > w.threshold[i][None], z, 0.0)
        for j in range(i, X):
            fit, left_j = _towards(f * weight[j], left[j] * weight[j], max(1, STEPS // X))
            rows[j].append(fit)
            left = left.at[j].set(left_j / weight[j])
    fit = [w[0] for w in unit_decoder(tuple(jnp.stack(r)[None] for r in rows))]
    norms = decoder_norms(tuple(r[None] for r in fit))[0, :, :, None]
    return [jnp.where(norms[: j + 1] > 0.5, fit[j], w.w_dec[j]) for j in range(X)]


def _towards(f: jax.Array, y: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """(decoder [F, E], what it leaves of y [B, E]) after `steps` of conjugate gradients towards the
    ridge regression of y on f [B, F] of unit columns."""
    size = jnp.linalg.norm(f, axis=0, keepdims=True)
    size = jnp.maximum(size, 1e-6 * jnp.max(size))
    f = f / size
    rest = f.T @ y

    def step(_, state):
        fit, rest, way, square = state
        up = f.T @ (f @ way) + way
        far = square / jnp.maximum(jnp.sum(way * up), 1e-30)
        rest = rest - far * up
        new = jnp.sum(rest**2)
        return fit + far * way, rest, rest + new / jnp.maximum(square, 1e-30) * way, new

    state = (jnp.zeros_like(rest), rest, rest, jnp.sum(rest**2))
    fit = jax.lax.fori_loop(0, steps, step, state)[0]
    return fit / size.T, y - f @ fit


def _exceeded(z: jax.Array, share: float) -> jax.Array:
    """The value that each row of z [F, B] exceeds in a share of its columns.

    It is halfway between two values, and at least a ten-thousandth below the upper one: many tokens
    may have the same value, and rounding would decide whether it exceeds a threshold equal to it.
    """
    above = min(max(round(share * z.shape[1]), 1), z.shape[1] - 1)
    top = jax.lax.top_k(z, above + 1)[0]
    low, high = top[:, above], top[:, above - 1]
    return high - jnp.maximum((high - low) / 2, 1e-4 * jnp.abs(high))


def from_coders(
    coders: Sequence[Coder], config: CoderConfig, scales: Mapping[str, jax.Array]
) -> tuple[Weights, list[jax.Array]]:
    """A coder of several layers from one Matryoshka-ordered coder for each layer; N = 1.

    From the earliest layer on, each layer takes its first `width` unmarked features. For each, it
    marks the most similar feature of every later layer (the early decoder times the later encoder),
    which is not taken again. The early feature starts by writing what the marked one wrote, times
    the similarity (our rule). Also returns the ids of the features taken, [F] for each layer.
    Source: Gemma Scope 2 technical paper, section 3.3.
    """
    X = len(coders)
    single = [_alone(c, config, i, scales) for i, c in enumerate(coders)]
    free = [jnp.ones(c.width, bool) for c in coders]
    taken, blocks = [], {}
    for i, w in enumerate(single):
        if int(free[i].sum()) < config.width:
            raise InputError(
                f"{config.init_layers[i]}: only {int(free[i].sum())} features are left after those "
                f"of earlier layers; {config.width} are needed"
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
    """Raise `InputError` unless the coders are of one layer each, those of the config."""
    for coder, address, layer in zip(coders, config.init_layers, config.layer_tuple):
        if coder.multi_layer:
            raise InputError(f"{address}: has several layers; a coder of one layer is needed")
        got = (coder.layers[0], coder.reads, coder.writes)
        if got != (wanted := (layer, config.reads, config.target)):
            place = "layer {}, {} to {}".format
            raise InputError(f"{address}: is for {place(*got)}, not for {place(*wanted)}")


def _alone(coder: Coder, config: CoderConfig, i: int, scales: Mapping[str, jax.Array]) -> Weights:
    """The coder of layer `i` in training units."""
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
