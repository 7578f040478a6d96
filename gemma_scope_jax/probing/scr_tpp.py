"""Targeted ablation, measured by linear probes: is each of a coder's features about one concept?

TPP (targeted probe perturbation): the features that matter most to one class's probe are ablated.
That probe should get worse, and those of the other classes should not.

    TPP_n = mean over classes c of [ drop of c's accuracy - mean over c' != c of the drop of c' ]

SCR (spurious correlation removal): a probe is trained on texts where two attributes always agree.
With the features of one attribute ablated, it should be a probe of the other.

    SCR_n = (accuracy ablated - accuracy of the biased probe)
            / (accuracy of a clean probe - accuracy of the biased probe)

A feature's effect on a probe w is its difference of mean activation between the classes times
w . decoder row. The n features with the largest effects are ablated: their decoder contributions
are subtracted, the coder's error stays. Probes read the mean activation over a text's tokens;
probes and ablations are linear, so pooled activations and features suffice for exact results.

Source: Karvonen et al. 2025, SAEBench, `evals/scr_and_tpp`. Two choices differ: probes are logistic
regressions with an L2 penalty, fitted to the optimum on activations scaled to norm sqrt(D)
(SAEBench: 20 epochs of Adam with an L1 penalty, the epoch that tests best); and only features with
an effect above 0 are ablated, where SAEBench adds features of effect 0 in any order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.probing import tables
from gemma_scope_jax.probing.logistic import accuracy, fit_logistic
from gemma_scope_jax.probing.pooling import along_decoder, typical_scale

ABLATED = (2, 5, 10, 20, 50, 100, 500)  # numbers of features
CONTEXT = 128  # tokens of a text at most
SMALLEST = 0.001  # SCR is 0 for a smaller difference of accuracies


@dataclasses.dataclass(frozen=True)
class Probe:
    """score(x) = x @ w + b of an activation x [..., D]; positive for the class."""

    w: np.ndarray  # float64 [D]
    b: float

    def scores(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float64) @ self.w + self.b


def effects(
    f: np.ndarray, split: tables.Split, products: np.ndarray, *, both_ways: bool
) -> np.ndarray:
    """Effects float64 [F] of features f [N, F] on a probe with `products` w_dec @ w [F].

    both_ways: absolute effects, whichever class a feature is for (SCR); else only features that are
    more active in the class have an effect (TPP).
    """
    rows, y = f[split.train], split.train_y > 0
    apart = rows[y].mean(0, dtype=np.float64) - rows[~y].mean(0, dtype=np.float64)
    return np.abs(apart * products) if both_ways else np.maximum(apart, 0) * products


def strongest(effect: np.ndarray, n: int) -> np.ndarray:
    """The n features with the largest effects above 0, or all of these if they are fewer."""
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] > 0]


def ablated(
    scores: np.ndarray, f: np.ndarray, products: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """A probe's scores [N] without the contributions of the `chosen` features."""
    return scores - np.asarray(f[:, chosen], np.float64) @ products[chosen]


def fit_probes(task: tables.Task, x: np.ndarray) -> dict[str, Probe]:
    """The probes of a task on its texts' activations x [N, D]: the same for every coder there."""
    probes = {}
    for name, split in task.questions.items():
        rows = x[split.train]
        scale = typical_scale(rows)
        fitted = fit_logistic(rows[None] * scale, split.train_y[None], 1.0)
        probes[name] = Probe(fitted.w[0, 0] * scale, float(fitted.b[0, 0]))
    return probes


def tpp_task(table: tables.Table, limit: int | None = None) -> tables.Task:
    """A question for each of three classes or more, from a table with a column `target`, `label` or
    `class`; see `probing.make_task`. Raises `InputError`."""
    names, classes = tables.classes_of(table.column("target", "label", "class"), table.path)
    if len(names) < 3:
        raise InputError(f"{table.path}: TPP needs at least 3 classes, not {len(names)}")
    kept = tables.first_of_each(classes, limit)
    found = tables.one_against_rest(classes[kept], table.path, table.numbered(kept))
    questions = {names[c]: split for c, split in found.items()}
    return tables.task_of(table, kept, classes, questions)


def tpp(
    task: tables.Task,
    probes: Mapping[str, Probe],
    w_dec: ArrayLike,
    x: np.ndarray,
    f: np.ndarray,
    ns: Sequence[int] = ABLATED,
) -> dict[str, Any]:
    """TPP of a coder with features f [N, F] and decoder rows w_dec [F, D], on texts with
    activations x [N, D] where it writes.
    {"clean": {class: accuracy}, "by_n": {n: {"tpp", "intended", "unintended"}}, "by_class": {class:
    {n: the same}}}."""
    names, splits = list(task.questions), list(task.questions.values())
    products, _ = along_decoder(w_dec, np.stack([probes[name].w for name in names]))
    scores = [probes[name].scores(x[split.test]) for name, split in task.questions.items()]
    clean = [accuracy(split.test_y, before) for split, before in zip(splits, scores)]
    by_class: dict[str, dict[str, dict[str, float]]] = {}
    for c, name in enumerate(names):
        effect = effects(f, splits[c], products[:, c], both_ways=False)
        by_class[name] = {}
        for n in ns:
            chosen = strongest(effect, n)
            drops = [
                before - accuracy(s.test_y, ablated(scores[i], f[s.test], products[:, i], chosen))
                for i, (s, before) in enumerate(zip(splits, clean))
            ]
            intended = drops.pop(c)
            other = float(np.mean(drops))
            found = {"tpp": intended - other, "intended": intended, "unintended": other}
            by_class[name][str(n)] = found
    mean = lambda n, key: float(np.mean([by_class[name][n][key] for name in names]))
    keys = ("tpp", "intended", "unintended")
    by_n = {n: {key: mean(n, key) for key in keys} for n in map(str, ns)}
    return {"clean": dict(zip(names, clean)), "by_n": by_n, "by_class": by_class}


def scr_task(table: tables.Table, limit: int | None = None) -> tables.Task:
    """A question about each of two attributes on balanced texts, then "biased", from a table with
    two columns of two values each; see `probing.make_task`. Raises `InputError`."""
    if len(table.columns) != 2:
        raise InputError(
            f"{table.path}: SCR needs two attributes: two columns beside the text, not "
            f"{len(table.columns)} ({', '.join(table.columns)})"
        )
    first, second = table.columns
    y: list[np.ndarray] = []
    for name in (first, second):
        values, which = tables.classes_of(table.column(name), table.path)
        if len(values) != 2:
            raise InputError(f"{table.path}: {name} has {len(values)} values; SCR needs 2")
        y.append(which)
    quadrant = 2 * y[0] + y[1]
    kept = tables.first_of_each(quadrant, limit)
    y = [v[kept] for v in y]
    combination = f"{table.path}: one of the four combinations of {first} and {second} has"
    if (fewest := np.bincount(quadrant[kept], minlength=4).min()) < 10:
        among = "" if limit is None else f" among {limit}"
        raise InputError(f"{combination} {fewest} texts{among}; SCR needs 10")
    sides = []
    for parts in tables.held_out(quadrant[kept], tables.SEED, table.numbered(kept)):
        if not (each := min(map(len, parts))):
            raise InputError(f"{combination} too few texts that occur nowhere else")
        balanced = np.concatenate([rows[:each] for rows in parts])
        agreeing = np.concatenate([parts[q][: 2 * each] for q in (0, 3)])
        sides.append((balanced, agreeing))
    (train, biased), (test, _) = sides
    questions = {
        name: tables.Split(train, v[train], test, v[test]) for name, v in zip((first, second), y)
    }
    nowhere = np.zeros(0, np.int64)
    questions["biased"] = tables.Split(biased, y[0][biased], nowhere, nowhere)
    return tables.task_of(table, kept, quadrant, questions)


def scr(
    task: tables.Task,
    probes: Mapping[str, Probe],
    w_dec: ArrayLike,
    x: np.ndarray,
    f: np.ndarray,
    ns: Sequence[int] = ABLATED,
) -> dict[str, Any]:
    """SCR of a coder, with arguments as for `tpp`.

    Direction "first" removes the second attribute from the biased probe and tests it on the first,
    "second" the other way round; the score is that of the direction whose biased probe is worse.
    {"direction", "by_n": {n: score}, "directions": {direction: {"clean", "biased", "ablated": {n:
    accuracy}, "by_n": {n: score}}}}.
    """
    biased, names = probes["biased"], list(task.questions)[:2]
    products, _ = along_decoder(w_dec, np.stack([biased.w, *(probes[n].w for n in names)]))
    directions: dict[str, dict[str, Any]] = {}
    for i, (direction, kept) in enumerate(zip(("first", "second"), names)):
        removed, split = names[1 - i], task.questions[kept]
        effect = effects(f, task.questions[removed], products[:, 2 - i], both_ways=True)
        before = biased.scores(x[split.test])
        clean = accuracy(split.test_y, probes[kept].scores(x[split.test]))
        original = accuracy(split.test_y, before)
        room, after, by_n = clean - original, {}, {}
        for n in ns:
            scores = ablated(before, f[split.test], products[:, 0], strongest(effect, n))
            after[str(n)] = accuracy(split.test_y, scores)
            by_n[str(n)] = (after[str(n)] - original) / room if room >= SMALLEST else 0.0
        directions[direction] = {
            "kept": kept,
            "removed": removed,
            "clean": clean,
            "biased": original,
            "ablated": after,
            "by_n": by_n,
        }
    worse = min(directions, key=lambda d: directions[d]["biased"])
    return {"direction": worse, "by_n": directions[worse]["by_n"], "directions": directions}
