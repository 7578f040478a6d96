"""What a judge is asked about a feature, and what it says: the one interface of all judges.

A judge (a chat endpoint, a Gemma on this machine, a rule) has a `name`, a `method`, says how many
features to work on at once (`parallel`), and answers questions:

    judge.answer(questions: Sequence[Question]) -> list[Answer]

The truth goes with a question for the one who scores the answer; no judge looks at it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from gemma_scope_jax.autointerp.examples import Window

MARKED = (
    0.3  # tokens with at least this share of the window's largest activation are marked (delphi)
)

UNCLEAR = "not understood"  # why a question has no answer, if nothing else is known

Task = Literal["explain", "classify", "select", "intruder", "simulate"]


@dataclasses.dataclass(frozen=True, eq=False)
class ShownText:
    """A text as a judge sees it."""

    tokens: tuple[str, ...]
    marks: tuple[bool, ...] = ()  # none, or one a token
    strengths: tuple[int, ...] = ()  # for explaining: 0 to 10, one a token

    def text(self) -> str:
        """One line; stretches of marked tokens stand in << >>, line breaks show as a sign."""
        parts, inside = [], False
        for token, mark in zip(self.tokens, self.marks or (False,) * len(self.tokens)):
            if mark != inside:
                parts.append("<<" if mark else ">>")
                inside = mark
            parts.append(token)
        return "".join([*parts, ">>" * inside]).translate(LINE_ENDS)

    @property
    def marked(self) -> tuple[str, ...]:
        return tuple(t for t, m in zip(self.tokens, self.marks) if m)


LINE_ENDS = str.maketrans({"\n": "↵", "\r": "↵", "\u2028": "↵", "\u2029": "↵", "\x85": "↵"})


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One request to a judge.

    explain   what do the marked tokens of `examples` have in common? -> a text
    classify  for each example: is the feature active (somewhere in the text, or where it is
              marked)? -> 0 or 1 each
    select    the same in SAEBench's form: which of these? -> 0 or 1 each
    intruder  where is the feature silent? -> the index of one example
    simulate  how active is the feature on each token of the one example? -> 0 to 10 each
    """

    task: Task
    examples: tuple[ShownText, ...]
    explanation: str = ""
    truth: tuple[float, ...] = ()

    @property
    def expected(self) -> int:
        """How many values an answer has."""
        if self.task == "simulate":
            return len(self.examples[0].tokens)
        return {"explain": 0, "intruder": 1}.get(self.task, len(self.examples))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a judge said. values: None if there is no answer, and `why` then says the reason, one
    of few, and `text` the words; `confidence` where there is one: of each example, the larger the
    more it is thought active."""

    text: str = ""
    values: tuple[float, ...] | None = None
    confidence: tuple[float, ...] | None = None
    why: str = ""


class Judge(Protocol):
    name: str
    method: str
    parallel: int

    @property
    def answered(self) -> bool:
        """Whether it ever has: an endpoint that never has is given up soon."""
        ...

    @answered.setter
    def answered(self, value: bool) -> None: ...

    def answer(self, questions: Sequence[Question]) -> list[Answer]: ...

    def close(self) -> None: ...


def marks_of(values: np.ndarray) -> tuple[bool, ...]:
    """The tokens of a window that stand for the feature: `MARKED` of the largest activation."""
    peak = float(values.max(initial=0.0))
    return tuple(peak > 0 and v >= MARKED * peak for v in values.tolist())


def random_marks(example: Window, count: int, rng: Any) -> tuple[bool, ...]:
    """`count` tokens at random; of a hard negative those on which its neighbour fires."""
    if example.other is not None:
        return marks_of(example.other)
    n = len(example.tokens)
    chosen = set(rng.choice(n, min(count, n), replace=False).tolist())
    return tuple(i in chosen for i in range(n))


def explain_question(train: Sequence[Window]) -> Question:
    """Ask what the marked tokens have in common; strengths are tenths of the largest activation."""
    top = max((e.peak for e in train), default=0.0) or 1.0
    shown = tuple(
        ShownText(e.tokens, marks_of(e.values), tuple(int(10 * v / top) for v in e.values.tolist()))
        for e in train
    )
    return Question("explain", shown)
