"""Whether features carry a behaviour: change them, and see whether it moves.

    found = gs.contrast(model, coder, arms)
    print(gs.mediate(outcome, coder, found, side_effects={"loss on plain text": loss}))

`outcome` runs the model under the intercepts that it is given and returns one number an item, such
as the log-probability of the biased ending. A feature that differs between arms may be a mere sign
of the behaviour: then changing it does nothing. Changing any features does something, so the change
is held against that by random sets, as many, as often active and writing as much.

Edits are data: the model is compiled once for the found set and all random ones.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.contrasts.activity import FeatureActivity, matched_sets
from gemma_scope_jax.behaviour.contrasts.differences import Contrast
from gemma_scope_jax.behaviour.contrasts.mediation import Change, Mediation
from gemma_scope_jax.behaviour.statistics import FEWEST, Interval, bootstrap
from gemma_scope_jax.circuits.interventions import checked_feature, edit_features
from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import check_finite, whole_number
from gemma_scope_jax.model.intercept import Intercept, token_mask, tokenwise, write
from gemma_scope_jax.progress import Progress

ALONG = 0.5  # the cosine above which a feature's direction is no control of others
Edit = Literal["ablate", "clamp", "project"]
Outcome = Callable[[list[Intercept]], np.ndarray]  # float [n]: a number an item
Pair = tuple[int, int]  # a layer of the model and a feature
Activities = FeatureActivity | Mapping[int, FeatureActivity]


def mediate(
    outcome: Outcome,
    coder: Coder | CoderSet | Iterable[Coder],
    features: Contrast | Sequence[int] | Sequence[Pair] = (),
    *,
    how: Edit = "ablate",
    value: float | Sequence[float] | None = None,
    directions: Any = None,
    controls: int = 20,
    activity: Activities | None = None,
    side_effects: Mapping[str, Outcome] | None = None,
    without: float = 0.0,
    clusters: Any = None,
    level: float = 0.05,
    seed: int = 0,
) -> Mediation:
    """How the behaviour changes when features are changed, against matched random features.

    outcome     a number for each of at least 5 items, under a list of intercepts
    features    a `Contrast`, for the features of its sparse probe; ids; or for coders of several
                layers (layer, feature), as `Supernodes.features()` has them
    how         "ablate" to 0, "clamp" to `value` (a number or one a feature), or "project": take
                the features' directions, or `directions` [n, D], out of what the coder writes
    controls    random sets; 19 at least for a p of 0.05
    activity    `feature_activity` on texts like the items, of several layers by layer: random
                features are drawn among the nearest in firing rate and in size of what they write.
                A `Contrast` has its own
    side_effects  what else may break, each measured as the behaviour is
    without     the outcome's value where there is no behaviour, for the share that is removed
    clusters    [n]: items that belong together, for the intervals

    Controls of `directions` are the directions of random active features, without those that have a
    cosine above 0.5 with them. Those of "clamp" are clamped so that they write as much. Raises
    `InputError` for outcomes that are no numbers or change in number, unknown features, and
    controls without `activity`.
    """
    coders = CoderSet(coder)
    found, activity = _features(coders, features, activity)
    edits = _Edits(coders, how, _values(how, value, len(found)), _directions(how, directions))
    if not len(found) and edits.given is None:
        raise InputError("mediate needs features, or directions with how='project'")
    sets = _controls(coders, found, edits, activity, whole_number("controls", controls, 0), seed)
    runs = Progress(2 + len(sets) + 2 * len(side_effects or {}), "runs", what="mediation")
    measure = _Measured(runs)
    before = measure("the outcome", outcome, [])
    own = edits.of(found, found)
    again = lambda some: measure("the outcome", outcome, edits.of(some, found), len(before))
    after = again(found)
    moved = [again(some) - before for some in sets]
    options: dict[str, Any] = {"clusters": clusters, "level": 1 - level, "seed": seed}
    broken = {}
    for name, effect in (side_effects or {}).items():
        clean = measure(name, effect, [])
        changed = measure(name, effect, own, len(clean))
        broken[name] = _change(clean, changed, {"level": 1 - level, "seed": seed})
    change = after - before
    beyond = None if not moved else bootstrap(change - np.mean(moved, 0), **options)
    return Mediation(
        how=how,
        features=tuple(found) if len(coders.layers) > 1 else tuple(f for _, f in found),
        behaviour=_change(before, after, options),
        removed=_removed(before, after, without, options),
        controls=np.array([m.mean() for m in moved]),
        beyond=beyond,
        side_effects=broken,
        level=level,
    )


@dataclasses.dataclass
class _Measured:
    """Calls outcomes, checks what they return, and counts."""

    runs: Progress
    done: int = 0

    def __call__(self, name: str, outcome: Outcome, items: list[Intercept], n: int | None = None):
        found = np.asarray(outcome(items), np.float64)
        if found.ndim != 1 or len(found) < FEWEST or not np.isfinite(found).all():
            wanted = f"must return at least {FEWEST} finite numbers, one an item"
            raise InputError(f"{name} {wanted}, not {found.dtype}{list(found.shape)}")
        if n is not None and len(found) != n:
            raise InputError(f"{name} returned {n} numbers, and {len(found)} with the edit")
        self.done += 1
        self.runs.at(self.done)
        return found


def _change(before: np.ndarray, after: np.ndarray, options: dict[str, Any]) -> Change:
    return Change(*(bootstrap(x, **options) for x in (before, after, after - before)))


def _removed(
    before: np.ndarray, after: np.ndarray, without: float, options: dict[str, Any]
) -> Interval:
    """The share of the behaviour that is gone; NaN unless there was some to begin with: the outcome
    is larger where the behaviour is stronger, so below `without` a share would mean nothing."""
    if not bootstrap(before - without, **options).low > 0.0:
        return Interval(float("nan"), float("nan"), float("nan"), len(before))
    # of a draw without any behaviour, not finite: left out
    share = lambda rows: (
        (rows[:, 0] - rows[:, 1]).mean() / ((rows[:, 0].mean() - without) or np.nan)
    )
    return bootstrap(np.stack([before, after], 1), share, **options)


# --- What is changed -----------------------------------------------------------------------------


def _features(
    coders: CoderSet, given: Any, activity: Activities | None
) -> tuple[list[Pair], dict[int, FeatureActivity]]:
    """The (layer, feature) meant, and the activity by layer."""
    if isinstance(given, Contrast):
        activity, given = given.activity if activity is None else activity, given.chosen
    if isinstance(activity, FeatureActivity):
        if len(coders.layers) != 1:
            raise InputError("activity of coders of several layers must be given by layer")
        activity = {coders.layers[0]: activity}
    found = []
    for one in given:
        pair = tuple(one) if isinstance(one, tuple | list) else (None, one)
        layer = coders.layers[0] if len(coders.layers) == 1 and pair[0] is None else pair[0]
        if len(pair) != 2 or layer is None:
            raise InputError(f"feature {one!r}: of coders of several layers give (layer, feature)")
        found.append(checked_feature(coders, layer, pair[1]))
    if len(set(found)) != len(found):
        raise InputError("a feature is named twice")
    return found, dict(activity or {})


def _values(how: str, value: Any, count: int) -> np.ndarray:
    """What each feature is set to, float64 [n]."""
    if how not in ("ablate", "clamp", "project"):
        raise InputError(f"how is {how!r}; known are ablate, clamp, project")
    if (value is None) == (how == "clamp"):
        raise InputError("clamp needs a value" if how == "clamp" else f"{how} takes no value")
    value = 0.0 if value is None else value
    check_finite("the value", value)
    found = np.asarray(value, np.float64)
    if found.shape not in ((), (count,)):
        raise InputError(f"value must be a number or one for each of {count} features")
    return np.broadcast_to(found, (count,))


def _directions(how: str, directions: Any) -> np.ndarray | None:
    if directions is None:
        return None
    if how != "project":
        raise InputError("directions are for how='project'")
    check_finite("directions", directions)
    found = np.atleast_2d(np.asarray(directions, np.float64))
    if found.ndim != 2 or np.linalg.matrix_rank(found) < len(found):
        raise InputError("directions must be [n, D], none of them a sum of others")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Edits:
    """The kind of edit; `of` makes its intercepts for one set of features."""

    coders: CoderSet
    how: str
    values: np.ndarray
    given: np.ndarray | None  # directions

    def of(self, some: Sequence[Pair], found: Sequence[Pair]) -> list[Intercept]:
        """The intercepts for the set `some`; what is clamped writes as much as `found` would."""
        if self.how == "project":
            own = self.given is not None and list(some) == list(found)
            rows = self.given if own else self.rows(some)
            assert rows is not None
            coder = self.coders[0]
            unit = np.linalg.qr(rows.T)[0].T.astype(np.float32)
            options = {"first": coder.first}
            return [write(coder.writes, coder.layers[0], project_out, unit, **options)]
        values = self.values
        if self.how == "clamp" and list(some) != list(found):
            values = values * self.norms(found) / np.maximum(self.norms(some), 1e-30)
        rows = [(layer, None, f, float(v)) for (layer, f), v in zip(some, values)]
        return edit_features(self.coders, rows)

    def rows(self, some: Sequence[Pair]) -> np.ndarray:
        """What the features write at their own layer, float64 [n, D]."""
        found: list[Any] = [None] * len(some)
        for layer in {layer for layer, _ in some}:
            coder, at = (
                self.coders.at(layer),
                [n for n, pair in enumerate(some) if pair[0] == layer],
            )
            i = coder.layers.index(layer)
            written = np.asarray(coder.written(i, i, np.array([some[n][1] for n in at])))
            for n, row in zip(at, written):
                found[n] = row
        return np.array(found, np.float64)

    def norms(self, some: Sequence[Pair]) -> np.ndarray:
        return np.linalg.norm(self.rows(some), axis=1)


@tokenwise
def project_out(x: jax.Array, ctx: Any, unit: Any, *, first: int) -> jax.Array:
    """x [B, T, D] without its components along the orthonormal `unit` [n, D], from `first` on."""
    wide = float32(x)
    unit = float32(unit)
    along = jnp.einsum("btd,nd->btn", wide, unit, precision=jax.lax.Precision.HIGHEST)
    part = jnp.einsum("btn,nd->btd", along, unit, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(token_mask(ctx, x, first), (wide - part).astype(x.dtype), x)


def _controls(
    coders: CoderSet,
    found: list[Pair],
    edits: _Edits,
    activity: dict[int, FeatureActivity],
    count: int,
    seed: int,
) -> list[list[Pair]]:
    """`count` sets of random features like the found ones, layer by layer in their order."""
    if edits.how == "project" and len(coders.layers) != 1:
        raise InputError("project is for a coder of one layer: take one with .at(layer)")
    layers = sorted({layer for layer, _ in found}) if edits.given is None else list(coders.layers)
    if count and not all(layer in activity for layer in layers):
        raise InputError(
            "controls are matched in firing rate and size: give activity=gs.feature_activity(model,"
            " coder, texts), or controls=0"
        )
    for layer in layers:
        if count and len(activity[layer].rate) != coders.at(layer).width:
            raise InputError(f"the activity given for layer {layer} is of another coder")
    sets: list[dict[Pair, Pair]] = [{} for _ in range(count)]
    if edits.given is not None:
        return _other_directions(coders[0], edits, activity.get(layers[0]), count, seed)
    for layer in layers:
        own = np.array([f for at, f in found if at == layer])
        others = matched_sets(activity[layer], own, count, seed) if count else ()
        for mapping, row in zip(sets, others):
            mapping |= {(layer, f): (layer, g) for f, g in zip(own.tolist(), row.tolist())}
    return [[mapping[pair] for pair in found] for mapping in sets]


def _other_directions(
    coder: Coder, edits: _Edits, activity: FeatureActivity | None, count: int, seed: int
) -> list[list[Pair]]:
    """`count` sets of active features whose directions are others than the given."""
    if activity is None or edits.given is None:  # no controls
        return []
    layer, (n, _) = coder.layers[0], edits.given.shape
    live = np.flatnonzero(activity.rate > 0)
    rows = edits.rows([(layer, int(f)) for f in live])
    along = np.linalg.norm(rows @ np.linalg.qr(edits.given.T)[0], axis=1)
    live = live[along <= ALONG * np.linalg.norm(rows, axis=1)]
    if len(live) < n and count:
        raise InputError("too few features are active for controls of the directions")
    draw = np.random.default_rng([seed, 4])
    return [[(layer, int(f)) for f in draw.permutation(live)[:n]] for _ in range(count)]
