"""An audit: measure a behaviour, find the features that go with it, and see what they do to it.

    done = gs.audit("bias_stereoset", model, tokenizer, coder, "audits/stereoset")
    print(done)

Stages: the items are scored or answered, the suite's arms are contrasted on one half of the items,
and the features found there are ablated while the other half is scored, beside matched random
features and with the loss on plain text. Each is kept in the folder, so a killed audit goes on
where it was and ends with the same result.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.behaviour.audits import asking
from gemma_scope_jax.behaviour.audits.evidence import evidence
from gemma_scope_jax.behaviour.audits.item_arms import arms_of, check_arms, halves
from gemma_scope_jax.behaviour.audits.judges import AnswerJudge, agreement
from gemma_scope_jax.behaviour.audits.kept import Kept
from gemma_scope_jax.behaviour.audits.outcomes import (
    Outcome,
    check_outcome,
    outcome_of,
    suite_outcome,
)
from gemma_scope_jax.behaviour.audits.results import Audit, figure_rows, not_shown, repeat
from gemma_scope_jax.behaviour.contrasts.activity import feature_activity
from gemma_scope_jax.behaviour.contrasts.contrast import contrast
from gemma_scope_jax.behaviour.contrasts.mediate import mediate
from gemma_scope_jax.behaviour.measure import text_loss
from gemma_scope_jax.behaviour.statistics import FEWEST, bootstrap
from gemma_scope_jax.behaviour.suites.scores import (
    MEASURES,
    grouped_figures,
    units_of,
    verdict_figures,
)
from gemma_scope_jax.behaviour.suites.suite import Suite, SuiteItems, load_suite, suite_items
from gemma_scope_jax.coders.coder import check_fits, public_name, weights_identity
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.documents import sample_documents
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress

LOG = logging.getLogger(__name__)
PLAIN, PLAIN_TOKENS = 16, 64  # texts, and tokens of each, on which the loss is measured


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """How an audit is made."""

    limit: int | None = None
    """Items asked; default: the suite's own limit; 0: all."""
    features: int = 8
    """Features found that are ablated together."""
    mediated: int = 100
    """Items, of those held out, on which features are ablated."""
    controls: int = 20
    """Sets of random features beside them."""
    side_suites: tuple[str, ...] = ()
    """Other suites whose outcome is measured, too, while the features are ablated."""
    seed: int = 0

    def __post_init__(self):
        for name, least in (("features", 1), ("mediated", FEWEST), ("controls", 1), ("seed", 0)):
            whole_number(name, getattr(self, name), least)
        if self.limit is not None:
            whole_number("limit", self.limit, 0)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Everything that the stages need."""

    suite: Suite
    model: Model
    tokenizer: Tokenizer
    coder: SparseCoder
    settings: AuditSettings
    judge: AnswerJudge | None
    asked: asking.Questions
    kept: Kept

    @property
    def first(self) -> np.ndarray:
        """bool [n]: the half on which features are found."""
        return halves(self.asked.items, self.settings.seed)


def check_audit(
    suite: Suite | str | os.PathLike,
    shape: GemmaConfig,
    coder: Any,
    settings: AuditSettings = AuditSettings(),
    *,
    sets: str | os.PathLike = "",
) -> tuple[Suite, SuiteItems]:
    """The suite and its items, and the `InputError`s of `audit` that need no weights of a model."""
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    if not isinstance(coder, SparseCoder):
        raise InputError("an audit takes a coder of one layer: of a set, take one with .at(layer)")
    check_fits(shape, coder)
    found = suite_items(suite, limit=settings.limit, sets=sets)
    for name in settings.side_suites:
        check_outcome(load_suite(name))
    if suite.arms:
        check_arms(suite, found.items)
        if suite.elsewhere and load_suite(suite.elsewhere).arms.get("by", "outcome") == "outcome":
            lacks = f"{suite.elsewhere} has no arms of its own"
            raise InputError(f"{suite.place}: elsewhere: {lacks}")
    return suite, found


@own_mesh
def audit(
    suite: Suite | str | os.PathLike,
    model: Model,
    tokenizer: Tokenizer,
    coder: SparseCoder,
    out: str | os.PathLike,
    settings: AuditSettings = AuditSettings(),
    *,
    judge: AnswerJudge | None = None,
    sets: str | os.PathLike = "",
    known: Any = None,
    command: str = "",
) -> Audit:
    """Audit `model` by a suite, and keep everything in the folder `out`.

    suite    a `Suite`, the name of a built-in one or a file
    judge    of written answers; needed where the suite's kind is "generate", see `open_judge`
    sets     where the packages of published sets are, see `rows.package_bytes`
    known    `KnownFeatures` of the coder, for the examples of features; default: beside the coder
    command  what to type to repeat the audit, for the report

    The same call continues an audit that was interrupted, and reads one that is done. Raises
    `InputError` for a suite or data that cannot be used, and for a folder that holds an audit of
    another suite, model, coder or settings.
    """
    suite, found = check_audit(suite, model.config, coder, settings, sets=sets)
    if (suite.kind == "generate") != (judge is not None):
        needs = "needs a judge=" if judge is None else "takes no judge: its choices are scored"
        raise InputError(f"{suite.name} {needs}")
    new = suite.new_tokens if suite.kind == "generate" else 0
    asked = asking.questions(
        found.items, tokenizer, suite.template, model.config.context, new_tokens=new
    )
    about = {
        "suite": suite.name,
        "suite_identity": suite.identity(),
        "model": model_identity(model),
        "coder": {"name": public_name(coder), "weights": weights_identity(coder)},
        "judge": None if judge is None else f"{judge.name}: {judge.about}",
        "settings": {**dataclasses.asdict(settings), "side_suites": list(settings.side_suites)},
        "asked": asked.identity(),  # after what it follows from: the first that differs is named
    }
    with Kept.opened(out, about) as kept:
        job = _Job(suite, model, tokenizer, coder, settings, judge, asked, kept)
        with contextlib.closing(AnswerFile(kept.folder / "answers.jsonl")) as answers:
            measured = _measured(job, answers)
        arms = kept.stage("contrast", lambda: _contrasted(job, measured, sets))
        moved = kept.stage("mediation", lambda: _mediated(job, arms.get("chosen", []), sets))
        shown = kept.stage(
            "evidence", lambda: {"features": evidence(model, coder, tokenizer, arms, known)}
        )
        done = Audit(
            suite=_suite_facts(suite),
            data=_data_facts(found, asked),
            model=about["model"],
            coder=_coder_facts(coder, about["coder"]),
            figures=measured["figures"],
            groups=measured["groups"],
            outcome=measured["outcome"],
            judge=measured["judge"],
            contrast=arms,
            mediation=moved,
            evidence=shown["features"],
            not_shown=not_shown(suite, found, asked, measured, arms, moved),
            repeat=repeat(about, command),
        )
        kept.finish(done)
    return done


def _measured(job: _Job, answers: AnswerFile) -> dict[str, Any]:
    """Figures, groups, the outcome of each item and, of written answers, the judge's agreement."""
    what = f"{job.suite.name}: {len(job.asked.items)} items"
    report = Progress(len(job.asked.items), "items", what=what)
    seed = job.settings.seed
    if job.suite.kind == "generate":
        return job.kept.stage("verdicts", lambda: _judged(job, answers, report))
    measure = MEASURES[job.suite.measure]
    scored = asking.score(job.model, job.asked, kept=answers, report=report)
    groups = grouped_figures(scored, measure, seed)
    outcome = measure.outcome(scored)
    mean = bootstrap(outcome, clusters=units_of(job.asked.items), seed=seed)
    return {
        "figures": figure_rows(measure.figures(scored, seed)),
        "groups": {name: figure_rows(some) for name, some in groups.items()},
        "outcome": {"about": measure.about, "mean": mean.as_dict()},
        "shows": (outcome > 0).tolist(),
        "judge": None,
    }


def _judged(job: _Job, answers: AnswerFile, report: Progress) -> dict[str, Any]:
    assert job.judge is not None
    variants = len(job.asked.items[0].prompts)
    if any(len(item.prompts) != variants for item in job.asked.items):
        raise InputError(f"{job.suite.place}: items with different numbers of prompts")
    texts = asking.answer(
        job.model, job.tokenizer, job.asked, job.suite.new_tokens, kept=answers, report=report
    )
    pairs = [
        (p, a) for item, said in zip(job.asked.items, texts) for p, a in zip(item.prompts, said)
    ]
    verdicts = job.judge.grade(*(list(part) for part in zip(*pairs)))
    table = verdicts.reshape(-1, variants)
    checked = agreement(job.judge, job.settings.seed) if job.judge.checked else None
    if checked is not None:
        LOG.info("%s", checked)
    last = table[:, -1]
    judged = np.isfinite(last)
    if not judged.any():
        raise InputError(f"{job.suite.place}: the judge ({job.judge.about}) judged no answer")
    units = units_of(job.asked.items)
    clusters = None if units is None else np.array(units)[judged]
    shown = bootstrap(last[judged], clusters=clusters, seed=job.settings.seed)
    return {
        "figures": figure_rows(
            verdict_figures(job.asked.items, table, job.judge.what, job.settings.seed)
        ),
        "groups": {},
        "outcome": {"about": f"whether the answer is {job.judge.what}", "mean": shown.as_dict()},
        "shows": [bool(v > 0.5) if known else None for v, known in zip(last, judged)],
        "judge": {
            "name": job.judge.name,
            "about": job.judge.about,
            "agreement": None if checked is None else checked.as_dict(),
            "unjudged": int((~np.isfinite(verdicts)).sum()),
        },
    }


def _contrasted(job: _Job, measured: Mapping[str, Any], sets: str | os.PathLike) -> dict[str, Any]:
    """The contrast of the two halves' arms as JSON data, or {"why": ...} if there is none."""
    suite, items, first = job.suite, job.asked.items, job.first
    if not suite.arms:
        return {"why": "the suite names no arms, so no features were contrasted"}
    judged = np.array([shows is not None for shows in measured["shows"]])
    shows = np.array([bool(shows) for shows in measured["shows"]])
    of = lambda half: [item for item, keep in zip(items, half) if keep]
    one, two = (
        arms_of(suite, of(half), job.tokenizer, shows=shows[half])
        for half in (first & judged, ~first & judged)
    )
    far = _elsewhere(job, sets)
    if isinstance(one, str) or isinstance(two, str) or isinstance(far, str):
        return {"why": next(why for why in (one, two, far) if isinstance(why, str))}
    made = contrast(
        job.model,
        job.coder,
        one,
        held_out=two,
        elsewhere=far,
        how=suite.arms["how"],
        k=job.settings.features,
        seed=job.settings.seed,
    )
    return {
        **made.as_dict(),
        "coder": public_name(job.coder),
        "verdict": made.verdict(),
        "tables": made.tables(),
    }


def _elsewhere(job: _Job, sets: str | os.PathLike):
    """The arms of the suite from elsewhere, None without one."""
    if not job.suite.elsewhere:
        return None
    other = load_suite(job.suite.elsewhere)
    items = suite_items(other, limit=len(job.asked.items), sets=sets).items
    return arms_of(other, items, job.tokenizer)


def _mediated(job: _Job, features: list[int], sets: str | os.PathLike) -> dict[str, Any]:
    """What ablating the features does to held-out items, as JSON data, or {"why": ...}."""
    if not features:
        return {"why": "no features were found to be ablated"}
    if job.judge is not None and job.judge.what != "refused":
        why = f"how nearly an answer is {job.judge.what} is not measured without writing it"
        return {"why": f"nothing was ablated: {why}"}
    held = np.flatnonzero(~job.first)
    order = np.random.default_rng(job.settings.seed).permutation(held)
    asked = job.asked.some(np.sort(order[: job.settings.mediated]))
    about, outcome = outcome_of(job.suite, job.model, job.tokenizer, asked)
    plain = [job.tokenizer.encode(text)[:PLAIN_TOKENS] for text in sample_documents()[:PLAIN]]
    plain = [ids[: job.model.config.context] for ids in plain]
    broken: dict[str, Outcome] = {}
    broken["loss on plain text"] = lambda intercepts: text_loss(job.model, plain, intercepts)
    for name in job.settings.side_suites:
        broken[name] = suite_outcome(
            name, job.model, job.tokenizer, limit=job.settings.mediated, sets=sets
        )
    texts = [np.concatenate(pairs[0]) for pairs in asked.pairs]
    made = mediate(
        outcome,
        job.coder,
        features,
        controls=job.settings.controls,
        activity=feature_activity(job.model, job.coder, texts),
        clusters=units_of(asked.items),
        side_effects=broken,
        seed=job.settings.seed,
    )
    return {**made.as_dict(), "about": about, "verdict": made.verdict(), "tables": made.tables()}


def _suite_facts(suite: Suite) -> dict[str, Any]:
    names = ("name", "question", "kind", "measure", "template", "licence", "source", "seed")
    facts = {name: getattr(suite, name) for name in names}
    return facts | {"identity": suite.identity(), "elsewhere": suite.elsewhere}


def _data_facts(found: SuiteItems, asked: asking.Questions) -> dict[str, Any]:
    facts = {"sources": [dict(o) for o in found.origins], "asked": len(asked.items)}
    return facts | {"left_out": asked.left_out, "ids": asked.identity()}


def _coder_facts(coder: SparseCoder, identity: Mapping[str, str]) -> dict[str, Any]:
    place = {"kind": coder.kind, "site": coder.reads, "layer": coder.layer, "width": coder.width}
    return {**identity, **place}
