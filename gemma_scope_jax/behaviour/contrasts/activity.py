"""How often features fire and how much they write: what controls are matched in.

Ablating any frequent feature that writes much changes a model; a found feature must do more than
others like it. Like it means: active on as many tokens, and writing as much where it is.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.probing.pooling import PooledFeatures, pool
from gemma_scope_jax.progress import Progress

NEAREST = 3  # control features are drawn among so many times as many as are needed


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureActivity:
    """How active the F features of a coder are on some texts.

    rate     float64 [F]: the share of tokens on which it is active
    size     float64 [F]: the mean norm of what it writes on these tokens
    counted  how many tokens: from position `coder.first` on
    """

    rate: np.ndarray
    size: np.ndarray
    counted: int


def feature_activity(
    model: Model, coder: SparseCoder, texts: Sequence[np.ndarray]
) -> FeatureActivity:
    """The activity of all features on `texts`, int [n] each with <bos>: two passes of the model.
    Raises `InputError` for a coder of several layers and without texts."""
    if not isinstance(coder, SparseCoder):
        raise InputError("feature activity is of a coder of one layer: take one with .at(layer)")
    if not len(texts):
        raise InputError("no texts to measure the activity of features on")
    options = {"first": coder.first, "report": Progress(None, "tokens", what="feature activity")}
    counted = np.array([max(len(ids) - coder.first, 1) for ids in texts], np.float64)
    weight = counted / counted.sum()
    rate, mean = (
        _whole(pool(model, [coder], texts, how=how, **options).features[0], weight, coder.width)
        for how in ("active", "mean")
    )
    return FeatureActivity(rate, _size(coder, rate, mean), int(counted.sum()))


def activity_by_text(
    coder: SparseCoder, columns: np.ndarray, values: np.ndarray
) -> FeatureActivity:
    """The activity in pooled features, `values` [N, A] of `columns` [A], with texts for tokens."""
    rate, mean = np.zeros((2, coder.width))
    rate[columns], mean[columns] = (values > 0).mean(0), values.mean(0, dtype=np.float64)
    return FeatureActivity(rate, _size(coder, rate, mean), len(values))


def _size(coder: SparseCoder, rate: np.ndarray, mean: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(np.asarray(float32(coder.w_dec)), axis=1)
    return norms * mean / np.where(rate > 0, rate, 1.0)


def _whole(found: PooledFeatures, weight: np.ndarray, width: int) -> np.ndarray:
    """The weighted mean over texts, float64 [width]."""
    whole = np.zeros(width)
    whole[found.columns] = weight @ found.values
    return whole


def matched_sets(
    activity: FeatureActivity, features: np.ndarray, count: int, seed: int = 0
) -> np.ndarray:
    """`count` sets of other features, int [count, n], the i-th of each like `features[i]`: drawn
    among the nearest in log rate and log size.

    No feature is twice in a set. Raises `InputError` where too few others are active.
    """
    live = np.flatnonzero((activity.rate > 0) & (activity.size > 0))
    live = np.setdiff1d(live, features)
    n, wide = len(features), NEAREST * max(len(features), count)
    if len(live) < 2 * n:
        raise InputError(
            f"controls for {n} features need {2 * n} other active ones, and there are {len(live)}: "
            "measure activity on more texts"
        )
    place = lambda some: np.log(
        np.stack([np.maximum(activity.rate[some], 0.5 / activity.counted),
                  np.maximum(activity.size[some], 1e-12)])
    )  # fmt: skip
    others, own = place(live), place(features)
    apart = np.square(others[:, None, :] - own[:, :, None]).sum(0)  # [n, live]
    near = live[np.argsort(apart, axis=1, kind="stable")[:, :wide]]
    rng, sets = np.random.default_rng([seed, 4]), np.zeros((count, n), np.int64)
    for row in sets:
        taken: list[int] = []
        for i in rng.permutation(n):
            row[i] = rng.choice(np.setdiff1d(near[i], taken))
            taken.append(int(row[i]))
    return sets
