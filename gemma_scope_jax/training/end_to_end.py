"""Finetuning a coder by its effect on the model: equation (6) of the Gemma Scope 2 paper.

    L = (MSE + alpha beta KL(p(x), p(x_hat))) / (1 + beta),  alpha = MSE / KL as a constant

The model runs on the tokens of a pass as it is, and with the reconstruction in place of what the
coder writes; the KL divergence of the two predictions is differentiated. A coder of several layers
is spliced at all of them at once, with reconstructions from the activations of the unchanged model
(unlike `coders.splice.replacement`). There is no shuffle buffer: updates see whole texts.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import Context, Intercept, capture, per_layer, write
from gemma_scope_jax.training import buffer
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training.objective import Parts, activate, cutoff, decode, encode, loss
from gemma_scope_jax.training.state import GroupState, Sites, TrainPlan, TrainState
from gemma_scope_jax.training.weights import CoderGroup, Weights


@dataclasses.dataclass(frozen=True)
class _ModelPass:
    """A pass of the model that runs once more for each reconstruction."""

    model: Model
    batch: TokenBatch
    mask: jax.Array  # bool [B*T]: the tokens to train on
    rows: jax.Array  # int32 [B*T]: their positions, over and over
    clean: jax.Array  # [B, T, V] log-probabilities of the unchanged model

    def divergence(self, splice: Intercept) -> jax.Array:
        """KL(the model, the model under `splice`), the mean over the mask."""
        logits = forward(self.model, self.batch, [splice]).logits
        spliced = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
        each = jnp.sum(jnp.exp(self.clean) * (self.clean - spliced), -1).reshape(-1)
        count = jnp.maximum(jnp.sum(self.mask, dtype=jnp.float32), 1.0)
        return jnp.sum(jnp.where(self.mask, each, 0.0)) / count


def update(
    state: TrainState, model: Model, batch: TokenBatch, plan: TrainPlan
) -> tuple[TrainState, list[Parts]]:
    """One update of the groups with a `kl_weight` on one model pass: (state, their parts, and {}
    for other groups).

    A pass with no token in the batch's mask changes nothing.
    """
    reads = [capture(site, layers) for site, layers in plan.sites]
    out = forward(model, batch, reads, remat=None)
    mask = batch.counted(plan.config.first).reshape(-1)
    order = jnp.argsort(~mask, stable=True)
    rows = order[jnp.arange(mask.shape[0]) % jnp.maximum(jnp.sum(mask), 1)]
    clean = jax.nn.log_softmax(out.logits.astype(jnp.float32), -1)
    own, x = _ModelPass(model, batch, mask, rows, clean), buffer.all_rows(out.reads, plan)
    done, parts = [], []
    for group, old in zip(plan.groups, state.groups):
        part = {}
        if group.template.loss.kl_weight:
            new, part = _update_group(old, group, x, own, state, plan)
            old = jax.tree.map(partial(jnp.where, jnp.any(mask)), new, old)
        done.append(old)
        parts.append(part)
    return dataclasses.replace(state, groups=tuple(done)), parts


def _update_group(
    old: GroupState,
    group: CoderGroup,
    x: Sites,
    own: _ModelPass,
    state: TrainState,
    plan: TrainPlan,
) -> tuple[GroupState, Parts]:
    read, target = buffer.pairs(plan, group, x, state.scale)
    dials = steps.dials(old, group, state.update)
    some = read[:, :, own.rows], target[:, :, own.rows]

    def total(w: Weights) -> tuple[jax.Array, Parts]:
        kl = _divergences(w, group, read, own, state.scale, plan)
        value, parts = loss(w, encode(w, some[0], group), *some, dials, group, kl)
        return value, parts | {"kl": kl}

    grads, parts = jax.grad(total, has_aux=True)(old.weights)
    return steps.apply(old, grads, parts, dials, state, plan, group)


def _divergences(
    w: Weights, group: CoderGroup, x: jax.Array, own: _ModelPass, scale: Sites, plan: TrainPlan
) -> jax.Array:
    """KL(model, model with the reconstruction of coder n) for each n: [N].

    BatchTopK keeps its share of the tokens in the mask, not of <bos> and padding.
    """
    codes = encode(w, x, group)
    if group.template.activation == "batch_topk":
        codes = dataclasses.replace(codes, edge=cutoff(codes.z[:, :, own.rows], group))
    outputs = [out[:, -1] for out in decode(w, activate(codes, group)[0], codes, x, group)]
    found, shape = [], own.batch.tokens.shape
    for n, c in enumerate(group.coders):
        raw = buffer.scales_of(plan, c, scale)["out"]
        y_hat = jnp.stack([out[n] * raw[j] for j, out in enumerate(outputs)])
        y_hat = per_layer(y_hat.reshape(len(raw), *shape, -1))
        keep = own.mask.reshape(*shape, 1)
        found.append(own.divergence(write(c.target, c.layer_tuple, _put, y_hat, keep)))
    return jnp.stack(found)


def _put(x: jax.Array, ctx: Context, y_hat: jax.Array, keep: jax.Array) -> jax.Array:
    """The layer's reconstruction at the tokens to keep."""
    return jnp.where(keep, y_hat.astype(x.dtype), x)
