"""What `contrast` returns: figures of features that differ, and of detectors beside them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gemma_scope_jax.behaviour.contrasts.activity import FeatureActivity
from gemma_scope_jax.behaviour.statistics import Interval
from gemma_scope_jax.circuits.tables import text_tables
from gemma_scope_jax.storage.strict_json import finite

NONE = "none given"

LEGEND = """\
d: Cohen's, positive where arm a has more. q: Benjamini-Hochberg over all features. stable: the
share of random halves with the feature among the top. auc: of this feature alone, in the direction
found. Means, d, p, q and auc are of texts that had no say in the choice and order of features."""


@dataclasses.dataclass(frozen=True)
class FeatureDifference:
    """How one feature differs, on texts that had no say in its choice.

    mean_a, mean_b  of the pooled activation
    fires_a, fires_b  the share of texts in which it is active
    effect          Cohen's d, see `FeatureTests`; p and q as there
    stability       the share of random halves of all texts in which it is among the k largest
    auc             of the feature alone, in the direction found; `elsewhere`: on these texts
    structural      it stands for the format, see `structural_features`
    """

    feature: int
    mean_a: float
    mean_b: float
    fires_a: float
    fires_b: float
    effect: float
    p: float
    q: float
    stability: float
    auc: float
    elsewhere: float | None
    structural: bool


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What `contrast` returns; printed, tables.

    name, coder, how  of the arms; where the coder reads; how texts are pooled
    rows       the features, those that differ most on the discovery texts first
    family_p   the alarm: p of the largest difference among all features, without structural ones,
               over all of `arms`
    tested     how many features are active anywhere
    below      how many of them have q below `level` on the reported texts
    aucs       name -> area under the ROC curve on the reported texts, with interval
    elsewhere  the same on texts from elsewhere, or None
    counts     texts of each arm: "discovery", "reported", "elsewhere"
    chosen     the features of the sparse probe
    activity   of all features on these texts, by texts instead of tokens: what random features are
               matched in by `mediate`
    """

    name: str
    coder: str
    how: str
    paired: bool
    rows: tuple[FeatureDifference, ...]
    family_p: float
    tested: int
    below: int
    level: float
    aucs: dict[str, Interval]
    elsewhere: dict[str, Interval] | None
    counts: dict[str, tuple[int, int]]
    chosen: tuple[int, ...]
    activity: FeatureActivity = dataclasses.field(compare=False)

    def features(self, count: int | None = None, *, structural: bool = False) -> list[int]:
        """The first `count` features; structural ones only if asked for."""
        kept = [row.feature for row in self.rows if structural or not row.structural]
        return kept[:count]

    @property
    def alarm(self) -> bool:
        """Whether the arms differ in any feature, at `level`."""
        return self.family_p < self.level

    def __repr__(self) -> str:
        best = f"best {self.features(1)}" if self.rows else "no feature differs"
        named = f"{self.name}, " if self.name else ""
        return f"Contrast({named}{self.coder}, family p {self.family_p:.3g}, {best})"

    def as_dict(self) -> dict[str, Any]:
        """JSON data; None for what is not defined."""
        areas = lambda some: None if some is None else {n: i.as_dict() for n, i in some.items()}
        names = ("name", "coder", "how", "paired", "tested", "below", "level", "family_p")
        return finite({
            **{name: getattr(self, name) for name in names},
            "alarm": self.alarm,
            "counts": {name: list(pair) for name, pair in self.counts.items()},
            "chosen": list(self.chosen),
            "aucs": areas(self.aucs),
            "aucs_elsewhere": areas(self.elsewhere),
            "features": [dataclasses.asdict(row) for row in self.rows],
        })  # fmt: skip

    def tables(
        self, count: int = 20, labels: Mapping[int, str] | None = None
    ) -> dict[str, list[list[Any]]]:
        """Heading -> rows, the first of which names them; `count` features, with what `labels` call
        them."""
        other = self.elsewhere or {}
        aucs = [["detector", "auc", "elsewhere"]]
        for name, area in self.aucs.items():
            aucs.append([name, str(area), str(other[name]) if name in other else NONE])
        names = ["feature", "mean a", "mean b", "d", "p", "q", "stable", "auc", "elsewhere"]
        names += [""] if labels is None else ["", "label"]
        rows: list[list[Any]] = [names]
        for r in self.rows[:count]:
            figures = f"{r.mean_a:.3g} {r.mean_b:.3g} {r.effect:+.2f} {r.p:.2g} {r.q:.2g}".split()
            far = NONE if r.elsewhere is None else f"{r.elsewhere:.2f}"
            flag = "structural" if r.structural else ""
            called = [] if labels is None else [labels.get(r.feature, "")]
            known = [f"{r.stability:.0%}", f"{r.auc:.2f}", far, flag, *called]
            rows.append([r.feature, *figures, *known])
        return {"Detection": aucs, "Features": rows}

    def verdict(self) -> str:
        """In a sentence, whether there is anything to see."""
        if not self.alarm:
            return f"No feature tells the arms apart (family p {self.family_p:.3g})."
        said = f"{self.below} of {self.tested} features differ with q < {self.level:g}"
        far = "" if self.elsewhere else "; nothing is known of texts from elsewhere"
        return f"The arms differ (family p {self.family_p:.3g}); on other texts {said}{far}."

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {a} and {b}" for name, (a, b) in self.counts.items())
        head = f"{self.name or 'contrast'}: {self.coder}, {self.how} over tokens; texts: {counts}"
        return f"{head}\n{self.verdict()}\n\n{text_tables(self.tables())}\n\n{LEGEND}"
