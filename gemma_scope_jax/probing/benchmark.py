"""Benchmarks coders end to end: tables and coders in, one comparison out.

    tables = benchmark_tables(probing=["tables/*.csv"], tpp=["topics.csv"])
    result = benchmark(model, coders, tokenizer, "out", tables, absorption=True)
    print(result.table)

`benchmark_tables` reads and checks tables before a model is loaded.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from etils import epath

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.evaluation.results import write_result
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.probing.jobs import (
    Bench,
    absorption_job,
    by_name,
    concept_job,
    probing_jobs,
    run_jobs,
)
from gemma_scope_jax.probing.probing import PROTOCOLS
from gemma_scope_jax.probing.report import by_task, compared, documents
from gemma_scope_jax.probing.scr_tpp import ABLATED, scr_task, tpp_task
from gemma_scope_jax.probing.tables import read_table, table_files, table_name
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.paths import folder_path

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """The result of `benchmark`."""

    table: str  # Markdown: the coders side by side
    file: epath.Path  # comparison.md: the table, and the figures of every task


def benchmark_tables(
    *,
    probing: Sequence[str] = (),
    without: Sequence[str] = (),
    tpp: Sequence[str] = (),
    scr: Sequence[str] = (),
    limit: int | None = None,
) -> dict[str, list[Path]]:
    """The tables of each family, {"probing", "tpp", "scr": files}.

    Each argument takes files, globs and folders. without: names, or globs of names, of tables that
    are not probed. limit: the largest number of examples of a table. Raises `InputError` for files
    that are not tables, and for tables that do not fit TPP or SCR.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: at least 1")
    families = {"probing": probing, "tpp": tpp, "scr": scr}
    files = {name: table_files(tuple(some)) for name, some in families.items() if some}
    if probing:
        kept = [f for f in files["probing"] if not any(fnmatch(table_name(f), w) for w in without)]
        if not kept:
            raise InputError(f"leaving out {' '.join(without)} leaves no table to probe")
        files["probing"] = kept
    for name, task in (("tpp", tpp_task), ("scr", scr_task)):
        for path in files.get(name, []):
            task(read_table(path), limit)
    return files


def benchmark(
    model: Model,
    coders: Sequence[SparseCoder],
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    tables: Mapping[str, Sequence[Path]],
    *,
    protocol: str = "sae-probes",
    ks: Sequence[int] = (),
    absorption: bool = False,
    words: int | None = 200,
    limit: int | None = None,
) -> BenchmarkResult:
    """Sparse probing, feature absorption, TPP and SCR of coders of one layer, side by side.

    folder      for comparison.md and SAEBench's JSON for each coder and benchmark; local or
                gs://. The same call resumes an interrupted one
    tables      from `benchmark_tables`
    protocol    of probing: "sae-probes" (last token, tuned penalty, AUC) or "saebench" (mean,
                accuracy)
    ks          numbers of features to probe on; default: the protocol's
    absorption  of first letters, on `words` words of the vocabulary per letter; None: all
    Raises `InputError`.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"no protocol {protocol!r}{nearest(protocol, PROTOCOLS)}")
    if not any(tables.values()) and not absorption:
        raise InputError("nothing to measure: give tables, or choose absorption")
    bench = Bench(model, tokenizer, by_name(coders), folder_path(folder))
    jobs = []
    if files := tables.get("probing"):
        jobs, skipped = probing_jobs(bench, files, PROTOCOLS[protocol], limit=limit, ks=ks)
        for line in skipped[:3]:
            LOG.warning("skipped: %s", line)
        if len(skipped) > 3:
            LOG.warning("skipped: %d more tables that do not fit", len(skipped) - 3)
    if absorption:
        jobs.append(absorption_job(bench, per_letter=words))
    for family in ("tpp", "scr"):
        for path in tables.get(family, ()):
            jobs.append(concept_job(bench, family, path, limit=limit, ns=ABLATED))
    results = list(zip(jobs, run_jobs(bench, jobs)))
    for document in documents(bench, results):
        write_result(bench.folder, document)
    table, file = compared(bench, results), bench.folder / "comparison.md"
    write_text(file, f"{table}\n{by_task(bench, results)}")
    return BenchmarkResult(table, file)
