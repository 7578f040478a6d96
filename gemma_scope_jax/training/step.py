"""One compiled step: the model's pass, a shuffle buffer on the device, the coder's updates.

Activations of a pass (without <bos> and padding) overwrite the oldest of a ring buffer; updates
draw from it at random. Everything is divided by one scalar so that inputs have unit mean squared
norm; `fold` puts that scalar, and the decoder bias subtracted from the input, into the weights.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import counted, forward, site_width
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.training.losses import jumprelu, quadratic_l0, step
from gemma_scope_jax.training.recipe import TrainConfig


@flax.struct.dataclass
class Weights:
    """The trained parameters, float32, on inputs of unit mean squared norm."""

    w_enc: jax.Array  # [D, F]
    b_enc: jax.Array  # [F]
    threshold: jax.Array  # [F]
    w_dec: jax.Array  # [F, D], unit rows
    b_dec: jax.Array  # [D], subtracted from the input too


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds: resuming from it continues bit for bit."""

    weights: Weights
    optimizer: Any
    buffer: jax.Array  # [buffer, D] raw activations, bfloat16
    filled: jax.Array  # int32: activations ever written
    scale: jax.Array  # float32: root-mean-square norm of raw activations; 0 until known
    last_active: jax.Array  # int32 [F]: update at which a feature was last active
    update: jax.Array  # int32: updates done
    key: jax.Array


def schedule(config: TrainConfig):
    """Learning rate by update: cosine from a tenth over the warm-up, then constant (then decay)."""

    def rate(count):
        count = count.astype(jnp.float32)
        ramp = jnp.minimum(1.0, count / max(1, config.learning_rate_warmup))
        warm = 1.0 - 0.45 * (1.0 + jnp.cos(jnp.pi * ramp))
        tail = max(1.0, config.learning_rate_decay * config.total_updates)
        left = jnp.clip((config.total_updates - count) / tail, 0.0, 1.0)
        return config.learning_rate * warm * (left if config.learning_rate_decay else 1.0)

    return rate


def optimizer(config: TrainConfig) -> Any:  # optax's types know arrays, not dataclasses
    return optax.adam(schedule(config), b1=config.b1, b2=config.b2, eps=config.epsilon)


def init_state(config: TrainConfig, model: GemmaConfig, key: jax.Array) -> TrainState:
    """He-uniform decoder with unit rows, encoder its transpose, biases zero, thresholds given."""
    d_in = site_width(model, config.site)
    key, draw = jax.random.split(key)
    bound = (6.0 / d_in) ** 0.5
    w_dec = jax.random.uniform(draw, (config.width, d_in), jnp.float32, -bound, bound)
    w_dec = _unit_rows(w_dec)
    zeros = jnp.zeros(config.width)
    weights = Weights(w_dec.T, zeros, zeros + (config.threshold or 0.0), w_dec, jnp.zeros(d_in))
    return TrainState(
        weights,
        optimizer(config).init(weights),
        jnp.zeros((config.buffer, d_in), jnp.bfloat16),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.float32),
        jnp.zeros(config.width, jnp.int32),
        jnp.zeros((), jnp.int32),
        key,
    )


def _unit_rows(w: jax.Array) -> jax.Array:
    return w / jnp.linalg.norm(w, axis=-1, keepdims=True)


def loss(
    weights: Weights, x: jax.Array, l0_weight: jax.Array, dead: jax.Array, config: TrainConfig
):
    """Mean loss of a batch x [B, D] of unit mean squared norm, and its parts.

    Tokens beyond `outlier` root-mean-square norms weigh as if they stood at it. Features marked
    `dead` (float32 [F]) are drawn towards their thresholds.
    """
    z = (x - weights.b_dec[None, :]) @ weights.w_enc + weights.b_enc[None, :]
    f = jumprelu(z, weights.threshold, config.bandwidth)
    y = f @ weights.w_dec + weights.b_dec[None, :]
    error = jnp.sum((x - y) ** 2, -1)
    weight = jnp.minimum(1.0, config.outlier**2 / jnp.maximum(jnp.sum(x * x, -1), 1e-9))
    l0 = jnp.sum(step(z, weights.threshold, config.bandwidth), -1)
    if config.per_token:
        penalty = jnp.mean(quadratic_l0(l0, config.target_l0))
    else:
        penalty = quadratic_l0(jnp.mean(l0), config.target_l0)
    reconstruction = jnp.mean(weight * error)
    revival = jnp.mean(jnp.sum(dead[None, :] * jax.nn.relu(weights.threshold[None, :] - z), -1))
    centred = jnp.sum((x - jnp.mean(x, 0, keepdims=True)) ** 2, -1)
    parts = {
        "loss": reconstruction + l0_weight * penalty + config.dead_weight * revival,
        "mse": reconstruction,
        "fvu": jnp.sum(weight * error) / jnp.sum(weight * centred),
        "l0": jnp.mean(l0),
        "active": jnp.any(f > 0, 0),
    }
    return parts["loss"], parts


def update(state: TrainState, config: TrainConfig) -> tuple[TrainState, dict]:
    """One optimizer update on a batch drawn from the buffer."""
    key, draw = jax.random.split(state.key)
    rows = jax.random.randint(draw, (config.batch,), 0, state.buffer.shape[0])
    x = state.buffer[rows].astype(jnp.float32) / state.scale
    ramp = jnp.minimum(1.0, state.update.astype(jnp.float32) / max(1, config.l0_warmup))
    idle = state.update - state.last_active
    dead = (idle > config.dead_after).astype(jnp.float32)
    grads, parts = jax.grad(loss, has_aux=True)(
        state.weights, x, config.l0_weight * ramp, dead, config
    )
    # Moving along a decoder row only changes its norm, which is put back to one below.
    w_dec = state.weights.w_dec
    along = jnp.sum(grads.w_dec * w_dec, -1, keepdims=True)
    grads = dataclasses.replace(grads, w_dec=grads.w_dec - along * w_dec)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        changes, opt = optimizer(config).update(grads, state.optimizer, state.weights)
    before: Any = state.weights
    weights: Any = optax.apply_updates(before, changes)
    weights = dataclasses.replace(
        weights, w_dec=_unit_rows(weights.w_dec), threshold=jnp.maximum(weights.threshold, 0.0)
    )
    last = jnp.where(parts.pop("active"), state.update, state.last_active)
    parts["dead"] = jnp.mean(dead)
    state = dataclasses.replace(
        state, weights=weights, optimizer=opt, last_active=last, update=state.update + 1, key=key
    )
    return state, parts


def model_activations(model: Model, tokens, segments, config: TrainConfig):
    """Activations [B*T, D] of the site, and which of them count (no padding, no <bos>)."""
    out = forward(
        model, tokens, [capture(config.site, config.layer)],
        segments=segments, stop_at_layer=config.layer + 1, logits="none", remat=None,
    )  # fmt: skip
    x = out.reads[config.site]
    return x.reshape(-1, x.shape[-1]), counted(segments, 1).reshape(-1)


def fill(state: TrainState, x: jax.Array, counts: jax.Array) -> TrainState:
    """Write the activations that count over the oldest of the buffer."""
    size = state.buffer.shape[0]
    slot = (state.filled + jnp.cumsum(counts.astype(jnp.int32)) - 1) % size
    slot = jnp.where(counts, slot, size)  # beyond the end: dropped
    buffer = state.buffer.at[slot].set(x.astype(state.buffer.dtype), mode="drop")
    return dataclasses.replace(
        state, buffer=buffer, filled=state.filled + jnp.sum(counts, dtype=jnp.int32)
    )


def fill_step(state: TrainState, model: Model, tokens, segments, config: TrainConfig) -> TrainState:
    """A model pass that only fills the buffer."""
    return fill(state, *model_activations(model, tokens, segments, config))


def train_step(state: TrainState, model: Model, tokens, segments, config: TrainConfig):
    """A model pass and `config.updates` updates, one program: (state, means of the loss parts)."""
    state = fill_step(state, model, tokens, segments, config)
    state, parts = jax.lax.scan(lambda s, _: update(s, config), state, None, length=config.updates)
    return state, jax.tree.map(jnp.mean, parts)


def start(state: TrainState, config: TrainConfig) -> TrainState:
    """What the full buffer decides before the first update: the scale, and the first weights.

    The scale is the root-mean-square norm. With `config.threshold` None, the decoder bias starts at
    the mean and each threshold where its feature is active on target_l0 / width of the tokens: a
    short run then starts at its target L0 with nothing dead, instead of spending itself on getting
    there from half of all features.
    """
    rows = state.buffer.astype(jnp.float32)
    squares = jnp.sum(rows * rows, -1)
    # Rare tokens of enormous norm would otherwise decide the scale.
    squares = jnp.minimum(squares, config.outlier**2 * jnp.median(squares))
    scale = jnp.sqrt(jnp.mean(squares))
    w = state.weights
    if config.threshold is None:
        w = dataclasses.replace(w, b_dec=jnp.mean(rows, 0) / scale)
        sample = rows[:8192] / scale - w.b_dec[None, :]
        share = config.target_l0 / config.width
        w = dataclasses.replace(
            w, threshold=jnp.maximum(jnp.quantile(sample @ w.w_enc, 1 - share, 0), 0.001)
        )
    return dataclasses.replace(state, scale=scale, weights=w)


def fold(weights: Weights, scale: jax.Array, *, layer: int, site: str) -> SparseCoder:
    """The published form: raw inputs, nothing subtracted, the same features times `scale`.

    With C the scale: b_enc' = C (b_enc - b_dec w_enc), b_dec' = C b_dec, threshold' = C threshold.
    """
    w = weights
    return SparseCoder(
        w_enc=w.w_enc,
        b_enc=scale * (w.b_enc - w.b_dec @ w.w_enc),
        threshold=scale * w.threshold,
        w_dec=w.w_dec,
        b_dec=scale * w.b_dec,
        layer=layer,
        reads=site,
        writes=site,
    )
