"""What ablation moves: the outcome of a suite as a function of intercepts, one number an item."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.audits import asking
from gemma_scope_jax.behaviour.audits.refusals import OPENINGS_ABOUT, refusal_odds
from gemma_scope_jax.behaviour.suites.scores import MEASURES
from gemma_scope_jax.behaviour.suites.suite import Suite, load_suite, suite_items
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.intercept import Intercept
from gemma_scope_jax.model.tokenizer import Tokenizer

Outcome = Callable[[Sequence[Intercept]], np.ndarray]


def suite_outcome(
    suite: Suite | str | os.PathLike,
    model: Model,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    sets: str | os.PathLike = "",
) -> Outcome:
    """The outcome of a suite's items under a list of intercepts, float64 [n], for `gs.mediate`: as
    the behaviour, or among its side effects.

    limit  items; default: the suite's own
    sets   where the packages of published sets are, see `rows.package_bytes`

    Raises `InputError` for a suite that cannot be used, and one whose answers are judged by
    anything but whether they refuse.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(suite)
    check_outcome(suite)
    items = suite_items(suite, limit=limit, sets=sets).items
    asked = asking.questions(items, tokenizer, suite.template, model.config.context, new_tokens=0)
    return outcome_of(suite, model, tokenizer, asked)[1]


def check_outcome(suite: Suite) -> None:
    """Raise `InputError` if the outcome of a suite is known only by judging what is written."""
    if suite.kind == "generate" and suite.judge != "refusal":
        raise InputError(
            f"{suite.name}: its answers must be written and judged; name another suite"
        )


def outcome_of(
    suite: Suite, model: Model, tokenizer: Tokenizer, asked: asking.Questions
) -> tuple[str, Outcome]:
    """The outcome in words, and the function."""
    if suite.kind == "generate":
        return OPENINGS_ABOUT, lambda some: refusal_odds(model, tokenizer, asked, some)
    measure: Any = MEASURES[suite.measure]
    return measure.about, lambda some: measure.outcome(asking.score(model, asked, some))
