"""Edits of MLP neurons: the hidden activation of the real model is changed where it is.

A neuron's activation is an entry of mlp_act, so that nothing of the MLP has to be repeated: what a
change writes runs through the down projection and the norm after the MLP, live or frozen like all
norms. The control's neurons keep their activations, and others change instead.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.circuits.edit_rows import another, drawn
from gemma_scope_jax.circuits.interventions import Edits
from gemma_scope_jax.circuits.neurons import MlpNeurons
from gemma_scope_jax.coders.coder import float32, matmul
from gemma_scope_jax.coders.multi_layer_coder import at_layer
from gemma_scope_jax.model.block import gelu
from gemma_scope_jax.model.intercept import tokenwise


@flax.struct.dataclass
class NeuronEdits:
    """Edits [B, E] of neurons, and which neuron each changes, by how much for a change of 1."""

    edits: Edits
    to: jax.Array  # int32 [B, E]
    size: jax.Array  # float32 [B, E]


def neuron_edits(neurons: MlpNeurons, edits: Edits, noise: tuple[Any, ...]) -> NeuronEdits:
    """The edits; in the control (`noise` as in `gathered`) of other neurons of the same layers, so
    that as much is written before the norm after the MLP scales it."""
    swap = noise[0]
    others = another(neurons, edits.feature, drawn(edits.layer.shape[1], *noise[1:]))
    layer = jnp.maximum(edits.layer, 0)

    def norm(ids):
        rows = float32(jnp.asarray(neurons.w_dec)[layer, ids])
        gain = 1.0 + float32(jnp.asarray(neurons.norm)[layer])
        return jnp.linalg.norm(rows * gain, axis=-1)

    size = norm(edits.feature) / jnp.maximum(norm(others), 1e-30)
    to = jnp.where(swap, others, edits.feature)
    return NeuronEdits(edits, to, jnp.where(swap, size, jnp.ones_like(size)))


@tokenwise
def edited_neurons(h, ctx, given: NeuronEdits, held, neurons: MlpNeurons, *, freeze):
    """mlp_act [B, T, M] of this layer under the edits; held [L]: whether the MLP is linear here,
    about row 0, which is the prompt."""
    edits, act = given.edits, float32(h)
    if freeze == "direct":
        act = jnp.where(held[ctx.layer], act[:1], act)
    if freeze == "replacement":  # neurons respond, with the prompt's gates
        x = float32(ctx.seen["mlp_in"])
        gate = gelu(matmul(x[:1], at_layer(neurons.w_gate, ctx.layer)))
        act = act[:1] + gate * matmul(x - x[:1], at_layer(neurons.w_enc, ctx.layer))
    each = jnp.arange(len(act), dtype=jnp.int32)[:, None]
    old = act[each, edits.position, edits.feature]
    new = jnp.where(edits.relative, edits.value * old, edits.value)
    change = jnp.where(edits.layer == ctx.layer, new - old, 0.0)
    return act.at[each, edits.position, given.to].add(change * given.size).astype(h.dtype)
