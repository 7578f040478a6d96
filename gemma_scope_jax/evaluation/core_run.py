"""The core evaluation as a job: finished documents are read, an interrupted run continues.

A folder of results holds a document for each coder and, during a run, the sums of its batches so
far, saved every minute. The text is the same each time, so a continued run gives the figures of an
uninterrupted one.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_scope_jax.coders.coder import Coder, weights_identity
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.evaluation.core import (
    CORE,
    REPLACEMENT,
    check_document,
    core_config,
    core_result,
    replacement_name,
    replacement_result,
)
from gemma_scope_jax.evaluation.evaluate import EvaluationPlan, Measured, measure
from gemma_scope_jax.evaluation.figures import ABLATIONS
from gemma_scope_jax.evaluation.geometry import geometry
from gemma_scope_jax.evaluation.metrics import COLUMNS
from gemma_scope_jax.evaluation.report import plot_core, plot_pareto
from gemma_scope_jax.evaluation.results import (
    coder_id,
    plain,
    read_result,
    result_path,
    write_result,
)
from gemma_scope_jax.evaluation.texts import EvaluationText
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.paths import folder_path

LOG = logging.getLogger(__name__)
SAVED_EVERY = 60.0  # seconds after which the sums of a run are saved again


def check_evaluation(
    shape: GemmaConfig,
    text: EvaluationText,
    *,
    loss_tokens: int | None = 16_000,
    replacement: bool = False,
) -> None:
    """Raise `InputError` for what `evaluate_coders` would refuse, before a model is loaded."""
    if text.context_size > shape.context:
        raise InputError(
            f"context_size {text.context_size} is more than the model's context of {shape.context}"
        )
    if loss_tokens is not None and loss_tokens < 0:
        raise InputError(f"loss_tokens {loss_tokens}: 0 or more")
    if replacement and loss_tokens == 0:
        raise InputError("replacement measures losses, which needs loss_tokens")


def evaluate_coders(
    model: Model,
    coders: Sequence[Coder],
    data: EvaluationText,
    *,
    loss_tokens: int | None = 16_000,
    replacement: bool = False,
    geometry: bool = True,
    out: str = "",
    dataset: str = "",
) -> list[dict[str, Any]]:
    """The core figures of any coders on one text: SAEBench's document for each.

    data         the text, in batches
    loss_tokens  run the whole model, changed and unchanged, on about the first of these tokens;
                 None: on all
    replacement  also measure the model with all coders in place at once, as one more document
    geometry     include norms and cosines of features, whose time grows with the width squared
    out          a folder, local or gs://, for the documents and plots; the same call continues an
                 interrupted one, and computes nothing twice
    dataset      the name of the text in the documents
    Raises `InputError` as `evaluate_core` and `check_evaluation` do.
    """
    check_evaluation(model.config, data, loss_tokens=loss_tokens, replacement=replacement)
    plan = EvaluationPlan(loss_tokens, ABLATIONS, positions=True, groups=data.groups)
    config = core_config(data, plan, model, dataset, geometry)
    return evaluate_core(model, coders, data, plan, config, out, replacement)


@own_mesh
def evaluate_core(
    model: Model,
    coders: Sequence[Coder],
    data: EvaluationText,
    plan: EvaluationPlan,
    config: dict[str, Any],
    out: str = "",
    replacement: bool = False,
) -> list[dict[str, Any]]:
    """Each coder's document, then that of all coders together if `replacement`.

    config  `core.core_config` of data and plan
    out     a folder, local or gs://, for documents and plots: existing documents are not measured
            again, and only the files keep the records of single features; "": nothing is written
    Raises `InputError` for coders that do not fit, documents made with another config, and while
    another process fills the folder.
    """
    configs = [{**config, "coder_weights": weights_identity(c)} for c in coders]
    ids = [coder_id(c) for c in coders]
    if repeated := [i for i in ids if ids.count(i) > 1]:
        raise InputError(f"{'/'.join(repeated[0])} is named twice: each coder once")
    name = replacement_name(coders)
    together = {**config, "coder_weights": [c["coder_weights"] for c in configs]}
    same = [{k: v for k, v in c.items() if k != "dataset"} for c in configs]  # a name, as spelled
    with only_writer(folder_path(out)) if out else contextlib.nullcontext():
        found = [_finished(out, CORE, i, c, data) for i, c in zip(ids, configs)]
        whole = None
        if replacement:
            whole = _finished(out, REPLACEMENT, coder_id(None, name), together, data)
        state = _Saved(out, [same, ids], replacement, COLUMNS)
        work = state.read(len(coders)) or _Work.needed(found, replacement and whole is None)
        if work.coders and (None in found or (replacement and whole is None)):
            plan = dataclasses.replace(plan, replacement=work.replacement, settled=work.settled)
            after = _After(config["tokens"], config["loss_tokens"], state, work)
            some = [coders[i] for i in work.coders]
            measured = measure(model, some, data, plan, begin=state.restore, after=after)
            state.write(measured, work)
            shapes = config["compute_featurewise_weight_based_metrics"]
            for i, tally in zip(work.coders, measured.tallies):
                if found[i] is None:
                    shape = geometry(coders[i]) if shapes else None
                    result = core_result(tally.metrics(), shape, coders[i], configs[i])
                    found[i] = _kept(out, result)
            if measured.replacement is not None and whole is None:
                result = replacement_result(measured.replacement, coders, together, name)
                whole = _kept(out, result)
        state.remove()
        results = [result for result in found if result is not None]
        if out:
            _plots(out, results)
        return results if whole is None else [*results, whole]


class _Work(NamedTuple):
    """What a run measures; saved with its sums."""

    coders: tuple[int, ...]  # which of the coders asked for
    settled: tuple[int, ...]  # which of these have documents, and are run for their means alone
    replacement: bool  # whether the replacement model is measured, too

    @classmethod
    def needed(cls, found: Sequence[dict[str, Any] | None], replacement: bool) -> "_Work":
        """What to measure, given the coders' documents, None for those to be made."""
        # The replacement model's mean ablation needs every coder's mean, hence its first pass.
        coders = tuple(i for i, result in enumerate(found) if result is None or replacement)
        settled = tuple(n for n, i in enumerate(coders) if found[i] is not None)
        return cls(coders, settled, replacement)


def _kept(out: str, result: dict[str, Any]) -> dict[str, Any]:
    """The document; once written, without its records of single features, which for many coders
    take gigabytes."""
    if not out:
        return result
    write_result(out, result)
    return {**result, "eval_result_details": []}


def _finished(
    out: str, kind: str, ident: tuple[str, str], config: Mapping[str, Any], data: EvaluationText
) -> dict[str, Any] | None:
    """The existing document. Raises `InputError` if it was made with another config."""
    if not out or not (path := result_path(out, kind, *ident)).exists():
        return None
    found = read_result(path)
    old, new = found["eval_config"], plain(config)
    if data.same_text(old.get("text")):  # whatever its name
        old = {**old, "text": new["text"], "dataset": new["dataset"]}
    if different := [k for k in new if old.get(k) != new[k]]:
        key = different[-1]  # ours come last, and tell more
        raise InputError(
            f"{path}: was measured with another {key} ({old.get(key)!r}, now {new[key]!r}): choose "
            "another folder, or delete it"
        )
    check_document(found, path)
    LOG.info("%s: measured before", path)
    return {**found, "eval_result_details": []}


class _Saved:
    """The sums of an unfinished run, in the folder of the results."""

    def __init__(self, out: str, *what: Any):
        """The name of the file is a digest of `what` is measured."""
        self.path = folder_path(out) / f"partial-{digest(plain(what))}.npz" if out else None
        self.arrays: dict[str, np.ndarray] | None = None

    def read(self, coders: int) -> _Work | None:
        """What the unfinished run measures, of as many `coders`; None if there is no such run."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with np.load(io.BytesIO(self.path.read_bytes()), allow_pickle=False) as file:
                self.arrays = found = dict(file)
            some, settled = (tuple(map(int, found[f"work/{n}"])) for n in ("coders", "settled"))
            if not all(0 <= i < coders for i in some):
                raise ValueError("it holds other coders")
            work = _Work(some, settled, bool(found["work/replacement"]))
        except Exception as error:  # zipfile and numpy raise types of their own
            raise InputError(f"{self.path}: damaged ({reason(error)}): delete it") from error
        LOG.info("continuing from %s", self.path)
        return work

    def restore(self, measured: Measured) -> None:
        """Put in the sums that were read, if any."""
        try:
            if self.arrays is not None:
                measured.restore(self.arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: damaged ({reason(error)}): delete it") from error

    def write(self, measured: Measured, work: _Work) -> None:
        if self.path is None:
            return
        numbers = {f"work/{k}": np.asarray(v, np.int64) for k, v in work._asdict().items()}
        arrays: dict[str, Any] = measured.arrays() | numbers
        data = io.BytesIO()
        np.savez(data, **arrays)
        write_bytes(self.path, data.getvalue())

    def remove(self) -> None:
        if self.path is not None and self.path.exists():
            self.path.unlink()


class _After:
    """Called after each step: shows progress and, now and then, saves the sums."""

    def __init__(self, tokens: int | None, loss_tokens: int | None, saved: _Saved, work: _Work):
        least = min((n for n in (tokens, loss_tokens) if n is not None), default=None)
        self.total = {"fit": tokens, "loss": least}
        self.saved, self.work, self.stage, self.done = saved, work, "", 0
        self.kept = time.monotonic()

    def __call__(self, measured: Measured, stage: str, tokens: int) -> None:
        if stage != self.stage:  # the rate is taken from now on: the first step also compiled
            steps = measured.fitted if stage == "fit" else measured.compared
            self.stage, self.done, total = stage, steps * tokens, self.total[stage]
            what = {"fit": "how they fit", "loss": "what they cost the model"}[stage]
            size = "all of the text" if total is None else f"{total:,} tokens"
            LOG.info("compiled; %s, %s", what, size)
            self.progress = Progress(total, begun=self.done)
        else:
            self.done += tokens
            self.progress.at(self.done)
        if time.monotonic() - self.kept > SAVED_EVERY:
            self.saved.write(measured, self.work)
            self.kept = time.monotonic()


def _plots(out: str, results: list[dict[str, Any]]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        LOG.warning("no plots: they need pip install 'gemma-scope-jax[track]'")
        return
    for r in results:
        path = result_path(out, CORE, r["sae_lens_release_id"], r["sae_lens_id"])
        plot_core(r, path.with_suffix(".png"))
    if len(results) > 1:
        plot_pareto(results, folder_path(out) / "pareto.png")
