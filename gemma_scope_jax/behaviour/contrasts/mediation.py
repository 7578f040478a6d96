"""What `mediate` returns: how the behaviour moved, against chance, and what else did."""

import dataclasses
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.statistics import Interval
from gemma_scope_jax.circuits.tables import text_tables
from gemma_scope_jax.storage.strict_json import finite


@dataclasses.dataclass(frozen=True)
class Change:
    """A mean over items before and after an edit, and of the items' changes (a paired interval)."""

    before: Interval
    after: Interval
    change: Interval

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name).as_dict() for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, eq=False)
class Mediation:
    """What `mediate` returns; printed, tables.

    how, features  what was done to which features: ids, or (layer, feature) of several layers
    behaviour      its mean before and after
    removed        the share of the behaviour that is gone; NaN if there was none to begin with
    controls       the mean change by each random set, float64 [C]
    beyond         the change less the mean change by random sets, or None without them
    side_effects   by name
    """

    how: str
    features: tuple[Any, ...]
    behaviour: Change
    removed: Interval
    controls: np.ndarray
    beyond: Interval | None
    side_effects: dict[str, Change]
    level: float

    @property
    def rank_p(self) -> float:
        """How often a random set changes the behaviour as much, in either direction, the found set
        counted too: 1 / (C + 1) at best. NaN without random sets."""
        if not len(self.controls):
            return float("nan")
        above = np.abs(self.controls) >= abs(self.behaviour.change.value)
        return float((1 + above.sum()) / (1 + len(self.controls)))

    @property
    def can_tell(self) -> bool:
        """Whether there are random sets enough for `rank_p` to come down to `level`."""
        return bool(self.level * (1 + len(self.controls)) >= 1)

    @property
    def mediates(self) -> bool:
        """Whether the change is not chance: its intervals exclude 0, by itself and beyond that of
        random sets, and `rank_p` is at most `level`."""
        apart = self.beyond is not None and self.beyond.excludes(0.0)
        return apart and self.behaviour.change.excludes(0.0) and self.rank_p <= self.level

    def verdict(self) -> str:
        """In a sentence, what was found."""
        named = f"{self.how} of {len(self.features) or 'the'} "
        named += (
            "feature" if len(self.features) == 1 else "features" if self.features else "directions"
        )
        moved = f"{named}: the behaviour changes by {self.behaviour.change}"
        if not len(self.controls):
            return f"{moved}; without random sets this says little."
        if not self.can_tell:
            few = f"{len(self.controls)} random sets are too few to tell whether that is chance"
            return f"{moved}; {few}."
        by = f"p {self.rank_p:.2g} among {len(self.controls)} matched random sets"
        if not self.mediates:
            return f"{moved}, which is not shown to be more than chance ({by})."
        return f"{moved} ({by}){self._gone()}."

    def _gone(self) -> str:
        share = self.removed.value
        if np.isnan(share):
            return ""
        return f"; {share:.0%} of it is gone" if share > 0 else f"; it grows by {-share:.0%}"

    def __repr__(self) -> str:
        return f"Mediation({self.verdict()})"

    def as_dict(self) -> dict[str, Any]:
        """JSON data; None for what is not defined."""
        return finite({
            "how": self.how,
            "features": [list(f) if isinstance(f, tuple) else f for f in self.features],
            "mediates": self.mediates,
            "can_tell": self.can_tell,
            "level": self.level,
            "behaviour": self.behaviour.as_dict(),
            "removed": self.removed.as_dict(),
            "controls": self.controls.tolist(),
            "rank_p": self.rank_p,
            "beyond_controls": None if self.beyond is None else self.beyond.as_dict(),
            "side_effects": {name: c.as_dict() for name, c in self.side_effects.items()},
        })  # fmt: skip

    def tables(self) -> dict[str, list[list[Any]]]:
        """Heading -> rows, the first of which names them."""
        b = self.behaviour
        rows = [["", "behaviour", "change"], ["as it is", str(b.before), ""]]
        rows.append([f"with {self.how}", str(b.after), str(b.change)])
        if len(self.controls):
            low, high = self.controls.min(), self.controls.max()
            spread = f"{self.controls.mean():.3g} (from {low:.3g} to {high:.3g})"
            rows.append([f"{len(self.controls)} matched random sets", "", spread])
            rows.append(["beyond these", "", str(self.beyond)])
        none = "undefined: as it is, the behaviour may be none"
        share = none if np.isnan(self.removed.value) else str(self.removed)
        rows.append(["share removed", "", share])
        found: dict[str, list[list[Any]]] = {"Mediation": rows}
        if self.side_effects:
            found["Side effects"] = [
                ["", "before", "after", "change"],
                *([n, str(c.before), str(c.after), str(c.change)]
                  for n, c in self.side_effects.items()),
            ]  # fmt: skip
        return found

    def __str__(self) -> str:
        return f"{self.verdict()}\n\n{text_tables(self.tables())}"
