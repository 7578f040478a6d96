"""Explains features and scores the explanations: examples, questions, answers, the file.

    corpus = open_corpus(FeatureStore("store"), tokenizer)
    explain_features(corpus, judge, [3, 17], ("detection", "fuzzing"), folder, coder="my coder")

Every finished feature is in explanations.json within seconds. The answers of an endpoint and the
explanations of a local model are on disk at once, so the same call resumes where a killed one
stopped.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait

from gemma_scope_jax.autointerp.examples import Corpus, Material, gather
from gemma_scope_jax.autointerp.explanations import (
    Explanation,
    is_number,
    read_explanations,
    write_explanations,
)
from gemma_scope_jax.autointerp.judges.chat_client import Stopped
from gemma_scope_jax.autointerp.judges.endpoint_judge import EndpointJudge
from gemma_scope_jax.autointerp.judges.statistics import RuleJudge, token_label
from gemma_scope_jax.autointerp.prompts import lengths, messages
from gemma_scope_jax.autointerp.questions import UNCLEAR, Answer, Judge, explain_question
from gemma_scope_jax.autointerp.scores import SCORES
from gemma_scope_jax.errors import InputError, nearest, shown
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.paths import folder_path

WRITE_EVERY = 5.0  # seconds between two versions of the file, at least
SAY_EVERY = 5.0  # seconds between two lines of progress
SIZED = 8  # features from whose questions a run is estimated
PLACEHOLDER = (
    "an explanation of about twenty words stands here while nobody has been asked what " * 2
)


@dataclasses.dataclass
class ExplainReport:
    """What a run did."""

    done: int = 0  # features explained or scored
    kept: int = 0  # features finished before
    few: int = 0  # features not scored, as they fire in too few windows
    unexplained: int = 0  # features for which no question has an answer
    unparsed: int = 0  # examples or questions without an answer in the requested form
    # questions without an answer, by reason: how many, and the words of the first
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
    """Raise `InputError` for a name that is not in `SCORES`."""
    for name in (name for name in scores if name not in SCORES):
        raise InputError(f"no score {name!r}{nearest(name, SCORES)}; known: {', '.join(SCORES)}")


def fingerprint(corpus: Corpus) -> str:
    """Eight characters that identify how examples are drawn and from what: scores depend on it."""
    sampling = dataclasses.asdict(corpus.sampling)
    if not sampling["hard"]:
        sampling["neighbours"] = None  # they are not used
    # files written before `non_activating` had its name must still match
    sampling = {"silent" if k == "non_activating" else k: v for k, v in sampling.items()}
    about = [sampling, len(corpus.store), corpus.coder, corpus.layer]
    about.append(hashlib.sha256(corpus.counts.tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


def explain_features(
    corpus: Corpus,
    judge: Judge,
    features: Sequence[int],
    scores: Sequence[str],
    folder: str | os.PathLike,
    *,
    coder: str,
    width: int | None = None,
    neighbours: Mapping[int, Sequence[int]] | None = None,
    raises: Callable[[int], Sequence[str]] = lambda _: (),
    status: Callable[[], str] = lambda: "",
) -> ExplainReport:
    """Explain and score `features`, into explanations.json in `folder` (local or gs://).

    Entries by the same judge from the same examples are kept, and only what they lack is asked for.
    Entries of other features stay. Labels from statistics replace only labels from statistics.

    neighbours  the features whose windows are a feature's hard negatives
    raises      the tokens whose logits a feature raises, listed in labels from statistics
    status      more text for the line of progress
    Raises `InputError` for unknown scores, and for errors of the judge and the disk, once what is
    finished has been written.
    """
    check_scores(scores)
    with only_writer(folder_path(folder)):
        entries = read_explanations(folder, width)
        run = _ExplainRun(corpus, judge, tuple(scores), folder, coder, entries)
        todo = unfinished(corpus, judge.method, judge.name, features, scores, entries)
        run.report.kept = len(features) - len(todo)
        if isinstance(judge, EndpointJudge):  # one that never answered is soon given up
            ours = (judge.method, judge.name)
            known = any((e["method"], e["model"]) == ours for e in entries.values())
            judge.client.answered |= known
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
            judge.close()  # answers to requests already sent are still received
            raise
        finally:
            run.finish()
        return run.report


def is_by(entry: Explanation, method: str, name: str, drawn: str) -> bool:
    """Whether an entry is by this judge (`method`, `name`), from examples of a `fingerprint`."""
    return (entry["method"], entry["model"], entry.get("drawn")) == (method, name, drawn)


def unfinished(
    corpus: Corpus,
    method: str,
    name: str,
    features: Sequence[int],
    scores: Sequence[str],
    entries: Mapping[int, Explanation],
) -> list[int]:
    """The `features` that a judge (its `method` and `name`) has yet to explain or score."""
    drawn, todo = fingerprint(corpus), []
    for f in features:
        entry = entries.get(f)
        if entry and method == "statistics" and entry["method"] != "statistics":
            continue
        is_ours = entry and is_by(entry, method, name, drawn)
        if not entry or not is_ours or not set(scores) <= set(entry["scores"]):
            todo.append(f)
    return todo


@dataclasses.dataclass
class _ExplainRun:
    """The features in progress, and the file."""

    corpus: Corpus
    judge: Judge
    scores: tuple[str, ...]
    folder: str | os.PathLike
    coder: str
    entries: dict[int, Explanation]

    def __post_init__(self):
        self.drawn, self.report = fingerprint(self.corpus), ExplainReport()
        self.pool = ThreadPoolExecutor(self.judge.parallel, thread_name_prefix="feature")
        self.running: dict[Future, int] = {}
        self.saved, self.changed = time.monotonic(), False

    def start(self, feature: int, neighbours: Sequence[int], raises: Callable) -> None:
        """Draw the examples of a feature in this thread, and have another thread explain it."""
        material = gather(self.corpus, feature, neighbours)
        if material is None:
            self.report.few += 1
        if isinstance(self.judge, RuleJudge):
            text, rule = token_label(self.corpus, feature, raises(feature))
            entry = self.entry(text, material) | {"rule": rule.as_dict()}
            self.judge.learn(text, rule)
            if material is None and rule.tokens:  # a label needs fewer examples than its scores
                self.keep(feature, entry)
        else:
            entry = self.entries.get(feature)
            if entry and not is_by(entry, self.judge.method, self.judge.name, self.drawn):
                entry = None
        if material is not None:
            self.running[self.pool.submit(self.explained, material, entry)] = feature

    def explained(
        self, material: Material, entry: Explanation | None
    ) -> tuple[Explanation | None, list[Answer]]:
        """The new entry, None if nothing was learnt, and the answers without values. A score is
        left out if none of its questions has an answer: the next run asks again."""
        is_new = entry is None
        if entry is None:
            (answer,) = self.judge.answer([explain_question(material.train)])
            if answer.values is None:
                return None, [answer]
            entry = self.entry(answer.text, material)
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
                score = SCORES[name][1](questions, said)
                rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in score.items()}
                known[name] = rounded
        if not is_new and len(known) == len(entry["scores"]):
            return None, lost
        return {**entry, "scores": known}, lost

    def entry(self, text: str, material: Material | None) -> Explanation:
        return {
            "text": text,
            "method": self.judge.method,
            "model": self.judge.name,
            "scores": {},
            "examples": len(material.train) if material else 0,
            "drawn": self.drawn,
        }

    def keep(self, feature: int, entry: Explanation) -> None:
        self.entries[feature], self.changed = entry, True
        self.report.done += 1
        counts = (score.get("unparsed") for score in entry["scores"].values())
        self.report.unparsed += sum(int(n) for n in counts if is_number(n))

    def take(self, room: int) -> None:
        """Keep what is done; wait until fewer than `room` features are in progress."""
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
        """Report progress, once a feature is finished."""
        lost = sum(count for count, _ in self.report.lost.values())
        parts = [f"{lost:,} questions without an answer"] if lost else []
        if passed := started - len(self.running):
            progress.at(passed, "".join(f"  {part}" for part in [*parts, status()] if part))

    def write(self, every: float = 0.0) -> None:
        """Write the file, if something changed and the last version is `every` seconds old."""
        if self.changed and time.monotonic() - self.saved >= every:
            write_explanations(self.folder, self.coder, self.entries)
            self.saved, self.changed = time.monotonic(), False

    def finish(self) -> None:
        """Keep and write what is finished, also after an error."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for future, feature in self.running.items():
            if future.cancelled() or future.exception() is not None:
                continue
            if (entry := future.result()[0]) is not None:
                self.keep(feature, entry)
        self.running.clear()
        self.write()


@dataclasses.dataclass(frozen=True)
class JudgeEstimate:
    """What a run through an endpoint will take, estimated from the questions of a few features; as
    text, a few lines."""

    features: int
    requests: int
    tokens_in: int
    tokens_out: int  # with answers of the usual length
    tokens_out_most: int  # with the longest answers allowed
    cost: float  # dollars
    cost_most: float

    def __str__(self) -> str:
        cost = f"${self.cost:.2f} to ${self.cost_most:.2f}"
        if self.requests and not self.cost_most:
            cost = "no prices are given"
        out = f"{self.tokens_out:,} to {self.tokens_out_most:,}"
        return (
            f"{self.features:,} features, at most {self.requests:,} requests; answers on file are "
            f"not asked for again\ntokens in {self.tokens_in:,}, out {out}: {cost}"
        )


def plan(
    corpus: Corpus, features: Sequence[int], scores: Sequence[str], prices: tuple[float, float]
) -> JudgeEstimate:
    """Estimate what explaining `features` will ask; prices in dollars per million tokens in, out.
    Tokens are Gemma's; another tokenizer's differ by some percent. Questions asked again because
    the answer was not understood are not included."""
    check_scores(scores)
    some = features[:: max(1, len(features) // SIZED)][:SIZED]
    totals = [0, 0, 0, 0]
    for material in filter(None, (gather(corpus, f) for f in some)):
        questions = [explain_question(material.train)]
        for name in scores:
            questions += SCORES[name][0](material, PLACEHOLDER, corpus.sampling)
        for q in questions:
            text = "".join(m["content"] for m in messages(q))
            size = (1, len(corpus.tokenizer.encode(text)) + 10, *lengths(q))
            totals = [a + b for a, b in zip(totals, size)]
    requests, into, usual, most = (round(t / max(1, len(some)) * len(features)) for t in totals)
    price = lambda out: (into * prices[0] + out * prices[1]) / 1e6
    return JudgeEstimate(len(features), requests, into, usual, most, price(usual), price(most))
