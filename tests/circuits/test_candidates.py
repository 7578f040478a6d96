"""Prompts with more active features than a graph may consider."""

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, KINDS, coders_of, key, near, sums
from gemma_scope_jax.circuits.candidates import total_effects
from gemma_scope_jax.circuits.sources import active_features, read_prompt
from gemma_scope_jax.circuits.targets import Resolver, checked_targets

WANTED = [7, gs.Target.feature(3, 5) - gs.Target.feature(2, 1, position=4), 9]


def brute_force(graph):
    """The total effect of each feature on each final target, through the features between."""
    n, order = graph.selected, np.argsort(-graph.sources.layer[: graph.selected], kind="stable")
    total = graph.effects[n:, :n].astype(np.float64)
    for j in order:  # the highest layer first: what reaches j is complete before it is handed on
        slope = total[:, j] / graph.sources.activation[j]
        total += slope[:, None] * graph.effects[j, :n][None]
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_total_effects_run_along_all_paths(model, kind):
    coders = coders_of(kind)
    graph = gs.attribute(model, coders, IDS, WANTED)
    coders = gs.CoderSet(coders)
    prompt = read_prompt(model, IDS)
    resolver = Resolver(model, coders, prompt, None)
    asked = checked_targets(WANTED, model.config, coders, len(IDS), None)
    wanted = resolver.resolve(asked)
    got, _ = total_effects(model, coders, prompt, active_features(coders, prompt), wanted)
    near(got, wanted.weights @ np.abs(brute_force(graph)))


@pytest.mark.parametrize("kind", ["affine", "clt"])
def test_candidates_leave_a_rest(model, kind):
    coders = coders_of(kind)
    whole = gs.attribute(model, coders, IDS, WANTED)
    part = gs.attribute(model, coders, IDS, WANTED, max_candidates=60, max_feature_nodes=20)
    effect = np.abs(brute_force(whole)).T @ whole.weights[whole.selected :]
    best = {key(whole.sources)[i] for i in np.argsort(-effect)[:60]}
    assert part.selected == 20 and set(key(part.sources, 20)) <= best
    assert part.about["active_features"] == whole.selected
    assert np.abs(part.rest).max() > 1e-3
    near(sums(part), whole.value[[key(whole.targets).index(k) for k in key(part.targets)]])
    rows = [key(whole.targets).index(k) for k in key(part.targets)]
    columns = [key(whole.sources).index(k) for k in key(part.sources)]
    near(part.effects, whole.effects[rows][:, columns])
