"""Sparse probing: how well the k features that differ most between two classes tell them apart.

Two protocols, which differ in everything (`PROTOCOLS`):

sae-probes   the activation at the text's last token (of at most 1,024, the last ones); features
             divided by their mean when active, then ranked; C chosen among ten on held-out training
             examples; AUC. Source: Kantamneni et al. 2025, "Are Sparse Autoencoders Useful?", and
             its package sae-probes 0.4.2.
saebench     the mean over the first 128 tokens; features ranked as they are; C = 1; accuracy;
             every class against the others. Source: Karvonen et al. 2025, SAEBench, sparse probing.

In both the baselines are the raw activation's own top k dimensions and a probe on all of them, with
C chosen as sae-probes does. All probes have an L2 penalty and are fitted to the optimum; the peers
stop scikit-learn early, and SAEBench trains its full probe by Adam and keeps the epoch that tests
best.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gemma_scope_jax.probing.logistic import accuracy, auc, fit_logistic, weighted_f1
from gemma_scope_jax.probing.tables import (
    Split,
    Table,
    classes_of,
    first_of_each,
    one_against_rest,
    repeated,
    sae_probes_split,
    say_repeats,
)
from gemma_scope_jax.progress import Report

STRENGTHS = np.logspace(5, -5, 10)  # C, from the weakest penalty to the strongest
ROUGHLY = 1e-5  # the gradient at which a probe is good enough to compare penalties by
WIDTHS = (8, 32, 128, 512)  # that probes of k features are padded to
SEED = 42


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What distinguishes ways of probing; see the module."""

    name: str
    how: Literal["mean"] | int  # see `pooling.pool`
    keep: Literal["first", "last"]  # of a text that is too long
    context: int  # tokens of a text at most
    ks: tuple[int, ...]
    by_scale: bool  # features are divided by their mean over where they are active, to rank them
    tuned: bool  # C of the sparse probes is chosen, instead of 1
    measure: Literal["auc", "accuracy"]  # that is reported


PROTOCOLS = {
    "sae-probes": Protocol(
        "sae-probes", -1, "last", 1024, (1, 2, 4, 8, 16, 32, 64, 128), True, True, "auc"
    ),
    "saebench": Protocol("saebench", "mean", "first", 128, (1, 2, 5), False, False, "accuracy"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The binary questions about a table, and the texts they need."""

    name: str
    texts: list[str]
    questions: dict[str, Split]  # by the class asked for; rows count in `texts`
    repeated: float = 0.0  # the share of rows that test whose texts were trained on


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one probe on the rows that test it."""

    accuracy: float
    auc: float
    f1: float  # weighted by class
    c: float  # the inverse penalty
    features: tuple[int, ...] = ()  # that it used, the best first; empty: all


def make_task(
    table: Table, protocol: Protocol, limit: int | None = None, *, quiet: bool = False
) -> Task:
    """The questions of a table with a column `target`; `limit` examples of it at most.

    Rows of the same text never train and test, but under sae-probes, whose draws are its package's:
    there stderr says how many do, and for any protocol how many texts have several labels, unless
    `quiet`. Raises `InputError` for a missing label, for labels that are numbers rather than
    classes, for more than two classes under sae-probes, and for too few rows.
    """
    labels = table.column("target", "label", "class")
    most = 2 if protocol.name == "sae-probes" else 20
    names, classes = classes_of(labels, table.path, most)
    kept = first_of_each(classes, limit)
    both = of = 0
    if protocol.name == "sae-probes":
        split = sae_probes_split(classes[kept], table.path, SEED)
        both, of = repeated(table, kept, split), len(split.test)
        questions = {names[1]: split}
    else:
        texts = table.numbered(kept)
        found = one_against_rest(classes[kept], table.path, seed=SEED, texts=texts)
        questions = {names[c]: split for c, split in found.items()}
    if not quiet:
        say_repeats(table, kept, classes[kept], both, of)
    texts = [table.texts[i] for i in kept]
    return _needed(Task(table.name, texts, questions, both / of if both else 0.0))


def _needed(task: Task) -> Task:
    """The task without the texts that no question uses."""
    sides = [rows for s in task.questions.values() for rows in (s.train, s.test)]
    used = np.unique(np.concatenate(sides))
    at = lambda rows: np.searchsorted(used, rows)
    questions = {
        name: dataclasses.replace(s, train=at(s.train), test=at(s.test))
        for name, s in task.questions.items()
    }
    return Task(task.name, [task.texts[i] for i in used], questions, task.repeated)


# -------------------------------------------------------------------------------------------------
# Probes


def rank(x: np.ndarray, y: np.ndarray, by_scale: bool = False) -> np.ndarray:
    """Columns of x [N, F] by |mean where y - mean elsewhere|, the largest first; ties by number.

    by_scale: each column is first divided by its mean absolute value over where it is not 0.
    """
    y = np.asarray(y) > 0
    apart = x[y].mean(0, dtype=np.float64) - x[~y].mean(0, dtype=np.float64)
    if by_scale:
        count = (x != 0).sum(0)
        size = np.abs(x).sum(0, dtype=np.float64) / (count + 1e-6)
        apart = apart / (size + 1e-6)
    return np.argsort(-np.abs(apart), kind="stable")


def folds(y: np.ndarray, seed: int = SEED) -> list[np.ndarray]:
    """Rows to choose C on, held out in turn: as sae-probes, the last fifth of 128 examples or more,
    100 at most; of fewer, six random parts with both classes in the same shares."""
    count = len(y)
    if count >= 128:
        return [np.arange(count - min(count // 5, 100), count)]
    draw = np.random.default_rng(seed)
    parts = min(6, int(np.bincount(y, minlength=2).min()))
    dealt = np.empty(count, np.int64)
    for c in (0, 1):
        rows = draw.permutation(np.flatnonzero(y == c))
        dealt[rows] = np.arange(len(rows)) % max(parts, 1)
    return [np.flatnonzero(dealt == part) for part in range(parts)]


def choose_strength(x: np.ndarray, y: np.ndarray) -> float:
    """The C of `STRENGTHS` with the best mean AUC on held-out rows of x [N, K]; 1 if there is no
    part of the rows with both classes to hold out."""
    total = np.zeros(len(STRENGTHS))
    for held in folds(y):
        kept = np.ones(len(y), bool)
        kept[held] = False
        if min(len(np.unique(y[held])), len(np.unique(y[kept]))) < 2:
            continue
        fitted = fit_logistic(x[None, kept], y[None, kept], STRENGTHS, tolerance=ROUGHLY)
        total += [auc(y[held], scores) for scores in fitted.scores(x[None, held])[0]]
    return float(STRENGTHS[np.argmax(total)]) if total.any() else 1.0


def probe(
    x: np.ndarray, split: Split, ks: Sequence[int], protocol: Protocol, *, full: bool = False
) -> dict[str, Score]:
    """Scores by k of sparse probes on x [N, F]; with `full`, "full" is the probe on all columns.

    k larger than F counts as F.
    """
    train, test = x[split.train], x[split.test]
    order = rank(train, split.train_y, protocol.by_scale)
    found = {}
    for k in ks:
        columns = order[:k]
        width = next((n for n in WIDTHS if n >= len(columns)), len(columns))
        pad = ((0, 0), (0, width - len(columns)))  # with zeros: few shapes are compiled
        a, b = np.pad(train[:, columns], pad), np.pad(test[:, columns], pad)
        score = _score(a, b, split, tuned=protocol.tuned)
        found[str(k)] = dataclasses.replace(score, features=tuple(map(int, columns)))
    if full:
        found["full"] = _score(train, test, split, tuned=True)
    return found


def _score(train: np.ndarray, test: np.ndarray, split: Split, *, tuned: bool) -> Score:
    """A probe on [N, K], trained and tested."""
    c = choose_strength(train, split.train_y) if tuned else 1.0
    scores = fit_logistic(train[None], split.train_y[None], c).scores(test[None])[0, 0]
    y = split.test_y
    return Score(accuracy(y, scores), auc(y, scores), weighted_f1(y, scores), c)


def probe_task(
    task: Task,
    subjects: Mapping[str, np.ndarray],
    protocol: Protocol,
    ks: Sequence[int] = (),
    full: Sequence[str] = (),
    report: Report = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """For each of `subjects` (its features or activations [N, F]) the scores of a task.

    {subject: {k or "full": {"accuracy", "auc", "f1", "c", "features"}}}; of several questions the
    means, and each under "questions". `full`: the subjects that a probe on everything is wanted of.
    `report` is told after each how many are done, of how many.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, x in subjects.items():
        by_question = {
            question: {
                k: dataclasses.asdict(score)
                for k, score in probe(
                    x, split, ks or protocol.ks, protocol, full=name in full
                ).items()
            }
            for question, split in task.questions.items()
        }
        results[name] = _mean(by_question)
        report(len(results), len(subjects))
    return results


def _mean(by_question: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if len(by_question) == 1:
        return next(iter(by_question.values()))
    first = next(iter(by_question.values()))
    means: dict[str, Any] = {}
    for k in first:
        each = [scores[k] for scores in by_question.values()]
        means[k] = {m: float(np.mean([s[m] for s in each])) for m in ("accuracy", "auc", "f1")}
    return {**means, "questions": by_question}
