"""Sparse probing: classifies texts by the k features that differ most between two classes.

There are two `PROTOCOLS`:

sae-probes   the activation at the last token, of the last 1,024; features are ranked after division
             by their mean when active; C is chosen among ten on held-out training examples; AUC.
             Source: Kantamneni et al. 2025, "Are Sparse Autoencoders Useful?", and its package
             sae-probes 0.4.2.
saebench     the mean over the first 128 tokens; features are ranked as they are; C = 1; accuracy;
             every class against the others. Source: Karvonen et al. 2025, SAEBench, sparse probing.

The baselines of both are the top k dimensions of the raw activation and a probe on all dimensions,
with C chosen as in sae-probes. All probes have an L2 penalty and are fitted to the optimum; the
peers stop scikit-learn early, and SAEBench trains its full probe by Adam and keeps the epoch that
tests best.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.probing import tables
from gemma_scope_jax.probing.logistic import accuracy, fit_logistic, weighted_f1
from gemma_scope_jax.progress import Report

STRENGTHS = np.logspace(5, -5, 10)  # C, from the weakest penalty to the strongest
ROUGHLY = 1e-5  # the gradient at which a probe is good enough to compare penalties
WIDTHS = (8, 32, 128, 512)  # probes of k features are padded to one of these


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A way of probing; see the module."""

    name: str
    how: Literal["mean"] | int  # see `pooling.pool`
    keep: Literal["first", "last"]  # which tokens of a text that is too long
    context: int  # tokens of a text at most
    ks: tuple[int, ...]
    by_scale: bool  # features are ranked after division by their mean when active
    tuned: bool  # C of the sparse probes is chosen; else it is 1


PROTOCOLS = {
    "sae-probes": Protocol(
        "sae-probes", -1, "last", 1024, (1, 2, 4, 8, 16, 32, 64, 128), True, True
    ),
    "saebench": Protocol("saebench", "mean", "first", 128, (1, 2, 5), False, False),
}


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of one probe on its test rows."""

    accuracy: float
    auc: float
    f1: float  # weighted by class
    c: float  # the inverse penalty
    features: tuple[int, ...] = ()  # used, the best first; empty: all


def make_task(table: tables.Table, protocol: Protocol, limit: int | None = None) -> tables.Task:
    """The questions of a table with a column `target`, on at most `limit` of its examples.

    Rows with the same text are never on both sides, except under sae-probes, whose draws are its
    package's. Raises `InputError` for a missing label, for labels that are numbers rather than
    classes, for more than two classes under sae-probes, and for too few rows.
    """
    labels = table.column("target", "label", "class")
    most = 2 if protocol.name == "sae-probes" else 20
    names, classes = tables.classes_of(labels, table.path, most)
    kept = tables.first_of_each(classes, limit)
    if protocol.name == "sae-probes":
        questions = {names[1]: tables.sae_probes_split(classes[kept], table.path)}
    else:
        found = tables.one_against_rest(classes[kept], table.path, table.numbered(kept))
        questions = {names[c]: split for c, split in found.items()}
    task = tables.task_of(table, kept, classes, questions)
    used = np.unique(np.concatenate([r for s in questions.values() for r in (s.train, s.test)]))
    at = lambda rows: np.searchsorted(used, rows)  # without the texts that no question uses
    questions = {
        name: dataclasses.replace(s, train=at(s.train), test=at(s.test))
        for name, s in questions.items()
    }
    texts = [task.texts[i] for i in used]
    return dataclasses.replace(task, texts=texts, questions=questions)


def rank(x: np.ndarray, y: np.ndarray, by_scale: bool = False) -> np.ndarray:
    """Columns of x [N, F] by |mean where y - mean elsewhere|, the largest first; ties by number.

    by_scale: each column is first divided by the mean of its absolute nonzero values.
    """
    y = np.asarray(y) > 0
    apart = x[y].mean(0, dtype=np.float64) - x[~y].mean(0, dtype=np.float64)
    if by_scale:
        count = (x != 0).sum(0)
        size = np.abs(x).sum(0, dtype=np.float64) / (count + 1e-6)
        apart = apart / (size + 1e-6)
    return np.argsort(-np.abs(apart), kind="stable")


def folds(y: np.ndarray, seed: int = tables.SEED) -> list[np.ndarray]:
    """Rows to hold out in turn to choose C: of 128 examples or more the last fifth, at most 100;
    of fewer, six random parts with the same shares of both classes (sae-probes)."""
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


def choose_strength(
    x: np.ndarray, y: np.ndarray, parts: Sequence[np.ndarray] | None = None
) -> float:
    """The C with the best mean AUC on held-out rows of x [N, K]; 1 if no part has both classes.
    parts: the rows to hold out in turn; default: `folds`."""
    total = np.zeros(len(STRENGTHS))
    for held in folds(y) if parts is None else parts:
        kept = np.ones(len(y), bool)
        kept[held] = False
        if min(len(np.unique(y[held])), len(np.unique(y[kept]))) < 2:
            continue
        fitted = fit_logistic(x[None, kept], y[None, kept], STRENGTHS, tolerance=ROUGHLY)
        total += [auc(y[held], scores) for scores in fitted.scores(x[None, held])[0]]
    return float(STRENGTHS[np.argmax(total)]) if total.any() else 1.0


def probe(
    x: np.ndarray, split: tables.Split, ks: Sequence[int], protocol: Protocol, *, full: bool = False
) -> dict[str, Score]:
    """Scores of sparse probes on x [N, F], by k (at most F); "full": of a probe on all columns."""
    train, test = x[split.train], x[split.test]
    order = rank(train, split.train_y, protocol.by_scale)
    found = {}
    for k in ks:
        columns = order[:k]
        width = next((n for n in WIDTHS if n >= len(columns)), len(columns))
        pad = ((0, 0), (0, width - len(columns)))  # few shapes are compiled
        a, b = np.pad(train[:, columns], pad), np.pad(test[:, columns], pad)
        score = _score(a, b, split, tuned=protocol.tuned)
        found[str(k)] = dataclasses.replace(score, features=tuple(map(int, columns)))
    if full:
        found["full"] = _score(train, test, split, tuned=True)
    return found


def _score(train: np.ndarray, test: np.ndarray, split: tables.Split, *, tuned: bool) -> Score:
    """A probe on [N, K], trained and tested."""
    c = choose_strength(train, split.train_y) if tuned else 1.0
    scores = fit_logistic(train[None], split.train_y[None], c).scores(test[None])[0, 0]
    y = split.test_y
    return Score(accuracy(y, scores), auc(y, scores), weighted_f1(y, scores), c)


def probe_task(
    task: tables.Task,
    subjects: Mapping[str, np.ndarray],
    protocol: Protocol,
    ks: Sequence[int] = (),
    full: Sequence[str] = (),
    report: Report = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """The scores of each of `subjects`, features or activations [N, F], on a task. {subject: {k or
    "full": {"accuracy", "auc", "f1", "c", "features"}}}; for several questions the means, with each
    question under "questions". full: the subjects to probe on all columns, too."""
    results: dict[str, dict[str, Any]] = {}
    for name, x in subjects.items():
        by_question = {}
        for question, split in task.questions.items():
            scores = probe(x, split, ks or protocol.ks, protocol, full=name in full)
            by_question[question] = {k: dataclasses.asdict(s) for k, s in scores.items()}
        results[name] = _mean(by_question)
        report(len(results), len(subjects))
    return results


def _mean(by_question: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first, *others = by_question.values()
    if not others:
        return first
    mean = lambda k, m: float(np.mean([scores[k][m] for scores in by_question.values()]))
    means = {k: {m: mean(k, m) for m in ("accuracy", "auc", "f1")} for k in first}
    return {**means, "questions": by_question}
