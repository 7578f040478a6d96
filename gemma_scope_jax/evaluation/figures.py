"""The figures of a coder on a text, computed from the sums of its batches.

Everything here is float64 numpy: a `Tally` adds up, and gives `Metrics`. Groups of tokens (by
position, by role, by source) have sums of their own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.metrics import COLUMNS, Fit, Sums, fit, fits, merge
from gemma_scope_jax.evaluation.results import plain

DENSE = 0.1  # a feature active on more than this share of tokens is dense
BINS_PER_DECADE = 4  # of the density histogram
LOWEST_DECADE = -8

SPLICED = "spliced"  # the run with the reconstruction in place of the activation
_ABLATED = {  # runs with something else there, and the fields of `Losses` for their loss and KL
    "zero": ("ablated", "kl_ablated"),
    "zero everywhere": ("everywhere_ablated", "kl_everywhere_ablated"),
    "mean": ("mean_ablated", "kl_mean_ablated"),
}
ABLATIONS = tuple(_ABLATED)
_SUMS = ("tokens", "mean", "bias", "columns")
_COUNTS = ("fired", "pieces", "predicted", "clean")


@dataclasses.dataclass(frozen=True)
class Losses:
    """Predictions with the activation changed, over the tokens from `coder.first` on.

    Losses are mean -log p(next token) in nats; KL is KL(the model's own || changed) in nats a
    token; agreement is the share of tokens with the same most likely next token. None: not run.
    Changes leave the tokens before `coder.first` alone, except for the `everywhere` zeros, which
    also replace those, <bos> above all, as in SAELens and SAEBench.
    """

    tokens: int
    clean: float  # the model as it is
    spliced: float  # with the coder's reconstruction in place of the activation
    ablated: float | None = None  # with zeros in its place
    mean_ablated: float | None = None  # with its mean over the measured tokens in its place
    kl: float | None = None
    kl_ablated: float | None = None
    kl_mean_ablated: float | None = None
    agreement: float | None = None  # of the spliced run
    everywhere_ablated: float | None = None  # with zeros in its place, at <bos> too
    kl_everywhere_ablated: float | None = None

    @property
    def delta(self) -> float:
        return self.spliced - self.clean

    def ce_score(self, ablation: str = "zero") -> float | None:
        """1: as good as the activation itself; 0: as bad as one of `ABLATIONS`."""
        base = self.ablation(ablation)[0]
        return None if base is None else _over(base - self.spliced, base - self.clean)

    def kl_score(self, ablation: str = "zero") -> float | None:
        """The same for the KL divergence, which is 0 for the activation itself."""
        base = self.ablation(ablation)[1]
        return None if base is None or self.kl is None else _over(base - self.kl, base)

    def ablation(self, name: str) -> tuple[float | None, float | None]:
        """(loss, KL) with one of `ABLATIONS` in place of the activation."""
        loss, kl = _ABLATED[name]
        return getattr(self, loss), getattr(self, kl)


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The figures of a coder on a text; `metrics.py` has their definitions."""

    all: Fit  # every token but padding and those before `coder.first`
    typical: Fit  # without outlier tokens
    layers: tuple[Fit, ...]  # `all`, for each layer of the coder
    density: np.ndarray  # [F], [X, F] for several layers: share of tokens on which a feature fires
    consistency: np.ndarray  # like density: mean tokens on which it fires, of pieces where it does
    losses: Losses | None
    groups: Mapping[str, tuple[dict[str, Any], ...]]  # by kind: a row for each group with tokens

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
        """Features that never fired: an upper bound on dead features, loose on a short text."""
        return int((self.density == 0).sum())

    @property
    def dense(self) -> int:
        """Features active on more than `DENSE` of the tokens."""
        return int((self.density > DENSE).sum())

    @property
    def delta_loss(self) -> float | None:
        """How many nats a token the model loses with the reconstruction in place."""
        return None if self.losses is None else self.losses.delta

    @property
    def loss_recovered(self) -> float | None:
        """1: as good as the activation itself; 0: as bad as zeros. None without the ablation."""
        return None if self.losses is None else self.losses.ce_score()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; the densities only as a summary. Undefined figures are None."""
        figures = {
            **dataclasses.asdict(self.all),
            "typical": dataclasses.asdict(self.typical),
            "fvu_by_layer": [layer.fvu for layer in self.layers],
            "features": int(self.density.size),
            "dead": self.dead,
            "dense": self.dense,
            "loss": None if self.losses is None else dataclasses.asdict(self.losses),
            "delta_loss": self.delta_loss,
            "loss_recovered": self.loss_recovered,
            "loss_recovered_saelens": self.losses and self.losses.ce_score("zero everywhere"),
        }
        return plain(figures)


def frequencies(density: np.ndarray) -> dict[str, float]:
    """SAEBench's summary of densities: shares of features, and of their activity ("normalized")."""
    total = density.sum()
    found = {"frac_alive": float((density > 0).mean())}
    for percent in (1, 10):
        over = density > percent / 100
        share = float(density[over].sum() / total) if total > 0 else 0.0
        found[f"freq_over_{percent}_percent"] = float(over.mean())
        found[f"normalized_freq_over_{percent}_percent"] = share
    return found


def density_histogram(density: np.ndarray) -> dict[str, Any]:
    """A histogram of log10 densities: bin edges [n + 1], counts [n], features that never fired."""
    count = -LOWEST_DECADE * BINS_PER_DECADE
    edges = np.linspace(LOWEST_DECADE, 0, count + 1)
    fires = density[density > 0]
    logs = np.clip(np.log10(fires), LOWEST_DECADE, 0)
    return {
        "log10_edges": edges.tolist(),
        "counts": np.histogram(logs, edges)[0].tolist(),
        "never": int(density.size - fires.size),
    }


class Tally:
    """The sums over batches for one coder, or for several coders spliced together."""

    def __init__(self, coders: tuple[Coder, ...], names: tuple[tuple[str, str], ...] = ()):
        """`names`: (kind, name) of each group of tokens."""
        self.coders, self.names = coders, names
        self.first = max(coder.first for coder in coders)
        self.sums: Sums | None = None
        shape = (len(coders[0].layers), coders[0].width)
        self.fired, self.pieces = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.predicted = np.zeros(1 + len(names), np.int64)
        self.clean = np.zeros(1 + len(names))
        self.runs: dict[str, np.ndarray] = {}  # [1 + G, 3]: sums of loss, KL, agreement

    def add_fit(self, sums: Sums, fired: jax.Array, pieces: jax.Array) -> None:
        self.sums = merge(self.sums, sums)
        self.fired += np.asarray(fired)
        self.pieces += np.asarray(pieces)

    def add_run(
        self, name: str, mask: np.ndarray, groups: np.ndarray, clean: np.ndarray, values: np.ndarray
    ) -> None:
        """Add a run of a batch: mask bool [N], groups bool [G, N], clean [N] (the model's own
        losses), values [3, N] (loss, KL and agreement). The spliced run, which every tally has,
        also adds the number of tokens and `clean`."""
        member = np.concatenate([mask[None], groups & mask])
        if name == SPLICED:
            self.predicted += member.sum(1)
            self.clean += _sums(member, clean[None])[:, 0]
        self.runs[name] = self.runs.get(name, 0.0) + _sums(member, values)

    def losses(self, group: int = 0) -> Losses | None:
        """The losses of a group, 0 being all tokens. None if no run was made."""
        if not self.runs:
            return None
        n = int(self.predicted[group])
        mean = lambda sums: [float(v) / n if n else math.nan for v in sums]
        (clean,) = mean(self.clean[group : group + 1])
        spliced, kl, agreement = mean(self.runs[SPLICED][group])
        changed: dict[str, float] = {}
        for name, fields in _ABLATED.items():
            if name in self.runs:
                changed |= dict(zip(fields, mean(self.runs[name][group])))
        return Losses(n, clean, spliced, kl=kl, agreement=agreement, **changed)

    def metrics(self) -> Metrics:
        """The figures of the sums. Raises `InputError` if there are no tokens."""
        coder, sums = self.coders[0], self.sums
        if sums is None or sums.tokens[0, 0] == 0:
            raise InputError(
                f"nothing to evaluate on: no token at or after position {coder.first} of a document"
            )
        density = self.fired / sums.tokens[0][:, None]
        consistency = np.where(self.pieces, self.fired / np.maximum(self.pieces, 1), np.nan)
        if not coder.multi_layer:
            density, consistency = density[0], consistency[0]
        each, average = fits(sums), (fit(sums), fit(sums, 1))
        return Metrics(*average, each, density, consistency, self.losses(), self.rows(sums))

    def rows(self, sums: Sums | None = None) -> dict[str, tuple[dict[str, Any], ...]]:
        """Figures by group, for groups with tokens: the fit, if `sums` are given, and losses."""
        found: dict[str, tuple[dict[str, Any], ...]] = {}
        for i, (kind, name) in enumerate(self.names):
            row: dict[str, Any] = {"name": name}
            if sums is not None and sums.tokens[2 + i].max():
                f = fit(sums, 2 + i)
                row |= {"tokens": f.tokens, "l0": f.l0, "fvu": f.fvu, "cosine": f.cosine}
            losses = self.losses(1 + i)
            if losses is not None and losses.tokens:
                row |= {"loss_tokens": losses.tokens, "loss": losses.clean}
                row |= {"delta_loss": losses.delta, "kl": losses.kl, "agreement": losses.agreement}
            if len(row) > 1:
                found[kind] = (*found.get(kind, ()), row)
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """All sums as arrays from which `restore` continues."""
        found = {name: getattr(self, name) for name in _COUNTS}
        found |= {f"run {name}": values for name, values in self.runs.items()}
        if self.sums is not None:
            found |= dict(zip(_SUMS, self.sums))
        return found

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises KeyError or ValueError for the arrays of another tally."""
        runs = {k: v for k, v in arrays.items() if k.startswith("run ")}
        wanted = {name: (getattr(self, name).shape, getattr(self, name).dtype) for name in _COUNTS}
        wanted |= {name: ((*self.clean.shape, 3), self.clean.dtype) for name in runs}
        if "tokens" in arrays:
            places, D = (2 + len(self.names), len(self.fired)), self.coders[0].d_out
            inner = ((), (D,), (D,), (len(COLUMNS),))
            wanted |= {k: ((*places, *some), self.clean.dtype) for k, some in zip(_SUMS, inner)}
        for name, (shape, dtype) in wanted.items():
            if (found := (arrays[name].shape, arrays[name].dtype)) != (shape, dtype):
                raise ValueError(
                    f"{name} is {found[1]} {list(found[0])}, not {dtype} {list(shape)}"
                )
        self.fired, self.pieces, self.predicted, self.clean = (arrays[name] for name in _COUNTS)
        self.runs = {k.removeprefix("run "): v for k, v in runs.items()}
        self.sums = Sums(*(arrays[k] for k in _SUMS)) if "tokens" in arrays else None


def _sums(member: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[G, C] sums in float64 of values [C, N] over the groups [G, N], of which the first holds all
    the others; values outside may be NaN."""
    used = np.where(member[0], np.asarray(values, np.float64), 0.0)
    return member.astype(np.float64) @ used.T
