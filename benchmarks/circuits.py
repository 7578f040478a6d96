"""Attribution graphs on prompts with a known answer: are they right about what the model does?

    .venv/bin/python benchmarks/circuits.py [--per-kind 3] [--results FILE.jsonl.gz]
    .venv/bin/python benchmarks/circuits.py --summary [--write PAGE.md]

Of each prompt in circuit_prompts.json (seven kinds of 20: text, answer, foil) the graph explains
the logit of the answer less that of the foil, in the real Gemma 3 270M with the packaged
transcoders:

- its scores, before and after pruning, and its strongest path;
- 16 features of most influence ablated one at a time: predicted against measured changes of the
  difference and of the features downstream, as `Graph.validate` has them;
- features ablated together, more and more of them, up to 5 % of all active ones, until the model
  prefers the foil. In the order of their total effect on the difference, as the graph says, the
  most supporting first; and, to compare, of their direct effect alone, of how much they write
  (activation times the norm of the decoder row), any features of the same layers and positions, and
  any active features;
- features set to the opposite of their activations, more and more of them, in the order of their
  total effect; and others of the same layers and positions;
- the automatic supernodes of the pruned graph's 25, 50 and 100 features of most influence: how much
  of the answer these alone carry;
- the baseline: the graph of as many of the model's own MLP neurons, ablated one at a time alike.

The predicted change of several features ablated together holds them at zero, and lets all others
follow their pre-activations. "nothing" is the real model, "attention" freezes attention patterns.

Each prompt is one line of the results file, which is written when one is done: a killed run goes on
where it was, and of prompts done before only what they lack is measured. The summary has one table
for each part, a row a kind, means with 95 % bootstrap intervals over prompts; its last line is
JSON. A minute a prompt on two busy cores.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from circuits_results import SETTINGS, key, lines_of, rounded, write_lines
from circuits_summary import ORDERS, START, renewed, summary

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "circuit_prompts.json"
RESULTS = "results/circuits_{nodes}_cpu.jsonl.gz"
# What stands for the MLPs in the graph; a row more for each other kind of nodes.
NODES: dict[str, Callable[[], Any]] = {
    "transcoders": lambda: _library().load_coders("gemma-3-270m-transcoder-*")
}
COUNTS = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 125, 200, 320, 500)  # features ablated together
REAL = {"nothing": ORDERS, "attention": ("total", "place")}  # the orders measured in each mode
MODES = ("direct", "attention", "nothing")
DEFAULTS = {"top": 16, "cap": 0.05}
NEXT_TO_NOTHING = 1e-9  # weight of the two logits, which are targets only to be measured
RANDOM = 1  # draws of each random order, a prompt
PINNED = (25, 50, 100)  # features in supernodes


def _library():
    import gemma_scope_jax as gs

    return gs


# ---- One prompt ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """One prompt's graph, and what measures need beside it."""

    model: Any
    tokenizer: Any
    prompt: dict
    nodes: Any  # what `attribute` was given
    graph: Any
    pruned: Any
    number: int  # of the prompt: a seed
    top: int
    cap: float
    modes: Sequence[str]

    @functools.cached_property
    def effects(self) -> tuple[np.ndarray, np.ndarray]:
        """`total_effects` of the graph."""
        return total_effects(self.graph)


def graph_of(model, tokenizer, nodes, prompt: dict, most: int | None = None) -> Any:
    """The graph of answer - foil; the two logits themselves are its last two targets."""
    gs = _library()
    logit = gs.Target.logit
    answer, foil = prompt["answer"], prompt["foil"]
    ends = [logit(token, weight=NEXT_TO_NOTHING) for token in (answer, foil)]
    targets = [logit(answer) - logit(foil), *ends]
    ids = tokenizer.encode(prompt["text"])
    return gs.attribute(
        model, nodes, ids, targets,
        tokenizer=tokenizer, max_feature_nodes=most, progress=lambda done, total: None,
    )  # fmt: skip


def behaviour(study: Study) -> dict:
    """What the model itself prefers: the difference, and how many tokens are before the answer."""
    gs, graph = _library(), study.graph
    logits = np.asarray(gs.run(study.model, graph.ids[None]).logits)[0, -1]
    answer, foil = graph.targets.feature[-2:]
    before = int((logits > logits[answer]).sum())
    return {"difference": float(logits[answer] - logits[foil]), "before": before}


def scores(study: Study) -> dict:
    """Replacement and completeness, whole and pruned; errors have what replacement lacks."""
    return {
        "features": study.graph.selected,
        "nodes": len(study.pruned.sources),
        "links": int(np.count_nonzero(study.pruned.effects)),
        "whole": dataclasses.astuple(study.graph.scores())[:2],
        "pruned": dataclasses.astuple(study.pruned.scores())[:2],
    }


def path(study: Study) -> dict:
    """The strongest path through features: the token that it starts at, None for an error; whether
    it raises the difference; and its share of the influence."""
    found = _library().strongest_paths(study.pruned, 1, direct=False)
    if not found:
        return {"token": None, "raises": False, "share": 0.0}
    start = START.match(str(found[0]))
    raises = " raises " in str(found[0])
    return {"token": start[1] if start else None, "raises": raises, "share": found[0].share}


def validation(study: Study) -> dict:
    """{mode: [Spearman, R2, sign, slope] of the difference, those of a control, and Spearman and R2
    of the features downstream}; the control is that of `Graph.validate`."""
    from gemma_scope_jax.circuits.validate import agreement

    top, modes = study.top, study.modes
    found = study.graph.validate(study.model, study.nodes, top=top, modes=modes, batch=top + 1)
    results = {}
    for mode in modes:
        predicted, *both = found.changes[mode][..., -2] - found.changes[mode][..., -1]
        of = [agreement(predicted, m, mode, "difference", False) for m in both]
        figures = [[a.spearman, a.r2, a.sign, a.slope] for a in of]
        later = [
            [a.spearman, a.r2]
            for a in found.agreements
            if (a.freeze, a.targets, a.control) == (mode, "features", False)
        ]
        results[mode] = [[round(f, 2) for f in some] for some in (*figures, *later)]
    return results


def ablation(study: Study) -> dict:
    """{"counts", "predicted", "nothing": {order: changes}, "attention": {order: changes}}: how the
    difference changes if so many features are ablated together; of random orders several."""
    graph, n = study.graph, study.graph.selected
    each, total = study.effects
    counts = counts_of(study)
    orders = {
        "total": np.argsort(-total, kind="stable"),
        "direct": np.argsort(-graph.effects[-3, :n], kind="stable"),
        "largest": np.argsort(-written(study), kind="stable"),
    }
    for seed in range(RANDOM):
        rng = np.random.default_rng((study.number, seed))
        orders[f"place{seed}"] = same_place(graph, orders["total"][: counts[-1]], rng)
        orders[f"random{seed}"] = rng.permutation(n)
    ladder = lambda order: [order[:k] for k in counts]
    result = {
        "counts": counts,
        "predicted": [round(joint(graph, each, s), 2) for s in ladder(orders["total"])],
    }
    for freeze, kinds in REAL.items():
        names = [name for name in orders if name.startswith(kinds)]
        sets = [some for name in names for some in ladder(orders[name])]
        changes = measured(study, sets, freeze).astype(float).round(2)
        result[freeze] = dict(zip(names, changes.reshape(len(names), len(counts)).tolist()))
    return result


def counts_of(study: Study) -> list[int]:
    """How many features are changed together."""
    return [k for k in COUNTS if k <= max(1, int(study.cap * study.graph.selected))]


def reversal(study: Study) -> dict:
    """{"counts", "predicted", "total": changes, "place": changes}: how the difference changes if so
    many features are set to the opposite of their activations, with nothing frozen."""
    each, total = study.effects
    counts, order = counts_of(study), np.argsort(-total, kind="stable")
    rng = np.random.default_rng((study.number, 0))
    orders = {"total": order, "place": same_place(study.graph, order[: counts[-1]], rng)}
    sets = [some[:k] for some in orders.values() for k in counts]
    changes = measured(study, sets, "nothing", -1.0).astype(float).round(2)
    return {
        "counts": counts,
        "predicted": [round(2 * joint(study.graph, each, order[:k]), 2) for k in counts],
        **dict(zip(orders, changes.reshape(len(orders), len(counts)).tolist())),
    }


def total_effects(graph) -> tuple[np.ndarray, np.ndarray]:
    """The effects of one unit of each feature [targets, n], and of each feature its total effect on
    the difference [n], if features downstream follow."""
    from scipy.linalg import solve_triangular

    n = graph.selected
    activation = graph.sources.activation[:n].astype(np.float64)
    each = graph.effects[:, :n] / activation
    left = np.eye(n) - each[:n]  # strictly lower triangular, for features are in order of layers
    slope = solve_triangular(left.T, each[-3], unit_diagonal=True)
    return each, slope * activation


def joint(graph, each: np.ndarray, some: np.ndarray) -> float:
    """The predicted change of the difference if the features `some` are set to zero together."""
    from scipy.linalg import solve_triangular

    n = graph.selected
    left, change = np.eye(n) - each[:n], np.zeros(n)
    left[some] = 0  # what is set does not follow
    left[some, some] = 1
    change[some] = -graph.sources.activation[:n][some]
    change = solve_triangular(left, change, lower=True, unit_diagonal=True)
    return float(each[-3] @ change)


def same_place(graph, some: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each of the features `some` another one, or itself, of its layer and position, drawn
    without returning any."""
    nodes, free = graph.sources, np.ones(graph.selected, bool)
    drawn = []
    for s in some:
        layer, position = (c[: len(free)] == c[s] for c in (nodes.layer, nodes.position))
        drawn.append(rng.choice(np.flatnonzero(free & layer & position)))
        free[drawn[-1]] = False
    return np.array(drawn)


def written(study: Study) -> np.ndarray:
    """The norm of what each feature writes [n]."""
    nodes, n = study.graph.sources, study.graph.selected
    norms = [
        np.linalg.norm(np.asarray(study.nodes.at(layer).w_dec), axis=-1)
        for layer in range(study.graph.layers)
    ]
    return nodes.activation[:n] * np.stack(norms)[nodes.layer[:n], nodes.feature[:n]]


def measured(
    study: Study, sets: Sequence[np.ndarray], freeze: str, factor: float = 0.0
) -> np.ndarray:
    """The change of the difference in the model if the activations of each set of features are
    multiplied by `factor` [sets]."""
    nodes, tokens = study.graph.sources, study.graph.targets.feature[-2:]
    columns = (nodes.layer, nodes.position, nodes.feature)
    value = factor * nodes.activation
    edits = [[(*(int(c[s]) for c in columns), float(value[s])) for s in some] for some in sets]
    found = _library().intervene(
        study.model, study.nodes, study.graph.ids, edits,
        freeze=freeze, tokens=tokens, logits="none", batch=17,
    )  # fmt: skip
    after, before = (np.subtract(*f.token_logits.T) for f in (found, found.clean))
    return after - before


def supernodes(study: Study) -> dict:
    """{number of features: [replacement, completeness, supernodes]}: of the supernodes that so many
    features of the pruned graph make, with all others folded into errors."""
    found = {}
    for most in PINNED:
        groups = _library().find_supernodes(study.pruned, study.nodes, most=most)
        found[str(most)] = [*dataclasses.astuple(groups.scores())[:2], len(groups)]
    return found


def neurons(study: Study) -> dict:
    """`validation` of the graph of as many MLP neurons."""
    given = study.model, study.tokenizer, None, study.prompt
    graph = graph_of(*given, most=study.graph.selected)
    return validation(dataclasses.replace(study, nodes=None, graph=graph))


# What is measured of each graph; a row more for each other figure.
MEASURES: dict[str, Callable[[Study], dict]] = {
    "behaviour": behaviour,
    "scores": scores,
    "path": path,
    "validation": validation,
    "ablation": ablation,
    "reversal": reversal,
    "supernodes": supernodes,
    "neurons": neurons,
}


def lacking(line: dict) -> list[str]:
    """The measures that a line does not have yet."""
    return [name for name in MEASURES if name not in line]


def measured_line(model, tokenizer, nodes, prompt: dict, number: int, line: dict) -> dict:
    """A prompt's line, which holds its settings and what was measured before, with all else."""
    start = time.perf_counter()
    graph = graph_of(model, tokenizer, nodes, prompt, line.get("most"))
    pruned = graph.prune(0.8, 0.98)
    seconds = {"attribute": time.perf_counter() - start, **line.get("seconds", {})}
    given = {"top": line["top"], "cap": line["cap"], "modes": line.get("modes", MODES)}
    study = Study(
        model=model, tokenizer=tokenizer, prompt=prompt, nodes=nodes, graph=graph, pruned=pruned,
        number=number, **given,
    )  # fmt: skip
    found: dict[str, Any] = {"tokens": len(graph.ids)}
    for name in lacking(line):
        start = time.perf_counter()
        found[name] = MEASURES[name](study)
        seconds[name] = time.perf_counter() - start
    seconds = {name: round(s, 1) for name, s in seconds.items()}
    return {**line, **rounded(found), "seconds": seconds}


# ---- All prompts -----------------------------------------------------------------------------


def prompts(per_kind: int | None = None, kinds: Sequence[str] = ()) -> list[dict]:
    """The first prompts of each kind, kinds in turn."""
    given: dict[str, list[dict]] = {}
    for prompt in json.loads(PROMPTS.read_text(encoding="utf-8")):
        if not kinds or prompt["kind"] in kinds:
            given.setdefault(prompt["kind"], []).append(prompt)
    most = max(map(len, given.values()), default=0)
    order = range(most if per_kind is None else min(per_kind, most))
    return [some[i] for i in order for some in given.values() if i < len(some)]


def run(file: Path, wanted: list[dict], settings: dict) -> None:
    """Study the prompts that the file lacks, and measure what its lines lack."""
    gs = _library()
    lines = {key(line): line for line in lines_of(file)}
    bare = [{k: v for k, v in p.items() if k != "key"} | settings for p in wanted]
    begun = [lines.get(key(line), line) for line in bare]
    left = [i for i, line in enumerate(begun) if lacking(line)]
    if not left:
        return
    model = gs.load_model("gemma-3-270m", dtype="float32")
    tokenizer = gs.load_tokenizer("gemma-3-270m")
    nodes = NODES[settings["nodes"]]()
    done = len(wanted) - len(left)
    progress = gs.Progress(len(wanted), "prompts", what="circuits", begun=done)
    for count, i in enumerate(left, done + 1):
        found = measured_line(model, tokenizer, nodes, wanted[i], i, begun[i])
        lines[key(found)] = found
        write_lines(file, lines.values())
        progress.at(count)


def results(file: Path, wanted: list[dict], settings: dict) -> list[dict]:
    """The lines of the wanted prompts, each with the token that decides its answer."""
    keys = {key({**prompt, **settings}): prompt["key"] for prompt in wanted}
    lines = lines_of(file)
    return [{**line, "key": keys[key(line)]} for line in lines if key(line) in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="transcoders", choices=NODES)
    parser.add_argument("--kinds", nargs="+", default=(), metavar="KIND", help="default: all")
    parser.add_argument("--per-kind", type=int, help="prompts of each kind; default: all")
    parser.add_argument(
        "--top", type=int, default=DEFAULTS["top"], help="features ablated one at a time"
    )
    parser.add_argument(
        "--cap", type=float, default=DEFAULTS["cap"], help="share ablated together, at most"
    )
    parser.add_argument("--modes", nargs="+", help=f"of one at a time; default: {' '.join(MODES)}")
    parser.add_argument("--most", type=int, help="features explained, at most; default: all active")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}")
    parser.add_argument("--summary", action="store_true", help="only print what there is")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="renew this page's tables")
    args = parser.parse_args()
    file = args.results or HERE / RESULTS.format(nodes=args.nodes)
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    wanted = prompts(args.per_kind, args.kinds)
    if not args.summary:
        run(file, wanted, settings)
    lines = results(file, wanted, settings)
    if not lines:
        raise SystemExit(f"{file} has no results of these settings yet")
    tables, figures = summary(lines)
    if args.write:
        page = renewed(args.write.read_text(encoding="utf-8"), tables)
        args.write.write_text(page, encoding="utf-8")
    for heading, text in tables.items():
        print(f"## {heading}\n\n{text}")
    print(json.dumps({"name": f"circuits-{args.nodes}", **rounded(figures)}))


if __name__ == "__main__":
    main()
