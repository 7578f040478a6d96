"""Explaining features and scoring the explanations: examples, questions, answers, the file.

    corpus = open_corpus(FeatureStore("store"), tok)
    explain_features(corpus, judge, [3, 17], ("detection", "fuzzing"), folder, coder="my coder")

Every finished feature is in explanations.json within seconds, and with an endpoint or a model every
single answer is on file at once: the same call goes on where a killed one was.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

from gemma_scope_jax.cards.explain.chat_client import Stopped
from gemma_scope_jax.cards.explain.examples import Corpus, Material, gather
from gemma_scope_jax.cards.explain.prompts import lengths, messages
from gemma_scope_jax.cards.explain.questions import Judge, Question, explain_question
from gemma_scope_jax.cards.explain.scores import SCORES, short_score
from gemma_scope_jax.cards.explain.statistics import RuleJudge, token_label
from gemma_scope_jax.cards.explanations import (
    Explanation,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.errors import InputError, nearest

WRITE_EVERY = 5.0  # seconds between two versions of the file, at least
SAY_EVERY = 5.0  # seconds between two lines of progress
PLACEHOLDER = (
    "an explanation of about twenty words stands here while nobody has been asked what " * 2
)


@dataclasses.dataclass
class Report:
    """What a run did."""

    done: int = 0  # features explained or scored
    kept: int = 0  # that were finished before
    few: int = 0  # left out: too few windows on which they fire
    unexplained: int = 0  # whose explanation could not be understood
    unparsed: int = 0  # examples or questions without an answer in the form asked for


def check_scores(scores: Sequence[str]) -> None:
    for name in scores:
        if name not in SCORES:
            raise InputError(
                f"no score {name!r}{nearest(name, SCORES)}; known: {', '.join(SCORES)}"
            )


def fingerprint(corpus: Corpus) -> str:
    """Eight letters for what examples are drawn from and how, as scores of others differ."""
    about = [dataclasses.asdict(corpus.sampling), len(corpus.store), corpus.coder, corpus.layer]
    about.append(hashlib.sha256(corpus.counts.tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


def is_finished(entry: Explanation | None, judge: Judge, scores: Sequence[str], drawn: str) -> bool:
    return _is_of(entry, judge, drawn) and set(scores) <= set(entry["scores"])  # type: ignore


def _is_of(entry: Explanation | None, judge: Judge, drawn: str) -> bool:
    """Whether an explanation is this judge's, from these examples."""
    if entry is None:
        return False
    return (entry["method"], entry["model"], entry.get("drawn")) == (
        judge.method,
        judge.name,
        drawn,
    )


def explain_features(
    corpus: Corpus,
    judge: Judge,
    features: Sequence[int],
    scores: Sequence[str],
    folder: Any,
    *,
    coder: str,
    width: int | None = None,
    neighbours: Mapping[int, Sequence[int]] | None = None,
    raises: Callable[[int], Sequence[str]] = lambda _: (),
    status: Callable[[], str] = lambda: "",
) -> Report:
    """Explain and score `features`, into explanations.json in `folder` (local or gs://).

    What is there by the same judge from the same examples is kept, and only what it lacks is asked;
    entries of other features stay. neighbours: of each feature, for hard negatives. raises: the
    tokens that a feature's logits raise, named in labels from statistics. status: more to say in
    the line of progress. Raises `InputError` for unknown scores and what judge and disk refuse.
    """
    check_scores(scores)
    entries = read_explanations(folder, width)
    drawn, report = fingerprint(corpus), Report()
    todo = [f for f in features if not is_finished(entries.get(f), judge, scores, drawn)]
    report.kept = len(features) - len(todo)
    progress, saved = _Progress(len(todo), report, status), time.monotonic()
    pool = ThreadPoolExecutor(judge.parallel, thread_name_prefix="feature")
    running: dict[Future, int] = {}
    most = 1 if judge.parallel == 1 else 2 * judge.parallel
    try:
        for feature in todo:  # examples are drawn here, in one thread
            material = gather(corpus, feature, (neighbours or {}).get(feature, ()))
            if material is None:
                report.few += 1
                continue
            text, old = "", entries.get(feature)
            if isinstance(judge, RuleJudge):
                text, rule = token_label(corpus, feature, raises(feature))
                judge.learn(text, rule)
            old = old if _is_of(old, judge, drawn) else None
            job = (_explained, corpus, judge, material, scores, text, old, drawn)
            running[pool.submit(*job)] = feature
            if len(running) >= most:
                _take(running, entries, report)
            progress.show()
            if time.monotonic() - saved > WRITE_EVERY:
                write_explanations(folder, coder, entries)
                saved = time.monotonic()
        while running:
            _take(running, entries, report)
            progress.show()
    except BaseException:
        judge.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in [f for f in running if f.done() and not f.cancelled() and f.exception()]:
            del running[future]  # the first one was raised
        while running:
            _take(running, entries, report)
        if report.done:
            write_explanations(folder, coder, entries)
    progress.show(last=True)
    return report


def _take(running: dict[Future, int], entries: dict[int, Explanation], report: Report) -> None:
    """Put what is done into `entries`, after waiting for the first."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        feature = running.pop(future)
        try:
            entry = future.result()
        except (Stopped, CancelledError):
            continue
        if entry is None:
            report.unexplained += 1
            continue
        entries[feature] = entry
        report.done += 1
        report.unparsed += sum(s["unparsed"] for s in entry["scores"].values())


def _explained(
    corpus: Corpus, judge: Judge, material: Material, scores: Sequence[str], text: str,
    old: Explanation | None, drawn: str,
) -> Explanation | None:  # fmt: skip
    """One feature from examples to scores; None if the explanation could not be understood."""
    extra: dict[str, Any] = {}
    if isinstance(judge, RuleJudge):
        extra["rule"] = judge.rule(text).as_dict()
    elif old is not None:
        text = old["text"]
    else:
        (answer,) = judge.answer([explain_question(material.train)])
        if answer.values is None:
            return None
        text = answer.text
    known = {} if old is None or isinstance(judge, RuleJudge) else dict(old["scores"])
    asked = {
        name: SCORES[name][0](material, text, corpus.sampling)
        for name in scores
        if name not in known
    }
    answers = iter(judge.answer([q for questions in asked.values() for q in questions]))
    for name, questions in asked.items():
        known[name] = short_score(SCORES[name][1](questions, [next(answers) for _ in questions]))
    return {
        "text": text, "method": judge.method, "model": judge.name, "scores": known,
        "examples": len(material.train), "fired": material.fired, "drawn": drawn, **extra,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Before and meanwhile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run through an endpoint is going to take, from the questions of a few features."""

    features: int
    requests: int
    tokens_in: int
    tokens_out: int  # as answers usually are
    tokens_out_most: int  # as long as they may be
    cost: float  # dollars
    cost_most: float


def plan(
    corpus: Corpus, features: Sequence[int], scores: Sequence[str], prices: tuple[float, float],
    *, looked_at: int = 8,
) -> Plan:  # fmt: skip
    """Count what explaining `features` will ask; prices in dollars a million tokens in and out.

    Tokens are Gemma's; another tokenizer's differ by some percent. Questions asked again after an
    answer that was not understood come on top.
    """
    check_scores(scores)
    step = max(1, len(features) // looked_at)
    some = [m for f in features[::step][:looked_at] if (m := gather(corpus, f)) is not None]
    totals = [0, 0, 0, 0]
    for material in some:
        questions = [explain_question(material.train)]
        for name in scores:
            questions += SCORES[name][0](material, PLACEHOLDER, corpus.sampling)
        for q in questions:
            totals = [a + b for a, b in zip(totals, _size(corpus.tok, q))]
    looked = max(1, len(features[::step][:looked_at]))
    requests, into, usual, most = (round(t / looked * len(features)) for t in totals)
    price = lambda out: (into * prices[0] + out * prices[1]) / 1e6
    return Plan(len(features), requests, into, usual, most, price(usual), price(most))


def _size(tok: Any, question: Question) -> tuple[int, int, int, int]:
    text = "".join(m["content"] for m in messages(question))
    return (1, len(tok.encode(text)) + 10, *lengths(question))


class _Progress:
    """A line on stderr every few seconds: how far, how fast, how long still."""

    def __init__(self, total: int, report: Report, status: Callable[[], str]):
        self.total, self.report, self.status = total, report, status
        self.began = self.said = time.monotonic()

    def show(self, last: bool = False) -> None:
        now, r = time.monotonic(), self.report
        if not self.total or (now - self.said < SAY_EVERY and not last):
            return
        self.said, passed = now, r.done + r.few + r.unexplained
        rate = passed / max(now - self.began, 1e-9)
        left = (self.total - passed) / max(rate, 1e-9)
        left_text = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
        parts = [f"{passed:,} of {self.total:,} features", f"{rate:.2g}/s", f"{left_text} left"]
        parts += [f"{r.unparsed:,} not understood"] if r.unparsed else []
        print("  ".join([*parts, self.status()]).rstrip(), file=sys.stderr, flush=True)
