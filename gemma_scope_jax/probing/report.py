"""Benchmark results as tables of the compared coders, and as SAEBench's documents."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.errors import in_markdown
from gemma_scope_jax.evaluation.results import saebench_result
from gemma_scope_jax.probing.jobs import Bench, BenchmarkJob

PROBING = {"sparse_probing": "accuracy", "sparse_probing_sae_probes": "auc"}
Results = Sequence[tuple[BenchmarkJob, Mapping[str, Any]]]  # each job, and its results by subject
Row = dict[str, Any]


def by_family(results: Results) -> dict[str, Results]:
    """The results of each family of benchmarks, in the order of the jobs."""
    families: dict[str, list] = {}
    for job, found in results:
        families.setdefault(job.family, []).append((job, found))
    return dict(families)


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}


def _by_k(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in result.items() if k != "questions"]


# -------------------------------------------------------------------------------------------------
# SAEBench's documents


def documents(bench: Bench, results: Results) -> list[Row]:
    """A SAEBench document for each coder and family; see `results.write_result`."""
    made = []
    for family, some in by_family(results).items():
        for name, coder in bench.coders.items():
            if any("why" in found[name] for _, found in some):  # nothing could be measured
                continue
            metrics, details = _figures(bench, family, some, name)
            config = {"model_name": bench.model.config.name, **some[0][0].settings}
            config["dataset_names"] = [job.name for job, _ in some]
            config.pop("table", None)
            everything: dict[str, Any] = {job.name: found[name] for job, found in some}
            if shares := {job.name: job.repeated for job, _ in some if job.repeated}:
                everything["share_of_tested_rows_with_texts_trained_on"] = shares
            made.append(
                saebench_result(family, config, metrics, details, coder, everything, name=name)
            )
    return made


def _figures(bench: Bench, family: str, some: Results, name: str) -> tuple[Row, list[Row]]:
    """SAEBench's metrics, and its details: a row for each task or letter."""
    if family == "absorption_first_letter":
        return _absorption_figures(some[0][1][name])
    rows = []
    for _, found in some:
        r, row = found[name], {}
        if family == "tpp":
            words = {"tpp": "total_metric", "intended": "intended_diff_only"}
            words["unintended"] = "unintended_diff_only"
            for n, scores in r["by_n"].items():
                row |= {f"tpp_threshold_{n}_{word}": scores[key] for key, word in words.items()}
        elif family == "scr":
            for n, score in r["by_n"].items():
                row[f"scr_dir1_threshold_{n}"] = r["directions"]["first"]["by_n"][n]
                row[f"scr_metric_threshold_{n}"] = score
                row[f"scr_dir2_threshold_{n}"] = r["directions"]["second"]["by_n"][n]
        else:
            for side, result in (("llm", found[bench.read_by(name)]), ("sae", r)):
                for k, s in _by_k(result):
                    top = "" if k == "full" else f"_top_{k}"
                    row |= {f"{side}{top}_test_{m}": s[m] for m in ("accuracy", "auc", "f1")}
        rows.append(row)
    suffix = "" if family in PROBING else f"_{family}"
    details = [{"dataset_name": job.name + suffix, **row} for (job, _), row in zip(some, rows)]
    means = _mean(rows)
    if family not in PROBING:
        return {f"{family}_metrics": means}, details
    part = lambda side: {k: v for k, v in means.items() if k.startswith(side)}
    return {side: part(side) for side in ("llm", "sae")}, details


def _absorption_figures(result: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    words = {
        "fraction": "absorption_fraction_score",
        "full": "full_absorption_score",
        "split": "num_split_features",
    }
    mean = {f"mean_{word}": result[key] for key, word in words.items()}
    mean |= {f"std_dev_{word}": result[f"{key}_std"] for key, word in words.items()}
    details = [
        {
            "first_letter": row["letter"],
            "mean_absorption_fraction": row["fraction"],
            "full_absorption_rate": row["full"],
            "num_full_absorption": row["full_count"],
            "num_probe_true_positives": row["words"],
            "num_split_features": len(row["features"]),
        }
        for row in result["letters"]
    ]
    return {"mean": mean}, details


# -------------------------------------------------------------------------------------------------
# Tables


def compared(bench: Bench, results: Results) -> str:
    """A Markdown table for each family, a row for each coder and for the activations themselves."""
    return _sections(_compared(bench, *item) for item in by_family(results).items())


def by_task(bench: Bench, results: Results) -> str:
    """Markdown tables of the parts: each probing task, each letter, each class, each direction."""
    return _sections(
        (f"{family}: {name}", rows)
        for family, some in by_family(results).items()
        for name in bench.coders
        if (rows := _parts(bench, family, some, name))
    )


def _sections(tables: Iterable[tuple[str, list[Row]]]) -> str:
    return "\n\n".join(f"### {title}\n\n{markdown(rows)}" for title, rows in tables) + "\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """An aligned Markdown table, with columns in the order in which the rows first name them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_cell(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return in_markdown(str(value))


def _compared(bench: Bench, family: str, some: Results) -> tuple[str, list[Row]]:
    """The title and the rows of a family's table."""
    (job, found), *_ = some
    if family == "absorption_first_letter":
        words = job.settings["per_letter"] or "all"
        title = f"Feature absorption, first letter, {words} words a letter"
        return title, [_absorption_row(name, found[name]) for name in bench.coders]
    if family in PROBING:
        measure, subjects = PROBING[family], (*bench.coders, *bench.raw())
        label = lambda k: "all" if k == "full" else f"k={k}"
        scores = lambda result: {label(k): s[measure] for k, s in _by_k(result)}
        title = (
            f"Sparse probing, {job.settings['protocol']}: {measure}, mean over {len(some)} tasks"
        )
        if share := sum(job.repeated for job, _ in some) / len(some):
            title += f"; {100 * share:.0f} % of the test rows have texts that were trained on"
    else:
        subjects = bench.coders
        value = lambda s: s["tpp"] if family == "tpp" else s
        scores = lambda result: {f"n={n}": value(s) for n, s in result["by_n"].items()}
        title = f"{family.upper()}, {', '.join(job.name for job, _ in some)}"
    means = {name: _mean([scores(found[name]) for _, found in some]) for name in subjects}
    return title, [{"coder": name, **row} for name, row in means.items()]


def _absorption_row(name: str, r: Mapping[str, Any]) -> Row:
    if "why" in r:
        return {"coder": name, "letters": f"0: {r['why']}"}
    return {
        "coder": name,
        "absorption": r["fraction"],
        "full": r["full"],
        "main features": r["split"],
        "letters": f"{r['used']}" + ("" if r["enough"] else ": too few, give more words"),
    }


def _parts(bench: Bench, family: str, some: Results, name: str) -> list[Row]:
    if family == "absorption_first_letter":
        return [
            {**row, "features": " ".join(map(str, row["features"]))}
            for row in some[0][1][name]["letters"]
        ]
    rows = []
    for job, found in some:
        r, task = found[name], {"task": job.name}
        if family in PROBING:
            measure = PROBING[family]
            row = task | {f"k={k}": s[measure] for k, s in _by_k(r)}
            row["activation, all"] = found[bench.read_by(name)]["full"][measure]
            row["feature"] = ", ".join(map(str, r.get("1", {}).get("features", ())[:1]))
            rows.append(row)
        elif family == "tpp":
            for c, by_n in r["by_class"].items():
                by_n = {f"n={n}": s["tpp"] for n, s in by_n.items()}
                rows.append({**task, "class": c, "probe": r["clean"][c], **by_n})
        else:
            for d in r["directions"].values():
                row = {**task, "keeps": d["kept"], "removes": d["removed"], "clean": d["clean"]}
                by_n = {f"n={n}": s for n, s in d["by_n"].items()}
                rows.append({**row, "biased": d["biased"], **by_n})
    return rows
