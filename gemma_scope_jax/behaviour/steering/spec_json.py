"""Specs of steering from JSON: our own form, and requests to Neuronpedia.

Sources: Neuronpedia, apps/webapp `/api/steer` (public) and apps/inference schemas/steer.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.steering.spec import (
    FORMAT,
    OPS,
    WITHOUT_STRENGTH,
    Reading,
    SteeringSpec,
    SteeringStep,
    When,
    checked_step,
)
from gemma_scope_jax.behaviour.steering.vectors import SteeringVector
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.strict_json import field, parse_json, read_bytes

_METHODS = {"SIMPLE_ADDITIVE": "add", "ORTHOGONAL_DECOMP": "rescale", "PROJECTION_CAP": "cap"}
_READING = {"coder", "feature", "layer", "vector", "bias", "site"}
_STEP = {"op", "strength", "other", "unit", "where", "first", "when"} | (_READING - {"bias"})


def steer_spec(given: Any, *, name: str = "") -> SteeringSpec:
    """A spec from JSON: a file, a dict, a list of steps, one step, or a request to Neuronpedia.

    A step is an object with `op`, `strength`, the target (`coder`, `feature` and, for a coder of
    several layers, `layer`; or `vector`, a list of numbers or the file of a `SteeringVector`, with
    `site`, `layer`), and any of `other`, `unit` ("norm"), `where`, `first`, `when` ({"coder",
    "feature", "above"}, or a direction with `vector`, `bias`, `above`). See `SteeringStep`.

    Of a Neuronpedia request (`features` or `vectors`, `steer_method`, `strength_multiplier`) each
    feature becomes a step; its coder is named by the source id, such as "12-gemmascope-2-res-16k":
    give `gs.steering` a dict with that key. Raises `InputError`, naming the step and the field.
    """
    if isinstance(given, SteeringSpec):
        return dataclasses.replace(given, name=name) if name else given
    where = "steering"
    if isinstance(given, (str, Path)):
        where = str(given)
        given = parse_json(read_bytes(expanded(given)), where)
    if isinstance(given, Mapping) and ("steer_method" in given or "modelId" in given):
        return SteeringSpec(_neuronpedia(given, where), name)
    if isinstance(given, Mapping):
        if "steps" in given:
            _known(given, {*FORMAT, "name", "steps"}, where)
            for key, wanted in FORMAT.items():
                if given.get(key, wanted) != wanted:
                    raise InputError(f"{where}: {key} is {given[key]!r:.60}, not {wanted!r}")
            name = name or field(given, "name", str, where, default="")
            given = field(given, "steps", list, where)
        else:
            given = [given]
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)) or not given:
        raise InputError(f"{where}: give steps, such as [{{'op': 'add', ...}}], at least one")
    steps = (
        step if isinstance(step, SteeringStep) else _step(step, f"{where}: step {n}")
        for n, step in enumerate(given)
    )
    return SteeringSpec(tuple(map(checked_step, steps)), name)


def _known(given: Any, allowed: set[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: is {given!r:.60}, not an object")
    for key in given:
        if key not in allowed:
            raise InputError(f"{where}: unknown field {key!r}{nearest(str(key), allowed)}")


def _step(given: Any, where: str) -> SteeringStep:
    _known(given, _STEP, where)
    op = field(given, "op", str, where)
    if op not in OPS:
        raise InputError(f"{where}: unknown op {op!r}{nearest(op, OPS)}")
    unit = field(given, "unit", str, where, default="")
    if unit not in ("", "norm"):
        raise InputError(f"{where}: unit is {unit!r}; the only one is 'norm'")
    given = dict(given)
    if op in WITHOUT_STRENGTH and given.get("strength") is not None:
        raise InputError(f"{where}: {op} takes no strength")
    strength = {"default": 0.0} if op in WITHOUT_STRENGTH else {}
    step = SteeringStep(
        op,
        _reading(given, where),
        field(given, "strength", float, where, **strength),
        field(given, "other", int, where, default=None, least=0),
        unit == "norm",
        _where(given.get("where", "all"), where),
        field(given, "first", int, where, default=None, least=0),
        None if given.get("when") is None else _when(given["when"], f"{where}: when"),
    )
    try:
        return checked_step(step)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('steering: ')}") from error


def _reading(given: Mapping[str, Any], where: str) -> Reading:
    vector, site = given.get("vector"), field(given, "site", str, where, default="resid_post")
    layer = field(given, "layer", int, where, default=None, least=0)
    if isinstance(vector, str):
        kept = SteeringVector.load(vector)
        vector, site = kept.vector, given.get("site") or kept.site
        layer = kept.layer if layer is None else layer
    elif vector is not None:
        field(given, "vector", list, where, least=1)
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in vector):
            raise InputError(f"{where}: vector must be a list of numbers")
        vector = np.asarray(vector, np.float32)
    coder = field(given, "coder", str, where, default="")
    feature = field(given, "feature", int, where, default=None, least=0)
    bias = field(given, "bias", float, where, default=0.0)
    return Reading(coder, feature, layer, vector, bias, site)


def _when(given: Any, where: str) -> When:
    if isinstance(given, When):
        return given
    _known(given, _READING | {"above", "below"}, where)
    ends = (field(given, key, float, where, default=None) for key in ("above", "below"))
    return When(_reading(given, where), *ends)


def _where(given: Any, where: str) -> Any:
    if isinstance(given, Mapping):
        _known(given, {"from", "to", "roles"}, f"{where}: where")
        if "roles" in given:
            return tuple(field(given, "roles", list, f"{where}: where", least=1))
        ends = (field(given, k, int, f"{where}: where", default=None) for k in ("from", "to"))
        return slice(*ends)
    return tuple(given) if isinstance(given, list) else given


# --- Neuronpedia ---------------------------------------------------------------------------------


def _neuronpedia(given: Mapping[str, Any], where: str) -> tuple[SteeringStep, ...]:
    """The steps of a request to Neuronpedia's public API or its inference server."""
    method = field(given, "steer_method", str, where, default="SIMPLE_ADDITIVE")
    if method not in _METHODS:
        raise InputError(f"{where}: steer_method {method!r}{nearest(method, _METHODS)}")
    factor = field(given, "strength_multiplier", float, where, default=1.0)
    unit = field(given, "normalize_steering", bool, where, default=False)
    roles = ("system", "user", "model")
    special = field(given, "steer_special_tokens", bool, where, default=True)
    chat = any(k in given for k in ("defaultChatMessages", "steeredChatMessages"))
    steps = []
    for n, one in enumerate(field(given, "features", list, where, default=[])):
        at = f"{where}: feature {n}"
        source = field(one, "layer" if "layer" in one else "source", str, at)
        index = one.get("index")
        index = int(index) if isinstance(index, str) and index.isdecimal() else index
        reading = Reading(source, whole_number(f"{at}: index", index, 0))
        steps.append((reading, field(one, "strength", float, at)))
    for n, one in enumerate(field(given, "vectors", list, where, default=[])):
        at = f"{where}: vector {n}"
        site, layer = _hook(field(one, "hook", str, at), at)
        row = {"vector": field(one, "steering_vector", list, at, least=1)}
        vector = np.asarray(_reading(row, at).vector, np.float32)
        if unit:
            vector = vector / np.linalg.norm(vector)
        steps.append(
            (Reading("", None, layer, vector, 0.0, site), field(one, "strength", float, at))
        )
    if not steps:
        raise InputError(f"{where}: a request to steer without features and vectors")
    if unit and any(r.feature is not None for r, _ in steps):
        raise InputError(
            f"{where}: normalize_steering of features: divide the strength by the norm"
        )
    factors = factor if method == "SIMPLE_ADDITIVE" else 1.0
    place = "all" if special or not chat else roles
    op = _METHODS[method]
    return tuple(checked_step(SteeringStep(op, r, s * factors, where=place)) for r, s in steps)


def _hook(name: str, where: str) -> tuple[str, int]:
    """A site and layer from the hook name of a residual stream, as Neuronpedia has them."""
    parts = name.split(".")
    sites = {"hook_resid_pre": "resid_pre", "hook_resid_post": "resid_post"}
    if len(parts) != 3 or parts[0] != "blocks" or not parts[1].isdecimal() or parts[2] not in sites:
        raise InputError(
            f"{where}: hook {name!r} is not blocks.N.hook_resid_pre or hook_resid_post"
        )
    return sites[parts[2]], int(parts[1])
