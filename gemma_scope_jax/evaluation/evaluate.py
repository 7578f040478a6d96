"""Evaluate a coder inside its model: one program for how it fits, one for what it costs the model.

    metrics = gs.evaluate(model, coder, text_batches(tok, [text]))
    metrics.l0, metrics.fvu, metrics.delta_loss, metrics.typical.fvu

Both programs are compiled once for a shape of batch; batches stream, and only sums are kept.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.coders.splice import splice
from gemma_scope_jax.data.text import pack
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.metrics import (
    Coder,
    Fit,
    Moments,
    coder_sums,
    fit,
    layers_of,
    merge,
    next_token_loss,
    predicts,
)
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import counted, forward, site_width
from gemma_scope_jax.model.intercept import Context, capture, token_mask, write

Batch = tuple[Any, Any]  # tokens int [B, T], segments int [B, T]: 0 is padding


@dataclasses.dataclass(frozen=True)
class Losses:
    """Mean -log p(next token) in nats, over the tokens that the coder's features may act on."""

    tokens: int
    clean: float
    spliced: float  # with the coder's reconstruction in place of the activation
    ablated: float | None  # with zeros in its place; None if not asked for


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The figures of a coder on a text; how they are defined: see `metrics.py`."""

    all: Fit  # every token but padding and those before `coder.first`
    typical: Fit  # without the tokens of enormous norm
    density: np.ndarray  # [F], [X, F] for several layers: share of tokens on which a feature fires
    losses: Losses | None

    @property
    def l0(self) -> float:
        return self.all.l0

    @property
    def fvu(self) -> float:
        return self.all.fvu

    @property
    def mse(self) -> float:
        return self.all.mse

    @property
    def dead(self) -> int:
        """Features that never fired: an upper bound on the dead ones, loose on little text."""
        return int((self.density == 0).sum())

    @property
    def delta_loss(self) -> float | None:
        """By how many nats a token the model gets worse on reconstructions."""
        return None if self.losses is None else self.losses.spliced - self.losses.clean

    @property
    def loss_recovered(self) -> float | None:
        """1: as good as the activation itself, 0: as bad as zeros. None without the ablation."""
        if self.losses is None or self.losses.ablated is None:
            return None
        return (self.losses.ablated - self.losses.spliced) / (
            self.losses.ablated - self.losses.clean
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; the densities only as a summary. Undefined figures are None."""
        figures = {
            **dataclasses.asdict(self.all),
            "typical": dataclasses.asdict(self.typical),
            "features": int(self.density.size),
            "dead": self.dead,
            "dense": int((self.density > 0.1).sum()),
            "loss": None if self.losses is None else dataclasses.asdict(self.losses),
            "delta_loss": self.delta_loss,
            "loss_recovered": self.loss_recovered,
        }
        return _finite(figures)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: None in its place."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    model: Model,
    coder: Coder,
    batches: Iterable[Batch],
    *,
    delta_loss: bool = True,
    ablation: bool = False,
) -> Metrics:
    """Measure `coder` on `batches` of (tokens, segments), int [B, T] each; segment 0 is padding.

    delta_loss: also run the model with and without the coder's reconstruction, the whole depth.
    ablation: and with zeros in its place, as a yardstick for the delta.
    Tokens before `coder.first` in each document are left alone and not counted. A multi-layer
    coder's figures are means over its layers. Raises `InputError` if the coder does not fit the
    model or no token is counted.
    """
    return evaluate_all(model, [coder], batches, delta_loss=delta_loss, ablation=ablation)[0]


def evaluate_all(
    model: Model,
    coders: Sequence[Coder],
    batches: Iterable[Batch],
    *,
    delta_loss: bool = True,
    ablation: bool = False,
) -> list[Metrics]:
    """`evaluate` of any coders on the same batches: how they fit takes one model pass for all.

    With the same `first`, the model's own loss is taken once too.
    """
    for coder in coders:
        check_fits(model.config, coder)
    tallies = [_Tally(coder) for coder in coders]
    for tokens, segments in batches:
        tokens, segments = _batch(tokens, segments)
        for tally, sums in zip(tallies, _fit_step(model, tuple(coders), tokens, segments)):
            tally.add_fit(sums)
        clean: dict[int, Any] = {}  # by `first`
        for tally in tallies if delta_loss or ablation else ():
            first = tally.coder.first
            runs = ("clean",) * (first not in clean) + ("spliced",) + ("ablated",) * ablation
            losses, mask = _loss_step(model, tally.coder, tokens, segments, runs=runs)
            clean.setdefault(first, losses.get("clean"))
            tally.add_losses(losses | {"clean": clean[first]}, np.asarray(mask))
    return [tally.metrics() for tally in tallies]


class _Tally:
    """The sums of one coder over batches."""

    def __init__(self, coder: Coder):
        self.coder = coder
        self.everything: Moments | None = None
        self.typical: Moments | None = None
        self.fired = np.zeros((len(layers_of(coder)), coder.width), np.int64)
        self.losses: dict[str, float] = {}
        self.predicted = 0

    def add_fit(self, sums: Any) -> None:
        everything, typical, fires = sums
        self.everything = merge(self.everything, everything)
        self.typical = merge(self.typical, typical)
        self.fired += np.asarray(fires)

    def add_losses(self, losses: dict[str, jax.Array], mask: np.ndarray) -> None:
        self.predicted += int(mask.sum())
        for name, loss in losses.items():
            total = float(np.asarray(loss, np.float64)[mask].sum())
            self.losses[name] = self.losses.get(name, 0.0) + total

    def metrics(self) -> Metrics:
        coder, a, t = self.coder, self.everything, self.typical
        if a is None or t is None or a.tokens[0] == 0:
            raise InputError(
                f"nothing to evaluate on: no token at or after position {coder.first} of a document"
            )
        density = self.fired / a.tokens[:, None]
        n = self.predicted
        mean = {name: total / n if n else math.nan for name, total in self.losses.items()}
        losses = Losses(n, mean["clean"], mean["spliced"], mean.get("ablated")) if mean else None
        if isinstance(coder, SparseCoder):
            density = density[0]
        return Metrics(fit(a), fit(t), density, losses)


def _batch(tokens: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
    if np.shape(tokens) != np.shape(segments) or len(np.shape(tokens)) != 2:
        raise InputError(
            f"a batch is tokens and segments of one shape [B, T], got {np.shape(tokens)} and "
            f"{np.shape(segments)}"
        )
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)


def read_sites(model: Model, layers: dict[str, tuple[int, ...]], tokens, segments):
    """Activations {site: [X, B*T, D]} at the `layers` of each site. The model stops at the last."""
    out = forward(
        model, tokens, [capture(site, some) for site, some in layers.items()],
        segments=segments, stop_at_layer=1 + max(map(max, layers.values())), logits="none",
    )  # fmt: skip
    return {s: a.reshape(a.shape[0], -1, *a.shape[3:]) for s, a in out.reads.items()}


@jax.jit
def _fit_step(model: Model, coders: tuple[Coder, ...], tokens: jax.Array, segments: jax.Array):
    """`coder_sums` of each coder, from one pass that reads what any of them needs."""
    wanted: dict[str, set[int]] = {}
    for coder in coders:
        for site in (coder.reads, coder.writes):
            wanted.setdefault(site, set()).update(layers_of(coder))
    layers = {site: tuple(sorted(some)) for site, some in wanted.items()}
    x = read_sites(model, layers, tokens, segments)
    sums = []
    for coder in coders:
        mask = counted(segments, coder.first).reshape(-1)
        read, target = (
            x[site][jnp.asarray([layers[site].index(layer) for layer in layers_of(coder)])]
            for site in (coder.reads, coder.writes)
        )
        sums.append(coder_sums(coder, read, target, mask))
    return sums


def _zeros(x: jax.Array, ctx: Context, *, first: int) -> jax.Array:
    return jnp.where(token_mask(ctx, x, first), jnp.zeros_like(x), x)


@functools.partial(jax.jit, static_argnames="runs")
def _loss_step(model: Model, coder: Coder, tokens, segments, *, runs: tuple[str, ...]):
    """{run: -log p(next token) [B, T]} and the tokens that count, bool [B, T]."""
    mask = predicts(segments, coder.first)
    intercepts = {
        "clean": lambda: [],
        "spliced": lambda: [splice(coder, error=False)],
        "ablated": lambda: [write(coder.writes, layers_of(coder), _zeros, first=coder.first)],
    }
    losses = {}
    for name in runs:
        reads = [*intercepts[name](), capture("resid_final")]
        out = forward(model, tokens, reads, segments=segments, logits="none")
        losses[name] = next_token_loss(model, out.reads["resid_final"], tokens, mask)
    return losses, mask


def check_fits(config: GemmaConfig, coder: Coder) -> None:
    """Raise `InputError` unless the model has the coder's layers and its sites the right widths."""
    last = max(layers_of(coder))
    if last >= config.layers:
        raise InputError(
            f"the coder is for layer {last}, but {config.name} has layers 0 to {config.layers - 1}"
        )
    for site, size, verb in (
        (coder.reads, coder.d_in, "reads"),
        (coder.writes, coder.d_out, "writes"),
    ):
        width = site_width(config, site)
        if size != width:
            raise InputError(
                f"the coder {verb} {size} values at {site}, where {config.name} has {width}: "
                "it is for another model"
            )


def text_batches(
    tok: Any, texts: Iterable[str], *, length: int = 256, batch: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, segments), int32 [batch, length] each, of packed `texts`; all of one shape."""
    encode = lambda text: tok.encode(text, bos=False)
    for packed in pack(texts, encode, batch, length, tok.bos_id):
        yield packed.tokens, packed.segments
