"""Features that stand for the format of a text, whatever it says.

At the tokens of a chat's template a few features dominate every text; others fire at a position,
such as the first of a text. They differ between arms where lengths or formats do, and rank high in
comparisons of means, though they know nothing of the behaviour. A feature is structural here if it
fires in nearly all texts of both arms and, where it fires,

    most of its activation is on tokens of the template, or
    its peak is at the same position in nearly all texts, from the start or from the end

Features of a format that only one arm has look like features of its content: give both arms the
same format.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.contrasts.arms import Arms
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.intercept import read, token_mask, tokenwise
from gemma_scope_jax.model.run import run
from gemma_scope_jax.probing.pooling import LENGTHS, batch_tokens, packed_texts

NEARLY = 0.9  # a share that counts as nearly all
MOST_TEXTS = 100  # of an arm that are looked at: shares of them are known to a few percent
SLOTS = 64  # features are padded to a multiple of this: few programs are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class StructuralFeatures:
    """How F features lie in the texts of both arms, and which of them are structural.

    features  int [F]
    fires     the share of texts with the feature, in the arm that has fewer
    template  the share of its activation on the template, mean over texts; 0 without templates
    place     the share of texts where its peak is at its most common position, from start or end
    flagged   bool [F]
    """

    features: np.ndarray
    fires: np.ndarray
    template: np.ndarray
    place: np.ndarray
    flagged: np.ndarray


def structural_features(
    model: Model,
    coder: SparseCoder,
    arms: Arms,
    features: Sequence[int] | np.ndarray,
    *,
    nearly: float = NEARLY,
    model_b: Model | None = None,
) -> StructuralFeatures:
    """Which of `features` stand for the format, see the module. Looks at 100 texts of an arm.

    nearly   the share of texts, of activation and of positions that counts as nearly all
    model_b  runs arm b, if it is another model
    """
    features = np.array([whole_number("feature", f, 0) for f in features], np.int64)
    counts, on_template, starts, ends = [], [], [], []
    for texts, templates, m in (
        (arms.a, arms.template_a, model),
        (arms.b, arms.template_b, model if model_b is None else model_b),
    ):
        there = np.zeros(len(features), int)
        texts = texts[:MOST_TEXTS]
        for number, f in _activations(m, coder, texts, features):
            total, peak = f.sum(0), f.argmax(0)
            fires = total > 0
            there += fires
            mask = np.zeros(len(f), bool) if templates is None else templates[number]
            safe = np.where(fires, total, 1.0)
            on_template.append(np.where(fires, f[mask].sum(0) / safe, np.nan))
            starts.append(np.where(fires, peak, -1))
            ends.append(np.where(fires, len(f) - 1 - peak, -1))
        counts.append(there / len(texts))
    fires = np.minimum(*counts)
    known = np.isfinite(on_template)
    template = np.where(known, on_template, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    place = np.maximum(_commonest(np.array(starts)), _commonest(np.array(ends)))
    flagged = (fires >= nearly) & ((template >= nearly) | (place >= nearly))
    return StructuralFeatures(features, fires, template, place, flagged)


def _commonest(places: np.ndarray) -> np.ndarray:
    """The share of the most common number in each column of places [N, F], -1 left out."""
    count = lambda column: np.bincount(column[column >= 0], minlength=1)
    return np.array([(c := count(column)).max() / max(c.sum(), 1) for column in places.T])


def _activations(
    model: Model, coder: SparseCoder, texts: Sequence[np.ndarray], features: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the text, float32 [T, F]) of every text; zero where the coder has no features."""
    ids = np.zeros(-(-max(len(features), 1) // SLOTS) * SLOTS, np.int32)
    ids[: len(features)] = features
    item = read(coder.reads, coder.layer, _some, coder, ids, name="some", first=coder.first)
    sizes = batch_tokens(), LENGTHS, model.config.context
    for which, batch, *_ in packed_texts(texts, "mean", coder.first, *sizes):
        out = run(model, batch, [item], stop_at_layer=coder.layer + 1, logits="none")
        found = np.asarray(out.reads["some"])
        for i, (row, columns) in zip(which, batch.document_slices(), strict=True):
            yield i, found[row, columns, : len(features)]


@tokenwise
def _some(x, ctx, coder, ids, *, first):
    """The activations [B, T, n] of the features `ids` [n]."""
    mask = token_mask(ctx, x, first)
    if coder.k is None:  # features do not compete: only these are encoded
        take = lambda a: jnp.take(a, ids, axis=-1)
        parts = {name: take(getattr(coder, name)) for name in ("w_enc", "b_enc", "threshold")}
        f = coder.replace(**parts).encode(x)
    else:
        f = jnp.take(coder.encode(x), ids, axis=-1)
    return jnp.where(mask, f, 0.0)
