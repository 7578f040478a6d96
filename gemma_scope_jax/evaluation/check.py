"""Does a coder do what it claims? Its figures on a text, and whether it would fit better elsewhere.

Silent mistakes with coders are few: the wrong layer or site, a norm's (1 + w) gain that is in the
activations but was not in training (or the reverse), a transposed skip connection. They leave
shapes intact and ruin the fit, and each can be undone and measured: `check_coder` compares the fit
at the place that the config states with the fit of every such alternative.

Source: the audits quoted in the documentation of Gemma Scope 2 coders; an affine transcoder of 27B
explains 0.69 of its target, and 0.38 with its skip transposed.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, check_fits, float32
from gemma_scope_jax.evaluation.evaluate import Batches, batch_list, evaluate
from gemma_scope_jax.evaluation.figures import Metrics
from gemma_scope_jax.evaluation.metrics import Fit, Sums, coder_sums, fit, merge, on_host
from gemma_scope_jax.model.batch import TokenBatch, as_batch
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import forward, site_width
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.sharding import own_mesh

TYPICAL = 1  # of the groups of `Sums`
CLEARLY = 0.8  # an alternative is better if its FVU is below this share of the stated place's
USELESS = 0.9  # FVU from which a coder is hardly better than the mean
L0_FACTOR = 3.0  # L0 on ordinary text may well be twice the target, or half of it
COSTLY = 0.05  # nats that zeros must cost before the delta loss is compared with their cost

GAINS = {"attn_out": "post_attn_norm", "mlp_in": "pre_mlp_norm", "mlp_out": "post_mlp_norm"}
POST_NORM = {"attn_out": "post_attn_scale", "mlp_out": "post_mlp_scale"}
SAE_SITES = ("z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")

# What to read or write instead: (site, shift of the layer, "" or "ungained" or "unnormed").
Reading = tuple[str, int, str]


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A place the coder may be meant for, and its fit there (typical tokens, see `metrics.py`)."""

    name: str  # "resid_post of layer 11"
    verdict: str  # what it means if this one fits best
    fit: Fit


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The result of `check_coder`; `warnings` is empty for a coder that looks right.

    As text: the figures, the places by how well the coder fits there, the verdict.
    """

    metrics: Metrics
    target_l0: float | None
    stated: Alternative  # the place in the config
    alternatives: list[Alternative]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        row = lambda a: {"name": a.name, "fvu": a.fit.fvu, "l0": a.fit.l0}
        return {
            **self.metrics.as_dict(),
            "target_l0": self.target_l0,
            "stated": row(self.stated),
            "alternatives": [row(a) for a in self.alternatives],
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        m, losses = self.metrics, self.metrics.losses
        assert losses is not None  # `check_coder` measures them
        target = "" if self.target_l0 is None else f"  (target {self.target_l0:g})"
        outliers = f"{m.all.tokens - m.typical.tokens} outlier tokens"
        cost = (
            f"{losses.clean:.3f} -> {losses.spliced:.3f}; {losses.ablated:.3f} with zeros instead"
        )
        lines = [
            f"  L0          {m.l0:8.1f}{target}",
            f"  FVU         {m.fvu:8.3f}  ({m.typical.fvu:.3f} without the {outliers})",
            f"  delta loss  {m.delta_loss:+8.3f}  nats a token ({cost})",
            f"  never fired {m.dead:8,}  of {m.density.size:,} features, on this text",
            "\nwhere it fits, without outlier tokens:     FVU      L0",
        ]
        for a in sorted([self.stated, *self.alternatives], key=lambda a: a.fit.fvu):
            note = "  <- its config" if a is self.stated else ""
            lines.append(f"  {a.name:50s} {a.fit.fvu:9.3f} {a.fit.l0:7.1f}{note}")
        verdict = [f"warning: {warning}" for warning in self.warnings] or ["looks right"]
        return "\n".join([*lines, "", *verdict])


class _Way(NamedTuple):
    reads: Reading
    writes: Reading
    verdict: str
    transposed: bool = False


@own_mesh
def check_coder(model: Model, coder: Coder, batches: Batches) -> CheckReport:
    """Measure `coder` on batches, as for `evaluate`, at its place and at every alternative to it.

    A few thousand tokens are enough. Raises `InputError` if it does not fit the model at all.
    """
    batches = [as_batch(batch) for batch in batch_list(batches)]
    metrics = evaluate(model, coder, batches, ablation=True)
    ways = list(_ways(model.config, coder))
    places = tuple(sorted({place for way in ways for place in (way.reads, way.writes)}))
    sums: list[Sums | None] = [None] * len(ways)
    for batch in batches:
        seen = _activations(model, batch.plain, coder.layers, places)
        mask = batch.counted(coder.first).reshape(-1)
        no_groups = (np.zeros((0, mask.size), bool), np.zeros(mask.size, np.int32))
        for i, way in enumerate(ways):
            used = coder
            if way.transposed:
                used = coder.replace(w_skip=jnp.swapaxes(jnp.asarray(coder.w_skip), -1, -2))
            data = (seen[way.reads], seen[way.writes], mask, *no_groups)
            sums[i] = merge(sums[i], on_host(_sums(used.unplaced(), *data)))
    stated, *others = (
        Alternative(_name(coder, way), way.verdict, fit(found, TYPICAL))
        for way, found in zip(ways, sums)
        if found is not None
    )
    # for several layers it is not known whether the target is for each layer or for all
    target = None if coder.multi_layer else coder.info.l0
    return CheckReport(metrics, target, stated, others, _warnings(metrics, target, stated, others))


_sums = jax.jit(coder_sums)


def _warnings(
    metrics: Metrics, target: float | None, stated: Alternative, others: list[Alternative]
) -> list[str]:
    found = []
    best = min(others, key=lambda a: a.fit.fvu if np.isfinite(a.fit.fvu) else np.inf, default=None)
    if best is not None and best.fit.fvu < CLEARLY * stated.fit.fvu and best.fit.fvu < USELESS:
        found.append(
            f"{best.verdict}: FVU is {best.fit.fvu:.3f} (L0 {best.fit.l0:.1f}) with {best.name}, "
            f"and {stated.fit.fvu:.3f} (L0 {stated.fit.l0:.1f}) with {stated.name}"
        )
    elif not stated.fit.fvu < USELESS:
        found.append(
            f"the coder hardly explains anything here: FVU is {stated.fit.fvu:.3f} with "
            f"{stated.name}, and no alternative does better; is the coder for another model, or "
            "for another kind of text?"
        )
    if target and not target / L0_FACTOR <= metrics.l0 <= target * L0_FACTOR:
        found.append(
            f"L0 is {metrics.l0:.1f}, the target {target:g}: more than a factor {L0_FACTOR:g} away"
        )
    losses = metrics.losses
    assert losses is not None and losses.ablated is not None
    if losses.ablated - losses.clean > COSTLY and losses.spliced >= losses.ablated:
        found.append(
            f"its reconstruction costs the model {losses.spliced - losses.clean:.3f} nats a token, "
            f"zeros in its place {losses.ablated - losses.clean:.3f}"
        )
    return found


def _name(coder: Coder, way: _Way) -> str:
    def place(site: str, shift: int, change: str) -> str:
        layers = [layer + shift for layer in coder.layers]
        where = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        if len(layers) > 5:
            where = f"{len(layers)} layers"
        without = {"": "", "ungained": " without its gain", "unnormed": " before its norm"}
        return f"{site} of {where}{without[change]}"

    ends = (way.reads,) if coder.reads == coder.writes else (way.reads, way.writes)
    return " -> ".join(place(*end) for end in ends) + ", skip transposed" * way.transposed


def _ways(config: GemmaConfig, coder: Coder) -> Iterator[_Way]:
    """The places to compare, the stated one first. All have activations of the coder's widths."""
    check_fits(config, coder)
    reads, writes = (coder.reads, 0, ""), (coder.writes, 0, "")
    yield _Way(reads, writes, "")
    for shift in (-1, 1):
        if min(coder.layers) + shift >= 0 and max(coder.layers) + shift < config.layers:
            other = (coder.reads, shift, ""), (coder.writes, shift, "")
            yield _Way(*other, "it belongs to another layer")
    wrong = "it sits at the wrong site"
    gain = "the (1 + w) gain is missing: the coder was made for activations without it"
    if coder.reads == coder.writes:
        others = {(s, 0, ""): wrong for s in SAE_SITES if site_width(config, s) == coder.d_in}
        others.pop(reads, None)
        if coder.reads in GAINS:
            others[coder.reads, 0, "ungained"] = gain
        if coder.reads in POST_NORM:
            others[coder.reads, 0, "unnormed"] = wrong
        yield from (_Way(place, place, verdict) for place, verdict in others.items())
        return
    if coder.reads in GAINS:
        yield _Way((coder.reads, 0, "ungained"), writes, gain)
    if coder.reads == "mlp_in":
        yield _Way(("resid_mid", 0, ""), writes, wrong)
    if coder.writes in GAINS:
        yield _Way(reads, (coder.writes, 0, "ungained"), gain)
    if coder.writes in POST_NORM:
        yield _Way(reads, (coder.writes, 0, "unnormed"), wrong)
    if coder.w_skip is not None and coder.d_in == coder.d_out:
        yield _Way(reads, writes, "the skip connection is transposed", transposed=True)


@partial(jax.jit, static_argnames=("layers", "places"))
def _activations(
    model: Model, batch: TokenBatch, layers: tuple[int, ...], places: tuple[Reading, ...]
) -> dict[Reading, jax.Array]:
    """The activation at every place, float32 [X, B*T, D], from one pass."""
    reads, stop = [], 0
    for site, shift, change in places:
        there = tuple(layer + shift for layer in layers)
        stop = max(stop, max(there) + 1)
        reads.append(capture(site, there, name=f"{site} {shift} {change}"))
        if change == "unnormed":
            reads.append(capture(POST_NORM[site], there, name=f"{site} {shift} scale"))
    out = forward(model, batch, reads, stop_at_layer=stop, logits="none").reads
    seen = {}
    for site, shift, change in places:
        x = float32(out[f"{site} {shift} {change}"])
        if change:
            there = np.array(layers) + shift
            gain = 1.0 + float32(getattr(model.params.blocks, GAINS[site])[there])
            gain = jnp.where(jnp.abs(gain) < 1e-6, 1.0, gain)
            x = x / gain[:, None, None, :]
        if change == "unnormed":
            x = x / out[f"{site} {shift} scale"]
        seen[(site, shift, change)] = x.reshape(x.shape[0], -1, x.shape[-1])
    return seen
