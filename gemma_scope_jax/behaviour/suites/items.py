"""An item of a suite, and what of it a model is asked: (prompt, continuation) as token ids."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gemma_scope_jax.data.chats import chat_prompt
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Tokenizer

Template = Literal["plain", "chat"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    prompts  what the model reads, one for each variant of the suite; "" is `<bos>` alone
    choices  what may follow, in the order that the measure expects; () if the model writes
    answer   index of the right choice; -1 if there is none
    group    what figures are given by, such as the kind of bias
    unit     items of one unit (a target, a template) are drawn together for intervals
    texts    named texts, of which the arms of a contrast are made
    facts    what a measure needs beside these
    """

    prompts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    answer: int = -1
    group: str = ""
    unit: str = ""
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {**dataclasses.asdict(self), "texts": dict(self.texts), "facts": dict(self.facts)}


Pair = tuple[np.ndarray, np.ndarray]  # prompt and continuation, int32 [n] and [m]


def requests(item: Item, tokenizer: Tokenizer, template: Template) -> list[Pair]:
    """The (prompt, continuation) of each variant and choice, choices of a variant together.

    In the plain template a choice follows its prompt after a space and the two are encoded as one
    text, as they would be read; where the prompt's last token is then another one, it is part of
    the continuation. In a chat, the choice begins the model's turn.
    """
    return [asked(p, c, tokenizer, template) for p in item.prompts for c in item.choices]


def asked(prompt: str, choice: str, tokenizer: Tokenizer, template: Template) -> Pair:
    """One prompt and what follows it."""
    head = prompt_ids(prompt, tokenizer, template)
    if template == "chat":
        return head, tokenizer.encode(choice, bos=False)
    spaced = choice if not prompt or prompt[-1].isspace() else f" {choice}"
    whole = tokenizer.encode(prompt + spaced)
    same = head[: len(whole)] == whole[: len(head)]
    kept = len(head) if len(same) == len(head) and same.all() else int(np.argmin(same))
    kept = max(1, min(kept, len(whole) - 1))
    return whole[:kept], whole[kept:]


def prompt_ids(prompt: str, tokenizer: Tokenizer, template: Template) -> np.ndarray:
    """What the model reads before it answers, int32 [n]."""
    if template == "chat":
        return chat_prompt(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def drawn(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` items, at random but in order; items of a group keep their share."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise InputError(f"limit is {limit}: at least 1 item")
    order = np.random.default_rng(seed).permutation(len(items))
    by_group: dict[str, list[int]] = {}
    for i in order.tolist():
        by_group.setdefault(items[i].group, []).append(i)
    # place each group's items evenly on a line, and take those placed first
    placed = [
        ((rank + 0.5) / len(some), i) for some in by_group.values() for rank, i in enumerate(some)
    ]
    return [items[i] for i in sorted(i for _, i in sorted(placed)[:limit])]
