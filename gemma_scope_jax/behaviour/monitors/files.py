"""A monitor as one safetensors file: weights, threshold, figures, and which model it belongs to.

The same direction means nothing in another model, so a file is opened with its model only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.monitors.monitor import Monitor
from gemma_scope_jax.behaviour.monitors.quality import quality_from
from gemma_scope_jax.behaviour.steering.spec import Reading
from gemma_scope_jax.behaviour.steering.vectors import SteeringVector
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.intercept import LAYER_SITES
from gemma_scope_jax.storage.atomic import write_file
from gemma_scope_jax.storage.manifest import Format
from gemma_scope_jax.storage.paths import expanded
from gemma_scope_jax.storage.safetensors_files import (
    StreamedTensor,
    open_safetensors,
    write_safetensors,
)
from gemma_scope_jax.storage.strict_json import field

ENCODER = ("w_enc", "b_enc", "threshold")


def save_monitor(monitor: Monitor, path: str | Path) -> None:
    """Write a monitor to a file. Raises `InputError` if it cannot be written."""
    facts = {
        **FORMAT.marks,
        "site": monitor.site,
        "layer": monitor.layer,
        "bias": monitor.b,
        "alarm_above": monitor.threshold,
        "features": list(monitor.features),
        "first": monitor.first,
        "calibration": list(monitor.calibration),
        "quality": None if monitor.quality is None else monitor.quality.as_dict(),
        "made": dict(monitor.made),
    }
    arrays = {"w": monitor.w} | dict(zip(ENCODER, monitor.encoder or ()))
    tensors = {n: StreamedTensor.whole(np.asarray(a, np.float32)) for n, a in arrays.items()}
    metadata = {"monitor": json.dumps(facts, allow_nan=False)}
    write_file(expanded(path), lambda file: write_safetensors(file, tensors, metadata))


def load_monitor(path: str | Path, model: Model) -> Monitor:
    """A monitor that `gs.save_monitor` wrote, for the model it was fitted on.

    Raises `InputError` for any other file, for one that is damaged, and for another model."""
    path = expanded(path)
    with open_safetensors(path) as file:
        text = (file.metadata() or {}).get("monitor", "{}")
        arrays = {name: file.get_tensor(name) for name in list(file.keys())}
    facts = FORMAT.parse(text.encode(), path)
    site, layer, features = facts["site"], facts["layer"], tuple(facts["features"])
    fitted, given = facts["made"]["model"], model_identity(model)
    if fitted["weights"] != given["weights"]:
        name, dtype = (str(fitted.get(key, ""))[:60] for key in ("name", "dtype"))
        said, advice = f"{name}, other weights than {given['name']}", ""
        if dtype != given["dtype"]:
            said = f"{name} in {dtype}, not {given['name']} in {given['dtype']}"
            advice = f"load the model with dtype={dtype!r}, or "
        raise InputError(
            f"{path}: fitted on another model ({said}); {advice}fit it anew with gs.fit_monitor"
        )
    width = site_width(model.config, site)
    count = len(features)
    shapes = {"w": (count or width,)}
    if features:
        shapes |= {"w_enc": (width, count), "b_enc": (count,), "threshold": (count,)}
    found = {name: a.shape for name, a in arrays.items()}
    finite = all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays.values())
    if found != shapes or not finite or layer >= model.config.layers:
        raise InputError(f"{path}: its arrays are not those of a monitor; {FORMAT.advice}")
    return Monitor(
        site,
        layer,
        arrays["w"],
        float(facts["bias"]),
        float(facts["alarm_above"]),
        features,
        tuple(arrays[name] for name in ENCODER) if features else None,  # type: ignore[arg-type]
        facts["first"],
        tuple(facts["calibration"]),
        quality_from(facts.get("quality"), path),
        facts["made"],
    )


def load_reading(path: str | Path, model: Model) -> Monitor | Reading:
    """What a file reads off `model`: a monitor, or the direction of a steering vector. Raises
    `InputError` for any other file, and for one that does not fit the model."""
    with open_safetensors(expanded(path)) as file:
        if "monitor" in (file.metadata() or {}):
            return load_monitor(path, model)
    vector = SteeringVector.load(path)
    width = site_width(model.config, vector.site)
    if vector.layer >= model.config.layers or len(vector.vector) != width:
        of = f"a direction of {len(vector.vector)} values at layer {vector.layer}"
        raise InputError(f"{path}: {of} does not fit {model.config.name}")
    return vector.reading()


def _check(facts: dict[str, Any], path: Any) -> None:
    if field(facts, "site", str, path) not in LAYER_SITES:
        raise InputError(f"{path}: site is {facts['site']!r:.60}")
    for name in ("layer", "first"):
        field(facts, name, int, path, least=0)
    for name in ("bias", "alarm_above"):
        field(facts, name, float, path)
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
    if not all(map(whole, field(facts, "features", list, path))):
        raise InputError(f"{path}: features are not whole numbers")
    slopes = field(facts, "calibration", list, path, least=2, most=2)
    if not all(isinstance(x, float | int) and not isinstance(x, bool) for x in slopes):
        raise InputError(f"{path}: calibration is not two numbers")
    identity = field(field(facts, "made", dict, path), "model", dict, path)
    field(identity, "weights", str, path)
    quality_from(facts.get("quality"), path)


FORMAT = Format(
    what="a monitor",
    marks={"format": "gemma_scope_jax monitor", "version": 1},
    check=_check,
    advice="gs.save_monitor writes one",
    keys=("site", "layer", "bias", "alarm_above", "features", "first", "calibration", "made"),
)
