"""The share of a device's peak that training reaches: model and coder in one compiled step.

    .venv/bin/python benchmarks/train_share.py [--model gemma-3-1b-pt] [--layer 12] [--width 131072]

A model of real shape with random weights, packed random tokens, one JumpReLU SAE at resid_post
(target L0 50, the published batch of 4,096), first with dense products, then with the sparse step.
Flops are counted as model-flops utilisation counts them: what a dense step computes, whatever was
computed; a token costs 2 flops a weight of the layers that run, their attention, and 10 D F for the
coder (five products with its matrices). The reference is 50.8 % at width 131,072 on TPUv3 (Gemma
Scope, section 3). The peak is the fastest of a few square products [8192, 8192], measured here in
the step's precision.
"""

import argparse
import dataclasses
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.kernels import active
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model, abstract_params, preset
from gemma_scope_jax.training import feeds
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training.ends import start
from gemma_scope_jax.training.lengths import SHORT
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, TrainConfig
from gemma_scope_jax.training.state import TrainPlan, first_state, make_plan


def random_model(name: str, seed: int = 0) -> Model:
    """A model of a preset's shape: matrices of small random values, in bfloat16."""
    config = preset(name)
    leaves, tree = jax.tree.flatten(abstract_params(config, "bfloat16"))
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(key, leaf):
        scale = 0.02 if leaf.ndim > 2 or max(leaf.shape) > 10_000 else 0.0
        return (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    return Model(
        jax.tree.unflatten(tree, list(map(jax.jit(one, static_argnums=1), keys, leaves))), config
    )


def model_flops(model: Model, plan: TrainPlan, length: int) -> float:
    """Of a token through the layers that run: weights and (half of) attention's square."""
    c = model.config
    weights = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
        if "embed" not in jax.tree_util.keystr(path)
    )
    attention = 2 * c.heads * c.head_dim * length  # two products, causal: half of them
    return plan.stop * (2 * weights / c.layers + attention)


def random_batch(model: Model, args, seed: int) -> TokenBatch:
    shape = (args.batch_size, args.context_size)
    tokens = jax.random.randint(jax.random.key(seed), shape, 10, model.config.vocab - 10, jnp.int32)
    return TokenBatch(tokens, jnp.ones(shape, jnp.int32), jnp.ones(shape, bool))


def measured_peak(config: TrainConfig, n: int = 8192) -> float:
    a = jax.random.normal(jax.random.key(0), (n, n))
    with steps.precision(config):
        product = jax.jit(jnp.matmul).lower(a, a).compile()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--width", type=int, nargs="+", default=[131_072])
    parser.add_argument("--precision", default="default", help="see TrainConfig.precision")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    model = random_model(args.model)
    kernels = active.backend().__name__.rpartition(".")[2]
    active.backend().FEATURES_A_SLOT = 0  # the sparse step also where a dense one may be faster
    peak, rows = None, []
    for width in args.width:
        loss = LossConfig(l0_warmup=0, dead_weight=1e-3)
        coder = CoderConfig(args.layer, width=width, target_l0=50, threshold=None, loss=loss)
        size = args.batch_size * args.context_size
        config = TrainConfig(
            (coder,),
            batch_size=args.batch_size,
            context_size=args.context_size,
            buffer=8 * size,
            train_batch_size=size,
            precision=args.precision,
            tokens=SHORT,  # of a long run: the published settings
        )
        peak = peak or measured_peak(config)
        batches = [random_batch(model, args, seed) for seed in range(4)]

        for sparsity in (0.0, 4.0):
            plan = make_plan(dataclasses.replace(config, sparse=sparsity), model.config)
            fill = jax.jit(partial(feeds.fill_step, plan=plan), donate_argnums=0)
            train = jax.jit(partial(feeds.train_step, plan=plan), donate_argnums=0)
            state = first_state(plan, model.config)
            while int(state.filled) < config.buffer:
                state = fill(state, model, batches[0])
            state = start(plan, state, state.buffer, {})
            state = dataclasses.replace(state, total=jnp.asarray(10_000, jnp.int32))
            times, last = [], {}
            for i in range(args.steps + 2):
                begin = time.perf_counter()
                state, (last,) = train(state, model, batches[i % 4])
                jax.block_until_ready((state, last))
                times.append(time.perf_counter() - begin)
            seconds = float(np.median(times[2:]))
            d = preset(args.model).d_model
            flops = model_flops(model, plan, args.context_size) + 10 * d * width
            row = {
                "name": f"train_share_{width // 1024}k",
                "model": args.model,
                "step": f"sparse, {kernels}" if sparsity else "dense",
                "ms": 1e3 * seconds,
                "tokens/s": size / seconds,
                "share": flops * size / seconds / peak,
                "peak": peak,
                "l0": float(last["l0"][0]),
                "dense": float(last.get("dense", jnp.ones(1))[0]),
                "device": jax.devices()[0].device_kind,
            }
            rows.append(row)
            print(
                f"{args.model}, width {width:,}, {row['step']:15s} {row['ms']:8.1f} ms  "
                f"{row['tokens/s']:10,.0f} tokens/s  {100 * row['share']:5.1f} % of "
                f"{peak / 1e12:,.1f} TFLOP/s  L0 {row['l0']:.0f}"
                + (f", {100 * row['dense']:.0f} % done densely" if sparsity else ""),
                flush=True,
            )
            del state
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
