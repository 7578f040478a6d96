"""Whether a graph's predictions hold: ablate its features, and compare what the model does.

A graph is a linear model of one prompt. Setting a feature s to zero changes a target t directly by
-effects[t, s]. If features downstream respond, by as much as their pre-activations change,

    change[f] = -effects[f, s] + sum over features j of effects[f, j] / activation[j] * change[j]

which, as features only have effects on later layers, is solved from the first layer to the last.
This total ignores thresholds: a feature that would switch off goes negative, and one that is not in
the graph cannot switch on. The model itself says how much that matters.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.intervene import Freeze, intervene
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import Model

FIGURES = ("spearman", "r2", "sign", "slope", "size")
ALLOWED = 0.05  # of a typical pre-activation: how far a graph's values may be from the model's


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Predicted against measured changes, over n pairs of an ablated feature and a target.

    freeze    what was frozen, see `intervene`; with "direct" the prediction is of direct effects,
              else of total ones
    targets   "logits", or "features": the pre-activations of the graph's features downstream
    control   whether each feature wrote a random direction of its decoder row's norm instead
    spearman  rank correlation
    r2        1 - sum of (measured - predicted)^2 / sum of (measured - mean)^2: 1 at best, no fit
    sign      share of pairs with the same sign, of those that are not zero
    slope     of measured over predicted, through the origin
    size      mean absolute measured change

    A figure is NaN where it is not defined. All are if a run overflowed, as it may with frozen
    norms, which do not hold large changes down.
    """

    freeze: str
    targets: str
    control: bool
    n: int
    spearman: float
    r2: float
    sign: float
    slope: float
    size: float


@dataclasses.dataclass(frozen=True)
class Validation:
    """What `validate` returns; printed, it is a table.

    agreements  one for each mode and kind of target, without and with the control
    ablated     the features that were ablated, one at a time
    changes     of the logits by mode, float32 [3, ablated, logits]: predicted, measured, control
    seed        of the control's random directions
    """

    agreements: tuple[Agreement, ...]
    ablated: Nodes
    changes: dict[str, np.ndarray]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON data; None for what is not defined."""
        rows = [dataclasses.asdict(a) for a in self.agreements]
        bare = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
        figures = [{name: bare(value) for name, value in row.items()} for row in rows]
        return {"ablated": len(self.ablated), "seed": self.seed, "figures": figures}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("frozen", "targets", "written", "n", *FIGURES)]
        for a in self.agreements:
            written = "random" if a.control else "decoder"
            figures = (f"{getattr(a, name):.3g}" for name in FIGURES)
            rows.append((a.freeze, a.targets, written, f"{a.n:,}", *figures))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.rjust(w) if c > 2 else cell.ljust(w) for c, (cell, w) in enumerate(both))
            for both in (zip(row, widths) for row in rows)
        ]
        return "\n".join(line.rstrip() for line in lines)


def validate(
    graph: Graph,
    model: Model,
    coders: Coder | Iterable[Coder],
    *,
    top: int = 32,
    modes: Sequence[Freeze] = ("direct", "attention", "nothing"),
    seed: int = 0,
    batch: int = 16,
) -> Validation:
    """Ablate the `top` features of a graph by influence, one at a time, and compare the changes of
    its logits and of its features downstream with those that the graph predicts.

    model, coders  those that the graph was made with; `graph.ids` is the prompt
    modes          what is frozen while measuring, see `intervene`. "direct" is the graph's own
                   linear model, where direct effects are exact; "attention" and "nothing" are the
                   real model; "replacement" shows what thresholds alone change
    seed           of the control: the same features write random directions of the same norm
    batch          rows run together

    Raises `InputError` for a graph without features or logits, or of another model or coders.
    """
    n = graph.selected
    logits = np.flatnonzero(graph.targets.kind == "logit")
    if not n or not (graph.sources.kind[:n] == "feature").all() or not logits.size:
        raise InputError("a graph is validated by its features and logits: it needs both")
    seed = whole_number("seed", seed, 0)
    which = np.argsort(-influence(graph)[:n], kind="stable")[: whole_number("top", top, 1)]
    nodes = graph.sources[:n]
    table = np.stack([nodes.layer, nodes.position, nodes.feature], 1)
    sets = [[(*table[s].tolist(), 0.0)] for s in which]
    later = nodes.layer[None, :] > nodes.layer[which][:, None]
    later &= nodes.position[None, :] >= nodes.position[which][:, None]

    agreements, changes = [], {}
    for mode in modes:
        predicted = (ablation if mode == "direct" else total_ablation)(graph, which)
        changes[mode] = predicted[None, :, logits]
        for control in (None, seed):
            options = {"freeze": mode, "control": control, "batch": batch}
            of_logits, of_features = _measured(graph, model, coders, sets, table, options)
            changes[mode] = np.concatenate([changes[mode], of_logits[None]])
            kind = (mode, "logits", control is not None)
            agreements.append(agreement(predicted[:, logits].ravel(), of_logits.ravel(), *kind))
            kind = (mode, "features", control is not None)
            agreements.append(agreement(predicted[:, :n][later], of_features[later], *kind))
    return Validation(tuple(agreements), nodes[which], changes, seed)


def _measured(graph, model, coders, sets, table, options) -> tuple[np.ndarray, np.ndarray]:
    """The changes of the graph's logits [sets, logits] and features [sets, n] in the model."""
    tokens = graph.targets.feature[graph.targets.kind == "logit"]
    given = {"read": table, "tokens": tokens, "logits": "none", **options}
    found = intervene(model, coders, graph.ids, sets, **given)
    clean: Any = found.clean
    _check_same(graph, clean.pre_activations)
    return (found.token_logits - clean.token_logits, found.pre_activations - clean.pre_activations)


# --- What the graph predicts ---------------------------------------------------------------------


def ablation(graph: Graph, which: np.ndarray) -> np.ndarray:
    """The direct change of every target if one feature is set to zero: [which, targets]."""
    return -graph.effects[:, which].T


def total_ablation(graph: Graph, which: np.ndarray) -> np.ndarray:
    """The total change of every target if one feature is set to zero and features downstream follow
    their pre-activations: [which, targets]."""
    n = graph.selected
    each = graph.effects[:, :n] / graph.sources.activation[None, :n]  # of one unit of activation
    direct = ablation(graph, which)
    features = _solved(graph, each[:n], direct[:, :n].T)
    return direct + (each @ features).T


def influence(graph: Graph) -> np.ndarray:
    """Each source's share in the targets' values along all paths: [sources].

    A target's inputs are weighed by |effect|, in sum 1; paths begin at `graph.weights`, or at all
    targets that are not features if these are zero. Source: circuit-tracer's node influence.
    """
    n = graph.selected
    share = np.abs(graph.effects)
    share = share / np.maximum(share.sum(1) + np.abs(graph.rest), 1e-30)[:, None]
    weights = graph.weights
    if not weights.any():
        weights = (graph.targets.kind != "feature").astype(np.float32)
    start = weights @ share
    through = _solved(graph, share[:n, :n], start[:n], back=True)
    return start + through @ share[:n]


def _solved(graph: Graph, matrix: np.ndarray, right: np.ndarray, back: bool = False) -> np.ndarray:
    """x = matrix x + right (`back`: x = x matrix + right), over the features. Effects only go to
    later layers, so that in their order the matrix is strictly triangular."""
    from scipy.linalg import solve_triangular

    order = np.argsort(graph.sources.layer[: graph.selected], kind="stable")
    sorted_ = np.eye(len(order), dtype=np.float32) - matrix[np.ix_(order, order)]
    x = np.empty_like(right)
    options = {"lower": True, "unit_diagonal": True, "trans": int(back), "check_finite": False}
    x[order] = solve_triangular(sorted_, right[order], **options)
    return x


def agreement(
    predicted: np.ndarray, measured: np.ndarray, freeze: str, targets: str, control: bool
) -> Agreement:
    """The figures of two arrays [n]."""
    p, m, nan = predicted.astype(np.float64), measured.astype(np.float64), float("nan")
    if not m.size or not np.isfinite(m).all():
        return Agreement(freeze, targets, control, int(p.size), *(nan,) * len(FIGURES))
    spread, both = np.square(m - m.mean()).sum(), (p != 0) & (m != 0)
    return Agreement(
        freeze,
        targets,
        control,
        n=int(p.size),
        spearman=_correlation(p, m),
        r2=1 - float(np.square(m - p).sum() / spread) if spread else nan,
        sign=float((np.sign(p) == np.sign(m))[both].mean()) if both.any() else nan,
        slope=float((p * m).sum() / np.square(p).sum()) if p.any() else nan,
        size=float(np.abs(m).mean()),
    )


def _correlation(p: np.ndarray, m: np.ndarray) -> float:
    """Spearman's, of ranks with ties at their mean; NaN if one array is constant."""
    from scipy.stats import rankdata

    if len(p) < 2 or not np.ptp(p) or not np.ptp(m):
        return float("nan")
    return float(np.corrcoef(rankdata(p), rankdata(m))[0, 1])


def _check_same(graph: Graph, z: np.ndarray) -> None:
    """Raise `InputError` unless the features have the values that the graph says."""
    value = graph.value[: graph.selected]
    far = np.abs(z[0] - value) > ALLOWED * (np.abs(value) + np.abs(value).mean())
    if far.mean() > 0.1:
        raise InputError(
            f"{far.mean():.0%} of the graph's features have other pre-activations in this model "
            "with these coders: validate a graph with what it was made from"
        )
