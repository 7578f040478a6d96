"""Evaluate coders inside their model: how they fit, and what they cost the model.

    metrics = gs.evaluate(model, coder, gs.tokens([text], tokenizer))
    metrics.l0, metrics.fvu, metrics.delta_loss, metrics.typical.fvu

There are two passes. The first reads the activations that the coders need, once for all coders, and
stops after the last layer read; it also gives the means for the mean ablation. The second runs the
model to the end: once as it is and once for each change. Programs are compiled once for a shape of
batch and of coder, whatever the layer; batches stream, and only sums are kept.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, check_fits
from gemma_scope_jax.coders.splice import replacement
from gemma_scope_jax.data.packing import Piece, fill_rows
from gemma_scope_jax.evaluation.figures import SPLICED, Metrics, Tally
from gemma_scope_jax.evaluation.metrics import coder_sums, on_host
from gemma_scope_jax.evaluation.predictions import ablated, compare, final_residual, predicts
from gemma_scope_jax.model.batch import TokenBatch, TokenLabels, as_batch, check_ids, check_tokens
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import forward
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer

RUNS_AT_ONCE = 8  # changed runs whose predictions are compared in one go

Batch = TokenBatch | tuple[Any, Any] | Any  # (tokens, segments); tokens [B, T] alone
Batches = TokenBatch | Iterable[Batch]


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What to measure.

    loss_tokens   run the whole model on the first batches that hold this many tokens; None: on all
    ablations     some of `ABLATIONS`: "zero", "zero everywhere" (also at <bos>, as in SAELens),
                  "mean" (the mean over the tokens that the first pass measures)
    replacement   also run the model with all coders' reconstructions in place at once
    settled       indices of coders that run in the first pass only
    positions     give figures by position in a piece of a document, in powers of two
    groups        {kind: names} of the groups in the batches' labels
    """

    loss_tokens: int | None = None
    ablations: tuple[str, ...] = ()
    replacement: bool = False
    settled: tuple[int, ...] = ()
    positions: bool = False
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def names(self, context: int) -> tuple[tuple[str, str], ...]:
        """(kind, name) of every group of tokens."""
        kinds = dict(self.groups)
        if self.positions:
            kinds = {"position": position_names(context), **kinds}
        return tuple((kind, name) for kind, names in kinds.items() for name in names)


@own_mesh
def evaluate(
    model: Model, coder: Coder, batches: Batches, *, delta_loss: bool = True, ablation: bool = False
) -> Metrics:
    """Measure `coder` on batches: a `TokenBatch` (see `gs.tokens`) or an iterable of them, of
    (tokens, segments) or of tokens alone, int [B, T] each.

    delta_loss: also run the whole model with and without the coder's reconstruction. ablation: also
    run it with zeros in place of the activation, once with <bos> left alone and once at <bos> too,
    as SAELens does.
    Figures are over the tokens of `batch.counted(coder.first)`; the reconstruction, too, leaves the
    tokens before `coder.first` of each document alone. Figures of a multi-layer coder are means
    over its layers. Raises `InputError` if the coder does not fit the model or no token is left.
    """
    tokens = None if delta_loss or ablation else 0
    plan = EvaluationPlan(tokens, ("zero", "zero everywhere") if ablation else ())
    return measure(model, [coder], batches, plan).tallies[0].metrics()


@dataclasses.dataclass
class Measured:
    """The sums of all batches so far."""

    tallies: list[Tally]
    replacement: Tally | None
    fitted: int = 0  # batches whose fit is included
    compared: int = 0  # steps of the second pass, each some of the runs of a batch

    @property
    def all(self) -> list[Tally]:
        return self.tallies + [t for t in (self.replacement,) if t is not None]

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` continues."""
        found = {"fitted": np.asarray(self.fitted), "compared": np.asarray(self.compared)}
        for i, tally in enumerate(self.all):
            found |= {f"{i}/{name}": value for name, value in tally.arrays().items()}
        return found

    def restore(self, saved: Mapping[str, np.ndarray]) -> None:
        """Raises KeyError, TypeError or ValueError for arrays of other sums."""
        self.fitted, self.compared = int(saved["fitted"]), int(saved["compared"])
        for i, tally in enumerate(self.all):
            head = f"{i}/"
            tally.restore({k.removeprefix(head): saved[k] for k in saved if k.startswith(head)})


def measure(
    model: Model,
    coders: Sequence[Coder],
    batches: Batches,
    plan: EvaluationPlan,
    *,
    begin: Callable[[Measured], None] = lambda measured: None,
    after: Callable[[Measured, str, int], None] = lambda measured, stage, tokens: None,
) -> Measured:
    """The sums of all coders over the batches, as the plan says.

    batches  read once for each pass; those of an iterator are kept for the second pass
    begin    called first: it may `restore` the sums of an interrupted call, which are not run again
    after    called as after(measured, "fit" or "loss", tokens) after each step: a batch or, in the
             second pass, some of a batch's runs, which stand for their share of its tokens
    Raises `InputError` for coders that do not fit the model, and for two at one place if they are
    to replace it together.
    """
    for coder in coders:
        check_fits(model.config, coder)
    names = plan.names(model.config.context)
    together = Tally(tuple(coders), names) if plan.replacement else None
    measured = Measured([Tally((coder,), names) for coder in coders], together)
    if plan.replacement:
        replacement(coders)  # raises now if two are at one place
    begin(measured)
    ready, batches = partial(_ready, model.config), batch_list(batches)
    again = batches is not iter(batches)  # else the batches for the second pass are kept
    kept: list[TokenBatch] = []
    held = 0
    for number, batch in enumerate(map(ready, batches)):
        if not again and (plan.loss_tokens is None or held < plan.loss_tokens):
            kept.append(batch)
            held += batch.size
        if number < measured.fitted:
            continue
        _add_fits(model, measured.tallies, batch, _groups(batch, names))
        measured.fitted += 1
        after(measured, "fit", batch.size)
    if measured.fitted and plan.loss_tokens != 0:
        _measure_losses(model, measured, map(ready, batches) if again else kept, plan, after)
    return measured


def batch_list(batches: Batches) -> Iterable[Batch]:
    """An iterable of batches, also where a single one is given."""
    return [batches] if isinstance(batches, TokenBatch) else batches


def _measure_losses(
    model: Model,
    measured: Measured,
    batches: Iterable[TokenBatch],
    plan: EvaluationPlan,
    after: Callable[[Measured, str, int], None],
) -> None:
    """The second pass, from where `measured` stopped."""
    runs = _runs(model, measured, plan)
    some = [runs[i : i + RUNS_AT_ONCE] for i in range(0, len(runs), RUNS_AT_ONCE)]
    names = plan.names(model.config.context)
    held = step = 0
    for batch in batches:
        held += batch.size
        clean, groups = None, _groups(batch, names)
        for part in some:
            step += 1
            if step <= measured.compared:
                continue
            if clean is None:
                clean = final_residual(model, batch.plain, ())
            _add_losses(model, clean, part, batch, groups)
            measured.compared += 1
            after(measured, "loss", batch.size // len(some))
        if plan.loss_tokens is not None and held >= plan.loss_tokens:
            return


def _ready(config: GemmaConfig, given: Batch) -> TokenBatch:
    """A batch, checked, with its tokens and segments on the device."""
    batch = as_batch(given)
    ids = np.asarray(batch.tokens)
    check_tokens(config, ids, None, None, None)
    check_ids(config, ids)
    put = lambda a: jnp.asarray(a, jnp.int32)
    return dataclasses.replace(batch, tokens=put(ids), segments=put(batch.segments))


def _groups(batch: TokenBatch, names: Sequence[tuple[str, str]]) -> np.ndarray:
    """bool [G, B T]: which tokens belong to each group (kind, name)."""
    labels = dict(batch.labels)
    ranges = tuple(name for kind, name in names if kind == "position")
    if ranges:
        bits = np.frexp(np.asarray(batch.positions).astype(np.float64))[1]
        labels["position"] = TokenLabels(bits, ranges)
    found = [np.asarray(labels[kind].where(name)) for kind, name in names]
    return np.array(found, bool).reshape(len(names), batch.tokens.size)


def _pieces(batch: TokenBatch) -> np.ndarray:
    """int32 [B T]: the number of the piece of a document that each token belongs to."""
    starts = np.array(batch.positions == 0)
    starts[:, 0] = True
    return np.cumsum(starts.reshape(-1)).astype(np.int32)


def position_names(context: int) -> tuple[str, ...]:
    """Names of the groups of positions 0, 1, 2-3, 4-7, ... below `context`."""
    starts = [2**i for i in range(max(1, int(np.ceil(np.log2(context)))))]
    return ("0", *(str(a) if a == 1 else f"{a}-{2 * a - 1}" for a in starts))


def _add_fits(
    model: Model, tallies: Sequence[Tally], batch: TokenBatch, groups: np.ndarray
) -> None:
    coders = [tally.coders[0] for tally in tallies]
    wanted: dict[str, set[int]] = {}
    for coder in coders:
        for site in (coder.reads, coder.writes):
            wanted.setdefault(site, set()).update(coder.layers)
    layers = {site: tuple(sorted(some)) for site, some in wanted.items()}
    seen = _read(model, batch.plain, layers=tuple(layers.items()))

    def of(site: str, coder: Coder) -> jax.Array:
        at = [layers[site].index(layer) for layer in coder.layers]
        return seen[site] if at == list(range(len(seen[site]))) else seen[site][np.array(at)]

    found, pieces = [], _pieces(batch)
    for coder in coders:
        data = of(coder.reads, coder), of(coder.writes, coder)
        mask = batch.counted(coder.first).reshape(-1)
        found.append(_fit_step(coder.unplaced(), *data, mask, groups, pieces))
    for tally, sums in zip(tallies, found):
        tally.add_fit(on_host(sums), sums.fired, sums.pieces)


_fit_step = jax.jit(coder_sums)


def read_sites(model: Model, layers: dict[str, tuple[int, ...]], batch: TokenBatch):
    """Activations {site: [X, B*T, D]} at the `layers` of each site; stops after the last layer."""
    out = forward(
        model,
        batch,
        [capture(site, some) for site, some in layers.items()],
        stop_at_layer=1 + max(map(max, layers.values())),
        logits="none",
    )
    return {s: a.reshape(a.shape[0], -1, *a.shape[3:]) for s, a in out.reads.items()}


@partial(jax.jit, static_argnames="layers")
def _read(model: Model, batch: TokenBatch, *, layers):
    return read_sites(model, dict(layers), batch)


@dataclasses.dataclass(frozen=True)
class _ChangedRun:
    """One changed run of the model, and whose figures it gives: (tally, name of the run)."""

    intercepts: tuple[Any, ...]
    users: list[tuple[Tally, str]]


def _runs(model: Model, measured: Measured, plan: EvaluationPlan) -> list[_ChangedRun]:
    """The changed runs: coders at the same place share their ablations."""
    runs: list[_ChangedRun] = []
    shared: dict[Any, _ChangedRun] = {}
    means = {}
    for tally in measured.tallies:
        assert tally.sums is not None
        means[id(tally.coders[0])] = tally.sums.mean[0].astype(np.float32)
    for i, tally in enumerate(measured.all):
        if i in plan.settled:
            continue
        runs.append(_ChangedRun(replacement(tally.coders), [(tally, SPLICED)]))
        for name in plan.ablations:
            some = tally.coders
            if name == "zero everywhere":
                some = tuple(c.replace(first=0) for c in some)
            key = (name, tuple((c.writes, c.layers, c.first) for c in some))
            if key not in shared:
                value = tuple(means[id(c)] for c in some) if name == "mean" else None
                shared[key] = _ChangedRun(ablated(model.config, some, value), [])
                runs.append(shared[key])
            shared[key].users.append((tally, name))
    return runs


def _add_losses(
    model: Model, clean: Any, runs: Sequence[_ChangedRun], batch: TokenBatch, groups: np.ndarray
) -> None:
    states = [final_residual(model, batch.plain, run.intercepts) for run in runs]
    found = compare(model, clean, jnp.stack(states), batch.tokens)
    own = np.asarray(found.clean).reshape(-1)
    values = np.stack([np.asarray(a).reshape(len(runs), -1) for a in found[1:]], 1)
    for run, value in zip(runs, values):
        for tally, name in run.users:
            mask = np.asarray(predicts(batch, tally.first)).reshape(-1)
            tally.add_run(name, mask, groups, own, value)


def text_batches(
    tokenizer: Tokenizer, texts: Iterable[str], *, context_size: int = 256, batch_size: int = 4
) -> Iterator[TokenBatch]:
    """Batches [batch_size, context_size] of packed `texts`, with every token in their mask: it is
    the `first` of coders that leaves out <bos>."""
    encoded = (tokenizer.encode(text, bos=False) for text in texts)
    pieces = (Piece(0, 0, ids, np.ones(len(ids), bool)) for ids in encoded)
    for batch, _ in fill_rows(pieces, batch_size, context_size, tokenizer.bos_id):
        yield batch.plain
