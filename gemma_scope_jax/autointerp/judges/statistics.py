"""Labels from token statistics alone, where no model is to judge: on which tokens a feature fires.

A label names the up to ten tokens (or what stands before or after) that best tell where the
feature fires: the set with the largest F0.5 as a rule for single tokens (precision counts more, so
that what is named means something), over the half of the text that explanations may see. The same
rule then answers the questions of every score, so a label is measured like any other explanation,
by what its text says and nothing more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gemma_scope_jax.autointerp.examples import Corpus, in_test
from gemma_scope_jax.autointerp.questions import Answer, Question, ShownText
from gemma_scope_jax.errors import shown

NAMED = 10  # tokens in a label
BETA = 0.5  # of F: below 1 precision counts more than recall
SEEN = 2  # times that a token must have fired to be named, if any has so often
MOST = 20_000  # firings looked at

TokenOffset = Literal["this", "previous", "next"]
WORDS = {"this": "on", "previous": "after", "next": "before"}
NAME = "token statistics"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which tokens, where, say that the feature fires: token -> (share of its occurrences on which
    the feature fires, mean activation over all its occurrences)."""

    place: TokenOffset
    tokens: Mapping[str, tuple[float, float]]

    def strengths(self, tokens: Sequence[str]) -> list[tuple[float, float]]:
        """Share and mean activation at each token of a text; (0, 0) for those not named."""
        shift = {"this": 0, "previous": -1, "next": 1}[self.place]
        named = [self.tokens.get(t, (0.0, 0.0)) for t in tokens]
        if shift:
            edge = [(0.0, 0.0)]
            named = edge + named[:-1] if shift < 0 else named[1:] + edge
        return named

    def as_dict(self) -> dict[str, Any]:
        rounded = {t: [float(f"{v:.4g}") for v in pair] for t, pair in self.tokens.items()}
        return {"place": self.place, "tokens": rounded}


def token_label(corpus: Corpus, feature: int, raises: Sequence[str] = ()) -> tuple[str, Rule]:
    """The label of a feature and the rule that it states.

    raises: the tokens whose logits the feature raises most, named at the end of the text.
    """
    seed = corpus.sampling.seed
    rows, values = corpus.feature(feature)
    train = ~in_test(corpus.pieces(rows), seed)
    rows, values = rows[train], values[train]
    fired = len(rows)
    some = np.unique(np.linspace(0, max(fired - 1, 0), min(MOST, fired)).astype(np.int64))
    around = corpus.store.windows(rows[some], 1, 1)
    each = fired / max(1, len(some))
    columns: dict[TokenOffset, int] = {"this": 1, "previous": 0, "next": 2}
    found = {
        place: _best_tokens(corpus, around[:, column], values[some], each)
        for place, column in columns.items()
    }
    place = max(columns, key=lambda p: found[p][0])  # the first among equals
    _, recall, precision, chosen = found[place]
    rule = Rule(place, chosen)
    named = ", ".join(_quoted(t) for t in chosen) or "tokens without a pattern"
    text = (
        f"token statistics: fires {WORDS[place]} {named} ({_percent(recall)} of where it fires; "
        f"it fires on {_percent(precision)} of them)"
    )
    if raises:
        text += f"; raises {', '.join(_quoted(t) for t in raises[:3])}"
    return text, rule


def _best_tokens(corpus: Corpus, ids: np.ndarray, values: np.ndarray, each: float):
    """F, recall and precision of the best rule on `ids` [m] (one a firing; -1: none), and its
    tokens, the most frequent first. An entry of `ids` stands for `each` firings."""
    special = ids < 0
    special[~special] = corpus.tokenizer.special[ids[~special]]
    known, inverse, n = np.unique(ids[~special], return_inverse=True, return_counts=True)
    if not len(known):
        return 0.0, 0.0, 0.0, {}
    sums = np.bincount(inverse, values[~special].astype(np.float64), len(known)) * each
    hits = np.where(n >= min(SEEN, n.max()), n * each, 0.0)
    total = np.maximum(corpus.counts[known], hits)
    chosen, best = best_set(hits, total, len(ids) * each)
    hit, everywhere = hits[chosen].sum(), total[chosen].sum()
    names = corpus.tokenizer.decode_tokens(known[chosen])
    pairs = zip((hits / total)[chosen].tolist(), (sums / total)[chosen].tolist())
    return best, hit / (len(ids) * each), hit / everywhere, dict(zip(names, pairs))


def best_set(hits: np.ndarray, total: np.ndarray, fired: float) -> tuple[np.ndarray, float]:
    """The at most `NAMED` tokens whose F as a rule is largest, the most frequent first, and it.

    hits, total [n]: firings and occurrences of each token; fired: firings in all. Exact, by
    Dinkelbach's method: F = (1 + b) sum(hits) / (sum(total) + b fired), b = `BETA`^2, is a ratio of
    sums, and for a guess of it the best set holds the largest (1 + b) hits - F total.
    """
    b, best = BETA**2, 0.0
    while True:
        gain = (1 + b) * hits - best * total
        chosen = np.argsort(-gain, kind="stable")[:NAMED]
        chosen = chosen[gain[chosen] > 0]
        better = (1 + b) * hits[chosen].sum() / (total[chosen].sum() + b * fired)
        if better <= best + 1e-12:
            return chosen[np.argsort(-hits[chosen], kind="stable")], float(best)
        best = better


def _quoted(token: str) -> str:
    return '"' + shown(token.replace("\n", "↵").replace("\t", "⇥")) + '"'


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


class RuleJudge:
    """Answers by the rules of token labels, which `learn` gives it."""

    method, name, parallel, answered = "statistics", NAME, 1, True

    def __init__(self):
        self._rules: dict[str, Rule] = {}

    def learn(self, text: str, rule: Rule) -> None:
        self._rules[text] = rule

    def rule(self, text: str) -> Rule:
        return self._rules[text]

    def close(self) -> None:
        """Nothing to close."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """In order; an explanation that no rule is known for gets no values."""
        return [self._answer(q) for q in questions]

    def _answer(self, question: Question) -> Answer:
        if question.task == "intruder":
            return Answer("", (float(_odd_one_out(question.examples)),))
        rule = self._rules.get(question.explanation)
        if rule is None:
            return Answer()
        if question.task == "simulate":
            strengths = rule.strengths(question.examples[0].tokens)
            return Answer("", tuple(mean for _, mean in strengths))
        shares = [_at_marks(rule, s) for s in question.examples]
        said = tuple(float(named) for named, _ in shares)
        return Answer("", said, tuple(share for _, share in shares))


def _odd_one_out(examples: Sequence[ShownText]) -> int:
    """The text with the fewest others that share one of its marked tokens, or of the tokens right
    before its marks: intruders are found without an explanation."""
    plain = lambda t: t.strip().lower() or t
    marked = [{plain(t) for t in s.marked} for s in examples]
    before = [{plain(t) for t, m in zip(s.tokens, s.marks[1:]) if m} for s in examples]
    shared = lambda sets: [sum(bool(one & other) for other in sets) for one in sets]
    clear, vague = sorted((shared(marked), shared(before)), key=sum, reverse=True)
    return min(range(len(examples)), key=lambda i: (clear[i], vague[i]))


def _at_marks(rule: Rule, shown: ShownText) -> tuple[bool, float]:
    """Whether the rule names a token (of marked ones: at least half), and the chance that one of
    them fires (of marked ones: the mean share)."""
    shares = [share for share, _ in rule.strengths(shown.tokens)]
    if not shown.marks:
        return any(shares), 1.0 - float(np.prod([1.0 - s for s in shares]))
    marked = [s for s, m in zip(shares, shown.marks) if m]
    named = 2 * sum(s > 0 for s in marked) >= len(marked) > 0
    return named, float(np.mean(marked)) if marked else 0.0
