"""Features that differ between two arms, with evidence that stands up.

    arms = gs.arms(tokenizer, stereotypes, anti_stereotypes, paired=True)
    found = gs.contrast(model, coder, arms, elsewhere=other_source)
    print(found)

Features are chosen on one half of the texts; all that is reported about them is of the other half,
or of texts held out by the caller, and the detectors are scored there and on texts from elsewhere:
a "behaviour" feature that detects the format of one data set fails on the second. Whether there is
anything to see at all is `family_p`.
"""

import dataclasses

import numpy as np

from gemma_scope_jax.behaviour.contrasts.activity import activity_by_text
from gemma_scope_jax.behaviour.contrasts.arms import HOWS, Arms, How, PooledArms, pool_arms
from gemma_scope_jax.behaviour.contrasts.detection import fit_detectors
from gemma_scope_jax.behaviour.contrasts.differences import Contrast, FeatureDifference
from gemma_scope_jax.behaviour.contrasts.ranking import ranked, stability, tests_of
from gemma_scope_jax.behaviour.contrasts.structural import MOST_TEXTS, NEARLY, structural_features
from gemma_scope_jax.coders.coder import check_fits, ends
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.sharding import own_mesh

SHOWN = 50  # features in the table
TESTED = 1000  # permutations


@own_mesh
def contrast(
    model: Model,
    coder: SparseCoder,
    arms: Arms,
    *,
    held_out: Arms | None = None,
    elsewhere: Arms | None = None,
    how: How = "mean",
    k: int = 8,
    other_layer: int | None = None,
    structural: bool = False,
    level: float = 0.05,
    permutations: int = TESTED,
    seed: int = 0,
    model_b: Model | None = None,
) -> Contrast:
    """The features of `coder`, of one layer, that differ between the arms.

    held_out   the texts that figures are reported on; default: half of `arms`
    elsewhere  texts of the same two kinds from another source
    how        a text's feature is its mean over tokens, the largest ("max"), or that at the last
               token; tokens before `coder.first` are left out. Raw activations are never maxima
    k          features of the sparse probe
    other_layer  of a second raw probe; default: half as deep as the coder
    structural   also choose features that stand for the format
    permutations  behind `family_p`, which is 1 / (permutations + 1) at the least
    model_b    runs arm b: the arms are then the same texts, paired

    Tests are of all features that are active on any text; `family_p` of those that may be chosen.
    Random choices follow `seed`. Raises `InputError` for too few texts, a coder that does not fit,
    and what does not belong together.
    """
    layers = _checked(model, coder, how, k, other_layer, model_b)
    given = {"arms": arms, "held_out": held_out, "elsewhere": elsewhere}
    for name, some in given.items():
        if some is not None:
            some.check_length(model.config.context)
            _check_same_texts(some, name, model_b)
    discovery, reported = (arms, held_out) if held_out is not None else arms.halves(seed)
    sets = {"discovery": discovery, "reported": reported}
    if elsewhere is not None:
        sets["elsewhere"] = elsewhere
    places = [(coder.reads, layer) for layer in layers]
    models = (model, model if model_b is None else model_b)
    pooled = dict(zip(sets, pool_arms(models, coder, list(sets.values()), how, places)))
    train, test, far = pooled["discovery"], pooled["reported"], pooled.get("elsewhere")
    everything = train if held_out is not None else train.joined(test)

    tests, order = tests_of(test, 0), ranked(tests_of(train, 0))
    flagged = _structural(models, coder, arms, everything)
    left_out = np.zeros_like(flagged) if structural else flagged
    chosen = order[~left_out[order]][:k]
    eligible = np.setdiff1d(np.flatnonzero(~left_out), chosen)
    detectors = fit_detectors(train, chosen, eligible, places[0], places[1], seed=seed)
    stable = stability(everything, k, left_out, seed=seed)
    shown = order[: max(SHOWN, 2 * k)].tolist()
    rows = [_row(j, train, test, far, tests, stable, flagged) for j in shown]
    return Contrast(
        name=arms.name,
        coder=coder.info.path or f"{coder.kind} at {ends(coder)} of layer {coder.layer}",
        how=how,
        paired=arms.paired,
        rows=tuple(rows),
        family_p=_family_p(everything, left_out, permutations, seed),
        tested=len(train.columns),
        below=int((tests.q < level).sum()),
        level=level,
        aucs=detectors.aucs(test, 1 - level, seed),
        elsewhere=None if far is None else detectors.aucs(far, 1 - level, seed),
        counts={name: (len(some.a), len(some.b)) for name, some in sets.items()},
        chosen=tuple(train.columns[chosen].tolist()),
        activity=activity_by_text(coder, everything.columns, everything.values),
    )


def _checked(
    model: Model,
    coder: SparseCoder,
    how: str,
    k: int,
    other_layer: int | None,
    model_b: Model | None,
) -> tuple[int, int]:
    """The layers of the two raw probes."""
    if not isinstance(coder, SparseCoder):
        raise InputError("contrast takes a coder of one layer: of a set, take one with .at(layer)")
    for m in (model, model_b or model):
        check_fits(m.config, coder)
    if how not in HOWS:
        raise InputError(f"how is {how!r}; known are {', '.join(HOWS)}")
    whole_number("k", k, 1)
    default = coder.layer // 2 if coder.layer else model.config.layers - 1
    other = default if other_layer is None else whole_number("other_layer", other_layer, 0)
    if other >= model.config.layers or other == coder.layer:
        last = model.config.layers - 1
        raise InputError(
            f"other_layer {other}: name one from 0 to {last} that is not the coder's, {coder.layer}"
        )
    return coder.layer, other


def _check_same_texts(arms: Arms, what: str, model_b: Model | None) -> None:
    if model_b is None:
        return
    if not arms.paired or any(not np.array_equal(x, y) for x, y in zip(arms.a, arms.b)):
        raise InputError(
            f"{what}: with model_b both arms must be the same texts, paired: what differs is then "
            "the models"
        )


def _structural(
    models: tuple[Model, Model], coder: SparseCoder, arms: Arms, pooled: PooledArms
) -> np.ndarray:
    """bool [F]: the columns of `pooled` that stand for the format."""
    everywhere = np.minimum((pooled.a > 0).mean(0), (pooled.b > 0).mean(0)) >= NEARLY
    flagged, where = np.zeros(len(pooled.columns), bool), np.flatnonzero(everywhere)
    if len(where):
        some = arms.some(*(_spaced(len(texts)) for texts in (arms.a, arms.b)))
        found = structural_features(
            models[0], coder, some, pooled.columns[where], model_b=models[1]
        )
        flagged[where] = found.flagged
    return flagged


def _family_p(arms: PooledArms, left_out: np.ndarray, permutations: int, seed: int) -> float:
    """The p of the largest difference among the columns that are not `left_out`; 1 for none."""
    if left_out.all():
        return 1.0
    kept = dataclasses.replace(arms, values=arms.values[:, ~left_out])
    return tests_of(kept, permutations, seed).family_p


def _spaced(count: int) -> np.ndarray:
    """Up to `MOST_TEXTS` numbers, evenly spaced: texts may be sorted by their source."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_TEXTS)).astype(int))


def _row(j, train, test, far, tests, stable, flagged) -> FeatureDifference:
    """The figures of column j."""
    sign = np.sign(train.a[:, j].mean() - train.b[:, j].mean()) or 1.0
    area = lambda arms: auc(arms.y, sign * arms.values[:, j])
    a, b = test.a[:, j], test.b[:, j]
    return FeatureDifference(
        feature=int(train.columns[j]),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        fires_a=float((a > 0).mean()),
        fires_b=float((b > 0).mean()),
        effect=float(tests.effect[j]),
        p=float(tests.p[j]),
        q=float(tests.q[j]),
        stability=float(stable[j]),
        auc=area(test),
        elsewhere=None if far is None else area(far),
        structural=bool(flagged[j]),
    )
