"""Labels features by token statistics alone, without a model as a judge.

A label lists up to ten tokens on, after or before which the feature fires: the set with the largest
F0.5 as a rule for single tokens (precision has more weight than recall), over the half of the text
that explanations may see. The same rule answers the questions of every score, so a label is scored
like any other explanation, by what its text states and nothing more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from gemma_scope_jax.autointerp.examples import Corpus, in_test
from gemma_scope_jax.autointerp.questions import Answer, Question, ShownText
from gemma_scope_jax.errors import shown

NAMED = 10  # tokens in a label
BETA = 0.5  # of F: below 1, precision has more weight than recall
SEEN = 2  # firings that a token in a label needs, if any token has so many
MOST = 20_000  # firings that are used

TokenOffset = Literal["this", "previous", "next"]
WORDS = {"this": "on", "previous": "after", "next": "before"}
NAME = "token statistics"


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tokens on, after or before which the feature fires: token -> (share of its occurrences on
    which the feature fires, mean activation over all its occurrences)."""

    place: TokenOffset
    tokens: Mapping[str, tuple[float, float]]

    def strengths(self, tokens: Sequence[str]) -> list[tuple[float, float]]:
        """Share and mean activation at each token of a text; (0, 0) for tokens not in the rule."""
        none = (0.0, 0.0)
        named = [self.tokens.get(t, none) for t in tokens]
        if self.place == "previous":
            return [none, *named[:-1]]
        return [*named[1:], none] if self.place == "next" else named

    def as_dict(self) -> dict[str, object]:
        rounded = {t: [float(f"{v:.4g}") for v in pair] for t, pair in self.tokens.items()}
        return {"place": self.place, "tokens": rounded}


def token_label(corpus: Corpus, feature: int, raises: Sequence[str] = ()) -> tuple[str, Rule]:
    """The label of a feature, and the rule that it states.

    raises: the tokens whose logits the feature raises most, listed at the end of the text.
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
    named = ", ".join(_quoted(t) for t in chosen) or "tokens without a pattern"
    text = (
        f"token statistics: fires {WORDS[place]} {named} ({_percent(recall)} of where it fires; "
        f"it fires on {_percent(precision)} of them)"
    )
    if raises:
        text += f"; raises {', '.join(_quoted(t) for t in raises[:3])}"
    return text, Rule(place, chosen)


def _best_tokens(
    corpus: Corpus, ids: np.ndarray, values: np.ndarray, each: float
) -> tuple[float, float, float, dict[str, tuple[float, float]]]:
    """F, recall, precision and tokens, the most frequent first, of the best rule on `ids` [m] (one
    per firing; -1: none), each of which represents `each` firings."""
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
    """The set of at most `NAMED` tokens with the largest F as a rule, the most frequent first, and
    that F.

    hits, total [n]: firings and occurrences of each token; fired: firings in all. Exact, by
    Dinkelbach's method: F = (1 + b) sum(hits) / (sum(total) + b fired), b = `BETA`^2, is a ratio of
    sums; given a guess of F, the best set has the largest values of (1 + b) hits - F total.
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
    """Answers by the rules of token labels; `learn` adds them."""

    method, name, parallel = "statistics", NAME, 1

    def __init__(self):
        self._rules: dict[str, Rule] = {}

    def learn(self, text: str, rule: Rule) -> None:
        self._rules[text] = rule

    def close(self) -> None:
        """Nothing to close."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """In order; `values` is None for an explanation without a rule."""
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
        return Answer("", tuple(float(said) for said, _ in shares), tuple(c for _, c in shares))


def _odd_one_out(examples: Sequence[ShownText]) -> int:
    """The text that shares a marked token, or a token right before its marks, with the fewest
    others: intruders are found without an explanation."""
    plain = lambda t: t.strip().lower() or t
    marked = [{plain(t) for t, m in zip(s.tokens, s.marks) if m} for s in examples]
    before = [{plain(t) for t, m in zip(s.tokens, s.marks[1:]) if m} for s in examples]
    shared = lambda sets: [sum(bool(one & other) for other in sets) for one in sets]
    clear, vague = sorted((shared(marked), shared(before)), key=sum, reverse=True)
    return min(range(len(examples)), key=lambda i: (clear[i], vague[i]))


def _at_marks(rule: Rule, shown: ShownText) -> tuple[bool, float]:
    """Whether the rule holds a token of the text, and the chance that one of them fires. With
    marks: whether it holds at least half of the marked tokens, and their mean share."""
    shares = [share for share, _ in rule.strengths(shown.tokens)]
    if not shown.marks:
        return any(shares), 1.0 - float(np.prod([1.0 - s for s in shares]))
    marked = [s for s, m in zip(shares, shown.marks) if m]
    named = 2 * sum(s > 0 for s in marked) >= len(marked) > 0
    return named, float(np.mean(marked)) if marked else 0.0
