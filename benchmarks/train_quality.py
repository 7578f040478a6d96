"""What trained SAEs are worth: ours against SAELens on the same tokens, and what options cost.

    make peers && .venv/bin/python benchmarks/train_quality.py [--tokens 2000000] [--only NAME ...]

All train once through the same activations of the real Gemma 3 270M, resid_post of layer 12, in
the same order: width 4096, batch 1,024, the quadratic L0 penalty with the same weight, warm-up,
learning rates, bandwidth, and inputs of unit mean squared norm. What is left is each side's own:
SAELens penalises the L0 of each token, starts from one threshold, clips gradients and calls a
feature dead that was not active for 400 updates (weight of the revival 1e-3); ours penalises the
batch's L0, starts thresholds from the data, keeps decoders at unit norm, cuts changes of rare
features and calls those dead that were rare in the last 200 updates (weight 0.01).
`saelens-defaults` has SAELens' own learning rate, momentum, bandwidth and scale instead; `falling`
is the recipe of the packaged SAE, but for its rate and tokens.

Each result is measured by the same few lines of numpy on activations of held-out text: L0, FVU
(without the rare tokens of enormous norm, too), features that never fire, that fire on fewer than
one token in 10,000, and that fire on more than 12 % of tokens. The ratio compares FVU at SAELens'
own L0, between ours of the nearest L0s. Everything is kept under --folder; the same command goes on
after an interruption. Text comes from $CORPUS, a folder with train/*.txt. On two cores the store
takes about 45 minutes (2.6 GB), SAELens about 15 each, ours some five minutes a coder.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LAYER, WIDTH, TARGET, TARGETS = 12, 4096, 50, (10, 20, 50, 60, 150)
BATCH, UPDATES = 1024, 2
RATE, WARMUP, DECAY = 1.5e-3, 100, 0.25
PENALTY, PENALTY_WARMUP, BANDWIDTH = 0.1, 200, 0.001
MATRYOSHKA, FREQUENCY, L0_START = (256, 1024), 0.01, 400.0
HELD_OUT = 150_000
SELDOM = 1e-4
OFTEN = 0.12  # share of tokens; the penalty leaves features at 0.1, and other text differs
# Learning rate, its warm-up, Adam's b1, bandwidth, updates until dead, norm of the inputs: those of
# ours, but for the window, and SAELens' defaults with inputs scaled as it does.
PEERS = {
    "saelens": (RATE, WARMUP, 0.0, BANDWIDTH, 400, 1.0),
    "saelens-defaults": (3e-4, 0, 0.9, 0.05, 1000, 640**0.5),
}
PEER_REVIVAL = 1e-3
NAMES = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")


# ---- ours ------------------------------------------------------------------------------------


def runs(folder: Path, tokens: int) -> dict:
    """The training runs by name."""
    from gemma_scope_jax.training.recipe import (
        CoderConfig,
        LossConfig,
        OptimizerConfig,
        TrainConfig,
    )

    loss = LossConfig(
        l0_weight=PENALTY,
        l0_warmup=PENALTY_WARMUP,
        per_token=False,
        bandwidth=BANDWIDTH,
        dead_after=200,
    )
    often = dataclasses.replace(loss, frequency_weight=FREQUENCY)
    falling = dataclasses.replace(often, l0_start=L0_START, l0_warmup=tokens // BATCH // 2)

    def run(*coders):
        return TrainConfig(
            coders,
            store=str(folder / "store"),
            tokens=tokens,
            train_batch_size=BATCH,
            updates=UPDATES,
            optimizer=OptimizerConfig(RATE, WARMUP, DECAY),
        )

    def sae(target=TARGET, loss=loss, prefixes=()):
        return CoderConfig(
            LAYER, width=WIDTH, target_l0=target, threshold=None, loss=loss, prefixes=prefixes
        )

    return {
        "plain": run(sae()),
        "matryoshka": run(sae(prefixes=MATRYOSHKA)),
        "frequency": run(sae(loss=often)),
        "both": run(sae(loss=often, prefixes=MATRYOSHKA)),
        "falling": run(sae(loss=falling, prefixes=MATRYOSHKA)),
        "targets": run(*(sae(t) for t in TARGETS if t != TARGET)),
    }


def stores(folder: Path, tokens: int):
    """(activations to train on, held out), written if they are not there."""
    from gemma_scope_jax.data.activations.store import ActivationStore
    from gemma_scope_jax.data.documents import TextData
    from gemma_scope_jax.training.train import store_activations

    corpus = os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")
    found = []
    for name, text, count in (
        ("store", "train/*.txt", tokens),
        ("held-out", "eval/heldout_mix.txt", HELD_OUT),
    ):
        path = folder / name
        if not (path / "manifest.json").exists() or len(ActivationStore(path)) < count:
            config = dataclasses.replace(
                runs(folder, tokens)["plain"],
                store="",
                tokens=count,
                context_size=512,
                buffer=8192,
                data=TextData(files=(f"{corpus}/{text}",)),
            )
            store_activations(config, path, count)
        found.append(ActivationStore(path))
    return found


def ours(name: str, folder: Path, tokens: int) -> dict:
    """{target L0: (weights, tokens a second and coder)} of a run."""
    from gemma_scope_jax.training.train import train

    config, out = runs(folder, tokens)[name], folder / name
    coders = train(config, out)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    rate = last["tokens_per_s"] * len(coders)
    weights = lambda c: {n: np.asarray(getattr(coders[c.folder], n)) for n in NAMES}
    return {c.target_l0: (weights(c), rate) for c in config.coders}


# ---- SAELens ---------------------------------------------------------------------------------


def peer(name: str, folder: Path, tokens: int, threads: int) -> None:
    """Train with SAELens; leaves `name`.npz."""
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from gemma_scope_jax.data.activations.store import ActivationStore
    from gemma_scope_jax.training.held_out import held_rows

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    store, passes = ActivationStore(folder / "store"), tokens // (UPDATES * BATCH)
    rate, warmup, b1, bandwidth, dead_after, norm = PEERS[name]
    steps, scale = passes * UPDATES, float(np.load(folder / "scale.npy")) / norm
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=store.width("resid_post"),
            d_sae=WIDTH,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=float(TARGET),
            l0_coefficient=PENALTY * norm**2,
            l0_warm_up_steps=PENALTY_WARMUP,
            jumprelu_bandwidth=bandwidth,
            pre_act_loss_coefficient=PEER_REVIVAL * norm,
            normalize_activations="none",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=rate,
        lr_end=0.0,
        lr_warm_up_steps=warmup,
        lr_decay_steps=int(DECAY * steps),
        adam_beta1=b1,
        dead_feature_window=dead_after,
    )
    trainer = SAETrainer(config, sae, iter(()))
    state, saved, seconds = folder / name, time.time(), 0.0
    if (state / "done.json").exists():
        seconds = json.loads((state / "done.json").read_text())["seconds"]
        sae.load_state_dict(torch.load(state / "sae.pt"))
        trainer.load_trainer_state(state)
    rows = len(store) - held_rows(len(store), 1 / 64)  # the others ours holds out
    batches = store.batches(
        UPDATES * BATCH, 0, start=trainer.n_training_steps // UPDATES, rows=rows
    )
    begin = time.perf_counter() - seconds
    while trainer.n_training_steps < steps:
        x = torch.from_numpy(next(batches)["resid_post"][0].astype(np.float32)) / scale
        for part in x.split(BATCH):
            out = trainer.step(part)
            trainer.n_training_steps += 1  # as its `fit` does
        seconds = time.perf_counter() - begin
        if time.time() - saved > 60 or trainer.n_training_steps == steps:
            saved, done = time.time(), trainer.n_training_steps
            state.mkdir(exist_ok=True)
            torch.save(sae.state_dict(), state / "sae.pt")
            trainer.save_trainer_state(state)
            (state / "done.json").write_text(json.dumps({"steps": done, "seconds": seconds}))
            l0 = out.feature_acts.count_nonzero().item() / BATCH
            left = (steps - done) * seconds / done / 60
            print(
                f"{name}: {100 * done / steps:.1f} %  {done * BATCH / seconds:,.0f} tokens/s  "
                f"{left:.0f} min left  squared error {out.losses['mse_loss'].item():.4f}  "
                f"L0 {l0:.1f}",
                file=sys.stderr,
                flush=True,
            )
    w = dict(zip(NAMES, (sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec)))
    w = {k: v.detach().double().numpy() for k, v in w.items()}
    if sae.cfg.apply_b_dec_to_input:
        w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["w_enc"]
    for kind in ("b_enc", "threshold", "b_dec"):  # for raw activations, as `fold` does it
        w[kind] = w[kind] * scale
    np.savez(folder / f"{name}.npz", rate=steps * BATCH / seconds, **w)


# ---- figures ---------------------------------------------------------------------------------


def figures(w: dict, x: np.ndarray) -> dict:
    """L0, FVU and firing of a coder in the published form on activations x [n, D]."""
    w = {name: w[name].astype(np.float32) for name in NAMES}
    x64 = x.astype(np.float64)
    spread = ((x64 - x64.mean(0)) ** 2).sum(1)
    norm = np.linalg.norm(x64, axis=1)
    typical = norm < 3 * np.median(norm)
    typical_spread = ((x64 - x64[typical].mean(0)) ** 2).sum(1)
    error, l0, fired = np.zeros(len(x)), np.zeros(len(x)), np.zeros(WIDTH)
    for a in range(0, len(x), 4096):
        z = x[a : a + 4096] @ w["w_enc"] + w["b_enc"]
        f = np.where(z > w["threshold"], np.maximum(z, 0), 0)
        y = f.astype(np.float32) @ w["w_dec"] + w["b_dec"]
        error[a : a + 4096] = ((x64[a : a + 4096] - y) ** 2).sum(1)
        l0[a : a + 4096], fired = (f > 0).sum(1), fired + (f > 0).sum(0)
    return {
        "l0": l0.mean(),
        "fvu": error.sum() / spread.sum(),
        "typical": error[typical].sum() / typical_spread[typical].sum(),
        "never": (fired == 0).mean(),
        "seldom": (fired < SELDOM * len(x)).mean(),
        "dense": (fired > OFTEN * len(x)).mean(),
    }


def at_l0(rows: list[dict], l0: float, key: str) -> float:
    """A figure of ours at an L0, linear in its logarithm between the neighbours."""
    rows = sorted(rows, key=lambda r: r["l0"])
    logs = [np.log(r["l0"]) for r in rows]
    return float(np.interp(np.log(l0), logs, [r[key] for r in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=ROOT / "out/train_quality")
    parser.add_argument(
        "--only", nargs="+", help="some of: " + ", ".join([*runs(Path(), 1), *PEERS])
    )
    parser.add_argument("--threads", type=int, default=2, help="of SAELens")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--role", choices=tuple(PEERS))
    args = parser.parse_args()
    if args.role:
        return peer(args.role, args.folder, args.tokens, args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = args.only or [*runs(args.folder, args.tokens), *PEERS]
    store, held_out = stores(args.folder, args.tokens)
    x = held_out.read(np.arange(len(held_out)))["resid_post"][0].astype(np.float32)
    some = store.read(np.linspace(0, len(store) - 1, 65_536, dtype=np.int64))["resid_post"][0]
    squares = (some.astype(np.float64) ** 2).sum(1)
    np.save(args.folder / "scale.npy", np.minimum(squares, 9 * np.median(squares)).mean() ** 0.5)
    rows = []

    def add(name, target, weights, rate):
        row = {"name": name, "target": target, "tokens/s": rate, **figures(weights, x)}
        rows.append(row)
        print(
            f"{name:12s} target {target:4g}  L0 {row['l0']:6.1f}  FVU {row['fvu']:.4f}  typical "
            f"{row['typical']:.4f}  never {100 * row['never']:.1f} %  below {SELDOM}: "
            f"{100 * row['seldom']:.1f} %  above {OFTEN:.0%}: {100 * row['dense']:.1f} %  "
            f"{rate:,.0f} tokens/s",
            flush=True,
        )

    for name in wanted:
        if name not in PEERS:
            for target, found in ours(name, args.folder, args.tokens).items():
                add(name, target, *found)
            continue
        if not args.peers.exists():
            raise SystemExit(f"{args.peers} is missing: run `make peers` first")
        command = [args.peers, __file__, "--role", name, "--folder", args.folder,
                   "--tokens", args.tokens, "--threads", args.threads]  # fmt: skip
        quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        subprocess.run(list(map(str, command)), check=True, env=os.environ | quiet, cwd=ROOT)
        with np.load(args.folder / f"{name}.npz") as file:
            add(name, TARGET, dict(file), float(file["rate"]))
    (args.folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    curve = [r for r in rows if r["name"] in ("plain", "targets")]
    for r in rows:
        if r["name"] in PEERS and curve:
            mine = at_l0(curve, r["l0"], "fvu")
            print(json.dumps({
                "name": f"train_quality {r['name']}", "l0": r["l0"], "ours": mine, "peer": r["fvu"],
                "ratio": r["fvu"] / mine,
                "typical": {"ours": at_l0(curve, r["l0"], "typical"), "peer": r["typical"]},
                "agree": any(abs(c["l0"] / r["l0"] - 1) < 0.05 for c in curve),
            }))  # fmt: skip
    return None


if __name__ == "__main__":
    main()
