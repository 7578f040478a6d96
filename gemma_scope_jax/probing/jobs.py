"""Benchmarks of several coders at once, a task at a time, each task's result kept when it is done.

A job is a task: a table to probe, or the vocabulary to spell. It runs the model once for all coders
that have no result yet, and its results are one file; run again, what is there is not measured
again, and a new coder joins those that were measured before. Whatever changes a result (settings,
table, model, a coder's weights) is part of the key that finds it.
"""

import dataclasses
import functools
import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from gemma_scope_jax.coders.coder import weights_identity
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.evaluation.results import coder_id, plain
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.probing import absorption as spelling
from gemma_scope_jax.probing import scr_tpp
from gemma_scope_jax.probing.pooling import (
    Pooled,
    SiteLayer,
    encode_rows,
    encode_texts,
    largest_first,
    narrowed,
    places_of,
    pool,
)
from gemma_scope_jax.probing.probing import Protocol, make_task, probe_task
from gemma_scope_jax.probing.tables import read_table
from gemma_scope_jax.progress import Progress, Report
from gemma_scope_jax.storage.atomic import write_bytes, write_text
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.strict_json import field, read_json

LOG = logging.getLogger(__name__)
SPELLING_COST = 90  # tokens of a spelling prompt
CHUNK = 256  # words whose activations are one file
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile)  # what reading such a file may raise
Measure = Callable[["Bench", Sequence[str], Report], dict[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured, and where results are kept."""

    model: Model
    tokenizer: Tokenizer
    coders: Mapping[str, SparseCoder]
    folder: epath.Path

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        return model_identity(self.model)

    @property
    def first(self) -> int:
        """The position from which on tokens count in means: the same for all coders."""
        return largest_first(self.coders.values())

    def raw(self) -> dict[str, SiteLayer]:
        """The activations that the coders read, by a name for each."""
        places = {(c.reads, c.layer) for c in self.coders.values()}
        return {raw_name(place): place for place in sorted(places)}


def by_name(coders: Sequence[SparseCoder]) -> dict[str, SparseCoder]:
    """Coders by their address or `coder_id` of a folder; those without one, and namesakes, by
    number."""
    found: dict[str, SparseCoder] = {}
    for number, coder in enumerate(coders):
        name = coder.info.path or f"{coder.kind} {coder.reads} {coder.layer}"
        name = "/".join(coder_id(coder)) if os.path.isabs(name) else name
        found[f"{name} ({number})" if name in found else name] = coder
    return found


def raw_name(place: SiteLayer) -> str:
    """What the activation at a place is called among the subjects."""
    return f"activation {place[0]} {place[1]}"


@dataclasses.dataclass(frozen=True)
class BenchmarkJob:
    """A task, for every subject (a coder, or an activation) that it is measured on."""

    family: str  # SAEBench's name of the evaluation
    name: str
    settings: Mapping[str, Any]
    subjects: tuple[str, ...]
    work: int  # tokens, about
    measure: Measure
    repeated: float = 0.0  # the share of rows that test whose texts were trained on

    def path(self, bench: Bench) -> epath.Path:
        """The file of its results: another for other settings or another model."""
        key = {**self.settings, "name": self.name, "model": bench.identity}
        return bench.folder / "tasks" / self.family / f"{self.name}-{digest(plain(key), 5)}.json"


def run_jobs(bench: Bench, jobs: Sequence[BenchmarkJob]) -> list[dict[str, Any]]:
    """Measure what has not been measured; the results of each job, {subject: result}.

    Raises `InputError` for a result file that is not one, and while another process measures into
    the folder.
    """
    with only_writer(bench.folder):
        return _run_jobs(bench, jobs)


def _run_jobs(bench: Bench, jobs: Sequence[BenchmarkJob]) -> list[dict[str, Any]]:
    keys = {name: weights_identity(coder) for name, coder in bench.coders.items()}
    stored = [_stored(job, bench, keys) for job in jobs]
    found = [{subject: r["result"] for subject, r in had.items()} for had in stored]
    missing = [[s for s in job.subjects if s not in had] for job, had in zip(jobs, found)]
    progress = Progress(sum(job.work for job, some in zip(jobs, missing) if some))
    kept = sum(not some for some in missing)
    if kept:
        LOG.info("%d of %d tasks are done already", kept, len(jobs))
    done = 0
    for job, before, had, some in zip(jobs, stored, found, missing):
        if not some:
            continue
        note = f"  {job.family} {job.name}"
        new = plain(job.measure(bench, some, progress.part(done, job.work, note)))
        had |= new
        done += job.work
        progress.at(done, note)
        document = {"family": job.family, "task": job.name, "settings": plain(job.settings)}
        document["results"] = before | {
            s: {"key": keys.get(s, ""), "result": r} for s, r in new.items()
        }
        path = job.path(bench)
        write_text(path, json.dumps(document, ensure_ascii=False) + "\n")
    return found


def _stages(report: Report, subjects: int) -> tuple[Report, Report]:
    """What the model's pass and what comes after it, a subject at a time, report to; a subject's
    probes are taken to be a tenth of the pass, which is of the right order."""
    parts = 10 + subjects

    def passed(done: int, of: int) -> None:
        report(10 * done, parts * max(of, 1))

    def probed(done: int, of: int) -> None:
        report(10 * max(of, 1) + subjects * done, parts * max(of, 1))

    return passed, probed


def _stored(job: BenchmarkJob, bench: Bench, keys: Mapping[str, str]) -> dict[str, Any]:
    """{subject: {"key", "result"}} of what was measured, also of coders that are not asked for."""
    path = job.path(bench)
    if not path.exists():
        return {}
    try:
        results = field(read_json(path), "results", dict, path)
        return {
            s: {"key": field(r, "key", str, path), "result": _checked(job, r["result"])}
            for s, r in results.items()
            if s not in keys or field(r, "key", str, path) == keys[s]
        }
    except (InputError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a task's results; remove it to measure again ({reason(error)})"
        ) from error


_PARTS = {  # of a result, what tables are made of
    "absorption_first_letter": ("letters",),
    "tpp": ("clean", "by_n", "by_class"),
    "scr": ("direction", "by_n", "directions"),
}


def _checked(job: BenchmarkJob, result: Any) -> Any:
    """A result that was read. Raises KeyError or `InputError` if parts of it are missing."""
    for part in _PARTS.get(job.family, ()):
        result[part]
    if job.family not in _PARTS:
        for k in map(str, job.settings["ks"]):
            for measure in ("accuracy", "auc", "f1"):
                field(result[k], measure, float, k, default=None)
    return result


# -------------------------------------------------------------------------------------------------
# Jobs


def probing_jobs(
    bench: Bench,
    files: Sequence[Path],
    protocol: Protocol,
    *,
    limit: int | None = None,
    ks: Sequence[int] = (),
) -> tuple[list[BenchmarkJob], list[str]]:
    """A job for each table that fits the protocol, and why others do not, a line each.

    Raises `InputError` if a file is no table, or none of them fits.
    """
    ks = tuple(ks) or protocol.ks
    if min(ks) < 1:
        raise InputError(f"k is {min(ks)}: probe on 1 feature or more")
    jobs, skipped = [], []
    for path in files:
        table = read_table(path)
        try:
            task = make_task(table, protocol, limit)
        except InputError as error:
            skipped.append(str(error))
            continue
        settings = {
            "protocol": protocol.name,
            "limit": limit,
            "ks": ks,
            "context": protocol.context,
            "table": _digest(path),
        }
        if protocol.name != "sae-probes":
            settings["split"] = "by text"
        if protocol.how == "mean":
            settings["first"] = bench.first
        subjects = (*bench.coders, *bench.raw())
        family = "sparse_probing" + ("_sae_probes" if protocol.name == "sae-probes" else "")
        work = _work(task.texts, protocol.context)
        measure = _probing(path, protocol, limit, ks)
        jobs.append(
            BenchmarkJob(family, task.name, settings, subjects, work, measure, task.repeated)
        )
    if not jobs:
        raise InputError(f"no table to probe; the first: {skipped[0]}")
    return jobs, skipped


def _probing(path: Path, protocol: Protocol, limit: int | None, ks: Sequence[int]) -> Measure:
    def measure(bench: Bench, missing: Sequence[str], report: Report) -> dict[str, dict[str, Any]]:
        task = make_task(read_table(path), protocol, limit, quiet=True)  # it was said before
        how, keep = protocol.how, protocol.keep
        passed, probed = _stages(report, len(missing))
        names, pooled = _pooled(bench, missing, task.texts, protocol.context, how, passed, keep)
        subjects = {name: f.values for name, f in zip(names, pooled.features)}
        raw = {name: pooled.raw[place] for name, place in bench.raw().items() if name in missing}
        results = probe_task(task, subjects | raw, protocol, ks, full=list(raw), report=probed)
        for name, f in zip(names, pooled.features):
            results[name] = _numbered(results[name], f.columns)
        return results

    return measure


def _numbered(result: Any, columns: np.ndarray) -> Any:
    """A result whose lists of "features" count `columns` [A], with the features' own numbers."""
    if isinstance(result, list):
        return [_numbered(value, columns) for value in result]
    if not isinstance(result, dict):
        return result
    own = lambda numbers: [int(columns[i]) for i in numbers]
    return {k: own(v) if k == "features" else _numbered(v, columns) for k, v in result.items()}


def _pooled(
    bench: Bench,
    missing: Sequence[str],
    texts: Sequence[str],
    context: int,
    how: Literal["mean"] | int,
    report: Report,
    keep: Literal["first", "last"] = "first",
) -> tuple[list[str], Pooled]:
    """The names of the coders among `missing`, and what they and the activations need."""
    names = [name for name in bench.coders if name in missing]
    places = {place for name, place in bench.raw().items() if name in missing}
    coders = [bench.coders[name] for name in names]
    for coder in bench.coders.values():  # one at each place of which only the activation is missing
        if (place := (coder.reads, coder.layer)) in places - {(c.reads, c.layer) for c in coders}:
            coders.append(coder)
            places.discard(place)
    ids = encode_texts(bench.tokenizer, texts, min(context, bench.model.config.context), keep)
    pooled = pool(bench.model, coders, ids, how=how, first=bench.first, report=report)
    for (site, layer), x in pooled.raw.items():
        if not np.isfinite(x).all():
            raise InputError(
                f"activations at {site} of layer {layer} are not finite numbers on these texts: "
                "run the model in float32"
            )
    for name, f in zip(names, pooled.features):
        if not np.isfinite(f.values).all():
            raise InputError(f"{name}: features are not finite numbers: the coder is broken")
    return names, Pooled(pooled.raw, pooled.features[: len(names)])


def concept_job(
    bench: Bench, family: str, path: Path, *, limit: int | None, ns: Sequence[int]
) -> BenchmarkJob:
    """A job of family "tpp" or "scr" on a table."""
    if min(ns) < 1:
        raise InputError(f"{min(ns)} features to ablate: 1 or more")
    make = scr_tpp.tpp_task if family == "tpp" else scr_tpp.scr_task
    task = make(read_table(path), limit)
    settings = {"limit": limit, "ns": tuple(ns), "context": scr_tpp.CONTEXT, "split": "by text"}
    settings |= {"table": _digest(path), "first": bench.first}
    work = _work(task.texts, scr_tpp.CONTEXT)
    measure = _concepts(family, path, limit, ns)
    return BenchmarkJob(family, task.name, settings, tuple(bench.coders), work, measure)


def _concepts(family: str, path: Path, limit: int | None, ns: Sequence[int]) -> Measure:
    def measure(bench: Bench, missing: Sequence[str], report: Report) -> dict[str, dict[str, Any]]:
        table = read_table(path)
        make = scr_tpp.tpp_task if family == "tpp" else scr_tpp.scr_task
        task: Any = make(table, limit, quiet=True)
        score = scr_tpp.tpp if family == "tpp" else scr_tpp.scr
        passed, scored = _stages(report, len(missing))
        names, pooled = _pooled(bench, missing, task.texts, scr_tpp.CONTEXT, "mean", passed)
        probes: dict[SiteLayer, Any] = {}
        results = {}
        for name, f in zip(names, pooled.features):
            coder = bench.coders[name]
            place = (coder.writes, coder.layer)
            x = pooled.raw[place]
            if place not in probes:
                probes[place] = scr_tpp.fit_probes(task, x)
            some = narrowed(coder, f.columns)
            results[name] = score(task, probes[place], some, x, f.values, ns)
            scored(len(results), len(names))
        return results

    return measure


def absorption_job(bench: Bench, *, per_letter: int | None) -> BenchmarkJob:
    """The job of feature absorption, on up to `per_letter` words of the vocabulary a letter."""
    if per_letter is not None and per_letter < 5:
        raise InputError(f"{per_letter} words a letter are too few: 5 at least")
    work = SPELLING_COST * 26 * (per_letter or 4000)
    settings = {"per_letter": per_letter, "question": spelling.QUESTION, "seed": spelling.SEED}
    family, names = "absorption_first_letter", tuple(bench.coders)

    def measure(bench: Bench, missing: Sequence[str], report: Report) -> dict[str, dict[str, Any]]:
        task = spelling.spelling_prompts(bench.tokenizer, per_letter)
        coders = {name: bench.coders[name] for name in names if name in missing}
        places = sorted(places_of(list(coders.values())))
        passed, scored = _stages(report, len(coders))
        x = _word_activations(bench, job, task, places, passed)
        probes: dict[SiteLayer, spelling.LetterProbes] = {}
        results = {}
        for name, coder in coders.items():
            place = (coder.writes, coder.layer)
            if place not in probes:
                probes[place] = spelling.fit_letters(x[place], task.letters)
            f = encode_rows(coder, x[coder.reads, coder.layer])
            some = narrowed(coder, f.columns)
            try:
                found = spelling.absorption(some, x[place], f.values, task.letters, probes[place])
                results[name] = _numbered(found, f.columns)
            except InputError as error:  # where this one writes; others may still be measured
                results[name] = {"letters": [], "why": str(error)}
            scored(len(results), len(coders))
        if len(results) == len(names) and not any(r["letters"] for r in results.values()):
            raise InputError(results[names[0]]["why"])
        return results

    job = BenchmarkJob(family, "vocabulary", settings, names, work, measure)
    return job


def _word_activations(
    bench: Bench,
    job: BenchmarkJob,
    task: spelling.Spelling,
    places: Sequence[SiteLayer],
    report: Report,
) -> dict[SiteLayer, np.ndarray]:
    """Activations [W, D] at each of `places` at the words of the prompts.

    Kept in files of `CHUNK` words beside the results: the whole vocabulary is hours of work, which
    may be interrupted, and later coders at the same places need no model.
    """
    where = digest(repr(places), 4)
    folder = job.path(bench).with_suffix("") / f"activations-{where}"
    lengths = (-(-max(map(len, task.prompts)) // 8) * 8,)
    parts = []
    for start in range(0, len(task.prompts), CHUNK):
        file, some = folder / f"{start:06d}.npz", task.prompts[start : start + CHUNK]
        if not file.exists():
            found = pool(bench.model, (), some, how=task.at, places=places, lengths=lengths)
            data = io.BytesIO()
            np.savez(data, *[found.raw[place] for place in places])
            write_bytes(file, data.getvalue())
        try:
            with np.load(io.BytesIO(file.read_bytes())) as arrays:
                rows = [arrays[f"arr_{n}"] for n in range(len(places))]
            widths = [site_width(bench.model.config, site) for site, _ in places]
            if [x.shape for x in rows] != [(len(some), D) for D in widths]:
                raise ValueError("other words or sites")
            if not all(np.isfinite(x).all() for x in rows):
                raise ValueError("not all numbers")
        except (*BROKEN, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: broken; remove it to measure again") from error
        parts.append(rows)
        report(min(start + CHUNK, len(task.prompts)), len(task.prompts))
    return {place: np.concatenate(rows) for place, rows in zip(places, zip(*parts))}


def _work(texts: Sequence[str], context: int) -> int:
    """Tokens, about: a quarter of the letters, and <bos>."""
    return sum(min(context, 1 + len(text) // 4) for text in texts)


def _digest(path: Path) -> str:
    return digest(path.expanduser().read_bytes())
