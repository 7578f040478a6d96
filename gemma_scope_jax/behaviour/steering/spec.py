"""Steering as data: what is done to activations, where and when, as a list of steps.

    spec = gs.steer_spec([{"op": "add", "strength": 4.0, "coder": NAME, "feature": 4510}])
    gs.generate(model, ids[None], 40, gs.steering(model, spec))

A step is one operation on a direction or on a feature, at some tokens of a text, always or only
where another feature fires. A spec goes to JSON and back, so it can be stored beside what it did;
`gs.steering` makes intercepts of it, see `steering_rows.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.arguments import check_finite, whole_number
from gemma_scope_jax.model.intercept import LAYER_SITES
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.paths import expanded

DIRECTION_OPS = ("add", "rescale", "cap", "floor", "project_out")
FEATURE_OPS = ("clamp", "clamp_min", "clamp_max", "scale", "ablate", "swap")
OPS = DIRECTION_OPS + FEATURE_OPS
PLACES = ("all", "prompt", "generated", "last")
ROLES = ("system", "user", "model", "turn")
FORMAT = {"format": "gemma_scope_jax steering", "version": 1}
WITHOUT_STRENGTH = ("project_out", "ablate", "swap")


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """One number a token: a feature's activation, or `vector . x + bias` at a site.

    coder, feature  a feature; `layer` says which, for a coder of several layers
    vector, bias    else a direction, read from `site` of `layer`
    """

    coder: str = ""
    feature: int | None = None
    layer: int | None = None
    vector: np.ndarray | None = None
    bias: float = 0.0
    site: str = "resid_post"


@dataclasses.dataclass(frozen=True, eq=False)
class When:
    """A condition: a step acts at the tokens whose `reading` is above `above`, or not above
    `below`: a `below` of 0 means that a feature is not active."""

    reading: Reading
    above: float | None = None
    below: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringStep:
    """One operation. With x the activation, v the direction (a vector, or what the feature writes),
    u = v / |v|, p = x . u, f the feature's activation and s the strength, it adds to x:

        add          s v; in_norms: s |x| u            clamp      (s - f) v
        rescale      (s - 1) p u                       clamp_min  max(s - f, 0) v
        cap          min(s - p, 0) u                   clamp_max  min(s - f, 0) v
        floor        max(s - p, 0) u                   scale      (s - 1) f v
        project_out  -p u                              ablate     -f v
        swap         (g - f) (v - w), where g and w are the activation and direction of `other`

    op        one of these
    strength  s
    target    what v and f are
    other     of swap: a feature of the same coder and layer
    in_norms  of add, cap and floor: s counts in norms |x| of the token's own activation
    where     "all" tokens, those of the "prompt", its "last" one, the "generated" ones; absolute
              positions (a tuple of ints); a range (slice); or roles of a chat (a tuple of names,
              of which "model" includes what is generated)
    first     tokens before this position are left alone; default: the coder's own first, else 1
    when      None, or a condition read at the same token, in the run as changed so far
    """

    op: str
    target: Reading
    strength: float = 0.0
    other: int | None = None
    in_norms: bool = False
    where: str | tuple[int, ...] | tuple[str, ...] | slice = "all"
    first: int | None = None
    when: When | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SteeringSpec:
    """Steps, which act in this order where they meet at one site. `gs.steer_spec` makes them."""

    steps: tuple[SteeringStep, ...]
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON that `gs.steer_spec` reads back to the same spec."""
        named = {"name": self.name} if self.name else {}
        return {**FORMAT, **named, "steps": [_step_json(step) for step in self.steps]}

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file. Raises `InputError` if it cannot be written."""
        write_text(expanded(path), json.dumps(self.as_dict()) + "\n")

    def times(self, factor: float) -> "SteeringSpec":
        """The spec with every strength multiplied. At 0, add does nothing; rescale and scale
        remove, clamp and cap hold at 0."""
        check_finite("the factor of a spec", factor)
        some = (dataclasses.replace(s, strength=s.strength * factor) for s in self.steps)
        return dataclasses.replace(self, steps=tuple(some))

    def __repr__(self) -> str:
        """One line without arrays."""
        return f"SteeringSpec({', '.join(map(_said, self.steps))})"


def adding(target: Reading, strength: float, first: int | None = None) -> SteeringSpec:
    """A direction added to every token from `first` on, in norms of the token's own activation."""
    return SteeringSpec((SteeringStep("add", target, strength, in_norms=True, first=first),))


def checked_step(step: SteeringStep) -> SteeringStep:
    """The step itself. Raises `InputError` if its parts do not fit each other."""
    what = f"steering: {step.op}"
    if step.op not in OPS:
        raise InputError(f"steering: unknown op {step.op!r}{nearest(str(step.op), OPS)}")
    check_finite(f"the strength of {step.op}", step.strength)
    _check_reading(step.target, what)
    if step.target.bias:
        raise InputError(f"{what}: a bias belongs to a condition, not to what is written")
    if step.op in FEATURE_OPS and step.target.feature is None:
        raise InputError(f"{what} changes a feature: give coder and feature, not a vector")
    if (step.op == "swap") != (step.other is not None):
        raise InputError(f"{what}: `other`, the second feature, belongs to swap alone")
    if step.op == "swap" and step.other == step.target.feature:
        raise InputError(f"{what}: feature {step.other} cannot be swapped with itself")
    if step.in_norms and step.op not in ("add", "cap", "floor"):
        raise InputError(f"{what}: unit norm is for add, cap and floor")
    _check_where(step.where, what)
    if step.first is not None:
        whole_number(f"{what}: first", step.first, 0)
    if step.when is not None:
        _check_reading(step.when.reading, f"{what}: when")
        if (step.when.above is None) == (step.when.below is None):
            raise InputError(f"{what}: when needs either above or below, a number")
        check_finite(f"{what}: when", step.when.above if step.when.below is None else 0.0)
        check_finite(f"{what}: when", step.when.below if step.when.above is None else 0.0)
    return step


def _check_reading(reading: Reading, what: str) -> None:
    if (reading.feature is None) == (reading.vector is None):
        raise InputError(f"{what}: give either coder and feature, or a vector")
    if reading.layer is not None:
        whole_number(f"{what}: layer", reading.layer, 0)
    if reading.feature is not None:
        whole_number(f"{what}: feature", reading.feature, 0)
        return
    vector = np.asarray(reading.vector)
    check_finite(f"{what}: vector", vector)
    if vector.ndim != 1 or not vector.any():
        raise InputError(f"{what}: vector must be one row of numbers, not all of them 0")
    if reading.site not in LAYER_SITES or reading.site == "attn_pattern":
        hint = nearest(str(reading.site), LAYER_SITES)
        raise InputError(f"{what}: site {reading.site!r} is not inside a layer{hint}")
    if reading.layer is None:
        raise InputError(f"{what}: a vector needs the layer it is for")


def _check_where(where: Any, what: str) -> None:
    if isinstance(where, slice):
        ends = (where.start, where.stop)
        numbers = [whole_number(f"{what}: where", n, 0) for n in ends if n is not None]
        if where.step not in (None, 1) or (len(numbers) == 2 and numbers[1] <= numbers[0]):
            raise InputError(f"{what}: where holds no positions")
    elif isinstance(where, str):
        if where not in PLACES:
            raise InputError(f"{what}: where is {where!r}{nearest(where, PLACES)}")
    elif not isinstance(where, tuple) or not where:
        raise InputError(f"{what}: where is {where!r:.60}, not a place, positions or roles")
    elif all(isinstance(n, str) for n in where):
        if bad := set(where) - set(ROLES):
            raise InputError(f"{what}: no role {min(bad)!r}; there are {', '.join(ROLES)}")
    else:
        for n in where:
            whole_number(f"{what}: a position", n, 0)


# --- As JSON -------------------------------------------------------------------------------------


def _reading_json(reading: Reading) -> dict[str, Any]:
    if reading.vector is not None:
        vector = [float(v) for v in np.asarray(reading.vector, np.float32)]
        bias = {"bias": reading.bias} if reading.bias else {}
        return {"site": reading.site, "layer": reading.layer, "vector": vector, **bias}
    layer = {} if reading.layer is None else {"layer": reading.layer}
    coder = {"coder": reading.coder} if reading.coder else {}
    return {**coder, "feature": reading.feature, **layer}


def _step_json(step: SteeringStep) -> dict[str, Any]:
    found: dict[str, Any] = {"op": step.op}
    if step.op not in WITHOUT_STRENGTH:
        found["strength"] = step.strength
    found |= _reading_json(step.target)
    found |= {} if step.other is None else {"other": step.other}
    found |= {"unit": "norm"} if step.in_norms else {}
    if isinstance(step.where, slice):
        ends = {"from": step.where.start, "to": step.where.stop}
        found["where"] = {k: v for k, v in ends.items() if v is not None}
    elif isinstance(step.where, tuple):
        names = isinstance(step.where[0], str)
        found["where"] = {"roles": list(step.where)} if names else list(step.where)
    elif step.where != "all":
        found["where"] = step.where
    found |= {} if step.first is None else {"first": step.first}
    if step.when is not None:
        ends = {"above": step.when.above, "below": step.when.below}
        kept = {k: v for k, v in ends.items() if v is not None}
        found["when"] = {**_reading_json(step.when.reading), **kept}
    return found


def _said(step: SteeringStep) -> str:
    t = step.target
    what = f"feature {t.feature}" if t.vector is None else f"a vector at {t.site} {t.layer}"
    strength = "" if step.op in WITHOUT_STRENGTH else f" {step.strength:g}"
    return f"{step.op}{strength}{' norms' if step.in_norms else ''} of {what}"
