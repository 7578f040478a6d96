"""The same prompts explained with transcoders and with a cross-layer transcoder (CLT).

    .venv/bin/python benchmarks/circuits_clt.py --train        # some 20 minutes on two cores
    .venv/bin/python benchmarks/circuits_clt.py [--per-kind 1]

The CLT starts as the 18 packaged affine transcoders of Gemma 3 270M, which it reproduces: a feature
writes to its own layer what it wrote, and nothing to later ones. Then it is trained for a short
time on the reconstruction of all layers at the same L0, so that features learn to write to later
layers. What is compared is therefore two dictionaries of one origin, and a CLT that has seen very
little; it says nothing of published ones.

Of every prompt there is one graph each of the answer's logit less the foil's. A row has the scores,
the mean number of features that influence passes on its way, what the two graphs agree on
(`graph_overlap`, of pruned graphs), and, when the features of most influence are ablated one at a
time, Spearman's correlation, R2 and slope of predicted and measured changes: with all else frozen,
which must be exact, and in the real model, which says what each graph is worth. A dictionary that
counts twice what the model does once shows as a slope above 1.

Text comes from $CORPUS, a folder with train/*.txt and eval/heldout_mix.txt. The training is kept in
--folder, and the results get a line a prompt; the same commands go on after an interruption.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from circuits_results import lines_of, rounded, write_lines
from table import table

import circuits

HERE = Path(__file__).resolve().parent
LAYERS, WIDTH, L0 = 18, 1024, 20
EXTRA = {"kind": "two_hop", "text": "The capital of the state containing Dallas is"}
EXTRA |= {"answer": " Austin", "foil": " Columbus", "key": " Dallas"}
SHARES = (0.8, 0.98)
MODES = ("direct", "nothing")
BOTH = ("transcoders", "clt")


def corpus() -> str:
    return os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")


# ---- The coder -------------------------------------------------------------------------------


def as_clt(coders) -> Any:
    """Transcoders of all layers as a CLT whose features write to no later layer."""
    import jax.numpy as jnp

    from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder, block_index

    some = list(coders)
    X, F, D = len(some), some[0].width, some[0].d_out
    names = ("w_enc", "b_enc", "threshold", "b_dec", "w_skip")
    stacked = {
        name: jnp.stack([jnp.asarray(getattr(c, name), jnp.float32) for c in some])
        for name in names
    }
    blocks = np.zeros((X * (X + 1) // 2, F, D), np.float32)
    for i, coder in enumerate(some):
        blocks[block_index(i, i, X)] = np.asarray(coder.w_dec, np.float32)
    place: dict[str, Any] = {"reads": "mlp_in", "writes": "mlp_out"}
    place["layers"] = tuple(c.layer for c in some)
    return MultiLayerCoder(**stacked, w_dec=jnp.asarray(blocks), **place)


def recipe(folder: Path, updates: int) -> Any:
    """The training run: the packaged transcoders' loss and L0, a text read once."""
    import gemma_scope_jax as gs

    coder = gs.CoderConfig(
        layers=tuple(range(LAYERS)),
        reads="mlp_in",
        writes="mlp_out",
        width=WIDTH,
        target_l0=L0 * LAYERS,
        skip=True,
        init_from=str(folder / "start"),
        name="clt",
        loss=gs.LossConfig(l0_weight=0.1, l0_warmup=0, per_token=False, dead_after=200),
    )
    return gs.TrainConfig(
        (coder,),
        data=gs.TextData(files=(f"{corpus()}/train/*.txt",)),
        model_dtype="float32",
        tokens=8192 + updates * 512,  # the buffer is filled first
        batch_size=4,
        context_size=256,
        buffer=8192,
        train_batch_size=1024,
        updates=2,
        # few updates of many weights that start at zero: means of gradients, a low rate
        optimizer=gs.OptimizerConfig(
            learning_rate=1e-4, warmup=20, decay=0.5, b1=0.9, clip=1.2, threshold_rate=1.0
        ),
        checkpoint_every=120,
    )


def trained(folder: Path, updates: int | None = None) -> Any:
    """The CLT of the run in `folder`; with `updates`, trained first, or further."""
    import gemma_scope_jax as gs

    if updates is not None:
        if not (folder / "start" / "config.json").exists():
            gs.save_coder(as_clt(gs.load_coders("gemma-3-270m-transcoder-*")), folder / "start")
        gs.train(recipe(folder, updates), folder / "run")
    if not (done := folder / "run" / "coders" / "clt").exists():
        raise SystemExit(f"{done} is missing: run with --train first")
    return gs.load_coder(done, decoder=True)


def reconstruction(model, tokenizer, nodes: dict, tokens: int = 16) -> dict:
    """{name: {"l0", "fvu", "fvu_own", "later"}} on held-out text, of `tokens` passages of 256:
    features active on a token, unexplained variance (mean over layers), the same without what is
    written to later layers than a feature's own, and the share of the decoders' squared norm that
    these writes have, each layer measured in the spread of its outputs."""
    import jax.numpy as jnp

    import gemma_scope_jax as gs
    from gemma_scope_jax.coders.multi_layer_coder import triangle
    from gemma_scope_jax.data.documents import read_documents

    found, texts = {}, read_documents([f"{corpus()}/eval/heldout_mix.txt"])
    rows = (tokenizer.encode(texts[i])[:256] for i in range(len(texts)))
    ids = np.stack([row for _, row in zip(range(tokens), (r for r in rows if len(r) == 256))])
    reads = gs.run(model, ids, [gs.capture("mlp_in"), gs.capture("mlp_out")]).reads
    flat = lambda site: np.asarray(reads[site], np.float32)[:, :, 1:].reshape(LAYERS, -1, 640)
    x, y = flat("mlp_in"), flat("mlp_out")
    spread = np.square(y - y.mean(1, keepdims=True)).sum((1, 2))
    source, target = triangle(LAYERS)
    unit = (spread[source] / spread[target])[:, None, None]
    for name, coders in nodes.items():
        coder = coders[0] if coders[0].multi_layer else as_clt(coders)
        f, w_dec = coder.encode(x), np.asarray(coder.w_dec, np.float32)
        alone = coder.replace(w_dec=jnp.asarray(w_dec * (source == target)[:, None, None]))
        rest = lambda one, f=f: np.square(y - np.asarray(one.decode(f, x))).sum((1, 2)) / spread
        sizes = (np.square(w_dec) * unit).sum((1, 2))
        found[name] = {
            "l0": float((np.asarray(f) > 0).sum((0, 2)).mean()),
            "fvu": float(rest(coder).mean()),
            "fvu_own": float(rest(alone).mean()),
            "later": float(sizes[source < target].sum() / sizes.sum()),
        }
    return found


# ---- A prompt --------------------------------------------------------------------------------


def compared(model, tokenizer, nodes: dict, prompt: dict, top: int) -> dict:
    """Both graphs of a prompt, and what they agree on: a line of the results."""
    import gemma_scope_jax as gs

    line = {name: prompt[name] for name in ("kind", "text", "answer", "foil")}
    pruned = {}
    for name, coders in nodes.items():
        begin = time.perf_counter()
        graph = circuits.graph_of(model, tokenizer, coders, prompt)
        pruned[name] = graph.prune(*SHARES)
        study = circuits.Study(
            model=model, tokenizer=tokenizer, prompt=prompt, nodes=coders, graph=graph,
            pruned=pruned[name], number=0, top=top, cap=0.05, modes=MODES,
        )  # fmt: skip
        line[name] = {
            **circuits.scores(study),
            "steps": steps(graph),
            "validation": circuits.validation(study),
            "seconds": round(time.perf_counter() - begin, 1),
        }
    both = gs.graph_overlap(*(pruned[name] for name in BOTH))
    agree = ("place_correlation", "token_correlation", "effect_correlation", "common_routes")
    line["overlap"] = {name: getattr(both, name) for name in agree}
    return rounded(line)


def steps(graph) -> float:
    """How many features influence passes, on average, on its way from a token or an error."""
    return float(graph.influence()[: graph.selected].sum() / graph.weights.sum())


# ---- Tables ----------------------------------------------------------------------------------


def summary(lines: list[dict]) -> str:
    """Two tables in Markdown: each graph by itself, and what the two of a prompt agree on."""
    rows = [figures(line["text"], name, line[name]) for line in lines for name in BOTH]
    for name in BOTH:
        rows.append(mean([row for row in rows if row["dictionary"] == name], "all"))
    short = {"place": "places", "token": "tokens", "effect": "effects of tokens"}
    agree = []
    for line in lines:
        found = {title: line["overlap"][f"{k}_correlation"] for k, title in short.items()}
        routes = line["overlap"]["common_routes"]
        agree.append({"prompt": line["text"], **found, "common routes": routes})
    return table(rows) + "\n" + table([*agree, mean(agree, "all")])


def figures(prompt: str, name: str, one: dict) -> dict:
    direct, real = (one["validation"][mode][0] for mode in MODES)
    replacement, completeness = one["whole"]
    return {
        "prompt": prompt,
        "dictionary": name,
        "features": one["features"],
        "replacement": replacement,
        "completeness": completeness,
        "steps": one["steps"],
        "direct: slope": direct[3],
        "real model: Spearman": real[0],
        "R2": real[1],
        "slope": real[3],
    }


def mean(rows: list[dict], prompt: str) -> dict:
    """The means of the columns of numbers."""
    found: dict[str, Any] = {**rows[0], "prompt": prompt}
    numbers = [name for name, value in found.items() if not isinstance(value, str)]
    return {**found, **{name: float(np.mean([row[name] for row in rows])) for name in numbers}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "out/circuits_clt")
    parser.add_argument("--results", type=Path, default=HERE / "results/circuits_clt_cpu.jsonl.gz")
    parser.add_argument("--train", action="store_true", help="train the CLT, and do no more")
    parser.add_argument("--updates", type=int, default=200, help="of training")
    parser.add_argument("--per-kind", type=int, default=1, help="prompts of each kind")
    parser.add_argument("--top", type=int, default=16, help="features ablated, one at a time")
    args = parser.parse_args()
    if args.train:
        trained(args.folder, args.updates)
        return
    run(args)
    first, *lines = lines_of(args.results)
    print(json.dumps(first))
    print(summary(lines))


def run(args: argparse.Namespace) -> None:
    """Compare the prompts that the results lack; the first line tells of the coders."""
    import gemma_scope_jax as gs

    lines = lines_of(args.results)
    there = {line["text"] for line in lines[1:]}
    wanted = [EXTRA, *circuits.prompts(args.per_kind)]
    missing = [prompt for prompt in wanted if prompt["text"] not in there]
    if not missing:
        return
    clt, plain = trained(args.folder), gs.load_coders("gemma-3-270m-transcoder-*")
    model = gs.load_model("gemma-3-270m", dtype="float32")
    tokenizer = gs.load_tokenizer("gemma-3-270m")
    nodes = dict(zip(BOTH, (plain, gs.CoderSet([clt]))))
    if not lines:
        found = rounded(reconstruction(model, tokenizer, nodes))
        log = (args.folder / "run" / "log.jsonl").read_text().splitlines()
        lines = [{"tokens": json.loads(log[-1])["tokens"], "coders": found}]
    progress = gs.Progress(len(missing), "prompts", what="circuits")
    for count, prompt in enumerate(missing, 1):
        lines.append(compared(model, tokenizer, nodes, prompt, args.top))
        write_lines(args.results, lines)
        progress.at(count)


if __name__ == "__main__":
    main()
