"""What a graph would take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from abstract_coders import abstract_transcoders
from attribution import IDS, coders_of
from gemma_scope_jax.circuits import linear
from gemma_scope_jax.circuits.estimate import abstract_inputs, row_flops


@pytest.mark.parametrize("kind", ["plain", "affine", "clt"])
def test_the_program_is_that_of_attribute(model, monkeypatch, kind):
    """Same shapes and dtypes as in a run, but for the number of blocks, which is an estimate."""
    seen, effects = [], linear.effects
    monkeypatch.setattr(
        linear, "effects", lambda *given, size: seen.append(given) or effects(*given, size=size)
    )
    coders = gs.CoderSet(coders_of(kind))
    graph = gs.attribute(model, coders, IDS, 7)
    sizes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    model_, frozen, written, rows = seen[0]
    plan = abstract_inputs(model.config, coders, len(IDS), graph.selected)
    assert sizes(plan[0]) == sizes(model_) and sizes(plan[1]) == sizes(frozen)
    assert sizes(plan[3]) == sizes(rows)
    assert sizes(plan[2].replace(blocks=None)) == sizes(written.replace(blocks=None))
    planned, real = plan[2].blocks, written.blocks
    assert planned.rows.shape[1:] == real.rows.shape[1:]
    assert 0.5 < planned.rows.shape[0] / real.rows.shape[0] < 2.5


def test_products_are_those_of_the_layers():
    """On a prompt of one token: two matrices of the heads and a skip at each of half the layers."""
    config = gs.preset("gemma-3-270m")
    coders = abstract_transcoders(config, 64)
    each = 2 * 640 * (4 * 256 + 256 + 640) + 2 * 4 * 256
    assert row_flops(config, coders, 1) == config.layers * each / 2
    assert row_flops(config, coders, 2048) > 2048 * config.layers * each / 2


def test_long_prompts_of_the_4b_fit_an_h100():
    """6,000 tokens, 4,096 explained features, transcoders of width 16k."""
    config = gs.preset("gemma-3-4b")
    given = {"max_feature_nodes": 4096, "dtype": jnp.bfloat16, "timed": False}
    plan = gs.plan_attribution(config, abstract_transcoders(config), 6000, **given)
    assert plan.rows == 4106 and plan.candidates == 65_536 and plan.seconds is None
    assert plan.active == 34 * 60 * 5999
    assert 8e9 < plan.memory < 70e9 and plan.host < 5e9
    assert "6,000 tokens" in str(plan) and "unknown" in str(plan)


def test_a_prompt_without_tokens_is_refused(model):
    for count in (0, 65):
        with pytest.raises(gs.InputError):
            gs.plan_attribution(model.config, coders_of("plain"), count, timed=False)
    plan = gs.plan_attribution(model.config, coders_of("plain"), 8)
    assert plan.seconds and np.isfinite(plan.seconds)
