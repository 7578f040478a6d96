"""The optimizer's rules as optax transformations against the plain functions: same bits, or not?

.venv/bin/python benchmarks/trials/optax_rules.py
"""

import dataclasses
import inspect
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from gemma_scope_jax.training import optimizer
from gemma_scope_jax.training.lengths import SHORT
from gemma_scope_jax.training.recipe import CoderConfig, OptimizerConfig, TrainConfig
from gemma_scope_jax.training.weights import Weights, unit_decoder

N, X, F, D = 2, 1, 512, 128

PUBLISHED = TrainConfig((CoderConfig(0),), tokens=SHORT).resolved.optimizer


# What training/optimizer.py's `update` would be.
def without_decoder_direction() -> optax.GradientTransformation:
    across = optimizer.across
    return optax.stateless(lambda g, w: dataclasses.replace(g, w_dec=across(g.w_dec, w.w_dec)))


def clipped_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam whose gradients are cut by its own second moments: a chain has no way to hand those to
    the rule before it, so the two are one transformation."""
    adam = optimizer.adam(config)

    def update(grads, moments, w=None):
        return adam.update(optimizer.clipped(grads, moments, config), moments, w)

    return optax.GradientTransformation(adam.init, update)


def step_limit(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.stateless(lambda changes, w: optimizer.limited(changes, config))


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """The rate is an argument: it depends on how many updates there will be, which may grow."""

    def update(changes, state, w=None, *, rate, **_):
        return jax.tree.map(lambda change: -rate * change, changes), state

    return optax.GradientTransformationExtraArgs(lambda w: optax.EmptyState(), update)


def rules(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        without_decoder_direction(), clipped_adam(config), step_limit(config), scale_by_rate()
    )


def chained(grads, state, w, rate, config):
    with jax.numpy_dtype_promotion("standard"):
        changes, state = rules(config).update(grads, state, w, rate=rate)
    w = optax.apply_updates(w, changes)
    w = dataclasses.replace(w, w_dec=unit_decoder(w.w_dec), threshold=jnp.maximum(w.threshold, 0.0))
    return w, state


def schedule(config: OptimizerConfig, total: int) -> optax.Schedule:
    """`learning_rate` of a run whose length is known."""
    o, decay = config, round(config.decay * total)
    parts = [
        optax.cosine_decay_schedule(-0.9 * o.learning_rate, max(1, o.warmup)),
        optax.constant_schedule(o.learning_rate),
        optax.linear_schedule(o.learning_rate, 0.0, max(1, decay)),
    ]
    parts[0] = lambda n, rise=parts[0]: o.learning_rate + rise(n)
    return optax.join_schedules(parts, [o.warmup, total - decay])


def weights(seed: int) -> Weights:
    fields, keys = {}, iter(jax.random.split(jax.random.key(seed), 20))
    shapes = {"w_enc": (N, X, F, D), "b_enc": (N, X, F), "threshold": (N, X, F), "b_dec": (N, X, D)}
    for field in dataclasses.fields(Weights):
        if field.name == "w_dec":
            fields["w_dec"] = unit_decoder((jax.random.normal(next(keys), (N, X, F, D)),))
        elif field.name in shapes:
            fields[field.name] = jnp.abs(jax.random.normal(next(keys), shapes[field.name]))
        else:
            fields[field.name] = None
    return Weights(**fields)


def main() -> None:
    optimizer._kernel = lambda w: False  # the plain functions
    alive = jnp.zeros((N, X, F))
    for change in ({}, {"b1": 0.9}, {"clip": 0.0}):
        config = dataclasses.replace(PUBLISHED, **change)
        plain = jax.jit(lambda g, s, w, r, c=config: optimizer.update(g, s, w, r, alive, c))
        optaxed = jax.jit(lambda g, s, w, r, c=config: chained(g, s, w, r, c))
        a = b = weights(0)
        s, t = optimizer.adam(config).init(a), rules(config).init(b)
        times, worst = ([], []), 0.0
        for n in range(30):
            rate = optimizer.learning_rate(config, jnp.int32(n), jnp.int32(1000))
            grads = jax.tree.map(lambda x, n=n: 10.0 ** (n % 3) * (x - 0.5), weights(1 + n))
            jax.block_until_ready(grads)
            for step, taken in ((0, times[0]), (1, times[1])):
                start = time.process_time()
                if step == 0:
                    a, s = jax.block_until_ready(plain(grads, s, a, rate))
                else:
                    b, t = jax.block_until_ready(optaxed(grads, t, b, rate))
                taken.append(time.process_time() - start)
            leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
            worst = max([worst, *(float(jnp.abs(x - y).max()) for x, y in leaves)])
        ours, theirs = (1e3 * statistics.median(some[5:]) for some in times)
        print(
            f"b1 {config.b1}, clip {config.clip}: largest difference {worst:.2g} after 30 updates"
        )
        print(f"  {ours:.2f} ms an update, as optax {theirs:.2f} ms")
    config, total = PUBLISHED, 1000
    rate = lambda n: optimizer.learning_rate(config, jnp.int32(n), jnp.int32(total))
    ours = jnp.stack([rate(n) for n in range(total)])
    theirs = jnp.stack([jnp.asarray(schedule(config, total)(n)) for n in range(total)])
    off = float(jnp.abs(ours - theirs).max() / config.learning_rate)
    print(f"learning rate as join_schedules: off by {off:.2g} of the rate at the most")
    lines = lambda *some: sum(len(inspect.getsource(f).splitlines()) for f in some)
    print("lines:", lines(optimizer.update, optimizer.learning_rate), "and",
          lines(without_decoder_direction, clipped_adam, step_limit, scale_by_rate, rules, chained,
                schedule))  # fmt: skip


if __name__ == "__main__":
    main()
