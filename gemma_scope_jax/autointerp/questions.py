"""The interface of all judges: questions about a feature, and answers.

A judge is a chat endpoint, a local Gemma or a rule. Questions carry the truth for scoring; judges
ignore it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from gemma_scope_jax.autointerp.examples import Window

MARKED = 0.3  # of the window's largest activation: tokens from this share on are marked (delphi)
UNCLEAR = "not understood"  # why a question has no answer, if nothing else is known

Task = Literal["explain", "classify", "select", "intruder", "simulate"]


@dataclasses.dataclass(frozen=True, eq=False)
class ShownText:
    """A text as a judge sees it."""

    tokens: tuple[str, ...]
    marks: tuple[bool, ...] = ()  # empty, or one per token
    strengths: tuple[int, ...] = ()  # for explaining: 0 to 10, one per token

    def text(self) -> str:
        """One line: << >> around stretches of marked tokens, ↵ for line breaks."""
        parts, inside = [], False
        for token, mark in zip(self.tokens, self.marks or (False,) * len(self.tokens)):
            if mark != inside:
                parts.append("<<" if mark else ">>")
                inside = mark
            parts.append(token)
        return "".join([*parts, ">>" * inside]).translate(LINE_ENDS)


LINE_ENDS = str.maketrans({"\n": "↵", "\r": "↵", "\u2028": "↵", "\u2029": "↵", "\x85": "↵"})


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One request to a judge.

    explain   what do the marked tokens of `examples` have in common? -> a text
    classify  for each example: is the feature active in the text, or where it is marked? -> 0 or 1
    select    the same in SAEBench's form: on which of these is it active? -> 0 or 1 each
    intruder  on which example does the feature not fire? -> its index
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
    """What a judge said. Without an answer, `values` is None, `why` one of a few reasons and `text`
    the words. confidence: how surely the feature is active in each example, larger for surer."""

    text: str = ""
    values: tuple[float, ...] | None = None
    confidence: tuple[float, ...] | None = None
    why: str = ""


class Judge(Protocol):
    """What answers questions, `parallel` features at once; entries hold its `method` and `name`."""

    name: str
    method: str
    parallel: int

    def answer(self, questions: Sequence[Question]) -> list[Answer]: ...

    def close(self) -> None: ...


def marks_of(values: np.ndarray) -> tuple[bool, ...]:
    """Whether each token has at least `MARKED` times the largest activation of the window."""
    peak = float(values.max(initial=0.0))
    return tuple(peak > 0 and v >= MARKED * peak for v in values.tolist())


def random_marks(example: Window, count: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """Marks on `count` random tokens; in a hard negative on those where the neighbour fires."""
    if example.other is not None:
        return marks_of(example.other)
    n = len(example.tokens)
    chosen = set(rng.choice(n, min(count, n), replace=False).tolist())
    return tuple(i in chosen for i in range(n))


def explain_question(train: Sequence[Window]) -> Question:
    """Ask what the marked tokens have in common. Strengths are in tenths of the largest."""
    top = max((e.peak for e in train), default=0.0) or 1.0
    shown = tuple(
        ShownText(e.tokens, marks_of(e.values), tuple(int(10 * v / top) for v in e.values.tolist()))
        for e in train
    )
    return Question("explain", shown)
