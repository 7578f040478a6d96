"""The features of two models beside each other: pretrained and tuned, before and after finetuning.

    table = gs.compare_features(base, coder, tuned, tuned_coder, texts)

With one coder on both models a feature is compared with itself (`contrast` with `model_b` asks
which of them tell the models apart). Two coders number their features each in its own way, so
features are matched by the cosine of what they write. Low cosines are no match: dictionaries
trained apart share only a part of their features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_scope_jax.behaviour.statistics import FEWEST, paired_tests
from gemma_scope_jax.circuits.tables import text_tables
from gemma_scope_jax.coders.coder import check_fits
from gemma_scope_jax.coders.directions import check_comparable, most_similar, written
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.probing.pooling import PooledFeatures, pool
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.strict_json import finite

LEAST = 0.7  # the cosine of a match


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedFeatures:
    """Pairs of features of two coders, those whose firing rates differ most first.

    feature_a, feature_b  int [n]
    cosine    of what they write
    rate_a, rate_b  the share of tokens on which they fire, mean over texts
    effect    Cohen's d of the rates' differences over texts; p and q (over all pairs) likewise
    family_p  p of the largest difference of all: the alarm
    unmatched  how many active features of each coder have no match
    """

    feature_a: np.ndarray
    feature_b: np.ndarray
    cosine: np.ndarray
    rate_a: np.ndarray
    rate_b: np.ndarray
    effect: np.ndarray
    p: np.ndarray
    q: np.ndarray
    family_p: float
    unmatched: tuple[int, int]

    def __len__(self) -> int:
        return len(self.feature_a)

    def __repr__(self) -> str:
        return (
            f"MatchedFeatures({len(self)} pairs, family p {self.family_p:.3g}, "
            f"{self.unmatched[0]} and {self.unmatched[1]} unmatched)"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        columns = {
            f.name: value.tolist()
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray)
        }
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        more = {"family_p": self.family_p, "unmatched": list(self.unmatched)}
        return finite({**more, "features": rows})

    def tables(self, count: int = 20) -> dict[str, list[list[Any]]]:
        """Heading -> rows, the first of which names them; `count` pairs."""
        rows: list[list[Any]] = [["a", "b", "cosine", "rate a", "rate b", "d", "p", "q"]]
        columns = zip(
            self.feature_a.tolist(), self.feature_b.tolist(), self.cosine, self.rate_a,
            self.rate_b, self.effect, self.p, self.q,
        )  # fmt: skip
        for a, b, cosine, rate_a, rate_b, d, p, q in list(columns)[:count]:
            rates = f"{rate_a:.2%}", f"{rate_b:.2%}"
            rows.append([a, b, f"{cosine:.2f}", *rates, f"{d:+.2f}", f"{p:.2g}", f"{q:.2g}"])
        return {"Matched features": rows}

    def __str__(self) -> str:
        return f"{self!r}\n\n{text_tables(self.tables(), left=0)}"


def compare_features(
    model_a: Model,
    coder_a: SparseCoder,
    model_b: Model,
    coder_b: SparseCoder,
    texts: Sequence[np.ndarray],
    *,
    least: float = LEAST,
    seed: int = 0,
) -> MatchedFeatures:
    """How often matched features fire in two models on the same `texts`, int [n] each with <bos>.

    least  the cosine from which two features match; each must be the other's nearest

    Features that fire nowhere in either model are left out. Tests are paired by text. Raises
    `InputError` for fewer than 5 texts, coders that do not fit, and if nothing matches.
    """
    if not all(isinstance(coder, SparseCoder) for coder in (coder_a, coder_b)):
        raise InputError("matched features are of coders of one layer: take one with .at(layer)")
    for model, coder in ((model_a, coder_a), (model_b, coder_b)):
        check_fits(model.config, coder)
    check_comparable(coder_a, None, coder_b, None)
    if len(texts) < FEWEST:
        raise InputError(f"{len(texts)} texts: give at least {FEWEST}")
    first = max(coder_a.first, coder_b.first)
    fires = []
    for model, coder in ((model_a, coder_a), (model_b, coder_b)):
        report = Progress(None, "tokens", what="firing rates")
        fires.append(pool(model, [coder], texts, how="active", first=first, report=report))
    a, b, cosine = _matches(coder_a, coder_b, least)
    rate_a, rate_b = (_columns(f.features[0], n) for f, n in zip(fires, (a, b)))
    live = rate_a.any(0) | rate_b.any(0)
    if not live.any():
        raise InputError(f"no active features of the two coders match with a cosine of {least}")
    a, b, cosine, rate_a, rate_b = a[live], b[live], cosine[live], rate_a[:, live], rate_b[:, live]
    tests = paired_tests(rate_a - rate_b, seed=seed)
    order = np.argsort(-np.abs(tests.effect), kind="stable")
    alone = [_unmatched(f.features[0], n) for f, n in zip(fires, (a, b))]
    pairs = {"feature_a": a, "feature_b": b, "cosine": cosine}
    pairs |= {"rate_a": rate_a.mean(0), "rate_b": rate_b.mean(0)}
    pairs |= {"effect": tests.effect, "p": tests.p, "q": tests.q}
    ordered = {name: column[order] for name, column in pairs.items()}
    return MatchedFeatures(**ordered, family_p=tests.family_p, unmatched=(alone[0], alone[1]))


def _matches(
    coder_a: SparseCoder, coder_b: SparseCoder, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that are each other's nearest: numbers of both [n] and cosines."""
    if coder_a is coder_b:  # also where two features of it write the same
        numbers = np.arange(coder_a.width)
        return numbers, numbers, np.ones(coder_a.width)
    rows_a, rows_b = written(coder_a), written(coder_b)
    to_b, cosine = most_similar(rows_a, rows_b, 1, "nearest features")
    to_a, _ = most_similar(rows_b, rows_a, 1, "nearest features")
    numbers = np.arange(coder_a.width)
    found = np.flatnonzero((to_a[to_b[:, 0], 0] == numbers) & (cosine[:, 0] >= least))
    return found, to_b[found, 0].astype(np.int64), cosine[found, 0].astype(np.float64)


def _columns(found: PooledFeatures, features: np.ndarray) -> np.ndarray:
    """float64 [N, n]: the columns of `features`, zero where they are nowhere active."""
    values = np.zeros((len(found.values), len(features)))
    at = np.searchsorted(found.columns, features).clip(max=len(found.columns) - 1)
    there = found.columns[at] == features
    values[:, there] = found.values[:, at[there]]
    return values


def _unmatched(found: PooledFeatures, matched: np.ndarray) -> int:
    """How many active features are not among those matched."""
    return len(np.setdiff1d(found.columns[found.values.any(0)], matched))
