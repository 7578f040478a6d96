"""What features write, into a card: the tokens they push, and which features write alike."""

import dataclasses

import numpy as np

from gemma_scope_jax.cards.card_files import Stage
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.directions import (
    TO_LOGITS,
    Gain,
    check_comparable,
    extreme_logits,
    most_similar,
    unit_rows,
    written,
)
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class CardContext:
    """Where a stage of the cards writes its arrays, and how long they are."""

    stage: Stage
    settings: CardSettings


def write_logits(
    model: Model,
    coder: Coder,
    tokenizer: Tokenizer,
    layer: int | None,
    gain: Gain,
    context: CardContext,
) -> None:
    """Make `top_ids` to `logit_histogram`, but for a coder that does not write to the stream."""
    k, bins = context.settings.listed, context.settings.bins
    if coder.writes not in TO_LOGITS:
        return
    F, done = coder.width, 0
    shapes = {
        "top_ids": (k, np.int32),
        "top_logits": (k, np.float32),
        "bottom_ids": (k, np.int32),
        "bottom_logits": (k, np.float32),
        "logit_range": (2, np.float32),
        "logit_histogram": (bins, np.int32),
    }
    arrays = [context.stage.create(name, (F, n), dtype, 0) for name, (n, dtype) in shapes.items()]
    every, progress = np.arange(F), Progress(F, "features", what="logits")
    for chunk in extreme_logits(
        model, coder, tokenizer, every, k=k, gain=gain, bins=bins, layer=layer
    ):
        progress.at(done)
        size = len(chunk[0])
        for array, found in zip(arrays, chunk):
            array[done : done + size] = found
        done += size


def write_neighbours(coder: Coder, layer: int | None, context: CardContext) -> None:
    """Make `neighbour_ids` and `neighbour_cosines`."""
    k = context.settings.listed
    ids, cosines = most_similar(written(coder, layer), None, k, "decoder neighbours")
    context.stage.put("neighbour_ids", ids)
    context.stage.put("neighbour_cosines", cosines)


def write_comparison(
    coder: Coder,
    layer: int | None,
    other: Coder,
    other_layer: int | None,
    number: int,
    context: CardContext,
) -> None:
    """Make `compared_{number}_ids`, `_cosines` and `_same` against another coder's decoder.

    Raises `InputError` for coders that do not write vectors of one size.
    """
    check_comparable(coder, layer, other, other_layer)
    mine, theirs = written(coder, layer), written(other, other_layer)
    k, stage = context.settings.listed, context.stage
    ids, cosines = most_similar(mine, theirs, k, "neighbours in another coder")
    stage.put(f"compared_{number}_ids", ids)
    stage.put(f"compared_{number}_cosines", cosines)
    same = np.full(len(mine), np.nan, np.float32)
    both = min(len(mine), len(theirs))
    same[:both] = (unit_rows(mine[:both]) * unit_rows(theirs[:both])).sum(-1)
    stage.put(f"compared_{number}_same", same)
