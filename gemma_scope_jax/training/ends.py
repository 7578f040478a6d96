"""The two ends of a run: what its coders start from, and their published form at the end."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import Coder, CoderInfo
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.training import buffer, init
from gemma_scope_jax.training.objective import calibrated
from gemma_scope_jax.training.recipe import TrainConfig
from gemma_scope_jax.training.state import Sites, TrainPlan, TrainState
from gemma_scope_jax.training.weights import CoderGroup, fold, unfold

SAMPLE = 8192  # activations from which coders start and TopK is calibrated


def load_starts(config: TrainConfig) -> dict[str, Any]:
    """What the config's coders start from: by folder, a coder, or a list with one for each layer.

    Raises `InputError` for coders that do not fit.
    """
    found: dict[str, Any] = {}
    for c in config.coders:
        ones = jnp.ones(len(c.layer_tuple))
        scales = {"in": ones, "out": ones}
        if c.init_from:
            own = found[c.folder] = load_coder(c.init_from, decoder=True)
            jax.eval_shape(lambda own=own, c=c, scales=scales: unfold(own, c, scales))
        elif c.init_layers:
            found[c.folder] = [load_coder(address) for address in c.init_layers]
            init.check_coders(found[c.folder], c)
    return found


def some(sample: Sites, count: int) -> Sites:
    """About `count` of the activations {site: [L, B, D]}, evenly spaced."""
    return {site: rows[:, :: max(1, rows.shape[1] // count)] for site, rows in sample.items()}


def start(plan: TrainPlan, state: TrainState, sample: Sites, starts: dict[str, Any]) -> TrainState:
    """The state before the first update: scales and first weights from a sample {site: [L, B, D]}
    and `starts`, from `load_starts`.
    """
    state = dataclasses.replace(state, scale=buffer.scales(some(sample, 2 * SAMPLE), plan))
    few = some(sample, SAMPLE)
    new = []
    for group, old in zip(plan.groups, state.groups):
        x, y = buffer.pairs(plan, group, few, state.scale)
        weights, targets = init.from_data(old.weights, group, x, y), old.l0_start
        if group.template.activation == "batch_topk":
            weights = calibrated(weights, x, group)
        for n, c in enumerate(group.coders):
            scales = buffer.scales_of(plan, c, state.scale)
            if c.init_from:
                own = unfold(starts[c.folder], c, scales)
            elif c.init_layers:
                own, _ = init.from_coders(starts[c.folder], c, scales)
                l0 = init.expected_l0(own, CoderGroup((c,)), 0, x[n])
                targets = targets.at[n].set(jnp.maximum(l0, c.target_l0))
            else:
                continue
            put = lambda both, one, n=n: both.at[n].set(one[0])
            weights = jax.tree.map(put, weights, own)
        new.append(dataclasses.replace(old, weights=weights, l0_start=targets))
    return dataclasses.replace(state, groups=tuple(new))


def coders(plan: TrainPlan, state: TrainState, sample: Sites) -> dict[str, Coder]:
    """All coders of a state in the published form, by folder, in the config's order.

    BatchTopK, and TopK with `as_jump_relu`, become JumpReLU with the threshold at which `sample`,
    of tokens that were not trained on, has the target L0.
    """
    config, found = plan.config, {}
    name = config.model if "/" in config.model else f"google/{config.model}"
    for group, own in zip(plan.groups, state.groups):
        weights = own.weights
        if any(c.activation == "batch_topk" or c.as_jump_relu for c in group.coders):
            x, _ = buffer.pairs(plan, group, some(sample, SAMPLE), state.scale)
            weights = calibrated(weights, x, group)
        for n, c in enumerate(group.coders):
            same = c.target == c.reads
            kind = "sae" if same else "transcoder"
            if c.is_multi_layer:
                kind = "crosscoder" if same else "clt"
            width = c.width * len(c.layer_tuple)
            info = CoderInfo(model_name=name, type=kind, l0=c.target_l0, width=width)
            scales = buffer.scales_of(plan, c, state.scale)
            found[c.folder] = fold(weights, n, c, scales, config.first, info)
    return {c.folder: found[c.folder] for c in config.coders}
