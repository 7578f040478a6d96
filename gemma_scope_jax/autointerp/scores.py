"""Scores explanations: the questions of each score, and the figures computed from the answers.

    detection   is the feature active somewhere in this text?             Paulo et al. 2024, delphi
    fuzzing     is it active on the marked tokens? (elsewhere random ones are marked)        delphi
    intruder    on which text does it not fire? (needs no explanation)                       delphi
    simulation  Pearson's correlation of simulated and true activations over all test windows:
                Bills et al. 2023
    saebench    on which of 14 texts does it fire? accuracy                                SAEBench

Differences from the originals: on non-activating windows the feature is known not to fire (SAEBench
assumes it of random ones); and as many random tokens are marked as are marked on average in the
activating windows (delphi: as many as are active, of which it marks only some).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.autointerp.examples import Material, Sampling
from gemma_scope_jax.autointerp.questions import Answer, Question, ShownText, marks_of, random_marks
from gemma_scope_jax.data.ranks import auc

SHOWN = 5  # texts in one question (delphi)
INTRUDERS = 20  # intruder questions
SIMULATED = 10  # windows of each kind to simulate on
# SAEBench: tokens on each side, share of the maximum that is active, non-activating texts
BUFFER, FAINT, RANDOM = 10, 0.01, 10

Score = dict[str, Any]


def _draw(material: Material, sampling: Sampling, salt: int) -> np.random.Generator:
    return np.random.default_rng([sampling.seed, material.feature, salt])


def _marks(material: Material) -> tuple[list[tuple[bool, ...]], int]:
    """The marks of the test windows, and how many random ones a non-activating window gets."""
    marks = [marks_of(e.values) for e in material.test]
    return marks, max(1, -(-sum(map(sum, marks)) // max(1, len(marks))))


def _classify(
    texts: list[tuple[ShownText, float]], explanation: str, rng: np.random.Generator
) -> list[Question]:
    texts = [texts[i] for i in rng.permutation(len(texts))]
    groups = [texts[i : i + SHOWN] for i in range(0, len(texts), SHOWN)]
    return [
        Question("classify", tuple(s for s, _ in g), explanation, tuple(t for _, t in g))
        for g in groups
    ]


def ask_detection(material: Material, explanation: str, sampling: Sampling) -> list[Question]:
    texts = [(ShownText(e.tokens), 1.0) for e in material.test]
    texts += [(ShownText(e.tokens), 0.0) for e in material.non_activating]
    return _classify(texts, explanation, _draw(material, sampling, 1))


def ask_fuzzing(material: Material, explanation: str, sampling: Sampling) -> list[Question]:
    rng = _draw(material, sampling, 2)
    marks, count = _marks(material)
    texts = [(ShownText(e.tokens, m), 1.0) for e, m in zip(material.test, marks)]
    others = material.non_activating
    texts += [(ShownText(e.tokens, random_marks(e, count, rng)), 0.0) for e in others]
    return _classify(texts, explanation, rng)


def ask_intruder(material: Material, explanation: str, sampling: Sampling) -> list[Question]:
    """One non-activating window among `SHOWN` - 1 of one quantile; the quantiles take turns."""
    rng = _draw(material, sampling, 3)
    _, count = _marks(material)
    quantiles = [
        some
        for q in sorted({e.quantile for e in material.test})
        if len(some := [e for e in material.test if e.quantile == q]) >= 2
    ]
    questions = []
    for turn, intruder in enumerate(material.non_activating[:INTRUDERS] if quantiles else []):
        some = quantiles[turn % len(quantiles)]
        chosen = rng.choice(len(some), min(SHOWN - 1, len(some)), replace=False)
        texts = [ShownText(some[i].tokens, marks_of(some[i].values)) for i in chosen]
        place = int(rng.integers(len(texts) + 1))
        texts.insert(place, ShownText(intruder.tokens, random_marks(intruder, count, rng)))
        questions.append(Question("intruder", tuple(texts), truth=(float(place),)))
    return questions


def ask_simulation(material: Material, explanation: str, sampling: Sampling) -> list[Question]:
    step = max(1, len(material.test) // SIMULATED)
    some = [*material.test[::step][:SIMULATED], *material.non_activating[:SIMULATED]]
    return [
        Question("simulate", (ShownText(e.tokens),), explanation, tuple(e.values.tolist()))
        for e in some
    ]


def ask_saebench(material: Material, explanation: str, sampling: Sampling) -> list[Question]:
    rng = _draw(material, sampling, 4)
    strong = [e.cut(BUFFER) for e in material.strong]
    texts = [*strong, *(e.cut(BUFFER) for e in material.non_activating[-RANDOM:])]
    least = FAINT * max((e.peak for e in [*material.train, *strong]), default=0.0)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    truth = tuple(float(e.peak > least) for e in texts)
    return [Question("select", tuple(ShownText(e.tokens) for e in texts), explanation, truth)]


# -------------------------------------------------------------------------------------------------
# Figures


def binary_metrics(
    truth: Sequence[float], said: Sequence[float], confidence: Sequence[float] | None = None
) -> dict[str, float | int | None]:
    """accuracy, balanced_accuracy, f1 (of the positives), auc (with confidences) and n.

    truth, said: 0 or 1 for each example. Undefined figures are None: all of them without examples,
    balanced accuracy and AUC without both classes, F1 without positives in either.
    """
    t, s = np.asarray(truth, np.float64) > 0.5, np.asarray(said, np.float64) > 0.5
    n = len(t)
    tp, fn, fp = int((t & s).sum()), int((t & ~s).sum()), int((~t & s).sum())
    tn = n - tp - fn - fp
    balanced = 0.5 * (tp / (tp + fn) + tn / (tn + fp)) if tp + fn and tn + fp else None
    f1 = 2 * tp / (2 * tp + fn + fp) if tp + fn + fp else None
    right = (tp + tn) / n if n else None
    found = {"accuracy": right, "balanced_accuracy": balanced, "f1": f1, "n": n}
    if confidence is not None:
        area = auc(t, np.asarray(confidence, np.float64))
        found["auc"] = None if np.isnan(area) else area
    return found


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation of a and b [n] in float64; None if either is constant."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(x) < 2 or not (np.ptp(x) and np.ptp(y)):
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale > 0 else None  # very small squares vanish


def _understood(
    questions: Sequence[Question], answers: Sequence[Answer]
) -> tuple[list[tuple[Question, Answer]], int]:
    """The questions with an answer, paired with it, and how many have none."""
    pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if a.values is not None]
    return pairs, len(questions) - len(pairs)


def _flat(parts: Iterable[Iterable[float] | None]) -> list[float]:
    return [value for part in parts for value in part or ()]


def grade_classes(questions: Sequence[Question], answers: Sequence[Answer]) -> Score:
    """`binary_metrics` over all examples; `unparsed`: the number of examples without an answer."""
    pairs, _ = _understood(questions, answers)
    confident = bool(pairs) and all(a.confidence is not None for _, a in pairs)
    found = binary_metrics(
        _flat(q.truth for q, _ in pairs),
        _flat(a.values for _, a in pairs),
        _flat(a.confidence for _, a in pairs) if confident else None,
    )
    total = sum(q.expected for q in questions)
    return {**found, "unparsed": total - int(found["n"] or 0)}


def grade_intruder(questions: Sequence[Question], answers: Sequence[Answer]) -> Score:
    """The share of intruders found, and the share that guessing finds."""
    pairs, unparsed = _understood(questions, answers)
    right = [a.values[0] == q.truth[0] for q, a in pairs if a.values]
    chance = [1 / len(q.examples) for q, _ in pairs]
    mean = lambda values: float(np.mean(values)) if values else None
    return {"accuracy": mean(right), "chance": mean(chance), "n": len(right), "unparsed": unparsed}


def grade_simulation(questions: Sequence[Question], answers: Sequence[Answer]) -> Score:
    pairs, unparsed = _understood(questions, answers)
    true, said = _flat(q.truth for q, _ in pairs), _flat(a.values for _, a in pairs)
    return {"correlation": pearson(true, said), "n": len(pairs), "unparsed": unparsed}


def grade_saebench(questions: Sequence[Question], answers: Sequence[Answer]) -> Score:
    pairs, unparsed = _understood(questions, answers)
    right = [t == s for q, a in pairs for t, s in zip(q.truth, a.values or ())]
    score = float(np.mean(right)) if right else None
    return {"score": score, "n": len(right), "unparsed": unparsed}


SCORES: dict[str, tuple[Callable[..., list[Question]], Callable[..., Score]]] = {
    "detection": (ask_detection, grade_classes),
    "fuzzing": (ask_fuzzing, grade_classes),
    "intruder": (ask_intruder, grade_intruder),
    "simulation": (ask_simulation, grade_simulation),
    "saebench": (ask_saebench, grade_saebench),
}
