"""Asks a model the items of a suite, and keeps what it answered chunk by chunk.

A chunk is a fixed run of items, so that a killed audit measures the rest in the same batches, and
ends with the same numbers, as one that was not.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.autointerp.answers import AnswerFile, request_key
from gemma_scope_jax.behaviour.measure import continuation_logprobs, generated
from gemma_scope_jax.behaviour.suites.items import Item, Pair, Template, prompt_ids, requests
from gemma_scope_jax.behaviour.suites.scores import Scored
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.intercept import Intercept
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Report
from gemma_scope_jax.storage.manifest import digest

SCORED, WRITTEN = 64, 16  # items of a chunk whose choices are scored, whose answers are written


@dataclasses.dataclass(frozen=True)
class Questions:
    """Items with their token ids.

    pairs      of each item V * K (prompt, continuation), choices of a variant together; for suites
               whose answers are written, V prompts with an empty continuation
    left_out   how many items are longer than the model's context
    """

    items: tuple[Item, ...]
    pairs: tuple[tuple[Pair, ...], ...]
    left_out: int

    def some(self, kept: Sequence[int] | np.ndarray) -> "Questions":
        """The items of these numbers."""
        chosen = [int(i) for i in kept]
        items = tuple(self.items[i] for i in chosen)
        return Questions(items, tuple(self.pairs[i] for i in chosen), self.left_out)

    def identity(self) -> str:
        """A digest of all ids, hence of items, template and tokenizer."""
        ids = [[p.tolist(), c.tolist()] for pairs in self.pairs for p, c in pairs]
        return digest(ids)


def questions(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    template: Template,
    context: int,
    *,
    new_tokens: int = 0,
) -> Questions:
    """Items as token ids, without those that leave the model's context of `context` tokens no room
    for `new_tokens`. Raises `InputError` if none fits."""
    kept, pairs = [], []
    for item in items:
        if item.choices:
            asked = requests(item, tokenizer, template)
        else:
            none = np.zeros(0, np.int32)
            asked = [(prompt_ids(p, tokenizer, template), none) for p in item.prompts]
        if max(len(p) + len(c) for p, c in asked) + new_tokens <= context:
            kept.append(item)
            pairs.append(tuple(asked))
    if not kept:
        raise InputError(f"no item fits into the model's context of {context} tokens")
    return Questions(tuple(kept), tuple(pairs), len(items) - len(kept))


def score(
    model: Model,
    asked: Questions,
    intercepts: Intercept | Sequence = (),
    *,
    kept: AnswerFile | None = None,
    report: Report | None = None,
) -> Scored:
    """The log-probability of each choice of each item. kept: the file of finished chunks, for a
    run without intercepts."""
    n, V = len(asked.items), max(len(item.prompts) for item in asked.items)
    K = max(len(item.choices) for item in asked.items)
    logp, counts = np.full((n, V, K), np.nan), np.zeros((n, V, K), int)
    for start in range(0, n, SCORED):
        rows = range(start, min(start + SCORED, n))
        places = [
            (i, v, k)
            for i in rows
            for v in range(len(asked.items[i].prompts))
            for k in range(len(asked.items[i].choices))
        ]
        pairs = [pair for i in rows for pair in asked.pairs[i]]
        values = _kept_or(
            kept,
            ["scores", start, _ids(pairs)],
            lambda pairs=pairs: _scores(model, pairs, intercepts),
        )
        for place, value, (_, tail) in zip(places, values, pairs):
            logp[place], counts[place] = value, len(tail)
        if report is not None:
            report(rows[-1] + 1, n)
    return Scored(asked.items, logp, counts)


def _scores(model: Model, pairs: Sequence[Pair], intercepts: Any) -> list[float]:
    heads, tails = zip(*pairs)
    return continuation_logprobs(model, heads, tails, intercepts)[0].tolist()


def answer(
    model: Model,
    tokenizer: Tokenizer,
    asked: Questions,
    new_tokens: int,
    intercepts: Intercept | Sequence = (),
    *,
    kept: AnswerFile | None = None,
    report: Report | None = None,
) -> list[list[str]]:
    """The model's greedy answer to each prompt of each item; `kept` as in `score`."""
    found: list[list[str]] = []
    n = len(asked.items)
    for start in range(0, n, WRITTEN):
        rows = range(start, min(start + WRITTEN, n))
        pairs = [pair for i in rows for pair in asked.pairs[i]]
        prompts = [head for head, _ in pairs]
        texts = _kept_or(
            kept,
            ["answers", start, new_tokens, _ids(pairs)],
            lambda prompts=prompts: generated(
                model, tokenizer, prompts, new_tokens, intercepts, rows=WRITTEN
            ),
        )
        texts = iter(texts)
        found += [[next(texts) for _ in asked.items[i].prompts] for i in rows]
        if report is not None:
            report(rows[-1] + 1, n)
    return found


def _ids(pairs: Sequence[Pair]) -> list[list[list[int]]]:
    return [[p.tolist(), c.tolist()] for p, c in pairs]


def _kept_or(kept: AnswerFile | None, request: list[Any], make: Any) -> list[Any]:
    """What a chunk gave before, or `make()`."""
    if kept is None:
        return make()
    key = request_key(request)
    found = kept.get(key)
    if not isinstance(found, list):
        found = make()
        kept.put(key, found)
    return found
