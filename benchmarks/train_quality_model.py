"""What the SAEs of train_quality.py cost the model and tell of it: the best of each method.

    .venv/bin/python benchmarks/train_quality_model.py [--width 2048] [--tokens 400000]

For each method, at the rate that validation chose, seed 0 and an L0 of 50: delta loss on the
held-out mix, sparse probing with 1 and 8 features on some tasks of SAE-Probes, and absorption of
first letters. L0s are matched as in train_quality.py, whose --folder holds the coders. One JSON
line for each coder goes to --results. What is done is kept; all coders share the model's passes.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import table
from train_quality import L0, LAYER, METHODS, ROOT, Cell, best_rate, comparable

# Kinds of SAE-Probes' tasks, none of which shares text with the training mix.
TASKS = ("5_hist_fig_ismale", "56_wikidatasex_or_gender", "87_glue_cola", "90_glue_qnli",
         "105_click_bait", "110_aimade_humangpt3", "139_news_class_Politics", "21_headline_istrump",
         "114_nyc_borough_Manhattan", "125_world_country_Italy", "155_athlete_sport_basketball",
         "51_just_is")  # fmt: skip
KS = (1, 8)
LOSS_TOKENS, WORDS = 16_000, 150


def coder(file: Path, method: str, factor: float) -> Any:
    """The SAE in weights.npz, with its thresholds at the matched L0."""
    import jax.numpy as jnp

    from gemma_scope_jax.coders.coder import CoderInfo
    from gemma_scope_jax.coders.sparse_coder import SparseCoder

    with np.load(file) as found:
        w = {k: found[k] for k in found.files}
    threshold = factor * np.asarray(w.get("threshold", np.zeros_like(w["b_enc"])))
    f32 = lambda a: jnp.asarray(np.asarray(a), jnp.float32)
    return SparseCoder(
        w_enc=f32(w["w_enc"]),
        b_enc=f32(w["b_enc"]),
        threshold=f32(np.maximum(threshold, 0)),
        w_dec=f32(w["w_dec"]),
        b_dec=f32(w["b_dec"]),
        w_skip=None,
        layer=LAYER,
        reads="resid_post",
        writes="resid_post",
        first=1,
        k=int(w["k"]) if "k" in w else None,
        info=CoderInfo("google/gemma-3-270m", "sae", float(L0), len(threshold), method),
    )


def rows_of(markdown: str, family: str) -> dict[str, dict[str, float | None]]:
    """The rows of one family's table of `gs.benchmark`, by coder."""
    part = next((p for p in markdown.split("### ") if p.startswith(family)), "")
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if "|" in line
    ]
    number = lambda text: float(text.split(":")[0]) if text[:1].isdigit() else None
    return {cells[0]: dict(zip(lines[0][1:], map(number, cells[1:]))) for cells in lines[2:]}


def measured(args: argparse.Namespace, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each coder of a width and a number of activations."""
    import gemma_scope_jax as gs
    from gemma_scope_jax.data.documents import read_documents
    from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, measure, text_batches
    from gemma_scope_jax.probing.benchmark import benchmark, benchmark_tables

    corpus = Path(os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")).expanduser()
    some = comparable(lines, args.width, args.tokens)
    coders = {}
    for method in (m for m in METHODS if any(r["method"] == m for r in some)):
        cell = Cell(method, args.width, args.tokens, L0, best_rate(some, method), 0)
        (line,) = [r for r in some if all(r[k] == v for k, v in vars(cell).items())]
        coders[method] = coder(args.folder / cell.name / "weights.npz", method, line["factor"])
    model, tokenizer = (
        gs.load_model("gemma-3-270m", dtype="bfloat16"),
        gs.load_tokenizer("gemma-3-270m"),
    )
    documents = read_documents([str(corpus / "eval/heldout_mix.txt")])
    order = np.random.default_rng(0).permutation(len(documents))
    batches = list(text_batches(tokenizer, [documents[i][:4000] for i in order], context_size=512))
    batches = batches[: -(-LOSS_TOKENS // batches[0].tokens.size)]
    tallies = measure(model, list(coders.values()), batches, EvaluationPlan()).tallies
    folder = args.folder / f"benchmark_{args.width}_{args.tokens}"
    tasks = corpus / "x/sae_probes/sae_probes/data/cleaned_data"
    tables = benchmark_tables(probing=[str(tasks / f"{name}.csv.zst") for name in TASKS])
    found = benchmark(
        model, list(coders.values()), tokenizer, folder, tables, ks=KS, absorption=True, words=WORDS
    ).table
    probing, absorption = rows_of(found, "Sparse probing"), rows_of(found, "Feature absorption")
    raw = {k: v for k, v in probing.items() if k not in coders}
    rows = []
    for (method, _), tally in zip(coders.items(), tallies):
        m = tally.metrics()
        rows.append(
            {
                "width": f"{args.width:,}",
                "activations": f"{args.tokens / 1e6:g} M",
                "method": method.replace("_", " "),
                "L0": f"{m.l0:.1f}",
                "delta loss": f"{m.delta_loss:.3f}",
                **{f"AUC, {k}": f"{probing[method][f'k={k}']:.3f}" for k in KS},
                "absorption": absorption.get(method, {}).get("absorption"),
            }
        )
    for name, row in raw.items():
        rows.append({"method": name} | {f"AUC, {k}": f"{row[f'k={k}']:.3f}" for k in KS})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--folder", type=Path, default=ROOT / "out/train_quality")
    results = ROOT / "benchmarks/results"
    parser.add_argument("--ring", type=Path, default=results / "train_quality_cpu.jsonl")
    parser.add_argument("--results", type=Path, default=results / "train_quality_model_cpu.jsonl")
    args = parser.parse_args()
    rows = measured(args, table.read(args.ring))
    args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table.table(rows))


if __name__ == "__main__":
    main()
