"""Sparse features of a text: ours against transformers + SAELens, and against our bare forward.

    make peers && .venv/bin/python benchmarks/extract.py [--coders sae transcoders] [--tokens 40960]

Ours is `extract`: text in, a finished store on the disk, index and checksums included. The peer is
the loop people write: a transformers model cut after the last layer that is read, a hook there,
SAELens' `encode`, and the active features (token, feature, value) of each batch saved by numpy; it
is given token ids, so it tokenises nothing. The bare forward is ours to the same layer, on the same
batches of 8 x 256 tokens, and nothing is done with the activations.

The three take turns, on the same text in float32 (or --dtype bfloat16); the active features are
compared before the times are: the same, but for those within 1e-4 of their threshold, relative to
the token's largest activation. The floor is the model's and the encoders' products at the best
matmul rate measured in float32. On a GPU:
--device gpu --batch-size 32 --context-size 1024 --tokens 1048576.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sides import ROOT, Side, serve

SAE = "gemma-3-270m-resid-post-12-width-4k-l0-50"
TRANSCODERS = [f"gemma-3-270m-transcoder-{i}-width-1k-l0-20-affine" for i in range(18)]
CODERS = {"sae": [SAE], "transcoders": TRANSCODERS}
TIE = 1e-4
HALF = 1e-3  # values are kept as float16
COMPARED = 65_536  # tokens, at most
D, LAYER = 640, 640 * (4 * 256 + 2 * 256) + 4 * 256 * 640 + 3 * 640 * 2048  # weights of a layer


def flops(coders: str, length: int) -> float:
    """Matmul flops of a token: the layers run, attention over (T + 1) / 2 keys, the encoders."""
    layers, width = (13, 4096) if coders == "sae" else (18, 18 * 1024)
    return 2.0 * layers * (LAYER + 2 * 4 * 256 * (length + 1) / 2) + 2 * D * width


def documents(tokens: int) -> list[str]:
    """Eight documents of `tokens` tokens in all: pieces of this repository in any order."""
    import gemma_scope_jax as gs

    tok, rng = gs.load_tokenizer("gemma-3-270m"), np.random.default_rng(0)
    files = [ROOT / "LICENSE", ROOT / "README.md", *sorted((ROOT / "tests").glob("*.py"))]
    ids = np.concatenate([tok.encode(f.read_text(), bos=False) for f in files])

    def document() -> str:
        parts, size = [], 0
        while size < tokens // 8:
            start, length = int(rng.integers(0, len(ids) - 400)), int(rng.integers(100, 400))
            parts.append(tok.decode(ids[start : start + length].tolist()))
            size += length
        return "".join(parts)

    return [document() for _ in range(8)]


def best(product) -> float:
    product()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(args) -> None:
    import jax
    import jax.numpy as jnp

    import gemma_scope_jax as gs
    from gemma_scope_jax.coders.active_features import slots_for
    from gemma_scope_jax.coders.interop.saelens import save_saelens
    from gemma_scope_jax.extraction.runner import Runner
    from gemma_scope_jax.extraction.work import Packed, ShardPlan, open_text
    from gemma_scope_jax.model.batch import TokenBatch
    from gemma_scope_jax.model.checkpoints.huggingface import save_huggingface

    folder = Path(args.folder)
    model = gs.load_model("gemma-3-270m", dtype=args.dtype)
    tok = gs.load_tokenizer("gemma-3-270m")
    coders = {name: gs.load_coder(name) for name in CODERS[args.coders]}
    if not (folder / "model").exists():
        save_huggingface(gs.load_model("gemma-3-270m", dtype="float32"), folder / "model")
    for name, coder in coders.items():
        save_saelens(coder, folder / name)
    texts = documents(args.tokens)
    last = max(coder.layer for coder in coders.values())
    site = coders[CODERS[args.coders][0]].reads

    @jax.jit
    def bare(model, tokens, segments):
        reads = [gs.capture(site, last)]
        out = gs.forward(
            model,
            tokens,
            reads,
            segments=segments,
            stop_at_layer=last + 1,
            logits="none",
            remat=None,
        )
        return out.reads[site]

    def run() -> float:
        shutil.rmtree(folder / "store", ignore_errors=True)
        start = time.perf_counter()
        store = gs.extract(
            model,
            coders,
            tok,
            texts,
            folder / "store",
            batch_size=args.batch_size,
            context_size=args.context_size,
            precision=args.precision,
        )
        return len(store) / (time.perf_counter() - start)

    def prepare() -> float:
        """Write the batches that were run: tokens and segments [2, n, rows, length]."""
        run()
        store = gs.FeatureStore(folder / "store")
        held = store.manifest
        plan = ShardPlan(
            open_text(texts, tok, 0),
            held["documents"],
            held["per_shard"],
            args.batch_size,
            args.context_size,
            held["mean"],
        )
        packed = [p.batch for p in plan.batches(range(plan.shards)) if isinstance(p, Packed)]
        batches = np.stack([[p.tokens for p in packed], [p.segments for p in packed]])
        assert int((batches[1] > 0).sum()) == len(store)
        np.save(folder / "batches.npy", batches)
        return store.bytes / len(store)

    def forward() -> float:
        batches, segments = np.load(folder / "batches.npy")
        bare(model, jnp.asarray(batches[0]), jnp.asarray(segments[0])).block_until_ready()
        start = time.perf_counter()
        for batch, segment in zip(batches, segments):
            out = bare(model, jnp.asarray(batch), jnp.asarray(segment))
        out.block_until_ready()
        return int((segments > 0).sum()) / (time.perf_counter() - start)

    def device() -> float:
        """Our program alone: what it finds stays on the device."""
        batches, segments = np.load(folder / "batches.npy")
        runner = Runner(model, coders, slots_for(list(coders.values())), args.precision)
        start = lambda b, s: runner.launch(TokenBatch(b, s, s > 0))[1]
        jax.block_until_ready(start(batches[0], segments[0]))
        began = time.perf_counter()
        for batch, segment in zip(batches, segments):
            out = start(batch, segment)
        jax.block_until_ready(out)
        return int((segments > 0).sum()) / (time.perf_counter() - began)

    a, w = jnp.ones((2048, D), args.dtype), jnp.ones((D, 2048), args.dtype)
    product = jax.jit(lambda a, w: jnp.matmul(a, w))
    rate = lambda: 2 * 2048 * 2048 * D / best(lambda: product(a, w).block_until_ready())
    serve({"prepare": prepare, "run": run, "forward": forward, "device": device, "matmul": rate})


def peer(args) -> None:
    import torch
    from sae_lens import SAE
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, device = Path(args.folder), "cuda" if args.device == "gpu" else "cpu"
    names = CODERS[args.coders]
    layers = [12] if args.coders == "sae" else list(range(18))
    config = AutoConfig.from_pretrained(folder / "model")
    config.num_hidden_layers = max(layers) + 1
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = (
        AutoModelForCausalLM.from_pretrained(
            folder / "model", config=config, dtype=getattr(torch, args.dtype)
        )
        .model.eval()
        .to(device)
    )
    saes = [SAE.load_from_disk(str(folder / name), device=device) for name in names]
    seen: dict[int, torch.Tensor] = {}

    def hook(layer):
        def keep(module, inputs, output):
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    for layer in layers:
        block = model.layers[layer]
        module = block if args.coders == "sae" else block.pre_feedforward_layernorm
        module.register_forward_hook(hook(layer))

    def run() -> float:
        tokens, segments = np.load(folder / "batches.npy")
        batches = torch.tensor(tokens, dtype=torch.long)
        out = folder / "peer"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        start = time.perf_counter()
        with torch.inference_mode():
            for number, batch in enumerate(batches):
                model(batch.to(device), use_cache=False)
                for layer, sae in zip(layers, saes):
                    f = sae.encode(seen[layer].float())
                    f[:, 0] = 0  # <bos>
                    f = f.reshape(-1, f.shape[-1])
                    where = torch.nonzero(f)
                    values = f[where[:, 0], where[:, 1]]
                    np.savez(
                        out / f"{number}.{layer}.npz",
                        where=where.to(torch.int32).cpu(),
                        values=values.half().cpu() if args.dtype != "float32" else values.cpu(),
                    )
        return int((segments > 0).sum()) / (time.perf_counter() - start)

    a = torch.ones(2048, D, dtype=getattr(torch, args.dtype), device=device)
    w = torch.ones(D, 2048, dtype=a.dtype, device=device)

    def product():
        a @ w
        if device == "cuda":
            torch.cuda.synchronize()

    serve({"run": run, "matmul": lambda: 2 * 2048 * 2048 * D / best(product)})


def compare_features(coders: str, folder: str) -> tuple[float, float, float, int]:
    """(share of entries that both have, how far from its threshold any other is, the largest
    difference of values, entries).

    Distances are relative to the token's largest activation. Rows that hold two documents or
    padding are left out: the peer's tokens see what stands before them.
    """
    import gemma_scope_jax as gs

    store = gs.FeatureStore(Path(folder) / "store")
    segments = np.load(Path(folder) / "batches.npy")[1]
    segments = segments[: max(1, COMPARED // segments[0].size)]
    whole = np.broadcast_to((segments == 1).all(-1, keepdims=True), segments.shape).reshape(-1)
    place = np.flatnonzero(segments.reshape(-1) > 0)  # of the store's rows in the batches
    shared = total = 0
    worst = furthest = 0.0
    for name in CODERS[coders]:
        coder = gs.load_coder(name)
        threshold, width = np.asarray(coder.threshold), coder.width
        keys, values = [], []
        for segment in store.segments():
            n = min(len(segment), len(place) - segment.start)
            if n <= 0:
                break
            offsets, ids, some = segment.by_token(name)
            rows = np.repeat(np.arange(n) + segment.start, np.diff(offsets[: n + 1]))
            keys.append(place[rows] * width + ids[: len(rows)])
            values.append(some[: len(rows)])
        mine, mine_values = np.concatenate(keys), np.concatenate(values).astype(np.float64)
        keys, values = [], []
        for number in range(len(segments)):
            saved = np.load(Path(folder) / "peer" / f"{number}.{coder.layer}.npz")
            rows = saved["where"][:, 0].astype(np.int64) + number * segments[0].size
            keys.append(rows * width + saved["where"][:, 1])
            values.append(saved["values"])
        theirs, their_values = np.concatenate(keys), np.concatenate(values).astype(np.float64)
        keep = whole[mine // width]
        mine, mine_values = mine[keep], mine_values[keep]
        keep = whole[theirs // width]
        theirs, their_values = theirs[keep], their_values[keep]
        largest = np.full(whole.size, 1e-9)
        np.maximum.at(largest, mine // width, mine_values)
        both, i, j = np.intersect1d(mine, theirs, return_indices=True)
        shared, total = shared + len(both), total + len(mine) + len(theirs) - len(both)
        for key, value in ((mine, mine_values), (theirs, their_values)):
            alone = ~np.isin(key, both)
            apart = (value - threshold[key % width]) / largest[key // width]
            worst = max(worst, float(apart[alone].max(initial=0.0)))
        far = np.abs(mine_values[i] - their_values[j]) / largest[both // width]
        furthest = max(furthest, float(far.max()))
        print(
            f"  {name}: {len(mine)} entries, largest difference {far.max():.1e} of the token's "
            f"largest",
            file=sys.stderr,
        )
    return shared / max(total, 1), worst, furthest, total


def compare(coders: str, args, folder: str) -> dict:
    given: list = ["--coders", coders, "--folder", folder]
    for name in ("dtype", "device", "tokens", "batch_size", "context_size", "precision"):
        given += [f"--{name.replace('_', '-')}", getattr(args, name)]
    start = lambda python, role: Side(python, __file__, role, *given, HF_HUB_OFFLINE="1")
    sides = {"ours": start(sys.executable, "ours")}
    size = sides["ours"].ask("prepare")
    sides["peer"] = start(args.peers, "peer")
    sides["peer"].ask("run")
    share, worst, furthest, entries = compare_features(coders, folder)
    rates: dict[str, list[float]] = {"ours": [], "forward": [], "device": [], "peer": []}
    for _ in range(args.rounds):
        rates["forward"].append(sides["ours"].ask("forward"))
        rates["device"].append(sides["ours"].ask("device"))
        rates["ours"].append(sides["ours"].ask("run"))
        rates["peer"].append(sides["peer"].ask("run"))
    product = max(side.ask("matmul") for side in sides.values())
    for side in sides.values():
        side.close()
    rate = {name: statistics.median(some) for name, some in rates.items()}
    floor = product / flops(coders, args.context_size)
    print(
        f"{coders}, {args.dtype}: ours {rate['ours']:.0f}, of which the program alone "
        f"{rate['device']:.0f}, bare forward {rate['forward']:.0f}, "
        f"transformers + SAELens {rate['peer']:.0f} tokens/s; ours / forward "
        f"{rate['ours'] / rate['forward']:.2f}; {size:.0f} bytes a token; {entries} entries, "
        f"{share:.6f} shared, the others within {worst:.1e} of the threshold; matmul "
        f"{product / 1e9:.0f} GFLOP/s, so the floor is {floor:.0f} tokens/s"
    )
    return {
        "name": f"extract-{coders}-{args.dtype}",
        "ours": rate["ours"],
        "peer": rate["peer"],
        "ratio": rate["ours"] / rate["peer"],
        "of_forward": rate["ours"] / rate["forward"],
        "floor_share": rate["ours"] / floor,
        "bytes_per_token": size,
        "agree": entries > 0
        and (worst < TIE and furthest < HALF if args.dtype == "float32" else share > 0.95),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coders", nargs="+", default=["sae", "transcoders"], choices=CODERS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-size", type=int, default=256)
    parser.add_argument("--precision", default="highest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--role", choices=("ours", "peer"))
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.role:
        args.coders = args.coders[0]
        return {"ours": ours, "peer": peer}[args.role](args)
    if not args.peers.exists():
        raise SystemExit(f"{args.peers} is missing: run `make peers` first")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for coders in args.coders:
            rows.append(compare(coders, args, folder))
    for row in rows:
        print(json.dumps(row))
    return None


if __name__ == "__main__":
    main()
