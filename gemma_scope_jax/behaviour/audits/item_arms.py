"""The halves of an audit's items, and the two arms that each half gives.

Features are found on one half and everything said about them is measured on the other. Items of
one unit, such as all sentences about one target, are in the same half.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import Arms, arms
from gemma_scope_jax.behaviour.statistics import FEWEST
from gemma_scope_jax.behaviour.suites.items import Item
from gemma_scope_jax.behaviour.suites.suite import Suite
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Tokenizer


def halves(items: Sequence[Item], seed: int) -> np.ndarray:
    """bool [n]: the items on which features are found; a random half of the units."""
    names = [item.unit or f"item {n}" for n, item in enumerate(items)]
    units = sorted(set(names))
    order = np.random.default_rng(seed).permutation(len(units))
    first = {units[i] for i in order[: (len(units) + 1) // 2]}
    return np.array([name in first for name in names])


def arms_of(
    suite: Suite,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    *,
    shows: np.ndarray | None = None,
    name: str = "",
) -> Arms | str:
    """The arms of items, or, in words, why there are none: too few texts.

    shows  bool [n]: whether the behaviour shows in each item, for arms by outcome

    Raises `InputError` as `check_arms` does.
    """
    by = suite.arms["by"]
    if by == "text":
        sides = [(items, suite.arms[key]) for key in "ab"]
    elif by == "group":
        _check_groups(suite, items)
        sides = [([i for i in items if i.group == suite.arms[key]], "prompt") for key in "ab"]
    else:
        assert shows is not None
        both = ([i for i, yes in zip(items, shows) if yes == wanted] for wanted in (True, False))
        sides = [(some, "prompt") for some in both]
    # items without a unit are units of their own
    named = {id(item): item.unit or f"item {n}" for n, item in enumerate(items)}
    units = [[named[id(item)] for item in some] for some, _ in sides]
    if min(count := [len(set(names)) for names in units]) < FEWEST:
        what = "units" if any(item.unit for item in items) else "texts"
        return (
            f"features were not contrasted: {count[0]} and {count[1]} {what} in the arms of a half,"
            f" at least {FEWEST} are needed; raise the limit"
        )
    wrapped = [[_wrapped(suite, text) for text in _texts(suite, *side)] for side in sides]
    return arms(
        tokenizer,
        *wrapped,
        paired=bool(suite.arms.get("paired")),
        name=name or suite.name,
        units=(units[0], units[1]) if any(item.unit for item in items) else None,
    )


def check_arms(suite: Suite, items: Sequence[Item]) -> None:
    """Raise `InputError` if the items lack the texts or groups that the suite's arms name."""
    by = suite.arms["by"]
    if by == "group":
        _check_groups(suite, items)
    for name in (suite.arms["a"], suite.arms["b"]) if by == "text" else ("prompt",):
        _texts(suite, items, name)


def _texts(suite: Suite, items: Sequence[Item], name: str) -> list[str]:
    if lacking := next((item for item in items if name not in item.texts), None):
        known = ", ".join(lacking.texts) or "none"
        raise InputError(f"{suite.place}: arms: items have no text {name!r}; they have {known}")
    return [item.texts[name] for item in items]


def _check_groups(suite: Suite, items: Sequence[Item]) -> None:
    groups = {item.group for item in items}
    for key in "ab":
        if suite.arms[key] not in groups:
            known = ", ".join(sorted(groups)) or "none"
            raise InputError(
                f"{suite.place}: arms: no item of the group {suite.arms[key]!r}; groups are {known}"
            )


def _wrapped(suite: Suite, text: str) -> Any:
    return [{"role": "user", "content": text}] if suite.template == "chat" else text
