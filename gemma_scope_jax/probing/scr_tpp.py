"""Are a coder's features about one concept each? Targeted ablation, measured by linear probes.

TPP (targeted probe perturbation): the features that matter most to one class's probe are ablated;
that probe should get worse and the other classes' probes should not.

    TPP_n = mean over classes c of [ drop of c's accuracy - mean over c' != c of the drop of c' ]

SCR (spurious correlation removal): a probe is trained where two attributes always agree. Ablating
the features of the one should leave it a probe of the other.

    SCR_n = (accuracy ablated - accuracy of the biased probe) / (accuracy of a clean probe - ditto)

A feature's effect on a probe w is its difference of mean activation between the classes times
w . decoder row; the n largest are ablated: their decoder contributions are subtracted, what the
coder misses stays. Probes read the mean of the activation over a text's tokens and are linear, as
an ablation is, so that both need only pooled activations and features, exactly.

Source: Karvonen et al. 2025, SAEBench, `evals/scr_and_tpp`. Two choices differ: probes are logistic
regressions with an L2 penalty, fitted to the optimum on activations brought to norm sqrt(D)
(SAEBench: 20 epochs of Adam with an L1 penalty, the epoch that tests best); and only features with
an effect above 0 are ablated, where SAEBench fills up with features of effect 0 in any order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.probing.logistic import accuracy, fit_logistic
from gemma_scope_jax.probing.pooling import along_decoder, typical_scale
from gemma_scope_jax.probing.tables import (
    Split,
    Table,
    classes_of,
    first_of_each,
    held_out,
    one_against_rest,
    say_repeats,
)

ABLATED = (2, 5, 10, 20, 50, 100, 500)  # numbers of features
CONTEXT = 128  # tokens of a text at most
SMALLEST = 0.001  # a smaller difference of accuracies is no base for a share
SEED = 42


@dataclasses.dataclass(frozen=True)
class Probe:
    """score(x) = x @ w + b of an activation x [..., D], positive for the class."""

    w: np.ndarray  # float64 [D]
    b: float

    def scores(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float64) @ self.w + self.b


def fit_probe(x: np.ndarray, split: Split) -> Probe:
    """A probe on the training rows of x [N, D]."""
    rows = x[split.train]
    scale = typical_scale(rows)
    fitted = fit_logistic(rows[None] * scale, split.train_y[None], 1.0)
    return Probe(fitted.w[0, 0] * scale, float(fitted.b[0, 0]))


def effects(f: np.ndarray, split: Split, products: np.ndarray, *, both_ways: bool) -> np.ndarray:
    """Of features f [N, F] on a probe with `products` w_dec @ w [F]; float64 [F].

    both_ways (SCR): the size of the effect, whichever class a feature is for; else (TPP) only what
    is more active in the class counts.
    """
    rows, y = f[split.train], split.train_y > 0
    apart = rows[y].mean(0, dtype=np.float64) - rows[~y].mean(0, dtype=np.float64)
    return np.abs(apart * products) if both_ways else np.maximum(apart, 0) * products


def strongest(effect: np.ndarray, n: int) -> np.ndarray:
    """The n features with the largest effect above 0, or as many as there are."""
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] > 0]


def ablated(scores: np.ndarray, f: np.ndarray, products: np.ndarray, chosen: np.ndarray):
    """A probe's scores [N] once the `chosen` features' contributions are subtracted."""
    return scores - np.asarray(f[:, chosen], np.float64) @ products[chosen]


# -------------------------------------------------------------------------------------------------
# TPP


@dataclasses.dataclass(frozen=True)
class TppTask:
    """A table of three classes or more: a question for each of them."""

    name: str
    texts: list[str]
    questions: dict[str, Split]


def tpp_task(table: Table, limit: int | None = None, *, quiet: bool = False) -> TppTask:
    """From a table with a column `target`, `label` or `class`; see `probing.make_task`. Raises
    `InputError`."""
    names, classes = classes_of(table.column("target", "label", "class"), table.path)
    if len(names) < 3:
        raise InputError(
            f"{table.path}: TPP compares classes: it needs at least 3, not {len(names)}"
        )
    kept = first_of_each(classes, limit)
    texts = table.numbered(kept)
    questions = one_against_rest(classes[kept], table.path, seed=SEED, texts=texts)
    if not quiet:
        say_repeats(table, kept, classes[kept], 0, 0)
    return TppTask(
        table.name, [table.texts[i] for i in kept], {names[c]: s for c, s in questions.items()}
    )


def fit_probes(task: "TppTask | ScrTask", x: np.ndarray) -> dict[str, Probe]:
    """The probes of a task on its texts' activations x [N, D]: the same for every coder there."""
    return {name: fit_probe(x, split) for name, split in task.questions.items()}


def tpp(
    task: TppTask,
    probes: Mapping[str, Probe],
    coder: SparseCoder,
    x: np.ndarray,
    f: np.ndarray,
    ns: Sequence[int] = ABLATED,
) -> dict[str, Any]:
    """TPP of a coder with features f [N, F] on texts with activations x [N, D] where it writes.

    {"clean": {class: accuracy}, "by_n": {n: {"tpp", "intended", "unintended"}}, "by_class": {class:
    {n: the same}}}.
    """
    names = list(task.questions)
    products, _ = along_decoder(coder, np.stack([probes[name].w for name in names]))
    truth = {name: task.questions[name].test_y for name in names}
    clean_scores = {name: probes[name].scores(x[task.questions[name].test]) for name in names}
    clean = {name: accuracy(truth[name], clean_scores[name]) for name in names}
    by_class: dict[str, dict[str, dict[str, float]]] = {}
    for c, name in enumerate(names):
        effect = effects(f, task.questions[name], products[:, c], both_ways=False)
        by_class[name] = {}
        for n in ns:
            chosen, drops = strongest(effect, n), []
            for i, other in enumerate(names):
                rows = f[task.questions[other].test]
                scores = ablated(clean_scores[other], rows, products[:, i], chosen)
                drops.append(clean[other] - accuracy(truth[other], scores))
            unintended = float(np.mean([d for i, d in enumerate(drops) if i != c]))
            by_class[name][str(n)] = {
                "tpp": drops[c] - unintended,
                "intended": drops[c],
                "unintended": unintended,
            }
    by_n = {
        str(n): {
            k: float(np.mean([by_class[name][str(n)][k] for name in names]))
            for k in ("tpp", "intended", "unintended")
        }
        for n in ns
    }
    return {"clean": clean, "by_n": by_n, "by_class": by_class}


# -------------------------------------------------------------------------------------------------
# SCR


@dataclasses.dataclass(frozen=True)
class ScrTask:
    """A table of two attributes: a question about each on balanced texts, and "biased"."""

    name: str
    texts: list[str]
    attributes: tuple[str, str]
    questions: dict[str, Split]


def scr_task(table: Table, limit: int | None = None, *, quiet: bool = False) -> ScrTask:
    """From a table with two columns of two values each beside the text; see `probing.make_task`.
    Raises `InputError`."""
    if len(table.columns) != 2:
        raise InputError(
            f"{table.path}: SCR needs two attributes: two columns beside the text, not "
            f"{len(table.columns)} ({', '.join(table.columns)})"
        )
    first, second = table.columns
    y: list[np.ndarray] = []
    for name in (first, second):
        values, which = classes_of(table.column(name), table.path)
        if len(values) != 2:
            raise InputError(f"{table.path}: {name} has {len(values)} values; SCR needs 2")
        y.append(which)
    quadrant = 2 * y[0] + y[1]
    kept = first_of_each(quadrant, limit)
    quadrant, y = quadrant[kept], [v[kept] for v in y]
    sizes = np.bincount(quadrant, minlength=4)
    if sizes.min() < 10:
        among = "" if limit is None else f" among {limit}"
        raise InputError(
            f"{table.path}: of the four combinations of {first} and {second} one has "
            f"{sizes.min()} texts{among}; SCR needs 10"
        )
    sides = []
    for parts in held_out(quadrant, SEED, table.numbered(kept)):
        if not (each := min(map(len, parts))):
            raise InputError(
                f"{table.path}: one of the four combinations of {first} and {second} has too few "
                "texts that occur nowhere else"
            )
        balanced = np.concatenate([rows[:each] for rows in parts])
        agreeing = np.concatenate([parts[q][: 2 * each] for q in (0, 3)])
        sides.append((balanced, agreeing))
    (train, biased), (test, _) = sides
    questions = {name: Split(train, v[train], test, v[test]) for name, v in zip((first, second), y)}
    if not quiet:
        say_repeats(table, kept, quadrant, 0, 0)
    nowhere = np.zeros(0, np.int64)
    questions["biased"] = Split(biased, y[0][biased], nowhere, nowhere)
    return ScrTask(table.name, [table.texts[i] for i in kept], (first, second), questions)


def scr(
    task: ScrTask,
    probes: Mapping[str, Probe],
    coder: SparseCoder,
    x: np.ndarray,
    f: np.ndarray,
    ns: Sequence[int] = ABLATED,
) -> dict[str, Any]:
    """SCR of a coder with features f [N, F] on texts with activations x [N, D] where it writes.

    Direction "first" removes the second attribute from the biased probe and tests it on the first,
    "second" the other way round; the score is that of the one whose accuracy is lower before.
    {"direction", "by_n": {n: score}, "directions": {direction: {"clean", "biased", "ablated": {n:
    accuracy}, "by_n": {n: score}}}}.
    """
    biased = probes["biased"]
    names = task.attributes
    products, _ = along_decoder(coder, np.stack([biased.w, *(probes[n].w for n in names)]))
    directions: dict[str, dict[str, Any]] = {}
    for i, (direction, kept) in enumerate(zip(("first", "second"), names)):
        removed, split = names[1 - i], task.questions[kept]
        effect = effects(f, task.questions[removed], products[:, 2 - i], both_ways=True)
        before = biased.scores(x[split.test])
        clean = accuracy(split.test_y, probes[kept].scores(x[split.test]))
        original = accuracy(split.test_y, before)
        after = {
            str(n): accuracy(
                split.test_y, ablated(before, f[split.test], products[:, 0], strongest(effect, n))
            )
            for n in ns
        }
        room = clean - original
        share = lambda a: (a - original) / room if room >= SMALLEST else 0.0  # noqa: B023
        directions[direction] = {
            "kept": kept,
            "removed": removed,
            "clean": clean,
            "biased": original,
            "ablated": after,
            "by_n": {n: share(a) for n, a in after.items()},
        }
    worse = min(directions, key=lambda d: directions[d]["biased"])
    return {"direction": worse, "by_n": directions[worse]["by_n"], "directions": directions}
