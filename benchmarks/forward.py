"""Tokens a second through the trunk of Gemma 3 270M: ours against transformers, same weights.

    make peers && .venv/bin/python benchmarks/forward.py [--dtype float32 bfloat16] [--rounds 5]

Both sides run as processes of their own, hold the same weights (ours loads the packaged model and
writes it as a Hugging Face folder for the peer), and answer in turn, so that a change in the
machine's speed hits both. Each computes the final normed residual of the same 4 x 512 tokens; the
results are compared before the times are. The floor is the matmul flops of the trunk over the
machine's measured matmul rate in that dtype (the better of XLA's and torch's).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sides import ROOT, Side, serve

BATCH, LENGTH, LAYERS = 4, 512, 18
AGREE = {"float32": 1e-3, "bfloat16": 0.15}  # largest difference over the largest value


def flops_per_token() -> float:
    """Matmul flops of a token in the trunk: projections, and attention over (T + 1) / 2 keys."""
    weights = 640 * (4 * 256 + 2 * 256) + 4 * 256 * 640 + 3 * 640 * 2048
    scores = 2 * 4 * 256 * (LENGTH + 1) / 2
    return 2.0 * LAYERS * (weights + scores)


def tokens() -> np.ndarray:
    ids = np.random.default_rng(0).integers(1000, 200_000, (BATCH, LENGTH)).astype(np.int32)
    ids[:, 0] = 2
    return ids


def answer(forward, matmul) -> None:
    """Answer "run", or "run FILE" that also saves what came out, and "matmul": in seconds each."""

    def run(file: str = "") -> float:
        start = time.perf_counter()
        result = forward()
        seconds = time.perf_counter() - start
        if file:
            np.save(file, np.asarray(result, np.float32))
        return seconds

    forward()
    serve({"run": run, "matmul": lambda: min(timed(matmul) for _ in range(20))})


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(dtype: str, folder: str) -> None:
    import jax
    import jax.numpy as jnp

    import gemma_scope_jax as gs
    from gemma_scope_jax.model.block import rms_norm
    from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface

    model = gs.load_model("gemma-3-270m", dtype=dtype)
    if not Path(folder, "config.json").exists():
        save_huggingface(gs.load_model("gemma-3-270m", dtype="float32"), folder)
    ids = jnp.asarray(tokens())

    @jax.jit
    def trunk(model, ids):
        out = gs.forward(model, ids, [gs.capture("resid_final")], logits="none")
        return rms_norm(out.reads["resid_final"], model.params.final_norm, 1e-6)

    a, w = jnp.ones((BATCH * LENGTH, 640), dtype), jnp.ones((640, 2048), dtype)
    product = jax.jit(lambda a, w: jnp.matmul(a, w, preferred_element_type=jnp.float32))
    answer(lambda: trunk(model, ids).block_until_ready(), lambda: product(a, w).block_until_ready())


def peer(dtype: str, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).model.eval()
    ids = torch.tensor(tokens(), dtype=torch.long)
    a, w = torch.ones(BATCH * LENGTH, 640, dtype=kind), torch.ones(640, 2048, dtype=kind)

    def trunk():
        with torch.inference_mode():
            return model(ids, use_cache=False).last_hidden_state.float().numpy()

    answer(trunk, lambda: (a @ w).float().numpy())


def compare(dtype: str, rounds: int, folder: str, peers: Path) -> dict:
    given = ("--dtype", dtype, "--folder", folder)
    sides = {
        role: Side(python, __file__, role, *given)
        for role, python in (("ours", sys.executable), ("peer", peers))
    }
    files = {name: f"{folder}/{name}-{dtype}.npy" for name in sides}
    for name, side in sides.items():
        side.ask("run", files[name])
    mine, theirs = (np.load(files[name]) for name in ("ours", "peer"))
    difference = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(side.ask("run"))
    product = 2 * BATCH * LENGTH * 640 * 2048 / min(s.ask("matmul") for s in sides.values())
    for side in sides.values():
        side.close()
    rate = {name: BATCH * LENGTH / statistics.median(t) for name, t in times.items()}
    floor = product / flops_per_token()
    print(
        f"{dtype}: ours {rate['ours']:.0f}, transformers {rate['peer']:.0f} tokens/s; matmul "
        f"{product / 1e9:.0f} GFLOP/s, so the floor is {floor:.0f} tokens/s; largest difference "
        f"{difference:.1e} of the largest value"
    )
    return {
        "name": f"forward-{dtype}",
        "ours": rate["ours"],
        "peer": rate["peer"],
        "ratio": rate["ours"] / rate["peer"],
        "floor_share": rate["ours"] / floor,
        "agree": difference < AGREE[dtype],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--role", choices=("ours", "peer"))
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.role:
        return {"ours": ours, "peer": peer}[args.role](args.dtype[0], args.folder)
    if not args.peers.exists():
        raise SystemExit(f"{args.peers} is missing: run `make peers` first")
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(dtype, args.rounds, folder, args.peers) for dtype in args.dtype]
    for row in rows:
        print(json.dumps(row))
    return None


if __name__ == "__main__":
    main()
