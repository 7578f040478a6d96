"""The figures of a coder on a text, made of the sums that batches leave on the host.

Everything here is float64 numpy: a `Tally` adds up, `Metrics` is what came out. Groups of tokens
(by position, by role, by source) are sums of their own beside those of all tokens.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.metrics import COLUMNS, Fit, Sums, fit, fits, merge
from gemma_scope_jax.evaluation.results import plain

DENSE = 0.1  # a feature active on more than this share of tokens is dense
BINS_PER_DECADE = 4  # of the density histogram
LOWEST_DECADE = -8

SPLICED = "spliced"  # the run with the reconstruction in place; the others: `ABLATIONS`
ABLATIONS = ("zero", "zero everywhere", "mean")  # what stands in its place; see `Losses`
_SUMS = ("tokens", "mean", "bias", "columns")


@dataclasses.dataclass(frozen=True)
class Losses:
    """Predictions with the activation changed, over the tokens that the features may act on.

    Losses are mean -log p(next token) in nats, KL is KL(the model's own || changed) in nats a
    token, agreement the share of tokens with the same most likely next token. None: not run.
    Every change but one leaves alone the tokens that features do not act on: `everywhere` zeros are
    at those, too, at <bos> above all, as SAELens and SAEBench ablate.
    """

    tokens: int
    clean: float  # the model as it is
    spliced: float  # with the coder's reconstruction in place of the activation
    ablated: float | None = None  # with zeros in its place
    mean_ablated: float | None = None  # with its mean over the counted tokens in its place
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
        """1: as good as the activation itself, 0: as bad as what one of `ABLATIONS` puts there."""
        base = self._ablated(ablation)[0]
        return None if base is None else _over(base - self.spliced, base - self.clean)

    def kl_score(self, ablation: str = "zero") -> float | None:
        """The same of the KL divergence: the activation's own is 0."""
        base = self._ablated(ablation)[1]
        return None if base is None or self.kl is None else _over(base - self.kl, base)

    def _ablated(self, ablation: str) -> tuple[float | None, float | None]:
        return {
            "zero": (self.ablated, self.kl_ablated),
            "zero everywhere": (self.everywhere_ablated, self.kl_everywhere_ablated),
            "mean": (self.mean_ablated, self.kl_mean_ablated),
        }[ablation]


def _over(a: float, b: float) -> float:
    return a / b if b else math.nan


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The figures of a coder on a text; how they are defined: see `metrics.py`."""

    all: Fit  # every token but padding and those before `coder.first`
    typical: Fit  # without outlier tokens
    layers: tuple[Fit, ...]  # of `all`, one a layer of the coder
    density: np.ndarray  # [F], [X, F] for several layers: share of tokens on which a feature fires
    consistency: np.ndarray  # like density: tokens a piece of a document, of those it fires in
    losses: Losses | None
    groups: Mapping[str, tuple[dict[str, Any], ...]]  # "position": a row a group that has tokens

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
    def dense(self) -> int:
        """Features active on more than `DENSE` of the tokens."""
        return int((self.density > DENSE).sum())

    @property
    def delta_loss(self) -> float | None:
        """By how many nats a token the model gets worse on reconstructions."""
        return None if self.losses is None else self.losses.delta

    @property
    def loss_recovered(self) -> float | None:
        """1: as good as the activation itself, 0: as bad as zeros at the tokens that features act
        on. None without the ablation."""
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
    """SAEBench's summary of densities: shares of features, and of all activity ("normalized")."""
    total = density.sum()
    found = {"frac_alive": float((density > 0).mean())}
    for percent in (1, 10):
        over = density > percent / 100
        share = float(density[over].sum() / total) if total > 0 else 0.0
        found[f"freq_over_{percent}_percent"] = float(over.mean())
        found[f"normalized_freq_over_{percent}_percent"] = share
    return found


def density_histogram(density: np.ndarray) -> dict[str, Any]:
    """How many features have which log10 density: bin edges [n + 1], counts [n], and the silent."""
    count = -LOWEST_DECADE * BINS_PER_DECADE
    edges = np.linspace(LOWEST_DECADE, 0, count + 1)
    fires = density[density > 0]
    logs = np.clip(np.log10(fires), LOWEST_DECADE, 0)
    return {
        "log10_edges": edges.tolist(),
        "counts": np.histogram(logs, edges)[0].tolist(),
        "never": int(density.size - fires.size),
    }


# -------------------------------------------------------------------------------------------------
# Adding up


class Tally:
    """The sums over batches: of one coder, or of several spliced together."""

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

    def add_fit(self, sums: Sums, fired: Any, pieces: Any) -> None:
        self.sums = merge(self.sums, sums)
        self.fired += np.asarray(fired)
        self.pieces += np.asarray(pieces)

    def add_run(
        self, name: str, mask: np.ndarray, groups: np.ndarray, clean: np.ndarray, values: np.ndarray
    ) -> None:
        """A run of a batch: mask bool [N], groups bool [G, N], clean [N], values [3, N].

        `values` are loss, KL and agreement. Tokens and `clean`, the model's own losses, are counted
        with the spliced run, which every tally has.
        """
        member = np.concatenate([mask[None], groups & mask])
        if name == SPLICED:
            self.predicted += member.sum(1)
            self.clean += _sums(member, clean[None])[:, 0]
        self.runs[name] = self.runs.get(name, 0.0) + _sums(member, values)

    def losses(self, group: int = 0) -> Losses | None:
        """Those of a group, 0 being all tokens. None if no run was made."""
        if not self.runs:
            return None
        n = int(self.predicted[group])
        mean = {k: v[group] / n if n else np.full(3, math.nan) for k, v in self.runs.items()}
        of = lambda run, what: float(mean[run][what]) if run in mean else None
        spliced = of(SPLICED, 0)
        return Losses(
            n,
            self.clean[group] / n if n else math.nan,
            math.nan if spliced is None else spliced,
            of("zero", 0),
            of("mean", 0),
            of(SPLICED, 1),
            of("zero", 1),
            of("mean", 1),
            of(SPLICED, 2),
            of("zero everywhere", 0),
            of("zero everywhere", 1),
        )

    def metrics(self) -> Metrics:
        """The figures of what was added. Raises `InputError` if that is nothing."""
        coder, sums = self.coders[0], self.sums
        if sums is None or sums.tokens[0, 0] == 0:
            raise InputError(
                f"nothing to evaluate on: no token at or after position {coder.first} of a document"
            )
        density = self.fired / sums.tokens[0][:, None]
        consistency = np.where(self.pieces, self.fired / np.maximum(self.pieces, 1), np.nan)
        if not coder.multi_layer:
            density, consistency = density[0], consistency[0]
        groups: dict[str, list[dict[str, Any]]] = {}
        for i, (kind, name) in enumerate(self.names):
            if sums.tokens[2 + i].max():
                groups.setdefault(kind, []).append(_row(name, fit(sums, 2 + i), self.losses(1 + i)))
        return Metrics(
            fit(sums),
            fit(sums, 1),
            fits(sums),
            density,
            consistency,
            self.losses(),
            {kind: tuple(rows) for kind, rows in groups.items()},
        )

    def loss_rows(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """The losses by group alone, for several coders spliced together."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for i, (kind, name) in enumerate(self.names):
            if self.predicted[1 + i]:
                rows.setdefault(kind, []).append(_row(name, None, self.losses(1 + i)))
        return {kind: tuple(some) for kind, some in rows.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was added, to be saved; `restore` takes it back."""
        found = {"fired": self.fired, "pieces": self.pieces, "predicted": self.predicted}
        found["clean"] = self.clean
        found |= {f"run {name}": values for name, values in self.runs.items()}
        if self.sums is not None:
            found |= dict(zip(_SUMS, self.sums))
        return found

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises KeyError or ValueError for arrays that are not those of such a tally."""
        runs = {k: v for k, v in arrays.items() if k.startswith("run ")}
        own = ("fired", "pieces", "predicted", "clean")
        wanted = {name: (getattr(self, name).shape, getattr(self, name).dtype) for name in own}
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
        self.fired, self.pieces = arrays["fired"], arrays["pieces"]
        self.predicted, self.clean = arrays["predicted"], arrays["clean"]
        self.runs = {k.removeprefix("run "): v for k, v in runs.items()}
        self.sums = Sums(*(arrays[k] for k in _SUMS)) if "tokens" in arrays else None


def _sums(member: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[G, C] sums in float64 of values [C, N] over the groups [G, N]; others may be NaN."""
    used = np.where(member[0], np.asarray(values, np.float64), 0.0)
    return member.astype(np.float64) @ used.T


def _row(name: str, fit: Fit | None, losses: Losses | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    if fit is not None:
        row |= {"tokens": fit.tokens, "l0": fit.l0, "fvu": fit.fvu, "cosine": fit.cosine}
    if losses is not None and losses.tokens:
        row |= {"loss_tokens": losses.tokens, "loss": losses.clean, "delta_loss": losses.delta}
        row |= {"kl": losses.kl, "agreement": losses.agreement}
    return row
