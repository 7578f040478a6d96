"""Explains the features of a coder from its feature store, end to end.

    job = open_explanation_job(FeatureStore("store"), coder, tokenizer, sample=50, thorough=True)
    judge = open_judge(Endpoint(url, model, key), job.answer_file())
    report = job.run(judge)

Opening the job checks its input before a model is loaded or a request is sent.
"""

import dataclasses
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.autointerp import explain
from gemma_scope_jax.autointerp.answers import AnswerFile
from gemma_scope_jax.autointerp.examples import Corpus, Sampling, open_corpus
from gemma_scope_jax.autointerp.explanations import (
    SCORE_FIGURES,
    Explanation,
    explained_folder,
    is_number,
    layer_folder,
    read_explanations,
)
from gemma_scope_jax.autointerp.judges.chat_client import ChatClient
from gemma_scope_jax.autointerp.judges.endpoint import Endpoint
from gemma_scope_jax.autointerp.judges.endpoint_judge import EndpointJudge
from gemma_scope_jax.autointerp.judges.model import ModelJudge
from gemma_scope_jax.autointerp.judges.statistics import RuleJudge
from gemma_scope_jax.autointerp.neighbours import cooccurring, decoder_neighbours
from gemma_scope_jax.autointerp.questions import Judge
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.manifest import name_in_store
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.paths import cache_folder, expanded, is_remote

LOG = logging.getLogger(__name__)
ANSWERS = "explanations.answers.jsonl"


@dataclasses.dataclass(frozen=True, eq=False)
class ExplanationJob:
    """What to explain, from which examples, and where the explanations go.

    folder  for explanations.json; each layer of a coder of several has its own
    labels  of the features; labels from statistics list their `top_logits`
    """

    corpus: Corpus
    coder: Coder
    features: list[int]
    scores: tuple[str, ...]
    folder: str
    neighbours: dict[int, list[int]]
    labels: Sequence[Mapping[str, Any]] | None = None

    def todo(self, method: str, name: str) -> list[int]:
        """The features that a judge (its `method` and `name`) has yet to explain or score."""
        entries = read_explanations(self.folder)
        return explain.unfinished(self.corpus, method, name, self.features, self.scores, entries)

    def estimate(self, endpoint: Endpoint) -> explain.JudgeEstimate:
        """What the remaining features will take and cost through `endpoint`."""
        todo = self.todo("endpoint", endpoint.name)
        return explain.plan(self.corpus, todo, self.scores, (endpoint.price_in, endpoint.price_out))

    def answer_file(self, path: str | os.PathLike = "") -> Path:
        """The file that keeps answers: `path`; else beside explanations.json, or in the cache if
        that is in a bucket. Raises `InputError` for a path in a bucket."""
        if path and is_remote(path):
            raise InputError(f"{path}: answers are appended to, so they need a local file")
        if path:
            return expanded(path)
        if is_remote(self.folder):
            return cache_folder() / "explain" / ANSWERS
        return expanded(self.folder) / ANSWERS

    def run(self, judge: Judge) -> explain.ExplainReport:
        """Explain and score, then close the judge. See `explain_features`."""
        try:
            return explain.explain_features(
                self.corpus,
                judge,
                self.features,
                self.scores,
                self.folder,
                coder=public_name(self.coder),
                width=self.coder.width,
                neighbours=self.neighbours,
                raises=lambda f: self.labels[f]["top_logits"] if self.labels else (),
                status=lambda: judge_status(judge),
            )
        finally:
            judge.close()
            if isinstance(judge, EndpointJudge):
                judge.client.answers.close()
            elif isinstance(judge, ModelJudge) and judge.answers is not None:
                judge.answers.close()

    def summary(self, report: explain.ExplainReport, judge: Judge) -> str:
        """How many features are explained, and the scores of those that this judge explained."""
        entries, ours = self.explained(judge)
        lines = [f"{self.folder}/explanations.json: {len(entries):,} features explained"]
        counts = {
            "finished before": report.kept,
            "explained now": report.done,
            "fire in too few windows to be scored": report.few,
            "of which nothing that was asked has an answer": report.unexplained,
        }
        lines += [f"  {count:,} {what}" for what, count in counts.items() if count]
        for name in self.scores:
            figure = SCORE_FIGURES[name]
            found = [e["scores"].get(name, {}).get(figure) for e in ours]
            if known := [value for value in found if is_number(value)]:
                spread = f"{statistics.fmean(known):.3f} ± {statistics.pstdev(known):.3f}"
                figure = figure.replace("_", " ")
                lines.append(f"  {name}: {figure} {spread} over {len(known):,} features")
        if report.lost:
            count = sum(count for count, _ in report.lost.values())
            lines.append(
                f"  {count:,} questions have no answer and are in no score: {report.losses}"
            )
        return "\n".join(filter(None, [*lines, judge_status(judge)]))

    def explained(self, judge: Judge) -> tuple[dict[int, Explanation], list[Explanation]]:
        """All entries of the file, and this judge's entries of the job's features."""
        entries = read_explanations(self.folder, self.coder.width)
        drawn = explain.fingerprint(self.corpus)
        some = [entries[f] for f in dict.fromkeys(self.features) if f in entries]
        return entries, [e for e in some if explain.is_by(e, judge.method, judge.name, drawn)]


def open_explanation_job(
    store: FeatureStore,
    coder: Coder,
    tokenizer: Tokenizer,
    *,
    features: str | Sequence[int] = "",
    sample: int | None = None,
    thorough: bool = False,
    scores: Sequence[str] = ("detection", "fuzzing"),
    sampling: Sampling | None = None,
    name: str = "",
    layer: int | None = None,
    folder: str | os.PathLike = "",
    labels: Sequence[Mapping[str, Any]] | None = None,
) -> ExplanationJob:
    """Read through a coder's `FeatureStore` once, and choose the features to explain.

    features  numbers, or text such as "1,5,10-20"; not with `sample`
    sample    instead: how many to draw at random from those that fire often enough
    thorough  require `features` or `sample`, as for judges that are models; the default without
              them is all features that fire
    name      of the coder in the store, if the store has several of it
    layer     of a coder of several layers
    folder    for explanations.json, local or gs://; default: beside the coder
    Raises `InputError`.
    """
    check_explanation(scores, features, sample, thorough)
    sampling = sampling or Sampling()
    name = name_in_store(store, coder, name)
    store.place(name, layer)  # raises for a coder of several layers if none is given
    corpus = open_corpus(store, tokenizer, sampling, name, layer)
    fired = store.fired(name, layer)
    chosen = choose_features(features, sample, fired, sampling)
    known: dict[int, list[int]] = {}
    if sampling.hard and sampling.neighbours == "cooccurring":
        known = cooccurring(corpus, chosen)
    elif sampling.hard:
        if coder.multi_layer:
            raise InputError("neighbours by decoder need a coder of one layer; use cooccurring")
        known = decoder_neighbours(coder.w_dec, chosen)
    folder = os.fspath(folder) or explained_folder(coder.info)
    folder = layer_folder(folder, len(coder.layers), layer)
    return ExplanationJob(corpus, coder, chosen, tuple(scores), folder, known, labels)


def check_explanation(
    scores: Sequence[str], features: str | Sequence[int], sample: int | None, thorough: bool
) -> None:
    """Raise the `InputError`s of `open_explanation_job` that need neither store nor coder."""
    explain.check_scores(scores)
    if not isinstance(features, str) and not len(features):
        raise InputError("the list of features is empty")
    if len(features) and sample is not None:
        raise InputError("give features or the size of a sample, not both")
    if thorough and not len(features) and sample is None:
        raise InputError("which features? give some, such as 1,5,10-20, or the size of a sample")
    if sample is not None and sample < 1:
        raise InputError(f"sample is {sample}: at least 1")


def choose_features(
    features: str | Sequence[int], sample: int | None, fired: np.ndarray, sampling: Sampling
) -> list[int]:
    """The chosen features. fired [F]: on how many tokens each fires."""
    if len(features):
        text = features if isinstance(features, str) else ",".join(map(str, features))
        return parse_features(text, len(fired))
    if sample is None:
        return np.flatnonzero(fired).tolist()
    live = np.flatnonzero(fired >= 2 * sampling.least)
    if not len(live):
        raise InputError("no feature fires often enough in this store")
    drawn = np.random.default_rng(sampling.seed).permutation(live)[:sample]
    return np.sort(drawn).tolist()


def parse_features(text: str, width: int) -> list[int]:
    """ "1,5,10-20" as distinct numbers, in order. Raises `InputError`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"features {text!r}: give numbers and ranges, such as 1,5,10-20")
        a, b = int(first), int(last or first)
        if a > b or b >= width:
            raise InputError(f"features {part.strip()}: the coder has features 0 to {width - 1}")
        found += range(a, b + 1)
    return list(dict.fromkeys(found))


def open_judge(
    kind: Endpoint | Model | None,
    answers: Path,
    *,
    tokenizer: Tokenizer | None = None,
    name: str = "",
) -> Judge:
    """What explains and scores: a chat endpoint, a local Gemma, or token statistics (None).

    answers          the file that keeps every answer, so that nothing is asked twice
    tokenizer, name  of a local model; its answers are kept under the name
    """
    if kind is None:
        return RuleJudge()
    held = AnswerFile(answers)
    if held.damaged:
        LOG.warning("%s: %d damaged lines, asked again", answers, held.damaged)
    if isinstance(kind, Endpoint):
        return EndpointJudge(ChatClient(kind, held))
    if tokenizer is None:
        raise InputError("a model that explains or scores needs its tokenizer=")
    return ModelJudge(kind, tokenizer, name, held)


def judge_status(judge: Judge) -> str:
    """What an endpoint has answered so far, and what it has cost; "" for other judges."""
    if not isinstance(judge, EndpointJudge):
        return ""
    client, endpoint = judge.client, judge.client.endpoint
    cost = f"${client.cost:.3f}  " if endpoint.price_in or endpoint.price_out else ""
    uncounted = f", {client.uncounted:,} without a count of tokens" if client.uncounted else ""
    return (
        f"{cost}{client.requests:,} answers, {client.tokens_in:,} tokens in, "
        f"{client.tokens_out:,} out, {client.retried:,} tried again{uncounted}"
    )
