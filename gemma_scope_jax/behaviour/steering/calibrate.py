"""Which strength to steer with: chosen on one half of the prompts, scored on the other.

More strength gives more effect until the text falls apart. For each group of arms (a feature, a
baseline) the strength is chosen on half of the prompts as the one with the largest effect among
those whose text the unchanged model still finds likely enough, and what is reported is the other
half, so that the choice does not flatter itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.statistics import FEWEST, Interval, bootstrap
from gemma_scope_jax.behaviour.steering.sweep import Sweep
from gemma_scope_jax.circuits.tables import text_tables
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.strict_json import finite

FEWEST_PROMPTS = 4  # two choose, two are scored
CLEAN = "unsteered"


@dataclasses.dataclass(frozen=True)
class StrengthFigures:
    """One arm on one half of the prompts.

    effect      the mean, and `gain` its paired difference to the unsteered text
    perplexity  the ratio to the unsteered text's, under the unchanged model: exp of the mean
                difference of the losses
    repetition  the mean share of repeated trigrams
    """

    strength: float
    effect: Interval
    gain: Interval
    perplexity: Interval
    repetition: Interval

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        parts = dataclasses.fields(self)[1:]
        return {"strength": self.strength} | {
            f.name: getattr(self, f.name).as_dict() for f in parts
        }


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """One group: its curve on both halves, and what was chosen.

    chosen    the recommended strength; None if none raises the effect within the bound, and for
              groups without strengths, such as a prompt
    range     the strengths around it, within the bound, with at least half of its gain on the half
              it was chosen on
    held_out  the figures of `chosen` on the other half; those of the unsteered text if no strength
              helps
    within_bound  whether these are within the bound; None if no strength helps
    """

    group: str
    curve: tuple[StrengthFigures, ...]
    held_out_curve: tuple[StrengthFigures, ...]
    chosen: float | None
    range: tuple[float, float] | None
    held_out: StrengthFigures
    within_bound: bool | None

    @property
    def helps(self) -> bool:
        """Whether the held-out prompts show a gain: there are 5 at least, and its interval is above
        0."""
        gain = self.held_out.gain
        return gain.n >= FEWEST and gain.low > 0

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "group": self.group,
            "chosen": self.chosen,
            "helps": self.helps,
            "range": self.range and list(self.range),
            "within_bound": self.within_bound,
            "held_out": self.held_out.as_dict(),
            "curve": [f.as_dict() for f in self.curve],
            "held_out_curve": [f.as_dict() for f in self.held_out_curve],
        }


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The groups of a sweep, in its order; see `calibrate`."""

    groups: tuple[Calibrated, ...]
    effect: str
    bound: float
    chosen_on: tuple[int, ...]  # prompts
    scored_on: tuple[int, ...]

    def __getitem__(self, group: str) -> Calibrated:
        for one in self.groups:
            if one.group == group:
                return one
        raise InputError(f"no group {group!r}; there are {', '.join(g.group for g in self.groups)}")

    def as_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return finite({
            "effect": self.effect,
            "bound": self.bound,
            "chosen_on": list(self.chosen_on),
            "scored_on": list(self.scored_on),
            "groups": [g.as_dict() for g in self.groups],
        })  # fmt: skip

    def tables(self) -> dict[str, list[list[Any]]]:
        """Heading -> rows, of which the first names the columns."""
        head = ["", "strength", "range", "effect", "gain", "", "perplexity x", "repetition"]
        rows: list[list[Any]] = [head]
        for g in self.groups:
            h = g.held_out
            span = "" if g.range is None else " to ".join(f"{s:g}" for s in sorted({*g.range}))
            strength = "none helps" if g.chosen is None else f"{g.chosen:g}"
            if g.chosen is None and g.within_bound is not None:  # there was nothing to choose
                strength = "" if g.within_bound else "beyond the bound"
            said = g.helps or g.group == CLEAN or strength == "none helps"
            gain = [str(h.gain), "" if said else "not shown"]
            rest = [str(h.perplexity), str(h.repetition)]
            rows.append([g.group, strength, span, str(h.effect), *gain, *rest])
        count = (
            f"{len(self.scored_on)} prompts, the strength chosen on {len(self.chosen_on)} others"
        )
        return {f"{self.effect}, on {count}": rows}

    def __str__(self) -> str:
        """The tables as text."""
        return text_tables(self.tables())

    def __repr__(self) -> str:
        """One line."""
        said = ", ".join(f"{g.group} {g.chosen}" for g in self.groups)
        return f"Calibration({self.effect}: {said})"


def calibrate(
    sweep: Sweep, *, effect: str = "", bound: float = 2.0, repetition: float = 0.2, seed: int = 0
) -> Calibration:
    """Choose each group's strength on half of the prompts, and score it on the others.

    effect      which of the sweep's effects; default: its only one
    bound       the largest allowed ratio of perplexity to the unsteered text's
    repetition  how much more of the text may be repeated trigrams than in the unsteered text
    The sweep needs an arm without spec, the unsteered text, and at least four prompts. Intervals
    are over prompts. Raises `InputError`.
    """
    effect = effect or next(iter(sweep.effects))
    if effect not in sweep.effects:
        raise InputError(f"no effect {effect!r}; there are {', '.join(sweep.effects)}")
    check_prompts(sweep.prompts)
    check_bound(bound)
    clean = next(
        (a for a, arm in enumerate(sweep.arms) if not arm.before and arm.spec is None), None
    )
    if clean is None:
        raise InputError("the sweep needs an arm without spec: the unsteered text")
    order = np.random.default_rng(seed).permutation(len(sweep.prompts))
    halves = np.sort(order[::2]), np.sort(order[1::2])
    groups: dict[str, list[int]] = {}
    for a, arm in enumerate(sweep.arms):
        groups.setdefault(CLEAN if a == clean else arm.group or arm.name, []).append(a)
    limits = bound, repetition
    found = [
        _group(sweep, effect, name, arms, clean, halves, limits) for name, arms in groups.items()
    ]
    chosen_on, scored_on = (tuple(int(i) for i in half) for half in halves)
    return Calibration(tuple(found), effect, bound, chosen_on, scored_on)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise `InputError` unless there are enough for both halves."""
    if (n := len(prompts)) < FEWEST_PROMPTS:
        raise InputError(f"a calibration needs at least {FEWEST_PROMPTS} prompts, not {n}")


def check_bound(bound: float) -> None:
    """Raise `InputError` unless this can be a bound on the ratio of perplexities."""
    if not bound >= 1.0:
        raise InputError(f"bound is a ratio of perplexities, at least 1, not {bound}")


def _figures(sweep: Sweep, effect: str, arm: int, clean: int, half: np.ndarray) -> StrengthFigures:
    values, loss = sweep.effects[effect][:, half], sweep.loss[:, half]
    ratio = bootstrap(loss[arm] - loss[clean])
    value, low, high = (float(np.exp(x)) for x in (ratio.value, ratio.low, ratio.high))
    ratio = Interval(value, low, high, ratio.n)
    return StrengthFigures(
        sweep.arms[arm].strength,
        bootstrap(values[arm]),
        bootstrap(values[arm] - values[clean]),
        ratio,
        bootstrap(sweep.repetition[arm, half]),
    )


def _group(sweep, effect, name, arms, clean, halves, limits) -> Calibrated:
    bound, repetition = limits
    arms = sorted(arms, key=lambda a: sweep.arms[a].strength)
    curve, other = ([_figures(sweep, effect, a, clean, half) for a in arms] for half in halves)
    base = [_figures(sweep, effect, clean, clean, half) for half in halves]
    fits = lambda f, b: (
        f.perplexity.value <= bound and f.repetition.value <= b.repetition.value + repetition
    )
    good = [f for f in curve if fits(f, base[0]) and f.gain.value > 0]
    if all(sweep.arms[a].spec is None for a in arms):  # the unsteered text, a prompt: no choice
        held = other[-1]
        return Calibrated(name, tuple(curve), tuple(other), None, None, held, fits(held, base[1]))
    if not good:
        return Calibrated(name, tuple(curve), tuple(other), None, None, base[1], None)
    best = max(good, key=lambda f: (f.gain.value, -abs(f.strength)))
    at = curve.index(best)
    enough = [f in good and f.gain.value >= 0.5 * best.gain.value for f in curve]
    low, high = at, at
    while low > 0 and enough[low - 1]:
        low -= 1
    while high + 1 < len(curve) and enough[high + 1]:
        high += 1
    ends = (curve[low].strength, curve[high].strength)
    held = other[at]
    return Calibrated(
        name, tuple(curve), tuple(other), best.strength, ends, held, fits(held, base[1])
    )
