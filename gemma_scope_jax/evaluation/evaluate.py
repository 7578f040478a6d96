"""Evaluate a coder inside its model: one program for how it fits, one for what it costs the model.

    metrics = gs.evaluate(model, coder, text_batches(tok, [text]))
    metrics.l0, metrics.fvu, metrics.delta_loss, metrics.typical.fvu

Both programs are compiled once for a shape of batch; batches stream, and only sums are kept.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
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
    check_fits(model.config, coder)
    everything: Moments | None = None
    typical: Moments | None = None
    fired = np.zeros((len(layers_of(coder)), coder.width), np.int64)
    sums: dict[str, float] = {}
    predicted = 0
    for tokens, segments in batches:
        tokens, segments = _batch(tokens, segments)
        a, t, fires = _fit_step(model, coder, tokens, segments)
        everything, typical = merge(everything, a), merge(typical, t)
        fired += np.asarray(fires)
        if delta_loss or ablation:
            losses, mask = _loss_step(model, coder, tokens, segments, ablation=ablation)
            mask = np.asarray(mask)
            predicted += int(mask.sum())
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + float(np.asarray(loss, np.float64)[mask].sum())
    if everything is None or typical is None or everything.tokens[0] == 0:
        raise InputError(
            f"nothing to evaluate on: no token at or after position {coder.first} of a document"
        )
    density = fired / everything.tokens[:, None]
    mean = {name: total / predicted if predicted else math.nan for name, total in sums.items()}
    losses = (
        Losses(predicted, mean["clean"], mean["spliced"], mean.get("ablated")) if mean else None
    )
    if isinstance(coder, SparseCoder):
        density = density[0]
    return Metrics(fit(everything), fit(typical), density, losses)


def _batch(tokens: Any, segments: Any) -> tuple[jax.Array, jax.Array]:
    if np.shape(tokens) != np.shape(segments) or len(np.shape(tokens)) != 2:
        raise InputError(
            f"a batch is tokens and segments of one shape [B, T], got {np.shape(tokens)} and "
            f"{np.shape(segments)}"
        )
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)


def read_site(model: Model, layers: tuple[int, ...], sites: tuple[str, ...], tokens, segments):
    """Activations at `sites` of `layers`: {site: [X, B*T, D]}. The model stops after the last."""
    out = forward(
        model, tokens, [capture(site, layers) for site in dict.fromkeys(sites)],
        segments=segments, stop_at_layer=max(layers) + 1, logits="none",
    )  # fmt: skip
    return {s: a.reshape(a.shape[0], -1, *a.shape[3:]) for s, a in out.reads.items()}


@jax.jit
def _fit_step(model: Model, coder: Coder, tokens: jax.Array, segments: jax.Array):
    sites = read_site(model, layers_of(coder), (coder.reads, coder.writes), tokens, segments)
    mask = counted(segments, coder.first).reshape(-1)
    return coder_sums(coder, sites[coder.reads], sites[coder.writes], mask)


def _zeros(x: jax.Array, ctx: Context, *, first: int) -> jax.Array:
    return jnp.where(token_mask(ctx, x, first), jnp.zeros_like(x), x)


@functools.partial(jax.jit, static_argnames="ablation")
def _loss_step(model: Model, coder: Coder, tokens, segments, *, ablation: bool):
    """{run: -log p(next token) [B, T]} and the tokens that count, bool [B, T]."""
    mask = predicts(segments, coder.first)
    runs = {"clean": [], "spliced": [splice(coder, error=False)]}
    if ablation:
        runs["ablated"] = [write(coder.writes, layers_of(coder), _zeros, first=coder.first)]
    losses = {}
    for name, intercepts in runs.items():
        reads = [*intercepts, capture("resid_final")]
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
