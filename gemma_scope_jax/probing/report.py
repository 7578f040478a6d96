"""What benchmarks found: one table over the compared coders, SAEBench's document for each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.errors import in_markdown
from gemma_scope_jax.evaluation.results import saebench_result
from gemma_scope_jax.probing.jobs import Bench, BenchmarkJob, raw_name

PROBING = {"sparse_probing": "accuracy", "sparse_probing_sae_probes": "auc"}
Results = Sequence[tuple[BenchmarkJob, Mapping[str, Any]]]  # each job, and its results by subject


def by_family(results: Results) -> dict[str, Results]:
    """The results of each family of benchmarks, in the order they were asked for."""
    families: dict[str, list] = {}
    for job, found in results:
        families.setdefault(job.family, []).append((job, found))
    return dict(families)


# -------------------------------------------------------------------------------------------------
# SAEBench's documents


def documents(bench: Bench, results: Results) -> list[dict[str, Any]]:
    """A SAEBench document for each coder and family; see `results.write_result`."""
    made = []
    for family, some in by_family(results).items():
        for name, coder in bench.coders.items():
            if any("why" in found[name] for _, found in some):  # nothing could be measured
                continue
            raw = raw_name((coder.reads, coder.layer))
            metrics, details = _FIGURES[family](some, name, raw)
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


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}


def _probing_figures(some: Results, name: str, raw: str):
    rows = []
    for job, found in some:
        row = {f"llm{_top(k)}_test_{m}": s[v] for k, s in _by_k(found[raw]) for v, m in _MEASURES}
        row |= {f"sae{_top(k)}_test_{m}": s[v] for k, s in _by_k(found[name]) for v, m in _MEASURES}
        rows.append((job.name, row))
    means = _mean([row for _, row in rows])
    metrics = {
        side: {k: v for k, v in means.items() if k.startswith(side)} for side in ("llm", "sae")
    }
    return metrics, [{"dataset_name": task, **row} for task, row in rows]


_MEASURES = (("accuracy", "accuracy"), ("auc", "auc"), ("f1", "f1"))


def _top(k: str) -> str:
    return "" if k == "full" else f"_top_{k}"


def _by_k(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in result.items() if k != "questions"]


def _absorption_figures(some: Results, name: str, raw: str):
    del raw
    ((_, found),) = some
    r = found[name]
    mean = {
        "mean_absorption_fraction_score": r["fraction"],
        "mean_full_absorption_score": r["full"],
        "mean_num_split_features": r["split"],
        "std_dev_absorption_fraction_score": r["fraction_std"],
        "std_dev_full_absorption_score": r["full_std"],
        "std_dev_num_split_features": r["split_std"],
    }
    details = [
        {
            "first_letter": row["letter"],
            "mean_absorption_fraction": row["fraction"],
            "full_absorption_rate": row["full"],
            "num_full_absorption": row["full_count"],
            "num_probe_true_positives": row["words"],
            "num_split_features": len(row["features"]),
        }
        for row in r["letters"]
    ]
    return {"mean": mean}, details


def _tpp_figures(some: Results, name: str, raw: str):
    del raw
    words = {
        "tpp": "total_metric",
        "intended": "intended_diff_only",
        "unintended": "unintended_diff_only",
    }
    rows = [
        {
            f"tpp_threshold_{n}_{word}": scores[key]
            for n, scores in found[name]["by_n"].items()
            for key, word in words.items()
        }
        for _, found in some
    ]
    details = [{"dataset_name": f"{job.name}_tpp", **row} for (job, _), row in zip(some, rows)]
    return {"tpp_metrics": _mean(rows)}, details


def _scr_figures(some: Results, name: str, raw: str):
    del raw
    rows = []
    for _, found in some:
        r, row = found[name], {}
        for n, score in r["by_n"].items():
            row[f"scr_dir1_threshold_{n}"] = r["directions"]["first"]["by_n"][n]
            row[f"scr_metric_threshold_{n}"] = score
            row[f"scr_dir2_threshold_{n}"] = r["directions"]["second"]["by_n"][n]
        rows.append(row)
    details = [{"dataset_name": f"{job.name}_scr", **row} for (job, _), row in zip(some, rows)]
    return {"scr_metrics": _mean(rows)}, details


_FIGURES = {
    "sparse_probing": _probing_figures,
    "sparse_probing_sae_probes": _probing_figures,
    "absorption_first_letter": _absorption_figures,
    "tpp": _tpp_figures,
    "scr": _scr_figures,
}


# -------------------------------------------------------------------------------------------------
# Tables


def compared(bench: Bench, results: Results) -> str:
    """A Markdown table for each family, a row for each coder and for the activations themselves."""
    parts = []
    for family, some in by_family(results).items():
        title, rows = _ROWS[family](bench, some)
        parts.append(f"### {title}\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, columns in the order in which rows first name them, padded to read well."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_cell(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return in_markdown(str(value))


def _probing_rows(bench: Bench, some: Results):
    measure = PROBING[some[0][0].family]
    protocol = some[0][0].settings["protocol"]
    rows = []
    for name in (*bench.coders, *bench.raw()):
        means = _mean([{k: s[measure] for k, s in _by_k(found[name])} for _, found in some])
        named = {("all" if k == "full" else f"k={k}"): v for k, v in means.items()}
        rows.append({"coder": name, **named})
    title = f"Sparse probing, {protocol}: {measure}, mean over {len(some)} tasks"
    if share := sum(job.repeated for job, _ in some) / len(some):
        title += f"; {100 * share:.0f} % of the rows that test have texts that were trained on"
    return title, rows


def _absorption_rows(bench: Bench, some: Results):
    ((job, found),) = some
    rows = []
    for name in bench.coders:
        r = found[name]
        if "why" in r:
            rows.append({"coder": name, "letters": f"0: {r['why']}"})
            continue
        rows.append(
            {
                "coder": name,
                "absorption": r["fraction"],
                "full": r["full"],
                "main features": r["split"],
                "letters": f"{r['used']}" + ("" if r["enough"] else ": too few, give more words"),
            }
        )
    words = job.settings["per_letter"]
    return f"Feature absorption, first letter, {words or 'all'} words a letter", rows


def _tpp_rows(bench: Bench, some: Results):
    rows = []
    for name in bench.coders:
        means = _mean([{n: s["tpp"] for n, s in found[name]["by_n"].items()} for _, found in some])
        rows.append({"coder": name, **{f"n={n}": v for n, v in means.items()}})
    return f"TPP, {', '.join(job.name for job, _ in some)}", rows


def _scr_rows(bench: Bench, some: Results):
    rows = []
    for name in bench.coders:
        means = _mean([found[name]["by_n"] for _, found in some])
        rows.append({"coder": name, **{f"n={n}": v for n, v in means.items()}})
    return f"SCR, {', '.join(job.name for job, _ in some)}", rows


_ROWS = {
    "sparse_probing": _probing_rows,
    "sparse_probing_sae_probes": _probing_rows,
    "absorption_first_letter": _absorption_rows,
    "tpp": _tpp_rows,
    "scr": _scr_rows,
}


def by_task(bench: Bench, results: Results) -> str:
    """Markdown tables of the parts: each probing task, each letter, each class, each direction."""
    parts = []
    for family, some in by_family(results).items():
        for name in bench.coders:
            if rows := _parts(bench, family, some, name):
                parts.append(f"### {family}: {name}\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def _parts(bench: Bench, family: str, some: Results, name: str) -> list[dict[str, Any]]:
    if family in PROBING:
        coder, measure = bench.coders[name], PROBING[family]
        raw = raw_name((coder.reads, coder.layer))
        return [
            {
                "task": job.name,
                **{f"k={k}": s[measure] for k, s in _by_k(found[name])},
                "activation, all": found[raw]["full"][measure],
                "feature": ", ".join(map(str, found[name].get("1", {}).get("features", ())[:1])),
            }
            for job, found in some
        ]
    if family == "absorption_first_letter":
        return [
            {**row, "features": " ".join(map(str, row["features"]))}
            for row in some[0][1][name]["letters"]
        ]
    if family == "tpp":
        return [
            {
                "task": job.name,
                "class": c,
                "probe": found[name]["clean"][c],
                **{f"n={n}": s["tpp"] for n, s in by_n.items()},
            }
            for job, found in some
            for c, by_n in found[name]["by_class"].items()
        ]
    return [
        {
            "task": job.name,
            "keeps": d["kept"],
            "removes": d["removed"],
            "clean": d["clean"],
            "biased": d["biased"],
            **{f"n={n}": s for n, s in d["by_n"].items()},
        }
        for job, found in some
        for d in found[name]["directions"].values()
    ]
