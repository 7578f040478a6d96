"""Whether a graph's predictions hold: ablate its features, and compare what the model does.

A graph is a linear model of one prompt. Setting a feature s to zero changes a target t directly by
-effects[t, s]. If features downstream respond, by as much as their pre-activations change,

    change[f] = -effects[f, s] + sum over features j of effects[f, j] / activation[j] * change[j]

which, as features only have effects on later layers, is solved from the first layer to the last.
This total ignores thresholds: a feature that would switch off goes negative, and one that is not in
the graph cannot switch on. The model itself says how much that matters.

Of a graph without coders read "neurons" for "features", here and below.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_scope_jax.circuits.intervene import Freeze, intervene
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.storage.strict_json import finite

if TYPE_CHECKING:
    from gemma_scope_jax.circuits.graph import Graph, Nodes

FIGURES = ("spearman", "r2", "sign", "slope", "size")
ALLOWED = 0.05  # of a typical pre-activation: how far a graph's values may be from the model's


LEGEND = """\
frozen: "direct" is the graph's own linear model, where its direct effects are exact if nothing was
pruned; the other rows compare total effects. written: "another" is the control, where each feature
writes what another one of its layer does. r2: 1 at best, below 0 where sizes are far off. slope:
measured over predicted. size: the mean change. n: pairs of an ablated feature and a target."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Predicted against measured changes, over n pairs of an ablated feature and a target.

    freeze    what was frozen, see `intervene`; with "direct" the prediction is of direct effects,
              else of total ones
    targets   "final": what the graph was asked about; or "features": the pre-activations of its
              features downstream
    control   whether each feature wrote the direction of a random other feature of its layer
              instead, with the norm of its own
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
    """What `Graph.validate` returns; printed, it is a table.

    agreements  one for each mode and kind of target, without and with the control
    ablated     the features that were ablated, one at a time
    final       what the graph was asked about, less what cannot be measured
    changes     of `final`, by mode, float32 [3, ablated, final]: predicted, measured, control
    seed        of the control
    """

    agreements: tuple[Agreement, ...]
    ablated: "Nodes"
    final: "Nodes"
    changes: dict[str, np.ndarray]
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON data; None for what is not defined."""
        figures = finite([dataclasses.asdict(a) for a in self.agreements])
        return {"ablated": len(self.ablated), "seed": self.seed, "figures": figures}

    def rows(self) -> list[list[str]]:
        """The figures as a table of texts; the first row names the columns."""
        rows = [["frozen", "targets", "written", "n", *FIGURES]]
        for a in self.agreements:
            written = "another" if a.control else "its own"
            figures = (f"{getattr(a, name):.3g}" for name in FIGURES)
            rows.append([a.freeze, a.targets, written, f"{a.n:,}", *figures])
        return rows

    def __str__(self) -> str:
        head, *rows = self.rows()
        return "\n".join([text_table(head, rows, left=3), LEGEND, *self.verdict()])

    def verdict(self) -> list[str]:
        """In a sentence, how the graph's predictions of the final targets fare in the model; empty
        if it was not measured without anything frozen."""
        where = [a for a in self.agreements if (a.freeze, a.targets) == ("nothing", "final")]
        of = lambda control: [a for a in where if a.control == control]
        return [
            f"In the model, the targets change in the predicted order with a rank correlation of "
            f"{own.spearman:.2f} (control: {other.spearman:.2f}), and by {own.slope:.2f} times as "
            "much as predicted."
            for own, other in zip(of(False), of(True))
        ]


def validate(
    graph: "Graph",
    model: Model,
    coders: Coder | Iterable[Coder] | None,
    *,
    top: int = 32,
    modes: Sequence[Freeze] = ("direct", "attention", "nothing"),
    seed: int = 0,
    batch: int = 16,
) -> Validation:
    """See `Graph.validate`."""
    n, seed = graph.selected, whole_number("seed", seed, 0)
    nodes, final = graph.sources[:n], _final(graph)
    _known(graph)
    which = graph.strongest(whole_number("top", top, 1)).columns
    later = nodes.layer[None, :] > nodes.layer[which][:, None]
    later &= nodes.position[None, :] >= nodes.position[which][:, None]

    agreements, changes = [], {}
    for mode in modes:
        predicted = (ablation if mode == "direct" else total_ablation)(graph, which)
        kinds = {"final": predicted[:, final], "features": predicted[:, :n][later]}
        changes[mode] = [kinds["final"]]
        for control in (None, seed):
            options = {"freeze": mode, "control": control, "batch": batch}
            measured = _measured(graph, model, coders, which, options)
            changes[mode].append(measured[:, final])
            answers = {"final": measured[:, final], "features": measured[:, :n][later]}
            agreements += [
                agreement(kinds[k], answers[k], mode, k, control is not None) for k in kinds
            ]
    changes = {mode: np.stack(found) for mode, found in changes.items()}
    return Validation(tuple(agreements), nodes[which], graph.targets[final], changes, seed)


def _final(graph: "Graph") -> np.ndarray:
    """The rows of what was asked about and can be measured."""
    n = graph.selected
    if not n:
        raise InputError("a graph is validated by ablating its features, and this one has none")
    final = [row for row in range(n, len(graph.targets)) if target_terms(graph, row)]
    final = np.array(final, int)
    if not final.size:
        raise InputError(
            "a graph keeps no vectors of directions, and as JSON no terms of differences, so that "
            "they cannot be measured: validate one that was asked about logits, features, or "
            "differences of these, and load it from its .npz"
        )
    return final


def target_terms(graph: "Graph", row: int) -> list[dict[str, Any]]:
    """What a final target is a sum of, with token ids and positions; nothing for directions, whose
    vectors a graph does not keep."""
    known, n, t = graph.about.get("targets"), graph.selected, graph.targets
    if isinstance(known, list) and len(known) == len(t) - n:
        return known[row - n] or []
    kind = {"logit": "logit", "feature": "feature", "neuron": "feature"}.get(t.kind[row])
    if kind is None:
        return []
    where = {"layer": int(t.layer[row]), "position": int(t.position[row])}
    return [{"kind": kind, "what": int(t.feature[row]), "factor": 1.0, **where}]


def _measured(graph, model, coders, which, options) -> np.ndarray:
    """The changes of the graph's targets in the model if one feature is set to zero: [which,
    targets], 0 for targets that are not measured."""
    n, nodes = graph.selected, graph.targets
    terms = [(row, t) for row in range(n, len(nodes)) for t in target_terms(graph, row)]
    logits, asked = ([x for x in terms if x[1]["kind"] == k] for k in ("logit", "feature"))
    own = np.stack([nodes.layer, nodes.position, nodes.feature], 1)[:n]
    more = [[t["layer"], t["position"], t["what"]] for _, t in asked]
    read = np.concatenate([own, np.array(more, np.int32).reshape(-1, 3)])
    wanted = [[t["position"], t["what"]] for _, t in logits]
    options["tokens"] = np.array(wanted, np.int32) if wanted else None
    sets = [[(*own[s].tolist(), 0.0)] for s in which]
    found: Any = intervene(model, coders, graph.ids, sets, read=read, logits="none", **options)
    _check_same(graph, found.clean.pre_activations[:, :n])
    changes = np.zeros((len(which), len(nodes)), np.float32)
    features = found.pre_activations - found.clean.pre_activations
    changes[:, :n] = features[:, :n]
    for column, (row, term) in zip(features[:, n:].T, asked):
        changes[:, row] += np.float32(term["factor"]) * column
    if logits:
        differences = found.token_logits - found.clean.token_logits
        for column, (row, term) in zip(differences.T, logits):
            changes[:, row] += np.float32(term["factor"]) * column
    return changes


# --- What the graph predicts ---------------------------------------------------------------------


def ablation(graph: "Graph", which: np.ndarray) -> np.ndarray:
    """The direct change of every target if one feature is set to zero: [which, targets]."""
    return -graph.effects[:, which].T


def total_ablation(graph: "Graph", which: np.ndarray) -> np.ndarray:
    """The total change of every target if one feature is set to zero and features downstream follow
    their pre-activations: [which, targets]."""
    n = graph.selected
    active = graph.sources.activation[:n]
    active = np.where(active == 0, np.float32(1), active)  # a neuron at 0 has no effects
    each = graph.effects[:, :n] / active[None, :]  # of one unit of activation
    direct = ablation(graph, which)
    features = _solved(graph, each[:n], direct[:, :n].T)
    return direct + (each @ features).T


def _solved(graph: "Graph", matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """x = matrix x + right, over the features. Effects only go to later layers, so that in their
    order the matrix is strictly triangular."""
    from scipy.linalg import solve_triangular

    order = np.argsort(graph.sources.layer[: graph.selected], kind="stable")
    left = np.eye(len(order), dtype=np.float32) - matrix[np.ix_(order, order)]
    x = np.empty_like(right)
    options = {"lower": True, "unit_diagonal": True, "check_finite": False}
    x[order] = solve_triangular(left, right[order], **options)
    return x


def agreement(
    predicted: np.ndarray, measured: np.ndarray, freeze: str, targets: str, control: bool
) -> Agreement:
    """The figures of two arrays of one shape."""
    p, m = (a.astype(np.float64).reshape(-1) for a in (predicted, measured))
    nan = float("nan")
    if not m.size or not np.isfinite(m).all():
        return Agreement(freeze, targets, control, int(p.size), *(nan,) * len(FIGURES))
    spread, both = np.square(m - m.mean()).sum(), (p != 0) & (m != 0)
    return Agreement(
        freeze,
        targets,
        control,
        n=int(p.size),
        spearman=rank_correlation(p, m),
        r2=1 - float(np.square(m - p).sum() / spread) if spread else nan,
        sign=float((np.sign(p) == np.sign(m))[both].mean()) if both.any() else nan,
        slope=float((p * m).sum() / np.square(p).sum()) if p.any() else nan,
        size=float(np.abs(m).mean()),
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties at their mean rank; NaN if one of the two is constant."""
    ranks = []
    for values in (a.ravel(), b.ravel()):
        _, where, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - 0.5 * (count - 1))[where]
        ranks.append(rank - rank.mean())
    size = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / size) if size else float("nan")


def _known(graph: "Graph") -> np.ndarray:
    """The features' pre-activations [n] as the graph has them; those of active features are their
    activations, which JSON files hold, too. Raises `InputError` where neither is known."""
    n = graph.selected
    value = np.where(np.isnan(graph.value[:n]), graph.sources.activation[:n], graph.value[:n])
    if np.isnan(value).any():
        raise InputError(
            f"{int(np.isnan(value).sum())} of the graph's features have no activation, so that "
            "nothing shows which model and coders it is of: make the graph with attribute"
        )
    return value


def _check_same(graph: "Graph", z: np.ndarray) -> None:
    """Raise `InputError` unless the features have the values that the graph says."""
    value = _known(graph)
    far = np.abs(z[0] - value) > ALLOWED * (np.abs(value) + np.abs(value).mean())
    if far.mean() > 0.1:
        raise InputError(
            f"{far.mean():.0%} of the graph's features have other pre-activations in this model "
            "with these coders: validate a graph with what it was made from"
        )
