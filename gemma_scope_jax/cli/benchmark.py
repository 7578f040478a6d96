"""Benchmarks of coders: `benchmark`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gemma_scope_jax.cli.shared import (
    PACKAGED_CODER,
    Coders,
    Dtype,
    Folder,
    NameOrPlace,
    Place,
    load_all,
)
from gemma_scope_jax.errors import InputError

Tables = Annotated[tuple[Place, ...], tyro.conf.arg(metavar="TABLE...", help_behavior_hint="")]


def benchmark(
    coders: Coders = (PACKAGED_CODER,),
    *,
    probing: Tables = (),
    without: Tables = (),
    protocol: Literal["sae-probes", "saebench"] = "sae-probes",
    ks: tuple[int, ...] = (),
    absorption: bool = False,
    words: int | None = 200,
    tpp: Tables = (),
    scr: Tables = (),
    limit: int | None = None,
    out: Folder = "out/benchmark",
    model: NameOrPlace = "",
    dtype: Dtype = "auto",
) -> None:
    """Benchmarks of coders side by side: sparse probing, feature absorption, TPP, SCR.

    Tables are CSV files (.csv, .csv.zst, .csv.gz; globs and folders too) with a column "prompt" or
    "text" and labels beside it. The same command goes on where an interrupted one was; what has
    been measured is not measured again.

    Args:
        coders: Addresses of the release, folders, packaged coders, or globs of them.
        probing: Tables with a column "target": how well k features tell its classes apart.
        without: Of these, names (or globs of names) to leave out.
        protocol: sae-probes (last token, tuned penalty, AUC) or saebench (mean, accuracy).
        ks: Numbers of features to probe with; default: the protocol's.
        absorption: First letters of the vocabulary's words.
        words: Of each letter; None: all, as SAEBench.
        tpp: Tables with a column "target" of 3 classes or more.
        scr: Tables with two columns of two values each beside the text.
        limit: Examples of a table at most.
        out: Results: comparison.md, and SAEBench's JSON for each coder and benchmark.
        model: A name, a folder or a file; default: the coders' model.
        dtype: Of the model; auto is float32 on a CPU and bfloat16 elsewhere.
    """
    if not (probing or absorption or tpp or scr):
        raise InputError("nothing to measure: give --probing, --absorption, --tpp or --scr")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
    from gemma_scope_jax.probing.tables import table_files
    from gemma_scope_jax.storage.paths import folder_path

    folder = folder_path(out)
    files = {
        name: table_files(some)
        for name, some in (("probing", probing), ("tpp", tpp), ("scr", scr))
        if some
    }
    if probing:
        files["probing"] = _left(files["probing"], without)
    _check(files, limit)
    loaded_model, loaded, tok = load_all(model, coders, dtype, one_layer=True)
    from gemma_scope_jax.probing.jobs import (
        Bench,
        absorption_job,
        by_name,
        concept_job,
        probing_jobs,
    )
    from gemma_scope_jax.probing.probing import PROTOCOLS
    from gemma_scope_jax.probing.scr_tpp import ABLATED

    bench = Bench(loaded_model, tok, by_name(loaded), folder)
    jobs = []
    if probing:
        way = PROTOCOLS[protocol]
        jobs, skipped = probing_jobs(bench, files["probing"], way, limit=limit, ks=ks)
        _say_skipped(skipped)
    if absorption:
        jobs.append(absorption_job(bench, per_letter=words))
    for family in ("tpp", "scr"):
        jobs += [
            concept_job(bench, family, path, limit=limit, ns=ABLATED)
            for path in files.get(family, [])
        ]
    _run(bench, jobs)


def _run(bench: Any, jobs: list[Any]) -> None:
    """Measure, write and print."""
    from gemma_scope_jax.evaluation.results import write_result
    from gemma_scope_jax.probing.jobs import run_jobs
    from gemma_scope_jax.probing.report import by_task, compared, documents
    from gemma_scope_jax.storage.atomic import write_text

    results = list(zip(jobs, run_jobs(bench, jobs)))
    for document in documents(bench, results):
        write_result(bench.folder, document)
    table, file = compared(bench, results), bench.folder / "comparison.md"
    write_text(file, f"{table}\n{by_task(bench, results)}")
    print(table)
    print(f"by task: {file}")


def _check(files: dict[str, list[Path]], limit: int | None) -> None:
    """What is wrong with tables of concepts shows before anything is loaded."""
    from gemma_scope_jax.probing.scr_tpp import scr_task, tpp_task
    from gemma_scope_jax.probing.tables import read_table

    for name, task in (("tpp", tpp_task), ("scr", scr_task)):
        for path in files.get(name, []):
            task(read_table(path), limit)


def _left(files: list[Path], without: tuple[str, ...]) -> list[Path]:
    from fnmatch import fnmatch

    from gemma_scope_jax.probing.tables import table_name

    left = [f for f in files if not any(fnmatch(table_name(f), w) for w in without)]
    if not left:
        raise InputError("--without leaves no table to probe")
    return left


def _say_skipped(skipped: list[str]) -> None:
    import sys

    for line in skipped[:3]:
        print(f"skipped: {line}", file=sys.stderr)
    if len(skipped) > 3:
        print(f"skipped: {len(skipped) - 3} more tables that do not fit", file=sys.stderr)
