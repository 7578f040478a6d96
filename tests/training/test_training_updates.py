"""The buffer, the model's pass and single updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.kernels import cpu
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.training import buffer, ends, optimizer
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training.init import random_weights
from gemma_scope_jax.training.optimizer import adam, clipped, limited
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig
from gemma_scope_jax.training.state import init_state, make_plan
from gemma_scope_jax.training.weights import CoderGroup
from training_runs import MODEL, coder, recipe


def small_run(**sizes):
    coder = CoderConfig(0, width=8, target_l0=2)
    return recipe(coder, batch_size=1, context_size=4, **sizes)


def test_buffer_takes_only_tokens_that_count_and_forgets_the_oldest():
    config = small_run(buffer=8, train_batch_size=8)
    plan = make_plan(config, dataclasses.replace(MODEL, d_model=3))
    state = init_state(plan, dataclasses.replace(MODEL, d_model=3))
    x = jnp.arange(1.0, 7.0)[None, :, None] * jnp.ones((1, 6, 3))
    counts = jnp.array([True, False, True, True, True, False])
    for scale in (1, 10, 100):
        state = buffer.fill(state, {"resid_post": scale * x}, counts)
    got = sorted(np.asarray(state.buffer["resid_post"][0, :, 0], np.float32))
    assert got == [10, 30, 40, 50, 100, 300, 400, 500]


def test_every_activation_is_drawn_once_in_a_sweep():
    config = small_run(buffer=12, train_batch_size=4)
    small = dataclasses.replace(MODEL, d_model=3)
    plan = make_plan(config, small)
    state = init_state(plan, small)
    x = jnp.arange(12.0)[None, :, None] * jnp.ones((1, 12, 3))
    state = buffer.fill(state, {"resid_post": x}, jnp.ones(12, bool))
    sweeps = []
    for _ in range(2):
        seen = []
        for _ in range(3):
            state, batch = buffer.draw(state, plan)
            seen += np.asarray(batch["resid_post"][0, :, 0], np.float32).tolist()
        assert sorted(seen) == list(range(12))
        sweeps.append(seen)
    assert sweeps[0] != sweeps[1] != list(range(12))


def test_model_activations_are_of_tokens_that_count(model):
    """Left out are <bos> of every piece, padding and what the data says."""
    plan = make_plan(recipe(coder(2), coder(2, reads="z")), model.config)
    segments, mask = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.ones((1, 6), bool).at[0, 2].set(False)
    batch = TokenBatch(jnp.array([[2, 5, 6, 2, 7, 0]]), segments, mask)
    x, kept = buffer.model_activations(model, batch, plan)
    assert kept.tolist() == [False, True, False, False, True, False]
    assert x["resid_post"].shape == (1, 6, 32) and x["z"].shape == (1, 6, 64)


def test_update_keeps_decoders_at_unit_norm_and_thresholds_positive():
    config = recipe(
        coder((1, 2), width=16, target_l0=4),
        optimizer=OptimizerConfig(0.1, 0, 0.0),
        train_batch_size=64,
    )
    small = dataclasses.replace(MODEL, d_model=6)
    plan = make_plan(config, small)
    x = {"resid_post": 30 * jax.random.normal(jax.random.key(1), (2, 64, 6))}
    state = ends.start(plan, init_state(plan, small), x, {})
    norms = jnp.sqrt(jnp.mean(jnp.sum(x["resid_post"] ** 2, -1), 1))
    np.testing.assert_allclose(state.scale["resid_post"], norms, rtol=0.2)
    update = jax.jit(lambda s: steps.update(s, x, plan)[0])
    for _ in range(5):
        state = update(state)
    for group in state.groups:
        d = group.weights.w_dec
        for i in range(len(d)):
            squares = sum(jnp.sum(d[j][:, i] ** 2, -1) for j in range(i, len(d)))
            np.testing.assert_allclose(squares, 1.0, rtol=1e-5)
        assert float(group.weights.threshold.min()) >= 0


def test_products_have_the_precision_asked_for():
    plan = make_plan(recipe(coder(2, width=16)), dataclasses.replace(MODEL, d_model=6))
    state = jax.eval_shape(lambda: init_state(plan, dataclasses.replace(MODEL, d_model=6)))
    x = {"resid_post": jax.ShapeDtypeStruct((1, 128, 6), jnp.float32)}

    def products(precision):
        config = dataclasses.replace(plan.config, precision=precision)
        step = jax.make_jaxpr(
            lambda s, x: steps.update(s, x, dataclasses.replace(plan, config=config))
        )
        return [line for line in str(step(state, x)).splitlines() if "precision=" in line]

    assert len(products("float32")) > 3 and all("None" in line for line in products("default"))
    assert all("HIGHEST" in line for line in products("float32"))
    assert all("HIGH" in line and "HIGHEST" not in line for line in products("tensorfloat32"))


def test_a_gradient_of_unusual_norm_is_cut_alone():
    """Other kinds of weights and other coders stay as they are."""
    config = recipe(*(coder(2, seed=n, width=16) for n in range(2)))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(b1=0.0, b2=0.9, clip=1.5))
    plan = make_plan(config, dataclasses.replace(MODEL, d_model=6))
    [group] = init_state(plan, dataclasses.replace(MODEL, d_model=6)).groups
    rng, moments, squares = np.random.default_rng(0), group.optimizer, []
    rule = adam(config.optimizer)
    normal = lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    for _ in range(4):
        grads = jax.tree.map(normal, group.weights)
        assert jax.tree.all(
            jax.tree.map(
                jnp.array_equal,
                grads,
                clipped(grads, moments, dataclasses.replace(config.optimizer, clip=0.0)),
            )
        )
        if not squares:  # nothing is usual yet
            first = clipped(grads, moments, config.optimizer)
            assert jax.tree.all(jax.tree.map(jnp.array_equal, grads, first))
        squares.append(np.sum(np.asarray(grads.w_enc) ** 2, (1, 2, 3)))
        with jax.numpy_dtype_promotion("standard"):
            _, moments = rule.update(grads, moments)
    grads = jax.tree.map(normal, group.weights)
    wild = dataclasses.replace(grads, w_enc=grads.w_enc.at[1].multiply(1000.0))
    cut = clipped(wild, moments, config.optimizer)
    shares = 0.1 * 0.9 ** np.arange(3, -1, -1)
    usual = np.sqrt(shares @ np.array(squares) / shares.sum())
    np.testing.assert_allclose(np.linalg.norm(cut.w_enc[1]), 1.5 * usual[1], rtol=1e-5)
    np.testing.assert_allclose(
        cut.w_enc[1] / np.linalg.norm(cut.w_enc[1]),
        grads.w_enc[1] / np.linalg.norm(grads.w_enc[1]),
        rtol=1e-4,
    )
    usually = clipped(grads, moments, config.optimizer)
    assert jnp.array_equal(cut.w_enc[0], usually.w_enc[0])
    assert jnp.array_equal(cut.b_dec, usually.b_dec)
    wild = dataclasses.replace(grads, threshold=1000.0 * grads.threshold)
    cut = clipped(wild, moments, config.optimizer)
    assert jnp.array_equal(cut.threshold, wild.threshold)


def test_a_feature_active_again_after_long_moves_no_more_than_the_limit():
    config = recipe(coder(2, width=16))
    config = dataclasses.replace(
        config, optimizer=OptimizerConfig(1e-2, 0, b1=0.0, step_limit=2e-2)
    )
    plan = make_plan(config, dataclasses.replace(MODEL, d_model=6))
    state = init_state(plan, dataclasses.replace(MODEL, d_model=6))
    [group] = state.groups
    moments = adam(config.optimizer).init(group.weights)
    rule, rng = adam(config.optimizer), np.random.default_rng(0)
    normal = lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32)
    seldom = lambda g: dataclasses.replace(
        g, w_enc=g.w_enc.at[:, :, 3].set(0.0), b_enc=g.b_enc.at[:, :, 3].set(0.0)
    )
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2000):
            _, moments = rule.update(seldom(jax.tree.map(normal, group.weights)), moments)
        changes, _ = rule.update(jax.tree.map(normal, group.weights), moments)
    cut = limited(changes, config.optimizer)
    size = lambda a: np.sqrt(np.mean(np.asarray(a[0, 0, 3]) ** 2))
    assert size(changes.w_enc) > 20 and abs(changes.b_enc[0, 0, 3]) > 2
    np.testing.assert_allclose(size(cut.w_enc), 2.0, rtol=1e-5)  # 2e-2 over the rate of 1e-2
    np.testing.assert_allclose(abs(cut.b_enc[0, 0, 3]), 2.0, rtol=1e-5)
    others = np.delete(np.arange(16), 3)
    assert jnp.array_equal(cut.w_enc[:, :, others], changes.w_enc[:, :, others])
    assert jnp.array_equal(cut.threshold, changes.threshold)
    off = limited(changes, OptimizerConfig(step_limit=0.0))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, off, changes))


@pytest.mark.parametrize("layers", [3, (1, 2)], ids=["one layer", "two layers"])
@pytest.mark.parametrize(
    "b1,clip,step_limit", [(0.0, 1.2, 1e-3), (0.9, 0.0, 1e-3), (0.8, 0.0, 0.0), (0.9, 1.2, 1e-3)]
)
def test_the_kernel_takes_the_steps_of_optax(b1, clip, step_limit, layers, monkeypatch):
    """Where there is one; elsewhere, and on a mesh, the steps are optax's."""
    coders = tuple(CoderConfig(layers, width=40, target_l0=4, seed=n) for n in range(2))
    config = OptimizerConfig(
        1e-2, 0, b1=b1, clip=clip, step_limit=step_limit, threshold_rate=0.1, decay=0.0
    )
    group = CoderGroup(coders)
    start, found, rng = random_weights(group, 21, 21, 0), [], np.random.default_rng(0)
    normal = lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32)
    drawn = [jax.tree.map(normal, start) for _ in range(5)]
    dead = jnp.zeros(start.b_enc.shape).at[:, :, ::2].set(1.0)
    for kernel in (cpu.available(), False):
        monkeypatch.setattr(optimizer, "_kernel", lambda w, kernel=kernel: kernel)
        step = jax.jit(lambda g, m, w: optimizer.update(g, m, w, jnp.float32(1e-2), dead, config))
        w, moments = start, optimizer.adam(config).init(start)
        for size, grads in zip((1.0, 1.0, 1.0, 30.0, 1.0), drawn, strict=True):
            w, moments = step(jax.tree.map(lambda g, size=size: size * g, grads), moments, w)
        found.append((w, moments))
    moved = np.abs(found[0][0].threshold - start.threshold).mean((0, 1))
    assert moved[::2].mean() > 5 * moved[1::2].mean()  # dead features' at the full rate
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_features_are_dead_by_how_seldom_they_are_active():
    """Silent, once in a while, half the limit, four times the limit; all were frequent before."""
    loss = LossConfig(dead_after=50, dead_below=0.02, l0_warmup=0)
    of_two_layers = make_plan(recipe(coder((3, 4), loss=loss)), MODEL)
    assert float(of_two_layers.groups[0].dead_limit[0, 0, 0]) == pytest.approx(0.02 * 4 / 64)
    config = recipe(coder(3, loss=loss), coder(4, loss=loss, target_l0=16.0))
    plan = make_plan(config, MODEL)
    [group], [state] = plan.groups, init_state(plan, MODEL).groups
    limit = np.array([0.02 * 8 / 64, 0.02 * 16 / 64])[:, None, None]
    dead = lambda f: steps.dials(dataclasses.replace(state, activity=f), group, jnp.array(0)).dead
    assert not dead(state.activity).any()  # nobody knows yet
    f = steps.activities(state.activity, jnp.full((2, 1, 64), 0.3), group)
    when = np.zeros((2, 1, 64))
    for i in range(400):
        share = np.full((2, 1, 64), 4.0) * limit
        share[..., 0], share[..., 1], share[..., 2] = 0.0, 5 * limit[..., 0] * (i % 50 == 0), 0.5
        share[..., 2] *= limit[..., 0]
        f = steps.activities(f, jnp.asarray(share, jnp.float32), group)
        when = np.where((when == 0) & (np.asarray(dead(f)) > 0), i + 1, when)
    got = np.asarray(dead(f))
    assert (got[..., 3:] == 0).all() and ((when[..., 0] >= 50) & (when[..., 0] <= 52)).all()
    np.testing.assert_allclose(got[..., 2], 0.5, atol=0.01)
    assert (got[..., 0] > 0.99).all() and ((got[..., 1] > 0.8) & (got[..., 1] < 1)).all()


def test_a_coder_that_starts_silent_learns():
    """Its first gradients are 0, and so is their usual norm: that is no reason to cut the next."""
    config = recipe(coder(2, width=16, threshold=0.5, loss=LossConfig(l0_warmup=0, dead_after=0)))
    config = dataclasses.replace(config, optimizer=OptimizerConfig(3e-2, 0, 0.0))
    plan = make_plan(config, dataclasses.replace(MODEL, d_model=6))
    state = init_state(plan, dataclasses.replace(MODEL, d_model=6))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128, 6)), jnp.float32)
    x = {"resid_post": 0.1 * x / jnp.linalg.norm(x, axis=-1, keepdims=True)}
    state = dataclasses.replace(state, scale={"resid_post": jnp.ones(1)})
    before, update = (
        state.groups[0].weights.w_dec[0],
        jax.jit(lambda state: steps.update(state, x, plan)),
    )
    l0 = []
    for _ in range(60):
        state, [parts] = update(state)
        l0.append(float(parts["l0"][0]))
    assert l0[0] == 0 < l0[-1]
    assert np.abs(state.groups[0].weights.w_dec[0] - before).max() > 0.01


def test_silent_features_become_features_that_are_used():
    """Tokens are sums of 3 of 128 directions; half of 128 features start out of their reach."""
    D, F, few = 64, 128, dataclasses.replace(MODEL, d_model=64)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((128, D)) / D**0.5

    def batch():
        on = np.argsort(rng.random((512, 128)), 1)[:, :3]
        x = np.sum(rng.uniform(0.5, 1.5, (512, 3, 1)) * directions[on], 1)
        return {"resid_post": jnp.asarray(x[None] / np.sqrt(np.mean(np.sum(x**2, 1))), jnp.float32)}

    def trained(dead_weight, threshold=0.3, b_enc=0.0):
        """Whether each feature is used after 600 updates, and the FVU then."""
        loss = LossConfig(
            l0_warmup=0,
            per_token=False,
            bandwidth=0.05,
            dead_after=20,
            dead_below=0.1,
            dead_weight=dead_weight,
        )
        slow = OptimizerConfig(3e-3, 10, 0.0, b1=0.0, clip=1.2, threshold_rate=1.0)
        config = recipe(coder(2, width=F, target_l0=4, threshold=0.3, loss=loss), optimizer=slow)
        plan = make_plan(config, few)
        state = dataclasses.replace(init_state(plan, few), scale={"resid_post": jnp.ones(1)})
        [group] = state.groups
        weights = dataclasses.replace(
            group.weights,
            threshold=group.weights.threshold.at[..., F // 2 :].set(threshold),
            b_enc=group.weights.b_enc.at[..., F // 2 :].set(b_enc),
        )
        state = dataclasses.replace(state, groups=(dataclasses.replace(group, weights=weights),))
        update = jax.jit(lambda state, x: steps.update(state, x, plan))
        for _ in range(600):
            state, [parts] = update(state, batch())
        w = jax.tree.map(lambda a: np.asarray(a)[0, 0], state.groups[0].weights)
        z = (np.asarray(batch()["resid_post"][0]) - w.b_dec) @ w.w_enc.T + w.b_enc
        return (z > w.threshold).mean(0) > 0.1 * 4 / F, float(parts["fvu"][0])

    (off, without), (on, fvu) = trained(0.0, 1.0), trained(0.01, 1.0)
    assert off[: F // 2].all() and not off[F // 2 :].any()
    assert on[F // 2 :].mean() > 0.95 and fvu < 0.3 * without
    on, fvu = trained(0.01, b_enc=-0.8)
    assert on[F // 2 :].mean() > 0.95 and fvu < 0.3 * without
