"""Benchmarks several coders at once, one task at a time, and keeps the result of each task.

A job is a task: a table to probe, or the vocabulary to spell. It runs the model once for all coders
without a result and writes one file. A second run measures only what is missing, such as a new
coder. Whatever changes a result (settings, table, model, a coder's weights) is part of its key.
"""

import dataclasses
import functools
import io
import json
import logging
import os
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
from gemma_scope_jax.probing import pooling, scr_tpp
from gemma_scope_jax.probing.probing import Protocol, make_task, probe_task
from gemma_scope_jax.probing.tables import read_table
from gemma_scope_jax.progress import Progress, Report
from gemma_scope_jax.storage.atomic import write_bytes, write_text
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.strict_json import field, read_json

LOG = logging.getLogger(__name__)
SPELLING_COST = 90  # tokens of a spelling prompt
CHUNK = 256  # words whose activations are one file
Result = dict[str, Any]  # plain data, as in the files
Measure = Callable[["Bench", Sequence[str], Report], dict[str, Result]]  # the missing subjects


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured, and where results are kept."""

    model: Model
    tokenizer: Tokenizer
    coders: Mapping[str, SparseCoder]
    folder: epath.Path

    @property
    def first(self) -> int:
        """The first position that is included in means: from there on all coders have features."""
        return max((coder.first for coder in self.coders.values()), default=1)

    def raw(self) -> dict[str, pooling.SiteLayer]:
        """The activations that the coders read, by name."""
        places = sorted({(c.reads, c.layer) for c in self.coders.values()})
        return {f"activation {site} {layer}": (site, layer) for site, layer in places}

    def read_by(self, name: str) -> str:
        """The name of the activation that a coder reads."""
        coder = self.coders[name]
        return f"activation {coder.reads} {coder.layer}"


def by_name(coders: Sequence[SparseCoder]) -> dict[str, SparseCoder]:
    """Coders by their address, or by the `coder_id` of their folder; a number follows the name of
    a coder without either, and of namesakes."""
    found: dict[str, SparseCoder] = {}
    for number, coder in enumerate(coders):
        name = coder.info.path or f"{coder.kind} {coder.reads} {coder.layer}"
        name = "/".join(coder_id(coder)) if os.path.isabs(name) else name
        found[f"{name} ({number})" if name in found else name] = coder
    return found


@dataclasses.dataclass(frozen=True)
class BenchmarkJob:
    """A task for all its subjects: coders, and activations themselves."""

    family: str  # SAEBench's name of the evaluation
    name: str
    settings: Mapping[str, Any]
    subjects: tuple[str, ...]
    work: int  # tokens, about
    measure: Measure
    repeated: float = 0.0  # the share of test rows whose texts are also in the training rows

    def path(self, bench: Bench) -> epath.Path:
        """The file of its results, which depends on the settings and the model."""
        key = {**self.settings, "name": self.name, "model": model_identity(bench.model)}
        return bench.folder / "tasks" / self.family / f"{self.name}-{digest(plain(key), 5)}.json"


def run_jobs(bench: Bench, jobs: Sequence[BenchmarkJob]) -> list[dict[str, Result]]:
    """Measure what is missing; the results of each job, {subject: result}. Raises `InputError` for
    a broken result file, and while another process measures into the folder."""
    with only_writer(bench.folder):
        keys = {name: weights_identity(coder) for name, coder in bench.coders.items()}
        stored = [_stored(job, bench, keys) for job in jobs]
        missing = [[s for s in job.subjects if s not in had] for job, had in zip(jobs, stored)]
        progress, done = Progress(sum(job.work for job, some in zip(jobs, missing) if some)), 0
        if kept := sum(not some for some in missing):
            LOG.info("%d of %d tasks are done already", kept, len(jobs))
        for job, had, some in zip(jobs, stored, missing):
            if not some:
                continue
            note = f"  {job.family} {job.name}"
            new = plain(job.measure(bench, some, progress.part(done, job.work, note)))
            had |= {s: {"key": keys.get(s, ""), "result": r} for s, r in new.items()}
            done += job.work
            progress.at(done, note)
            document = {"family": job.family, "task": job.name, "settings": plain(job.settings)}
            document["results"] = had
            write_text(job.path(bench), json.dumps(document, ensure_ascii=False) + "\n")
    return [{subject: r["result"] for subject, r in had.items()} for had in stored]


def _stages(report: Report, subjects: int) -> tuple[Report, Report]:
    """The reports of the model's pass, and of the subjects after it; a subject is assumed to cost a
    tenth of the pass, which is the right order of magnitude."""
    whole = lambda of: (10 + subjects) * max(of, 1)
    passed = lambda done, of: report(10 * done, whole(of))
    return passed, lambda done, of: report(10 * max(of, 1) + subjects * done, whole(of))


def _stored(job: BenchmarkJob, bench: Bench, keys: Mapping[str, str]) -> dict[str, Result]:
    """{subject: {"key", "result"}} of what was measured, including coders not asked for."""
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
        advice = "not a task's results; remove it to measure again"
        raise InputError(f"{path}: {advice} ({reason(error)})") from error


_PARTS = {  # of a result, which the tables need
    "absorption_first_letter": ("letters",),
    "tpp": ("clean", "by_n", "by_class"),
    "scr": ("direction", "by_n", "directions"),
}


def _checked(job: BenchmarkJob, result: Result) -> Result:
    """A result that was read. Raises KeyError or `InputError` if parts of it are missing."""
    for part in _PARTS.get(job.family, ()):
        result[part]
    for k in map(str, job.settings["ks"] if job.family not in _PARTS else ()):
        for measure in ("accuracy", "auc", "f1"):
            field(result[k], measure, float, k, default=None)
    return result


def probing_jobs(
    bench: Bench,
    files: Sequence[Path],
    protocol: Protocol,
    *,
    limit: int | None = None,
    ks: Sequence[int] = (),
) -> tuple[list[BenchmarkJob], list[str]]:
    """A job for each table that fits the protocol, and one line for each that does not. Raises
    `InputError` if a file is not a table, or none of them fits."""
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
        for line in task.doubts:
            LOG.warning(line)
        settings: dict[str, Any] = {"protocol": protocol.name, "limit": limit, "ks": ks}
        settings |= {"context": protocol.context, "table": digest(expanded(path).read_bytes())}
        family, subjects = "sparse_probing", (*bench.coders, *bench.raw())
        if protocol.name == "sae-probes":
            family += "_sae_probes"
        else:
            settings["split"] = "by text"
        if protocol.how == "mean":
            settings["first"] = bench.first
        work = _work(task.texts, protocol.context)
        measure, share = _probing(path, protocol, limit, ks), task.repeated
        jobs.append(BenchmarkJob(family, task.name, settings, subjects, work, measure, share))
    if not jobs:
        raise InputError(f"no table to probe; the first: {skipped[0]}")
    return jobs, skipped


def _probing(path: Path, protocol: Protocol, limit: int | None, ks: Sequence[int]) -> Measure:
    def measure(bench: Bench, missing: Sequence[str], report: Report) -> dict[str, Result]:
        task = make_task(read_table(path), protocol, limit)
        passed, probed = _stages(report, len(missing))
        how = (protocol.how, protocol.keep)
        names, pooled = _pooled(bench, missing, task.texts, protocol.context, passed, *how)
        subjects = {name: f.values for name, f in zip(names, pooled.features)}
        raw = {name: pooled.raw[place] for name, place in bench.raw().items() if name in missing}
        results = probe_task(task, subjects | raw, protocol, ks, full=list(raw), report=probed)
        for name, f in zip(names, pooled.features):
            results[name] = _numbered(results[name], f.columns)
        return results

    return measure


def _numbered(result: Any, columns: np.ndarray) -> Any:
    """A result with the features' own numbers in place of indices into `columns` [A]."""
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
    report: Report,
    how: Literal["mean"] | int = "mean",
    keep: Literal["first", "last"] = "first",
) -> tuple[list[str], pooling.Pooled]:
    """The names of the coders among `missing`; their features, and all activations needed."""
    names = [name for name in bench.coders if name in missing]
    places = {place for name, place in bench.raw().items() if name in missing}
    coders = [bench.coders[name] for name in names]
    most = min(context, bench.model.config.context)
    cut = lambda ids: ids[:most] if keep == "first" else np.append(ids[:1], ids[1 - most :])
    ids = [x if len(x) <= most else cut(x) for x in map(bench.tokenizer.encode, texts)]
    options: dict[str, Any] = {"how": how, "first": bench.first, "places": list(places)}
    pooled = pooling.pool(bench.model, coders, ids, **options, report=report)
    for (site, layer), x in pooled.raw.items():
        if not np.isfinite(x).all():
            raise InputError(
                f"activations at {site} of layer {layer} are not finite numbers on these texts: "
                "run the model in float32"
            )
    for name, f in zip(names, pooled.features):
        if not np.isfinite(f.values).all():
            raise InputError(f"{name}: features are not finite numbers: the coder is broken")
    return names, pooled


def concept_job(
    bench: Bench, family: str, path: Path, *, limit: int | None, ns: Sequence[int]
) -> BenchmarkJob:
    """A job of family "tpp" or "scr" on a table."""
    parts = {"tpp": (scr_tpp.tpp_task, scr_tpp.tpp), "scr": (scr_tpp.scr_task, scr_tpp.scr)}
    make, score = parts[family]

    def measure(bench: Bench, missing: Sequence[str], report: Report) -> dict[str, Result]:
        task = make(read_table(path), limit)
        passed, scored = _stages(report, len(missing))
        names, pooled = _pooled(bench, missing, task.texts, scr_tpp.CONTEXT, passed)
        fit = functools.cache(lambda *place: scr_tpp.fit_probes(task, pooled.raw[place]))
        results = {}
        for name, f in zip(names, pooled.features):
            coder = bench.coders[name]
            place = (coder.writes, coder.layer)
            w_dec, x = coder.w_dec[f.columns], pooled.raw[place]
            results[name] = score(task, fit(*place), w_dec, x, f.values, ns)
            scored(len(results), len(names))
        return results

    task = make(read_table(path), limit)
    for line in task.doubts:
        LOG.warning(line)
    settings = {"limit": limit, "ns": tuple(ns), "context": scr_tpp.CONTEXT, "split": "by text"}
    settings |= {"table": digest(expanded(path).read_bytes()), "first": bench.first}
    work = _work(task.texts, scr_tpp.CONTEXT)
    return BenchmarkJob(family, task.name, settings, tuple(bench.coders), work, measure)


def absorption_job(bench: Bench, *, per_letter: int | None) -> BenchmarkJob:
    """The job of feature absorption, on up to `per_letter` words of the vocabulary per letter."""
    if per_letter is not None and per_letter < 5:
        raise InputError(f"{per_letter} words a letter are too few: 5 at least")
    work = SPELLING_COST * 26 * (per_letter or 4000)
    settings = {"per_letter": per_letter, "question": spelling.QUESTION, "seed": spelling.SEED}
    names = tuple(bench.coders)

    def measure(bench: Bench, missing: Sequence[str], report: Report) -> dict[str, Result]:
        task = spelling.spelling_prompts(bench.tokenizer, per_letter)
        coders = {name: bench.coders[name] for name in names if name in missing}
        places = sorted(pooling.places_of(list(coders.values())))
        passed, scored = _stages(report, len(coders))
        x = _word_activations(bench, job.path(bench).with_suffix(""), task, places, passed)
        fit = functools.cache(lambda *place: spelling.fit_letters(x[place], task.letters))
        results: dict[str, Result] = {}
        for name, coder in coders.items():
            place = (coder.writes, coder.layer)
            probes, f = fit(*place), pooling.encode_rows(coder, x[coder.reads, coder.layer])
            w_dec = coder.w_dec[f.columns]
            try:
                found = spelling.absorption(w_dec, x[place], f.values, task.letters, probes)
                results[name] = _numbered(found, f.columns)
            except InputError as error:  # at this coder's site; others may still be measured
                results[name] = {"letters": [], "why": str(error)}
            scored(len(results), len(coders))
        if len(results) == len(names) and not any(r["letters"] for r in results.values()):
            raise InputError(results[names[0]]["why"])
        return results

    job = BenchmarkJob("absorption_first_letter", "vocabulary", settings, names, work, measure)
    return job


def _word_activations(
    bench: Bench,
    folder: epath.Path,
    task: spelling.Spelling,
    places: Sequence[pooling.SiteLayer],
    report: Report,
) -> dict[pooling.SiteLayer, np.ndarray]:
    """Activations [W, D] at each of `places` on the words of the prompts. Kept in files of `CHUNK`
    words in `folder`: the whole vocabulary takes hours, which may be interrupted, and later coders
    at the same places need no model."""
    folder = folder / f"activations-{digest(repr(places), 4)}"
    lengths = (-(-max(map(len, task.prompts)) // 8) * 8,)
    parts = []
    for start in range(0, len(task.prompts), CHUNK):
        file, some = folder / f"{start:06d}.npz", task.prompts[start : start + CHUNK]
        if not file.exists():
            found = pooling.pool(bench.model, (), some, how=task.at, places=places, lengths=lengths)
            data = io.BytesIO()
            np.savez(data, *[found.raw[place] for place in places])
            write_bytes(file, data.getvalue())
        try:
            content = file.read_bytes()
        except Exception as error:  # a bucket's clients raise types of their own
            raise InputError(f"{file}: cannot be read ({reason(error)})") from error
        try:
            with np.load(io.BytesIO(content)) as arrays:
                rows = [arrays[f"arr_{n}"] for n in range(len(places))]
            widths = [site_width(bench.model.config, site) for site, _ in places]
            if [x.shape for x in rows] != [(len(some), D) for D in widths]:
                raise ValueError("other words or sites")
            if not all(np.isfinite(x).all() for x in rows):
                raise ValueError("not all numbers")
        except Exception as error:  # zipfile and zlib raise types of their own
            why = f"broken ({reason(error)})"
            raise InputError(f"{file}: {why}; remove it to measure again") from error
        parts.append(rows)
        report(min(start + CHUNK, len(task.prompts)), len(task.prompts))
    return {place: np.concatenate(rows) for place, rows in zip(places, zip(*parts))}


def _work(texts: Sequence[str], context: int) -> int:
    """Tokens, about: a quarter of the letters, and <bos>."""
    return sum(min(context, 1 + len(text) // 4) for text in texts)
