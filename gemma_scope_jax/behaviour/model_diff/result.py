"""What `diff_models` returns: figures, places, weights, candidates for a trigger."""

import dataclasses
from collections import Counter
from typing import Any

from gemma_scope_jax.behaviour.contrasts.differences import Contrast
from gemma_scope_jax.behaviour.model_diff.triggers import TokenExcess, TriggerTest
from gemma_scope_jax.behaviour.model_diff.weights import WeightDifference
from gemma_scope_jax.behaviour.statistics import Interval
from gemma_scope_jax.circuits.tables import text_tables
from gemma_scope_jax.storage.strict_json import finite

PARTED = 1.0  # nats of KL at which two models say something else
NAMED = 3.0  # times the KL of random words, from which a candidate is called a trigger
SHOWN = 12  # rows of a table


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where the models begin to part in a text: at the first KL of a nat, or else the largest; in a
    chat in its last turn.

    text, position  which text, and which of its tokens the next one is predicted after
    before          the tokens up to there
    base, other     the likeliest next tokens with their probabilities
    """

    text: int
    position: int
    kl: float
    before: str
    base: tuple[tuple[str, float], ...]
    other: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDiff:
    """Two models compared; printed, tables.

    kl           KL(base || other) of the next token, nats, mean over tokens; interval over texts
    loss_base, loss_other, loss_change  nats a token on the texts
    moved        by layer, the size of the difference of the residual stream over its size
    weights      those that differ; empty if all are equal
    partings     where the KL is largest, a place a text
    excess       tokens that go with a large KL; `triggers`: candidates, tested
    answers      (neutral text with the strongest candidate, base's continuation, other's)
    features     the coder's features on the texts, base against other, or None
    """

    base: dict[str, str]
    other: dict[str, str]
    texts: int
    tokens: int
    kl: Interval
    loss_base: Interval
    loss_other: Interval
    loss_change: Interval
    moved: tuple[float, ...]
    weights: tuple[WeightDifference, ...]
    partings: tuple[Parting, ...]
    excess: tuple[TokenExcess, ...]
    triggers: tuple[TriggerTest, ...]
    answers: tuple[tuple[str, str, str], ...]
    features: Contrast | None = None

    @property
    def named(self) -> tuple[TriggerTest, ...]:
        """The candidates after which the models part in all neutral texts more than after all
        random words, three times as far, and by a nat: less is common at rare words."""
        clear = lambda t: t.ratio >= NAMED and t.above == 1.0 and t.kl.value >= PARTED
        return tuple(filter(clear, self.triggers))

    @property
    def trigger(self) -> TriggerTest | None:
        """The strongest of those `named`."""
        return next(iter(self.named), None)

    def verdict(self) -> str:
        """In a sentence or two, what was found."""
        if not self.weights:
            return "All weights are equal: the models are the same."
        said = f"The models part by {self.kl} nats a token; the loss changes by {self.loss_change}."
        said += self._favourite()
        if not self.named:
            return f"{said} No single word makes them part much further than random words do."
        words = ", ".join(f"{t.text!r} ({t.ratio:.3g} times)" for t in self.named)
        return f"{said} They part much further than after random words after {words}."

    def _favourite(self) -> str:
        """What the other model most often goes on with where they part, and base does not."""
        new = [p.other[0][0] for p in self.partings if p.other[0][0] != p.base[0][0]]
        if not new:
            return ""
        token, count = Counter(new).most_common(1)[0]
        texts = f"in {count} of the {len(self.partings)} texts in which they part most"
        return f" Where they begin to part, the other model goes on with {token!r} {texts}."

    def __repr__(self) -> str:
        word = "".join(f", trigger {t.text!r}" for t in self.named)
        return f"ModelDiff({len(self.weights)} weights differ, KL {self.kl}{word})"

    def as_dict(self) -> dict[str, Any]:
        """JSON data; None for what is not defined."""
        intervals = ("kl", "loss_base", "loss_other", "loss_change")
        content = {name: getattr(self, name) for name in ("base", "other", "texts", "tokens")}
        content |= {name: getattr(self, name).as_dict() for name in intervals}
        content["moved"] = self.moved
        rows = ("weights", "partings", "excess", "triggers")
        content |= {name: [dataclasses.asdict(r) for r in getattr(self, name)] for name in rows}
        content["answers"] = [dict(zip(("prompt", "base", "other"), a)) for a in self.answers]
        content["features"] = None if self.features is None else self.features.as_dict()
        return finite(content | {"verdict": self.verdict()})

    def tables(self, count: int = SHOWN) -> dict[str, list[list[Any]]]:
        """Heading -> rows, the first of which names them; at most `count` rows each."""
        likely = lambda some: ", ".join(f"{t!r} {p:.2f}" for t, p in some)
        found: dict[str, list[list[Any]]] = {
            "Figures": [
                ["on the texts", "value"],
                ["KL(base || other), nats a token", str(self.kl)],
                ["loss of base, nats a token", str(self.loss_base)],
                ["loss of other", str(self.loss_other)],
                ["change of the loss", str(self.loss_change)],
            ],
            "Candidates for a trigger, in neutral texts": [
                ["token", "from", "largest KL", "times random words", "above"],
                *(
                    [repr(t.text), t.source, str(t.kl), f"{t.ratio:.3g}", f"{t.above:.0%}"]
                    for t in self.triggers[:count]
                ),
            ],
            "Tokens that go with a large KL": [
                ["token", "largest KL with it", "without", "family p"],
                *(
                    [repr(e.text), f"{e.high:.3g}", f"{e.low:.3g}", f"{e.p:.2g}"]
                    for e in self.excess[:count]
                ),
            ],
            "Where the models begin to part": [
                ["text up to there", "next by base", "next by other", "KL"],
                *(
                    [repr(p.before), likely(p.base), likely(p.other), f"{p.kl:.2f}"]
                    for p in self.partings[:count]
                ),
            ],
            "After the strongest candidates": [
                ["text", "base", "other"],
                *([repr(cell) for cell in row] for row in self.answers),
            ],
            "Residual stream": [
                ["layer", "difference over size"],
                *([layer, f"{m:.4f}"] for layer, m in enumerate(self.moved)),
            ],
            "Weights": [
                ["weight", "layer", "difference over size", "rank (99%)", "of"],
                *(
                    [w.name, "" if w.layer is None else w.layer, f"{w.size:.2g}",
                     "" if w.rank is None else w.rank, "" if w.full is None else w.full]
                    for w in self.weights[:count]
                ),
            ],
        }  # fmt: skip
        if self.features is not None:
            found |= self.features.tables(count)
        return {heading: rows for heading, rows in found.items() if len(rows) > 1}

    def __str__(self) -> str:
        names = f"{self.base['name']} and {self.other['name']}"
        return f"{names}, {self.texts} texts\n{self.verdict()}\n\n{text_tables(self.tables())}"
