"""The core evaluation as a job: what is finished is read, what was killed goes on.

A folder of results holds a document a coder and, while a run is under way, the sums of its batches
so far, saved every minute. The text is the same each time, so a run that goes on gives the figures
of one that was never killed.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

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
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.paths import folder_path

LOG = logging.getLogger(__name__)
SAVED_EVERY = 60.0  # seconds between two savings of what a run has summed


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

    data         see `EvaluationText`: what is read, in batches of which shape
    loss_tokens  run the whole model, changed and unchanged, on the first so many tokens
    replacement  also measure the model with all coders in place at once: one document more
    geometry     norms and cosines of features, whose time grows with the width squared
    out          a folder, local or gs://, for the documents and plots; the same call goes on where
                 it was killed, and computes nothing twice
    dataset      what the text is called in the documents
    Raises `InputError` as `evaluate_core` does, and for sequences beyond the model's context.
    """
    if data.context_size > model.config.context:
        raise InputError(
            f"--context-size {data.context_size} is more than the model's context of "
            f"{model.config.context}"
        )
    if replacement and loss_tokens == 0:
        raise InputError("--replacement measures losses: give --loss-tokens")
    plan = EvaluationPlan(
        loss_tokens=loss_tokens, ablations=ABLATIONS, positions=True, groups=data.groups
    )
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
    """Each coder's document, then that of all together if `replacement`.

    config  `core.core_config` of data and plan
    out     a folder, local or gs://, for documents and plots: those that are there are not measured
            again, and the records of single features are left to the files; "": nothing is written
    Raises `InputError` for coders that do not fit, documents made with another config, and while
    another process fills the folder.
    """
    with only_writer(folder_path(out)) if out else contextlib.nullcontext():
        return _evaluate_core(model, coders, data, plan, config, out, replacement)


def _evaluate_core(
    model: Model,
    coders: Sequence[Coder],
    data: EvaluationText,
    plan: EvaluationPlan,
    config: dict[str, Any],
    out: str,
    replacement: bool,
) -> list[dict[str, Any]]:
    configs = [{**config, "coder_weights": weights_identity(c)} for c in coders]
    ids = [coder_id(c) for c in coders]
    if repeated := [i for i in ids if ids.count(i) > 1]:
        raise InputError(f"{'/'.join(repeated[0])} is named twice: each coder once")
    name = replacement_name(coders)
    together = {**config, "coder_weights": [c["coder_weights"] for c in configs]}
    found = [_finished(out, CORE, i, c, data) for i, c in zip(ids, configs)]
    whole = None
    if replacement:
        whole = _finished(out, REPLACEMENT, coder_id(None, name), together, data)
    same = [{k: v for k, v in c.items() if k != "dataset"} for c in configs]  # a name, as spelled
    state = _Saved(out, [same, ids], replacement, COLUMNS)
    if (saved := state.read()) is not None:
        work = _Work.of(saved)
    else:
        work = _Work.needed(found, replacement and whole is None)
    if any(not 0 <= i < len(coders) for i in work.coders):
        raise InputError(f"{state.path}: damaged (it is of other coders): delete it")
    if work.coders and (None in found or (replacement and whole is None)):
        after = _After(config["tokens"], config["loss_tokens"], state, work)
        some = [coders[i] for i in work.coders]
        measured = measure(
            model, some, data, work.plan(plan), saved=saved, after=after, saved_in=str(state.path)
        )
        state.write(measured, work)
        shapes = config["compute_featurewise_weight_based_metrics"]
        for i, tally in zip(work.coders, measured.tallies):
            if found[i] is None:
                shape = geometry(coders[i]) if shapes else None
                found[i] = _kept(out, core_result(tally.metrics(), shape, coders[i], configs[i]))
        if measured.replacement is not None and whole is None:
            result = replacement_result(measured.replacement, coders, together, name)
            whole = _kept(out, result)
    state.remove()
    results = [result for result in found if result is not None]
    if out:
        _plots(out, results)
    return results if whole is None else [*results, whole]


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is measured of the coders asked for; saved with the sums, for those are of no others.

    coders       their numbers, int [n]
    settled      which of these have documents, and are there for their means alone
    replacement  whether the replacement model is measured, too
    """

    coders: tuple[int, ...]
    settled: tuple[int, ...]
    replacement: bool

    @classmethod
    def needed(cls, found: Sequence[Any], replacement: bool) -> "_Work":
        """`found`: the coders' documents, None where there is none."""
        # The replacement model's mean ablation needs every coder's mean, hence its first pass.
        coders = tuple(i for i, result in enumerate(found) if result is None or replacement)
        settled = tuple(n for n, i in enumerate(coders) if found[i] is not None)
        return cls(coders, settled, replacement)

    @classmethod
    def of(cls, saved: Mapping[str, np.ndarray]) -> "_Work":
        numbers = lambda name: tuple(map(int, saved[f"work/{name}"].tolist()))
        return cls(numbers("coders"), numbers("settled"), bool(saved["work/replacement"]))

    def arrays(self) -> dict[str, np.ndarray]:
        values = dataclasses.asdict(self).items()
        return {f"work/{name}": np.asarray(value, np.int64) for name, value in values}

    def plan(self, plan: EvaluationPlan) -> EvaluationPlan:
        return dataclasses.replace(plan, replacement=self.replacement, settled=self.settled)


def _kept(out: str, result: dict[str, Any]) -> dict[str, Any]:
    """The document, written, and then without its records of single features: of many coders they
    are gigabytes."""
    if not out:
        return result
    write_result(out, result)
    return {**result, "eval_result_details": []}


def _finished(
    out: str, kind: str, ident: tuple[str, str], config: Mapping, data: EvaluationText
) -> dict | None:
    """The document that is there already. Raises `InputError` if it was made in another way."""
    if not out or not (path := result_path(out, kind, *ident)).exists():
        return None
    found = read_result(path)
    old, new = found["eval_config"], plain(config)
    if data.same_text(old.get("text")):  # whatever it is called
        old = {**old, "text": new["text"], "dataset": new["dataset"]}
    if different := [k for k in new if old.get(k) != new[k]]:
        key = different[-1]  # ours come last, and say more
        raise InputError(
            f"{path}: was measured with another {key} ({old.get(key)!r}, now {new[key]!r}): give "
            "another --out, or delete it"
        )
    check_document(found, path)
    LOG.info("%s: measured before", path)
    return {**found, "eval_result_details": []}


class _Saved:
    """The sums of a run under way, in the folder of the results, from which the next goes on."""

    def __init__(self, out: str, *what: Any):
        """`what` is measured decides the file's name."""
        self.path = folder_path(out) / f"partial-{digest(plain(what))}.npz" if out else None

    def read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            with np.load(io.BytesIO(self.path.read_bytes()), allow_pickle=False) as file:
                found: dict[str, Any] = dict(file)
            _Work.of(found)
        except Exception as error:  # zipfile and numpy raise types of their own
            raise InputError(f"{self.path}: damaged ({reason(error)}): delete it") from error
        LOG.info("going on from %s", self.path)
        return found

    def write(self, measured: Measured, work: _Work) -> None:
        if self.path is None:
            return
        arrays: dict[str, Any] = measured.arrays() | work.arrays()
        data = io.BytesIO()
        np.savez(data, **arrays)
        write_bytes(self.path, data.getvalue())

    def remove(self) -> None:
        if self.path is not None and self.path.exists():
            self.path.unlink()


class _After:
    """What happens after each batch: progress and, now and then, a saving."""

    def __init__(
        self, tokens: int | None, loss_tokens: int | None, saved: _Saved, work: _Work
    ):  # None: all of the text, however long that is
        least = min((n for n in (tokens, loss_tokens) if n is not None), default=None)
        self.total = {"fit": tokens, "loss": least}
        self.saved, self.work, self.stage, self.done = saved, work, "", 0
        self.kept = time.monotonic()

    def __call__(self, measured: Measured, stage: str, tokens: int) -> None:
        if stage != self.stage:  # the rate begins now: the first batch was compiled for
            steps = measured.fitted if stage == "fit" else measured.compared
            self.stage, self.done = stage, steps * tokens
            what = {"fit": "how they fit", "loss": "what they cost the model"}[stage]
            total = self.total[stage]
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
        LOG.warning("no plots: they need `pip install matplotlib`")
        return
    for r in results:
        path = result_path(out, "core", r["sae_lens_release_id"], r["sae_lens_id"])
        plot_core(r, path.with_suffix(".png"))
    if len(results) > 1:
        plot_pareto(results, path.parent.parent / "pareto.png")
