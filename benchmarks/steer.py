"""Steering sweeps: ours in batches of one compiled decode, against transformers with a hook.

    make peers && .venv/bin/python benchmarks/steer.py [--features 5 --strengths 8 --new-tokens 24]

Features x strengths x ten prompts are continued greedily (temperature 0) by the real Gemma 3 270M
in float32; a feature's direction is added to the residual stream after layer 12, at every token but
<bos>, in prefill and in decoding. The peer is the loop people write: for each feature and strength
a forward hook that adds the SAELens decoder row, and one `generate` of the ten prompts, padded on
the left. Both write the same tokens, but where the two likeliest logits are nearer than 1e-3.

Tokens a second are those written. The floor is the products of all tokens, prompts included, at the
best matmul rate measured.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sides import ROOT, Side, serve

SAE, SITE, LAYER, D = "gemma-3-270m-resid-post-12-width-4k-l0-50", "resid_post", 12, 640
FEATURES, NORM = (3, 134, 136, 510, 2047), 15_000.0
TIE = 1e-3
PER_LAYER = D * (4 * 256 + 2 * 256) + 4 * 256 * D + 3 * D * 2048  # weights


def levels(args) -> list[float]:
    """Strengths, in norms of a typical activation."""
    return [round(0.05 + 0.08 * n, 2) for n in range(args.strengths)]


def pairs(args) -> list[tuple[int, float]]:
    return [(f, s) for f in FEATURES[: args.features] for s in levels(args)]


def ours(args) -> None:
    import jax
    import jax.numpy as jnp

    import gemma_scope_jax as gs
    from gemma_scope_jax.coders.interop.saelens import save_saelens
    from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface

    folder = Path(args.folder)
    model, tok = gs.load_model("gemma-3-270m", dtype="float32"), gs.load_tokenizer("gemma-3-270m")
    sae = gs.load_coder(SAE)
    prompts = [tok.encode(p) for p in gs.NEUTRAL_PROMPTS]
    jobs = [(f, s, p) for f, s in pairs(args) for p in prompts]

    def spec(feature: int, strength: float):
        size = float(np.linalg.norm(np.asarray(sae.w_dec[feature], np.float32)))
        step = {"op": "add", "strength": strength * NORM / size, "feature": feature}
        return gs.steer_spec([step])

    def prepare() -> int:
        if not (folder / "model").exists():
            save_huggingface(model, folder / "model")
        save_saelens(sae, folder / "sae")
        (folder / "prompts.json").write_text(json.dumps([p.tolist() for p in prompts]))
        return len(jobs)

    def run() -> float:
        specs = {(f, s): spec(f, s) for f, s in pairs(args)}
        start, found = time.perf_counter(), []
        for at in range(0, len(jobs), args.rows):
            some = jobs[at : at + args.rows]
            filled = some + [some[-1]] * (args.rows - len(some))
            items = gs.steering(model, [specs[f, s] for f, s, _ in filled], sae)
            rows = [p for *_, p in filled]
            out = gs.generate(model, rows, args.new_tokens, items, stop_tokens=())
            found.append(np.asarray(out.tokens)[: len(some)])
        seconds = time.perf_counter() - start
        np.save(folder / "ours.npy", np.concatenate(found))
        return seconds

    def gap(row: int, step: int) -> float:
        """How far apart the two likeliest logits are before token `step` of a row."""
        feature, strength, prompt = jobs[row]
        written = np.load(folder / "ours.npy")[row, :step]
        text = np.concatenate([prompt, written])[None]
        items = gs.steering(model, spec(feature, strength), sae)
        logits = np.asarray(gs.run(model, text, items, logits="last").logits[0, -1])
        first, second = np.sort(logits)[-1:-3:-1]
        return float(first - second)

    a, w = jnp.ones((2048, D)), jnp.ones((D, 2048))
    product = jax.jit(lambda a, w: jnp.matmul(a, w))

    def rate() -> float:
        product(a, w).block_until_ready()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            product(a, w).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * 2048 * 2048 * D / min(times)

    serve({"prepare": prepare, "run": run, "matmul": rate,
           "gap": lambda row, step: gap(int(row), int(step))})  # fmt: skip


def peer(args) -> None:
    import torch
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM

    folder = Path(args.folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows = SAE.load_from_disk(str(folder / "sae")).W_dec.detach()
    prompts = json.loads((folder / "prompts.json").read_text())
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        ids[n, longest - len(prompt) :] = torch.tensor(prompt)
        mask[n, longest - len(prompt) :] = 1
    steered_prompt = ((mask > 0) & (ids != 2)).unsqueeze(-1)  # not <bos>
    added = torch.zeros(D)

    def hook(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        where = steered_prompt if x.shape[1] > 1 else torch.ones_like(x[..., :1], dtype=torch.bool)
        x = torch.where(where, x + added, x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    model.model.layers[LAYER].register_forward_hook(hook)

    def run() -> float:
        nonlocal added
        start, found = time.perf_counter(), []
        with torch.inference_mode():
            for feature, strength in pairs(args):
                added = strength * NORM * rows[feature] / rows[feature].norm()
                out = model.generate(ids, attention_mask=mask, max_new_tokens=args.new_tokens,
                                     min_new_tokens=args.new_tokens, do_sample=False,
                                     eos_token_id=None, pad_token_id=0)  # fmt: skip
                found.append(out[:, longest:].numpy())
        seconds = time.perf_counter() - start
        np.save(folder / "peer.npy", np.concatenate(found))
        return seconds

    serve({"run": run})


def compare(args, folder: str) -> dict:
    given: list = ["--folder", folder]
    for name in ("features", "strengths", "new_tokens", "rows"):
        given += [f"--{name.replace('_', '-')}", getattr(args, name)]
    mine = Side(sys.executable, __file__, "ours", *given)
    jobs = mine.ask("prepare")
    compiled = mine.ask("run")
    theirs = Side(args.peers, __file__, "peer", *given, HF_HUB_OFFLINE="1")
    theirs.ask("run")
    a, b = (np.load(Path(folder) / f"{side}.npy") for side in ("ours", "peer"))
    differ = [(r, int(np.argmax(a[r] != b[r]))) for r in range(jobs) if (a[r] != b[r]).any()]
    gaps = [mine.ask("gap", r, step) for r, step in differ]
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        seconds["ours"].append(mine.ask("run"))
        seconds["peer"].append(theirs.ask("run"))
    rate = mine.ask("matmul")
    for side in (mine, theirs):
        side.close()
    took = {name: float(np.median(some)) for name, some in seconds.items()}
    written = jobs * args.new_tokens
    vocab, prompt = 262_144, 8
    flops = 2.0 * jobs * (18 * PER_LAYER * (prompt + args.new_tokens) + D * vocab * args.new_tokens)
    agree = max(gaps, default=0.0) <= TIE
    print(
        f"{jobs} continuations of {args.new_tokens} tokens: ours {took['ours']:.1f} s (the first "
        f"time {compiled:.1f} s, with compilation), transformers + hook {took['peer']:.1f} s; "
        f"{jobs - len(differ)} rows are the same, the others part where two logits are within "
        f"{max(gaps, default=0.0):.1e}; floor {flops / rate:.1f} s at {rate / 1e9:.0f} GFLOP/s"
    )
    return {
        "name": f"steer-{args.features}x{args.strengths}-on-10-prompts",
        "ours": written / took["ours"],
        "peer": written / took["peer"],
        "ratio": took["peer"] / took["ours"],
        "with_compilation": took["peer"] / compiled,
        "floor_share": flops / rate / took["ours"],
        "same_rows": (jobs - len(differ)) / jobs,
        "agree": bool(agree),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=["ours", "peer"])
    parser.add_argument("--folder", default="")
    parser.add_argument("--features", type=int, default=5)
    parser.add_argument("--strengths", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    args = parser.parse_args()
    if args.role:
        (ours if args.role == "ours" else peer)(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(args, args.folder or folder)))


if __name__ == "__main__":
    main()
