"""One optimizer update of a JumpReLU SAE: ours against SAELens, same loss, weights and batches.

    make peers && .venv/bin/python benchmarks/train_step.py [--width 16384 65536] [--rounds 7]

The peer is SAELens' `SAETrainer.step` on `JumpReLUTrainingSAE` with `quadratic` sparsity, which has
our loss: squared error summed over D, (2 / L0*) (L0 - L0*)^2 a token, the same straight-through
kernel, thresholds trained as they are and kept from below zero, b_dec subtracted from the input,
dead features revived (there are none here). Ours is `step.update`, compiled with a donated
state as training runs it: the sparse step, and the dense one beside it. Before any time is taken
the loss, its parts and all gradients of the first batch are compared. What then follows differs:
SAELens clips the gradient's norm to 1, ours keeps decoders at unit norm and without the gradient
along them; both run Adam with b1 = 0, where SAELens still stores a first moment.

Activations are sparse sums of a planted dictionary, a mean and noise; the coder is that dictionary,
with thresholds where each feature is active on 50 / F of the tokens. Processes, threads and turns
are as in forward.py; the floor is the one product with the encoder that no exact step can go
without, 2 D F flops a token, at the best matmul rate measured on either side. Memory at F = 65536:
some 9 GB.

On a GPU, --device gpu compares both there, in --precision tensorfloat32 (SAELens: by
`set_float32_matmul_precision`) or bfloat16 (by its `autocast`), or float32; losses and gradients
are still compared in float32. --peers may name the same interpreter.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sides import ROOT, Side, serve

D, L0, BATCHES = 640, 50, 4
RATE, PENALTY, REVIVAL, BANDWIDTH = 7e-5, 0.1, 1e-3, 0.001
NAMES = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")
AGREE = {"loss": 1e-4, "mse": 1e-4, "l0": 1e-4}  # relative differences
AGREE_GRADIENT = (
    1e-2  # norm of the difference over the norm: one entry may fall off a kernel's edge
)


def activations(w_dec: np.ndarray, batch: int) -> np.ndarray:
    """[BATCHES, batch, D] float32: about L0 of the rows of w_dec [F, D], a mean, noise.

    Norms of tokens vary as those at resid_post 12 of the 270M do, the 99th percentile at 1.13 of
    the median: L0 grows steeply with them, and spreads as in training.
    """
    rng = np.random.default_rng(0)
    tokens, width = BATCHES * batch, len(w_dec)
    x = np.zeros((tokens, D), np.float32)
    count = rng.poisson(L0, tokens)
    for k in range(count.max()):
        here = np.flatnonzero(count > k)
        size = 0.5 + rng.standard_exponential(len(here), np.float32)
        x[here] += size[:, None] * w_dec[rng.integers(0, width, len(here))]
    norm = np.exp(0.055 * rng.standard_normal((tokens, 1), np.float32))
    x *= norm / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    x += 0.3 * rng.standard_normal(D, np.float32) / D**0.5
    x += 0.3 * rng.standard_normal((tokens, D), np.float32) / D**0.5
    x /= np.sqrt(np.mean(np.sum(x * x, -1)))
    return x.reshape(BATCHES, batch, D)


def side(args) -> int:
    """Of the square product that tells the matmul rate, [side, D] x [D, side]."""
    return 2048 if args.device == "cpu" else 16384


def best(product) -> float:
    """The fastest of 20 runs of a product, in seconds."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


def memory() -> float:
    """The largest resident size so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- ours ------------------------------------------------------------------------------------


def ours(args) -> None:
    import dataclasses
    from functools import partial

    width, batch, folder = args.width[0], args.batch, args.folder

    import jax
    import jax.numpy as jnp

    from gemma_scope_jax.kernels import active
    from gemma_scope_jax.model.config import preset
    from gemma_scope_jax.training import init, objective
    from gemma_scope_jax.training import step as steps
    from gemma_scope_jax.training.lengths import SHORT
    from gemma_scope_jax.training.recipe import (
        CoderConfig,
        LossConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from gemma_scope_jax.training.state import init_state, make_plan
    from gemma_scope_jax.training.weights import encoder_bias

    loss = LossConfig(l0_weight=PENALTY, l0_warmup=0, bandwidth=BANDWIDTH, dead_weight=REVIVAL)
    coder = CoderConfig(layers=0, width=width, target_l0=L0, threshold=None, loss=loss)
    config = TrainConfig(
        (coder,),
        store="given below",
        train_batch_size=batch,
        precision=args.precision,
        optimizer=OptimizerConfig(RATE, warmup=0),
        tokens=SHORT,  # of a long run: the published settings
    ).resolved
    active.backend().FEATURES_A_SLOT = 0  # also where a dense step may be faster
    plan = {"sparse": make_plan(config, preset("gemma-3-270m"))}
    plan["dense"] = dataclasses.replace(
        plan["sparse"], config=dataclasses.replace(config, sparse=0)
    )
    group, site = plan["sparse"].groups[0], "resid_post"
    state = init_state(plan["sparse"], preset("gemma-3-270m"))
    state = dataclasses.replace(state, scale={site: jnp.ones(1)})
    x = activations(np.asarray(state.groups[0].weights.w_dec[0][0, 0]), batch)
    batches = [{site: jnp.asarray(rows)[None]} for rows in x]
    first = batches[0][site][None]
    weights = init.from_data(state.groups[0].weights, group, first, first)
    state = dataclasses.replace(
        state, groups=(dataclasses.replace(state.groups[0], weights=weights),)
    )

    def flat(w):
        arrays = w.w_enc, w.b_enc, w.threshold, w.w_dec[0], w.b_dec
        return {name: np.asarray(a[0, 0]) for name, a in zip(NAMES, arrays)}

    np.save(folder / "x.npy", x)
    np.savez(folder / "weights.npz", **flat(weights))  # pyright: ignore[reportArgumentType]
    step = {
        name: jax.jit(partial(steps.update, plan=p), donate_argnums=0) for name, p in plan.items()
    }
    states = {"sparse": state}
    del state, weights

    def compare(file, name="sparse"):
        capacity, dead = plan[name].capacity(group), jnp.zeros((1, 1, width))
        dials = objective.Dials(jnp.full(1, PENALTY), jnp.full(1, float(L0)), dead)
        call = jax.jit(partial(objective.gradients, group=group, capacity=capacity))
        with jax.default_matmul_precision("float32"):
            grads, parts = call(states[name].groups[0].weights, first, first, dials)
        np.savez(file, **flat(grads))  # pyright: ignore[reportArgumentType]
        return {k: float(parts[k][0]) for k in AGREE}

    def update(name, i):
        if name not in states:  # a second state only once the first has been compared
            states[name] = jax.tree.map(jnp.copy, states["sparse"])
        start = time.perf_counter()
        states[name], parts = step[name](states[name], batches[int(i)])
        jax.block_until_ready(states[name])
        return {"seconds": time.perf_counter() - start, "l0": float(parts[0]["l0"][0])}

    def overflow():
        """The most tokens of a batch with more entries than slots, whose rows are done densely."""
        w, capacity = states["sparse"].groups[0].weights, plan["sparse"].capacity(group)
        low = w.threshold[0] - 0.5 * BANDWIDTH
        bias = encoder_bias(w, group.template.apply_b_dec_to_input)[0]
        counts = [
            active.encode_active(b[site], w.w_enc[0], bias, low, max(1, capacity)).count
            for b in batches
        ]
        return max(int((c > capacity).sum()) for c in counts)

    def peak():
        if args.device == "cpu":
            return memory()
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30

    n = side(args)
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((n, D), (D, n))))
    with steps.precision(config):
        product = jax.jit(jnp.matmul).lower(a, b).compile()
    serve(
        {
            "compare": compare,
            "update": update,
            "overflow": overflow,
            "memory": peak,
            "weights": lambda file: np.save(
                file, flat(states["sparse"].groups[0].weights)["w_enc"]
            ),
            "matmul": lambda: best(lambda: product(a, b).block_until_ready()),
        }
    )


# ---- SAELens ---------------------------------------------------------------------------------


def peer(args) -> None:
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.training.sae_trainer import SAETrainer

    width, batch, folder = args.width[0], args.batch, args.folder
    torch.set_num_threads(args.threads)
    device = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    x = torch.from_numpy(np.load(folder / "x.npy")).to(device)
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D,
            d_sae=width,
            decoder_init_norm=None,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=float(L0),
            l0_coefficient=PENALTY,
            jumprelu_bandwidth=BANDWIDTH,
            pre_act_loss_coefficient=REVIVAL,
            device=device,
        )
    ).to(device)
    own = dict(zip(NAMES, (sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec)))
    turn = lambda name, a: a.T if name == "w_enc" else a  # theirs is [D, F]
    with np.load(folder / "weights.npz") as file, torch.no_grad():
        for name in NAMES:
            own[name].copy_(turn(name, torch.from_numpy(file[name])))
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=batch,
        lr=RATE,
        lr_end=RATE,
        adam_beta1=0.0,
        autocast=args.precision == "bfloat16",
        device=device,
    )
    trainer = SAETrainer(config, sae, iter(()))

    def compare(file):
        out = sae.training_forward_pass(
            TrainStepInput(x[0], trainer.get_coefficients(), trainer.dead_neurons, 0, False)
        )
        out.loss.backward()
        np.savez(file, **{n: turn(n, own[n].grad).cpu().numpy() for n in NAMES})
        if args.precision in ("tensorfloat32", "bfloat16"):  # from here on
            torch.set_float32_matmul_precision("high")
        trainer.optimizer.zero_grad()
        l0 = out.feature_acts.count_nonzero() / batch
        return {"loss": out.loss.item(), "mse": out.losses["mse_loss"].item(), "l0": l0.item()}

    def update(_, i):
        wait()
        start = time.perf_counter()
        out = trainer.step(x[int(i)])
        wait()
        seconds = time.perf_counter() - start
        trainer.n_training_steps += 1  # as its `fit` does
        return {"seconds": seconds, "l0": (out.feature_acts.count_nonzero() / batch).item()}

    kind = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    n = side(args)
    a, b = (torch.randn(s, device=device, dtype=kind) for s in ((n, D), (D, n)))
    peak = lambda: torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else memory()
    serve(
        {
            "compare": compare,
            "update": update,
            "memory": peak,
            "weights": lambda file: np.save(file, own["w_enc"].detach().T.cpu().numpy()),
            "matmul": lambda: best(lambda: (a @ b, wait())),
        }
    )


# ---- the comparison --------------------------------------------------------------------------


def agree(sides: dict, folder: str) -> bool:
    """Whether loss, parts and gradients of the first batch are the same before any update."""
    files = {name: f"{folder}/{name}.npz" for name in sides}
    parts = {name: side.ask("compare", files[name]) for name, side in sides.items()}
    off = {k: abs(parts["ours"][k] / parts["peer"][k] - 1) for k in AGREE}
    with np.load(files["ours"]) as mine, np.load(files["peer"]) as theirs:
        gradient = {
            k: float(np.linalg.norm(mine[k] - theirs[k]) / np.linalg.norm(theirs[k])) for k in NAMES
        }
    p = parts["ours"]
    print(
        f"  before: loss {p['loss']:.4f}, squared error {p['mse']:.4f}, L0 {p['l0']:.2f}; "
        "differences "
        + ", ".join(f"{k} {v:.0e}" for k, v in off.items())
        + "; of gradients "
        + ", ".join(f"{k} {v:.0e}" for k, v in gradient.items())
    )
    return all(off[k] < AGREE[k] for k in AGREE) and max(gradient.values()) < AGREE_GRADIENT


def changed(sides: dict, folder: str) -> bool:
    """Whether the encoders of both have moved from the common start."""
    with np.load(f"{folder}/weights.npz") as file:
        start = file["w_enc"]
    moves = {}
    for name, side in sides.items():
        side.ask("weights", f"{folder}/now.npy")
        now = np.load(f"{folder}/now.npy")
        moves[name] = float(np.linalg.norm(now - start) / np.linalg.norm(start))
    print("  encoders moved by " + ", ".join(f"{k} {v:.1e}" for k, v in moves.items()))
    return all(0 < v < np.inf for v in moves.values())


def compare(width: int, args, folder: str) -> dict:
    given = ("--folder", folder, "--width", width, "--batch", args.batch, "--threads", args.threads,
             "--device", args.device, "--precision", args.precision)  # fmt: skip
    quiet = {"JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[args.device], "HF_HUB_OFFLINE": "1",
             "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "WANDB_MODE": "disabled"}  # fmt: skip
    sides = {role: Side(python, __file__, role, *given, **quiet)
             for role, python in (("ours", sys.executable), ("peer", args.peers))}  # fmt: skip
    print(f"F = {width}, D = {D}, batch {args.batch}")
    same = agree(sides, folder)
    columns = {"sparse": "ours", "peer": "peer", "dense": "ours"}
    times = {name: [] for name in columns}
    for i in range(args.rounds + 1):
        for name, role in columns.items():
            answer = sides[role].ask("update", name, i % BATCHES)
            times[name] += [answer["seconds"]] if i else []  # the first compiles
            if i in (0, args.rounds):
                print(f"  {'first' if i == 0 else 'last'} {name}: L0 {answer['l0']:.2f}")
    same &= changed(sides, folder)
    rate = 2 * side(args) ** 2 * D / min(s.ask("matmul") for s in sides.values())
    overflow = sides["ours"].ask("overflow")
    peak = {name: s.ask("memory") for name, s in sides.items()}
    for s in sides.values():
        s.close()
    seconds = {name: statistics.median(t) for name, t in times.items()}
    floor = 2 * D * width * args.batch / rate
    print(f"  {'update':24s} {'ms':>8s} {'min':>8s} {'tokens/s':>9s} {'of floor':>8s}")
    rows = {"ours, sparse": "sparse", "ours, dense": "dense", "SAELens": "peer"}
    for label, name in rows.items():
        s, low = seconds[name], min(times[name])
        print(
            f"  {label:24s} {1e3 * s:8.1f} {1e3 * low:8.1f} {args.batch / s:9.0f} {s / floor:7.2f}x"
        )
    print(f"  {'floor':24s} {1e3 * floor:8.1f}, at {rate / 1e9:.0f} GFLOP/s")
    print(f"  {overflow} tokens of a batch had too few slots (one in 64 may); peak memory "
          f"{peak['ours']:.1f} GB ours, {peak['peer']:.1f} GB SAELens")  # fmt: skip
    return {
        "name": f"train_step_{width // 1024}k" if width >= 1024 else f"train_step_{width}",
        "ours": args.batch / seconds["sparse"], "peer": args.batch / seconds["peer"],
        "ratio": seconds["peer"] / seconds["sparse"], "floor_share": floor / seconds["sparse"],
        "dense": args.batch / seconds["dense"], "agree": bool(same),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="processor cores each side may use")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--precision", default="tensorfloat32", help="see TrainConfig.precision")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--role", choices=("ours", "peer"))
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.role:
        if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as cores it may run on
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        return ours(args) if args.role == "ours" else peer(args)
    if not args.peers.exists():
        raise SystemExit(f"{args.peers} is missing: run `make peers` first")
    rows = []
    for width in args.width:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(width, args, folder))
    for row in rows:
        print(json.dumps(row))
    return None


if __name__ == "__main__":
    main()
