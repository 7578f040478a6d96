"""Explaining features and scoring the explanations: examples, questions, answers, the file.

    corpus = open_corpus(FeatureStore("store"), tokenizer)
    explain_features(corpus, judge, [3, 17], ("detection", "fuzzing"), folder, coder="my coder")

Every finished feature is in explanations.json within seconds. An endpoint's answers are on file at
once, and so are the explanations of a model on this machine, which scores without writing: the same
call goes on where a killed one was.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

from gemma_scope_jax.autointerp.examples import Corpus, Material, gather
from gemma_scope_jax.autointerp.explanations import (
    Explanation,
    is_number,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.autointerp.judges.chat_client import Stopped
from gemma_scope_jax.autointerp.judges.statistics import RuleJudge, token_label
from gemma_scope_jax.autointerp.prompts import lengths, messages
from gemma_scope_jax.autointerp.questions import UNCLEAR, Answer, Judge, Question, explain_question
from gemma_scope_jax.autointerp.scores import SCORES, short_score
from gemma_scope_jax.errors import InputError, nearest, shown
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.paths import folder_path

WRITE_EVERY = 5.0  # seconds between two versions of the file, at least
SAY_EVERY = 5.0  # seconds between two lines of progress
PLACEHOLDER = (
    "an explanation of about twenty words stands here while nobody has been asked what " * 2
)


@dataclasses.dataclass
class ExplainReport:
    """What a run did."""

    done: int = 0  # features explained or scored
    kept: int = 0  # that were finished before
    few: int = 0  # not scored: too few windows on which they fire
    unexplained: int = 0  # of which nothing that was asked has an answer
    unparsed: int = 0  # examples or questions without an answer in the form asked for
    # questions without an answer: why, and of each how many and what was said of the first
    lost: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def lose(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            why = answer.why or UNCLEAR
            count, words = self.lost.get(why, (0, answer.text))
            self.lost[why] = count + 1, words

    @property
    def losses(self) -> str:
        """How many questions have no answer and why, in one line; "" if all have one."""
        parts = [
            f"{count:,} {why}" + f" ({shown(' '.join(words.split()))[:200]})" * bool(words)
            for why, (count, words) in self.lost.items()
        ]
        return ", ".join(parts)


def check_scores(scores: Sequence[str]) -> None:
    """Raise `InputError` for a name that is no score of `SCORES`, naming the nearest."""
    for name in scores:
        if name not in SCORES:
            raise InputError(
                f"no score {name!r}{nearest(name, SCORES)}; known: {', '.join(SCORES)}"
            )


def fingerprint(corpus: Corpus) -> str:
    """Eight letters for what examples are drawn from and how, as scores of others differ."""
    sampling = dataclasses.asdict(corpus.sampling)
    if not sampling["hard"]:
        sampling["neighbours"] = None  # which are not looked at
    about = [sampling, len(corpus.store), corpus.coder, corpus.layer]
    about.append(hashlib.sha256(corpus.counts.tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


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
) -> ExplainReport:
    """Explain and score `features`, into explanations.json in `folder` (local or gs://).

    What is there by the same judge from the same examples is kept, and only what it lacks is asked;
    entries of other features stay, and labels from statistics replace nothing but their own kind.
    neighbours: of each feature, for hard negatives. raises: the tokens whose logits a feature
    raises, named in labels from statistics. status: more to say in the line of progress. Raises
    `InputError` for unknown scores and what judge and disk refuse; what is done by then is written.
    """
    check_scores(scores)
    with only_writer(folder_path(folder)):
        entries = read_explanations(folder, width)
        run = _ExplainRun(corpus, judge, tuple(scores), folder, coder, entries)
        todo = unfinished(corpus, judge.method, judge.name, features, scores, entries)
        run.report.kept = len(features) - len(todo)
        ours = (judge.method, judge.name)
        judge.answered |= any((e["method"], e["model"]) == ours for e in entries.values())
        progress = Progress(len(todo), "features", every=SAY_EVERY)
        try:
            for number, feature in enumerate(todo, 1):
                run.start(feature, (neighbours or {}).get(feature, ()), raises)
                run.take(2 * judge.parallel if judge.parallel > 1 else 1)
                run.say(progress, number, status)
                run.write(every=WRITE_EVERY)
            while run.running:
                run.take(len(run.running))
                run.say(progress, len(todo), status)
        except BaseException:
            judge.close()  # answers under way are still received
            raise
        finally:
            run.finish()
        return run.report


def explained_by(
    corpus: Corpus,
    method: str,
    model: str,
    features: Sequence[int],
    entries: Mapping[int, Explanation],
) -> list[Explanation]:
    """The entries of `features` that are a judge's (`method` and `name`) from these examples."""
    drawn = fingerprint(corpus)
    some = (entries[f] for f in dict.fromkeys(features) if f in entries)
    return [entry for entry in some if _is_of(entry, method, model, drawn)]


def unfinished(
    corpus: Corpus,
    method: str,
    model: str,
    features: Sequence[int],
    scores: Sequence[str],
    entries: Mapping[int, Explanation],
) -> list[int]:
    """Those of `features` that a judge (its `method` and `name`) has yet to explain or score."""
    drawn = fingerprint(corpus)

    def is_finished(entry: Explanation | None) -> bool:
        if entry is None:
            return False
        if method == "statistics" and entry["method"] != "statistics":
            return True
        return _is_of(entry, method, model, drawn) and set(scores) <= set(entry["scores"])

    return [f for f in features if not is_finished(entries.get(f))]


def _is_of(entry: Explanation, method: str, model: str, drawn: str) -> bool:
    """Whether an explanation is this judge's, from these examples."""
    return (entry["method"], entry["model"], entry.get("drawn")) == (method, model, drawn)


@dataclasses.dataclass
class _ExplainRun:
    """Features being worked on, and the file."""

    corpus: Corpus
    judge: Judge
    scores: tuple[str, ...]
    folder: Any
    coder: str
    entries: dict[int, Explanation]

    def __post_init__(self):
        self.drawn, self.report = fingerprint(self.corpus), ExplainReport()
        self.pool = ThreadPoolExecutor(self.judge.parallel, thread_name_prefix="feature")
        self.running: dict[Future, int] = {}
        self.saved, self.changed = time.monotonic(), False

    def start(self, feature: int, neighbours: Sequence[int], raises: Callable) -> None:
        """Draw the examples of a feature, here, in one thread, and hand it to another."""
        material = gather(self.corpus, feature, neighbours)
        if material is None:
            self.report.few += 1
        if isinstance(self.judge, RuleJudge):
            text, rule = token_label(self.corpus, feature, raises(feature))
            entry = self.entry(text, material, {})
            entry["rule"] = rule.as_dict()
            self.judge.learn(text, rule)
            if material is None and rule.tokens:  # a label needs fewer examples than its scores
                self.keep(feature, entry)
        else:
            entry = self.entries.get(feature)
            if entry and not _is_of(entry, self.judge.method, self.judge.name, self.drawn):
                entry = None
        if material is not None:
            self.running[self.pool.submit(self.explained, material, entry)] = feature

    def explained(
        self, material: Material, entry: Explanation | None
    ) -> tuple[Explanation | None, list[Answer]]:
        """From examples to scores, and the answers that are none. A score none of whose questions
        has an answer is left out, to be asked for again; None if nothing was learnt."""
        is_new = entry is None
        if entry is None:
            (answer,) = self.judge.answer([explain_question(material.train)])
            if answer.values is None:
                return None, [answer]
            entry = self.entry(answer.text, material, {})
        missing = [name for name in self.scores if name not in entry["scores"]]
        sampling = self.corpus.sampling
        asked = [SCORES[name][0](material, entry["text"], sampling) for name in missing]
        answers = iter(self.judge.answer([q for questions in asked for q in questions]))
        known, lost = dict(entry["scores"]), []
        for name, questions in zip(missing, asked):
            said = [next(answers) for _ in questions]
            none = [answer for answer in said if answer.values is None]
            lost += none
            if not questions or len(none) < len(said):
                known[name] = short_score(SCORES[name][1](questions, said))
        if not is_new and len(known) == len(entry["scores"]):
            return None, lost
        return {**entry, "scores": known}, lost

    def entry(self, text: str, material: Material | None, scores: Mapping) -> Explanation:
        return {
            "text": text,
            "method": self.judge.method,
            "model": self.judge.name,
            "scores": scores,
            "examples": len(material.train) if material else 0,
            "drawn": self.drawn,
        }

    def keep(self, feature: int, entry: Explanation) -> None:
        self.entries[feature], self.changed = entry, True
        self.report.done += 1
        counts = (score.get("unparsed") for score in entry["scores"].values())
        self.report.unparsed += sum(int(n) for n in counts if is_number(n))

    def take(self, room: int) -> None:
        """Keep what is done; wait until fewer than `room` features are being worked on."""
        while len(self.running) >= room:
            done, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in done:
                feature = self.running.pop(future)
                try:
                    entry, lost = future.result()
                except (Stopped, CancelledError):
                    continue
                self.report.lose(lost)
                if entry is None:
                    self.report.unexplained += 1
                else:
                    self.keep(feature, entry)

    def say(self, progress: Progress, started: int, status: Callable[[], str]) -> None:
        """How far it is, once a feature is through."""
        lost = sum(count for count, _ in self.report.lost.values())
        parts = [f"{lost:,} questions without an answer"] if lost else []
        if passed := started - len(self.running):
            progress.at(passed, "".join(f"  {part}" for part in [*parts, status()] if part))

    def write(self, every: float = 0.0) -> None:
        """The file anew, if something changed and it is some seconds old."""
        if self.changed and time.monotonic() - self.saved >= every:
            write_explanations(self.folder, self.coder, self.entries)
            self.saved, self.changed = time.monotonic(), False

    def finish(self) -> None:
        """Keep what got done meanwhile, whatever happened, and write it."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for future, feature in self.running.items():
            if future.cancelled() or future.exception() is not None:
                continue
            if (entry := future.result()[0]) is not None:
                self.keep(feature, entry)
        self.running.clear()
        self.write()


# -------------------------------------------------------------------------------------------------
# Before and meanwhile


@dataclasses.dataclass(frozen=True)
class JudgeEstimate:
    """What a run through an endpoint is going to take, from the questions of a few features."""

    features: int
    requests: int
    tokens_in: int
    tokens_out: int  # as answers usually are
    tokens_out_most: int  # as long as they may be
    cost: float  # dollars
    cost_most: float


def plan(
    corpus: Corpus,
    features: Sequence[int],
    scores: Sequence[str],
    prices: tuple[float, float],
    *,
    looked_at: int = 8,
) -> JudgeEstimate:
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
            totals = [a + b for a, b in zip(totals, _size(corpus.tokenizer, q))]
    looked = max(1, len(features[::step][:looked_at]))
    requests, into, usual, most = (round(t / looked * len(features)) for t in totals)
    price = lambda out: (into * prices[0] + out * prices[1]) / 1e6
    return JudgeEstimate(len(features), requests, into, usual, most, price(usual), price(most))


def _size(tokenizer: Tokenizer, question: Question) -> tuple[int, int, int, int]:
    text = "".join(m["content"] for m in messages(question))
    return (1, len(tokenizer.encode(text)) + 10, *lengths(question))
