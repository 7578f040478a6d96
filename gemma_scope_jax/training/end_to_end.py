"""Finetuning a coder by what it does to the model: equation (6) of the Gemma Scope 2 paper.

    L = (MSE + alpha beta KL(p(x), p(x_hat))) / (1 + beta),  alpha = MSE / KL as a constant

On the tokens of a pass the model runs as it is and with the reconstruction in place of what the
coder writes, and the KL divergence of the two predictions is differentiated through the layers in
between. A coder of several layers is spliced at all of them at once, each reconstruction made from
the activations of the model as it is. There is no shuffle buffer: updates see whole texts.

`coders.splice.replacement` is another model: it runs coders in published form where they stand, on
activations that earlier reconstructions have changed. Here the reconstructions come from weights in
training's units, batch-wide activations among them, and are differentiated; only their place in
the model is an intercept.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import Context, Intercept, capture, per_layer, write
from gemma_scope_jax.training import buffer
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training.objective import activate, cutoff, decode, encode, loss
from gemma_scope_jax.training.state import TrainPlan, TrainState
from gemma_scope_jax.training.weights import CoderGroup, Weights


def update(state: TrainState, model: Model, batch: TokenBatch, plan: TrainPlan):
    """One update of the groups with a `kl_weight` on one model pass: (state, parts of each).

    A pass with no token in the batch's mask changes nothing.
    """
    reads = [capture(site, layers) for site, layers in plan.sites]
    out = forward(model, batch, reads, remat=None)
    mask = batch.counted(plan.config.first).reshape(-1)
    x = {s: out.reads[s].reshape(len(ls), -1, out.reads[s].shape[-1]) for s, ls in plan.sites}
    clean = jax.nn.log_softmax(out.logits.astype(jnp.float32), -1)

    def run(splice: Intercept):
        logits = forward(model, batch, [splice]).logits
        spliced = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
        each = jnp.sum(jnp.exp(clean) * (clean - spliced), -1).reshape(-1)
        return jnp.sum(jnp.where(mask, each, 0.0)) / jnp.maximum(
            jnp.sum(mask, dtype=jnp.float32), 1.0
        )

    done, parts = [], []
    for group, old in zip(plan.groups, state.groups):
        part: Any = None
        if group.template.loss.kl_weight:
            read, target = buffer.pairs(plan, group, x, state.scale)
            new, part = _update_group(
                old, group, read, target, mask, batch.tokens.shape, run, state, plan
            )
            old = jax.tree.map(partial(jnp.where, jnp.any(mask)), new, old)
        done.append(old)
        parts.append(part)
    return dataclasses.replace(state, groups=tuple(done)), parts


def _update_group(old, group: CoderGroup, x, y, mask, shape, run, state, plan):
    dials = steps.dials(old, group, state.update)
    # As many rows as there are tokens, going round those in the mask: the rest is left out.
    order = jnp.argsort(~mask, stable=True)
    rows = order[jnp.arange(mask.shape[0]) % jnp.maximum(jnp.sum(mask), 1)]

    def total(w: Weights):
        kl = _divergences(w, group, x, rows, mask, shape, run, state.scale, plan)
        codes = encode(w, x[:, :, rows], group)
        value, parts = loss(w, codes, x[:, :, rows], y[:, :, rows], dials, group, kl)
        return value, parts | {"kl": kl}

    grads, parts = jax.grad(total, has_aux=True)(old.weights)
    return steps.apply(old, grads, parts, dials, state, plan, group)


def _divergences(
    w: Weights, group: CoderGroup, x, rows, mask, shape, run, scale, plan
) -> jax.Array:
    """KL(model, model with the reconstruction of coder n) for each n: [N].

    BatchTopK keeps its share of the tokens in the mask, `rows`, not of <bos> and padding, too.
    """
    codes, edge = encode(w, x, group), None
    if group.template.activation == "batch_topk":
        edge = cutoff(codes.z[:, :, rows], group)
    outputs = [out[:, -1] for out in decode(w, activate(codes, group, edge)[0], codes, x, group)]
    found = []
    for n, c in enumerate(group.coders):
        raw = buffer.scales_of(plan, c, scale)["out"]
        y_hat = jnp.stack([out[n] * raw[j] for j, out in enumerate(outputs)])
        y_hat = per_layer(y_hat.reshape(len(raw), *shape, -1))
        keep = mask.reshape(*shape, 1)
        found.append(run(write(c.target, c.layer_tuple, _put, y_hat, keep)))
    return jnp.stack(found)


def _put(x: jax.Array, ctx: Context, y_hat, keep) -> jax.Array:
    """The reconstruction of the layer at hand, at the tokens to keep."""
    return jnp.where(keep, y_hat.astype(x.dtype), x)
