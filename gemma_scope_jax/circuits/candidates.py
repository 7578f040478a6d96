"""Which features of a long prompt may become nodes, before any row is known.

A prompt of thousands of tokens has millions of active features. A graph keeps some thousands, and
only the candidates, some tens of thousands, get a column while it is made. They are the features
with the largest total effect on the targets: the derivative along all paths, through the active
features of the layers above, times the activation. One pass down the layers finds it for all
features, with the weights of one layer at a time. What the others write is kept as a whole
(`rest`), so nothing is missing from a target's sum.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.linear import TargetRows, begun_at, dot, down_a_layer
from gemma_scope_jax.circuits.neurons import neuron_candidates, neurons_of
from gemma_scope_jax.circuits.sources import (
    BLOCK,
    Active,
    Prompt,
    active_features,
    encoder_vectors,
    laid_out,
    slot_features,
    stacked_skips,
    writes_to,
    written_rows,
)
from gemma_scope_jax.circuits.targets import Resolved
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.model.config import Model

MOST = 1 << 16  # candidates, if more features are active


def candidates(
    model: Model, coders: CoderSet, prompt: Prompt, wanted: Resolved, most: int
) -> tuple[Active, int, jax.Array | None]:
    """The sources that may become nodes, in order, at most `most`; how many are active; and, if
    these are more, what all of them write [L, T, D]."""
    neurons = neurons_of(coders)
    if neurons is not None:
        active, count, written = neuron_candidates(model, neurons, prompt, wanted, most)
        return active, count, written if count > most else None
    active = active_features(coders, prompt)
    if len(active) <= most:
        return active, len(active), None
    effect, written = total_effects(model, coders, prompt, active, wanted)
    best = np.argpartition(-effect, most - 1)[:most]
    return active[np.sort(best)], len(active), written


def total_effects(
    model: Model, coders: CoderSet, prompt: Prompt, active: Active, wanted: Resolved
) -> tuple[np.ndarray, jax.Array]:
    """The total effect of each active feature [n], summed over the targets by their weights, and
    what features write to each MLP's output [L, T, D]."""
    layout, L = laid_out(active), model.config.layers
    gains = 1.0 + np.asarray(model.params.blocks.pre_mlp_norm, np.float32)
    gains = gains[:, None] * np.asarray(prompt.frozen.pre_mlp_scale)[..., None]  # [L, T, D]
    rows = TargetRows(*map(jnp.asarray, (wanted.stage, wanted.position, wanted.vector)))
    g = jnp.zeros((*prompt.mlp_in.shape[1:], len(wanted.bias)), jnp.float32).swapaxes(1, 2)
    written, skip = jnp.zeros_like(prompt.mlp_in), stacked_skips(coders)
    slopes: dict[int, Any] = {}  # of blocks, until their own layer: [P, R, C]
    effect = np.zeros(layout.source.size, np.float32)
    _, P, C = layout.source.shape
    nothing = np.zeros((P, g.shape[1], C), np.float32)
    for layer in reversed(range(L)):
        g = begun_at(rows, g, np.int32(2 * layer + 1))
        back = jnp.zeros_like(g)
        for n, source in enumerate(layout.layer.tolist()):
            coder = coders.at(source)
            if not writes_to(coder, source, layer):
                continue
            i, j = np.int32(coder.source(source)), np.int32(coder.source(layer))
            ids, strength = slot_features(active, layout, n)
            rows_out = written_rows(coder, i, j, ids)
            given = rows_out, strength, layout.positions[n], np.int32(layer)
            slope, written = _add_block(slopes.pop(n, nothing), written, g, *given)
            slopes[n] = slope
            if source != layer:
                continue
            here = slopes.pop(n)
            at = layout.positions[n]
            vectors = np.asarray(encoder_vectors(coder, i, ids)) * gains[layer][at][:, None]
            back = _add_back(back, here, vectors, strength, at)
            total = np.einsum("prc,r->pc", np.abs(np.asarray(here)), wanted.weights) * strength
            effect[n * BLOCK : (n + 1) * BLOCK] = total.reshape(-1)
        g = down_a_layer(model, prompt.frozen, skip, np.int32(layer), rows, g, back)
    return effect[layout.slot], written


@partial(jax.jit, donate_argnums=1)  # or each block would copy what all write
def _add_block(slope, written, g, rows, strength, positions, layer):
    """The slopes of a block's features [P, R, C] with this layer's, and what they write to it."""
    slope = slope + dot("prd,pcd->prc", g[positions], rows)
    new = (rows * strength[..., None]).sum(1)
    return slope, written.at[layer, positions].add(new)


@partial(jax.jit, donate_argnums=0)
def _add_back(back, slope, vectors, strength, positions):
    """What a layer's features hand on to resid_mid: active ones follow their pre-activation."""
    live = jnp.where((strength > 0)[:, None, :], slope, 0.0)
    return back.at[positions].add(dot("prc,pcd->prd", live, vectors))
