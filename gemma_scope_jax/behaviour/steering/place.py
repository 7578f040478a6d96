"""Steering specs as intercepts: each step with what it needs of the model and of the coders.

Rows of a batch may have different specs: other features, strengths, operations, layers. The program
depends on the sites, the number of steps and the length of the prompts, each rounded up; everything
else is data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.steering.rows import (
    ALWAYS,
    Lines,
    SteeringRows,
    nothing_yet,
    steered,
)
from gemma_scope_jax.behaviour.steering.spec import OPS, Reading, SteeringSpec, SteeringStep
from gemma_scope_jax.behaviour.steering.tokens import token_masks
from gemma_scope_jax.circuits.edit_rows import columns
from gemma_scope_jax.circuits.interventions import power_of_two
from gemma_scope_jax.coders.coder import Coder, by_layer, check_fits, public_name
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.load import decoder_rows, load_coder
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.model.intercept import LAYER_SITES, Intercept, fold


def steering(
    model: Model | GemmaConfig,
    specs: SteeringSpec | Sequence[SteeringSpec],
    coders: Coder | Mapping[str, Coder] | CoderSet | None = None,
    prompts: Any = None,
) -> list[Intercept]:
    """Specs as intercepts for `run` and `generate`.

    specs    one for all rows of the batch, or one for each
    coders   the coders that the specs name, by name, or one for the steps that name none; those
             not given are loaded by their names
    prompts  the texts that will be run: int ids, one row each, or a `TokenBatch` (`gs.tokens`),
             which knows the roles of a chat. Needed if a step is for the "prompt", its "last"
             token, what is "generated", or roles

    Features are read as the run has them where the step acts, after earlier steps; conditions
    before any step of their site and layer. Other features, strengths, operations, layers and
    prompts compile nothing. Raises `InputError` for what the model, the coders or the prompts
    lack.
    """
    config = model.config if isinstance(model, Model) else model
    given = [specs] if isinstance(specs, SteeringSpec) else list(specs)
    if not given or not all(isinstance(spec, SteeringSpec) for spec in given):
        raise InputError("steering takes a spec or a list of them, see steer_spec")
    known = _Coders(coders)
    parts = [[_Part(config, step, known) for step in spec.steps] for spec in given]
    masks = token_masks([[(p.step.where, p.first) for p in row] for row in parts], prompts)
    if len(parts) == 1 and len(masks) > 1:
        parts = parts * len(masks)
    found = []
    sites = sorted({p.writes for row in parts for p in row}, key=LAYER_SITES.index)
    for site in sites:
        kept = [[n for n, p in enumerate(row) if p.writes == site] for row in parts]
        some = [[row[n] for n in places] for row, places in zip(parts, kept)]
        tokens = [[row[n] for n in places] for row, places in zip(masks, kept)]
        reads = tuple(sorted({p.reads for row in some for p in row}, key=LAYER_SITES.index))
        whens = {p.when_site for row in some for p in row if p.when_site}
        sources = reads, tuple(sorted(whens, key=LAYER_SITES.index))
        rows = _rows(config, site, some, tokens, sources)
        found.append(fold(site, None, steered, nothing_yet, rows, sources=sources))
    return found


class _Coders:
    """The coders that specs name, given or loaded."""

    def __init__(self, given: Any):
        self.only = given if isinstance(given, Coder) else None
        self.known: dict[str, Coder] = {}
        if given is not None and self.only is None:
            self.known = dict(CoderSet(given).items())

    def named(self, name: str) -> Coder:
        own = ("",) if self.only is None else ("", self.only.info.path, public_name(self.only))
        if self.only is not None and name in own:
            return self.only
        if name in self.known:
            return self.known[name]
        if not name:
            if len(self.known) == 1:
                return next(iter(self.known.values()))
            raise InputError("steering: a feature without the name of its coder: give `coder`")
        try:
            coder = load_coder(name)
        except InputError as error:
            hint = nearest(name, self.known)
            raise InputError(f"steering: coder {name!r}: {error}{hint}") from error
        self.known[name] = coder
        return coder


class _Part:
    """One step with what it needs of the model and the coders.

    reads, writes   the sites; layer: where it reads; write_layers: what it writes to
    target          vector, bias and threshold of what is read, of the other of a swap, too
    rows            the directions [W, D] that it moves along
    condition       the same as `target`, read at `when_site` of `when_layer`
    """

    def __init__(self, config: GemmaConfig, step: SteeringStep, coders: _Coders):
        self.step = step
        self.reads: str
        self.writes: str
        self.layer: int
        self.write_layers: tuple[int, ...]
        self.target: list[tuple[np.ndarray, float, float]]
        self.rows: list[np.ndarray]
        t = step.target
        if t.feature is None:
            v = _direction(config, t, f"steering: {step.op}")
            self.reads = self.writes = t.site
            self.layer = int(t.layer or 0)
            self.write_layers = (self.layer,)
            size = float(np.linalg.norm(v))
            u = v / size
            row = u if step.op != "add" or step.in_norms else v
            self.target, self.rows = [(u, 0.0, -np.inf)], [row[None]]
            self.first = 1 if step.first is None else step.first
        else:
            coder = _checked(config, coders.named(t.coder), t)
            self._of_features(coder, step)
            self.first = coder.first if step.first is None else step.first
        self.when_site, self.when_layer, self.condition = self._when(config, coders)

    def _of_features(self, coder: Coder, step: SteeringStep) -> None:
        t, features = step.target, [int(step.target.feature or 0)]
        if step.other is not None:
            _in_range(coder, step.other)
            features.append(step.other)
        i = coder.source(t.layer)
        self.layer = coder.layers[i]
        self.reads, self.writes = coder.reads, coder.writes
        ids = np.asarray(features, np.int32)
        w, b, threshold = columns(coder, jnp.full(len(ids), i, jnp.int32), jnp.asarray(ids))
        self.write_layers = coder.layers[i:]
        rows = _written(coder, i, ids)  # [n, W, D]
        self.rows = list(rows)
        if step.op in ("rescale", "cap", "floor", "project_out") or step.in_norms:
            # operations on a direction: that which the feature writes, where it writes it
            if len(self.write_layers) > 1:
                raise InputError(
                    f"steering: {step.op} is along a direction at one layer, and this feature "
                    f"writes to {len(self.write_layers)}: give one of its decoder rows as a vector"
                )
            self.reads = self.writes
            u = rows[0, 0] / max(float(np.linalg.norm(rows[0, 0])), 1e-30)
            self.target, self.rows = [(u, 0.0, -np.inf)], [u[None]]
        else:
            self.target = [(np.asarray(a), float(c), float(d)) for a, c, d in zip(w, b, threshold)]

    def _when(self, config: GemmaConfig, coders: _Coders) -> tuple[str, int, tuple | None]:
        """The site and layer of the condition, and its vector, bias and threshold."""
        if (when := self.step.when) is None:
            return "", ALWAYS, None
        r = when.reading
        level = float((when.above if when.below is None else when.below) or 0.0)
        if r.feature is None:
            site, layer = r.site, int(r.layer or 0)
            line = (_direction(config, r, "steering: when"), r.bias, level)
        else:
            coder = _checked(config, coders.named(r.coder), r)
            i = coder.source(r.layer)
            site, layer = coder.reads, coder.layers[i]
            ids = jnp.asarray([r.feature], jnp.int32)
            w, b, threshold = columns(coder, jnp.full(1, i, jnp.int32), ids)
            if level < 0:
                raise InputError(f"steering: when: activations are never below 0, so not {level:g}")
            # an activation above `level` is a pre-activation above both
            line = (np.asarray(w[0]), float(b[0]), max(level, float(threshold[0])))
        late = LAYER_SITES.index(site) > LAYER_SITES.index(self.writes)
        if layer > self.layer or (layer == self.layer and late):
            raise InputError(
                f"steering: a condition at {site} of layer {layer} comes after {self.writes} of "
                f"layer {self.layer}, where the step acts"
            )
        if late:
            raise InputError(
                f"steering: a condition at {site} for a step at {self.writes}: read it at a site "
                f"that comes before in a layer (resid_pre of layer {layer + 1} is resid_post of "
                f"{layer})"
            )
        return site, layer, line


def _direction(config: GemmaConfig, reading: Reading, what: str) -> np.ndarray:
    vector = np.asarray(reading.vector, np.float32)
    width = site_width(config, reading.site)
    if reading.layer is None or reading.layer >= config.layers:
        last = config.layers - 1
        raise InputError(f"{what}: layer {reading.layer}: {config.name} has layers 0 to {last}")
    if len(vector) != width:
        raise InputError(f"{what}: a vector of {len(vector)}; {reading.site} has {width} values")
    return vector


def _checked(config: GemmaConfig, coder: Coder, reading: Reading) -> Coder:
    check_fits(config, coder)
    by_layer(coder)
    if coder.k is not None:
        raise InputError(
            "steering: in a TopK coder a feature's activation depends on all others: convert it "
            "with as_jump_relu, or use edit"
        )
    if coder.kind == "neurons":
        raise InputError("steering: neurons are edited by edit_features")
    coder.source(reading.layer)
    _in_range(coder, reading.feature)
    return coder


def _in_range(coder: Coder, feature: int | None) -> None:
    if feature is None or feature >= coder.width:
        raise InputError(f"steering: feature {feature}: the coder has 0 to {coder.width - 1}")


def _written(coder: Coder, i: int, ids: np.ndarray) -> np.ndarray:
    """What features of the coder's layer i write to each layer from their own on: [n, W, D]."""
    if coder.w_dec is None:
        return decoder_rows(coder, ids, layer=i).astype(np.float32)[:, i:]
    each = [coder.written(i, j, ids) for j in range(i, len(coder.layers))]
    return np.stack([np.asarray(a, np.float32) for a in each], 1)


def _rows(config: GemmaConfig, site: str, parts, masks, sources) -> SteeringRows:
    """The steps of each row as arrays; see `SteeringRows`."""
    B, E = len(parts), power_of_two(max(1, max(map(len, parts))))
    W = max(len(p.write_layers) for row in parts for p in row)
    S = max(m.shape[0] for row in masks for m, _ in row)
    zeros = lambda *shape: np.zeros((B, E, *shape), np.float32)
    lines = lambda some, *axes: Lines(
        tuple(zeros(*axes, site_width(config, s)) for s in some),
        zeros(*axes),
        np.full((B, E, *axes), -np.inf, np.float32),
    )
    rows = SteeringRows(
        op=np.full((B, E), -1, np.int32),
        layer=np.full((B, E), -2, np.int32),
        strength=zeros(),
        in_norms=np.zeros((B, E), bool),
        target=lines(sources[0], 2),
        write=zeros(2, W, site_width(config, site)),
        write_layer=np.full((B, E, W), -2, np.int32),
        when=lines(sources[1]),
        when_layer=np.full((B, E), ALWAYS, np.int32),
        below=np.zeros((B, E), bool),
        where=np.zeros((B, E, S), bool),
        after=np.zeros((B, E), bool),
    )
    for b, (row, tokens) in enumerate(zip(parts, masks)):
        for e, (p, (mask, after)) in enumerate(zip(row, tokens)):
            rows.op[b, e], rows.layer[b, e] = OPS.index(p.step.op), p.layer
            rows.strength[b, e], rows.in_norms[b, e] = p.step.strength, p.step.in_norms
            _put(rows.target, (b, e), p.target, sources[0].index(p.reads))
            for k, written in enumerate(p.rows):
                rows.write[b, e, k, : len(written)] = written
            rows.write_layer[b, e, : len(p.write_layers)] = p.write_layers
            if p.condition is not None:
                vector, rows.when.bias[b, e], rows.when.threshold[b, e] = p.condition
                rows.when.vectors[sources[1].index(p.when_site)][b, e] = vector
                rows.when_layer[b, e] = p.when_layer
                rows.below[b, e] = p.step.when.above is None
            rows.where[b, e, : len(mask)], rows.where[b, e, len(mask) :] = mask, after
            rows.after[b, e] = after
    return rows


def _put(lines: Lines, place: tuple[int, int], some, source: int) -> None:
    for k, (vector, bias, threshold) in enumerate(some):
        lines.vectors[source][(*place, k)] = vector
        lines.bias[(*place, k)], lines.threshold[(*place, k)] = bias, threshold
