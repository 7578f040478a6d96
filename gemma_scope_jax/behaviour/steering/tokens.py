"""Which tokens a step of steering is for, by absolute position: in prefill and decoding alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch, refuse_text
from gemma_scope_jax.model.buckets import bucket

Where = str | tuple[int, ...] | tuple[str, ...] | slice
Mask = tuple[np.ndarray, bool]  # bool [S] by position, and what holds for all later positions


def token_masks(steps: Sequence[Sequence[tuple[Where, int]]], prompts: Any) -> list[list[Mask]]:
    """The masks of each row's steps, given as (where, first). Rows are those of `steps` or, if that
    has one and prompts are given, those of the prompts.

    Raises `InputError` if a step needs prompts and there are none, or as many as there are not.
    """
    rows = None if prompts is None else _prompts(prompts)
    if rows is not None and len(steps) == 1:
        steps = [steps[0]] * len(rows)
    if rows is not None and len(rows) != len(steps):
        raise InputError(f"steering: {len(steps)} specs for {len(rows)} prompts")
    given = rows or [None] * len(steps)
    size = bucket(max(map(_size, steps, given), default=1), 2**31)
    return [[_mask(where, first, row, size) for where, first in some]
            for some, row in zip(steps, given)]  # fmt: skip


Prompt = tuple[int, np.ndarray | None, tuple[str, ...]]  # tokens, roles [n] and their names


def _prompts(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, TokenBatch):
        places = prompts.document_slices()
        if [row for row, _ in places] != list(range(len(np.asarray(prompts.tokens)))):
            raise InputError("steering: one prompt a row, not a packed batch or empty rows")
        label = prompts.labels.get("role")
        if label is None:
            return [(at.stop - at.start, None, ()) for _, at in places]
        numbers = np.asarray(label.numbers)
        return [(at.stop - at.start, numbers[row, at], label.names) for row, at in places]
    refuse_text(prompts)
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        raise InputError("steering: prompts must be rows of ids, or gs.tokens(texts, tokenizer)")
    return [(len(row), None, ()) for row in rows]


def _size(steps: Sequence[tuple[Where, int]], prompt: Prompt | None) -> int:
    """Positions that the masks of a row must have."""
    most = 1 if prompt is None else prompt[0]
    for where, first in steps:
        ends = [first]
        if isinstance(where, slice):
            ends += [n for n in (where.start, where.stop) if n is not None]
        elif isinstance(where, tuple) and not isinstance(where[0], str):
            ends += [max(where) + 1]  # type: ignore[operator]
        most = max(most, *ends)
    return most


def _mask(where: Where, first: int, prompt: Prompt | None, size: int) -> Mask:
    at = np.arange(size)
    if isinstance(where, slice):
        stop = size if where.stop is None else where.stop
        mask, after = (at >= (where.start or 0)) & (at < stop), where.stop is None
    elif isinstance(where, tuple) and not isinstance(where[0], str):
        mask, after = np.isin(at, where), False
        if min(where) < first:  # type: ignore[operator]
            raise InputError(
                f"steering: position {min(where)} comes before the first token that may be "
                f"changed, {first}: name others, or give first=0"
            )
    elif where == "all":
        mask, after = np.ones(size, bool), True
    elif prompt is None:
        named = where if isinstance(where, str) else f"roles {', '.join(map(str, where))}"
        raise InputError(f"steering: steps for {named} need the prompts: steering(..., prompts=)")
    elif where == "generated":
        mask, after = at >= prompt[0], True
    elif isinstance(where, str):
        last = at == prompt[0] - 1
        mask, after = (last if where == "last" else at < prompt[0]), False
    else:
        length, roles, names = prompt
        if roles is None:
            raise InputError("steering: roles need a chat: prompts=gs.tokens(chats, tokenizer)")
        mask, after = np.zeros(size, bool), "model" in where
        mask[:length] = np.isin(roles, [names.index(n) for n in where if n in names])
        mask[length:] = after
    return mask & (at >= first), after
