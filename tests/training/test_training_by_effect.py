"""Finetuning by what a coder does to the model's predictions: equation (6), end to end."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import PRESETS
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import capture, write
from gemma_scope_jax.training import buffer, end_to_end, ends, feeds
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig, TrainConfig
from gemma_scope_jax.training.state import first_state, make_plan
from gemma_scope_jax.training.weights import groups
from tiny import tiny_model

B, T = 4, 16
LOSS = LossConfig(l0_warmup=0, per_token=False, kl_weight=1.0)
CODER = CoderConfig(2, width=64, target_l0=8, threshold=None, loss=LOSS)


@pytest.fixture(scope="module")
def run():
    """(plan, model, a state about to be updated, tokens, segments)."""
    model = tiny_model(PRESETS["gemma-3-270m"], layers=4)
    config = TrainConfig(
        (CODER,),
        tokens=10 * B * T,
        batch_size=B,
        context_size=T,
        buffer=2 * B * T,
        train_batch_size=B * T,
        sparse=0,
        optimizer=OptimizerConfig(1e-3, 0, 0.0),
        model="tiny",
    )
    plan = make_plan(config, model.config)
    tokens = jax.random.randint(jax.random.key(0), (B, T), 5, model.config.vocab, jnp.int32)
    segments = jnp.ones((B, T), jnp.int32)
    state = first_state(plan, model.config)
    batch = TokenBatch(tokens, segments, jnp.ones((B, T), bool))
    x, mask = buffer.model_activations(model, batch, plan)
    state = ends.start(plan, buffer.fill(state, x, mask), {s: a[:, 1:] for s, a in x.items()}, {})
    return (plan, model, dataclasses.replace(state, total=jnp.asarray(10, jnp.int32)), batch)


def test_kl_is_that_of_the_model_with_the_reconstruction_in_place(run):
    plan, model, state, batch = run
    mask = np.ones((B, T), bool)
    mask[1, 5:9] = False
    batch = batch.replace(mask=jnp.asarray(mask))
    new, [parts] = end_to_end.update(state, model, batch, plan)
    [coder] = ends.coders(plan, state, {}).values()
    clean = forward(model, batch, [capture("resid_post", 2)])
    x = np.asarray(clean.reads["resid_post"], np.float32).reshape(B, T, -1)
    y = np.asarray(coder.decode(coder.encode(x)))
    mask[:, 0] = False  # <bos>
    put = lambda x, ctx, y: y.astype(x.dtype)
    there = np.where(mask[..., None], y, x)
    spliced = forward(model, batch, [write("resid_post", 2, put, jnp.asarray(there))])
    log = lambda z: jax.nn.log_softmax(jnp.asarray(z, jnp.float32), -1)
    p, q = (np.asarray(log(out.logits), np.float64) for out in (clean, spliced))
    each = np.sum(np.exp(p) * (p - q), -1)
    assert float(parts["kl"][0]) == pytest.approx(each[mask].mean(), rel=1e-3)
    assert np.isfinite(jax.tree.leaves(new.groups[0].weights)[0]).all()


def test_updates_bring_the_kl_down(run):
    plan, model, state, batch = run
    update = jax.jit(partial(end_to_end.update, plan=plan))
    kl = []
    for _ in range(25):
        state, [parts] = update(state, model, batch)
        state = dataclasses.replace(state, update=state.update + 1)
        kl.append(float(parts["kl"][0]))
    assert min(kl[-5:]) < 0.8 * kl[0]


def test_batch_topk_keeps_its_share_of_the_tokens_that_count(run):
    """<bos> is many times as large as the others: what it would take does not go from theirs."""
    plan, _, state, _ = run
    config = dataclasses.replace(
        plan.config,
        coders=(
            dataclasses.replace(CODER, activation="batch_topk"),
            dataclasses.replace(CODER, activation="batch_topk", seed=1),
        ),
    )
    [group] = groups(config)
    weights = jax.tree.map(lambda w: jnp.concatenate([w, w]), state.groups[0].weights)
    x = np.random.default_rng(0).standard_normal((2, 1, B * T, weights.w_enc.shape[-1]))
    x = x.astype(np.float32) / np.sqrt(x.shape[-1])
    mask = np.arange(B * T) % T > 1

    def reconstructed(x):
        order = jnp.argsort(~mask, stable=True)
        rows = order[jnp.arange(B * T) % mask.sum()]
        found = []
        own = SimpleNamespace(
            rows=rows,
            mask=jnp.asarray(mask),
            batch=TokenBatch(jnp.zeros((B, T)), jnp.ones((B, T))),
            divergence=lambda splice: found.append(splice.args[0].tree) or jnp.zeros(()),
        )
        end_to_end._divergences(weights, group, jnp.asarray(x), own, state.scale, plan)
        return np.stack(found).reshape(2, B * T, -1)[:, mask]

    large = np.where(mask[:, None], x, 20 * x)
    np.testing.assert_allclose(reconstructed(large), reconstructed(x), rtol=1e-6)


def test_a_pass_without_a_token_that_counts_changes_nothing(run):
    plan, model, state, batch = run
    step = jax.jit(partial(feeds.train_step, plan=plan))
    new, [parts] = step(state, model, batch.replace(mask=jnp.zeros((B, T), bool)))
    for one, other in zip(jax.tree.leaves(new.groups), jax.tree.leaves(state.groups)):
        np.testing.assert_array_equal(one, other)
    assert all(np.isfinite(np.asarray(p)).all() for p in jax.tree.leaves(parts))
