"""What features write: the tokens they promote and suppress, and features with similar rows."""

import numpy as np

from gemma_scope_jax.cards.card_files import Stage
from gemma_scope_jax.cards.examples import CardSettings
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.directions import (
    TO_LOGITS,
    Gain,
    extreme_logits,
    most_similar,
    unit_rows,
    written,
)
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress


def write_logits(
    model: Model,
    coder: Coder,
    tokenizer: Tokenizer,
    layer: int | None,
    gain: Gain,
    settings: CardSettings,
    stage: Stage,
) -> None:
    """Make `top_ids` to `logit_histogram`, unless the coder does not write to the stream."""
    k, bins = settings.listed, settings.bins
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
    arrays = [stage.create(name, (F, n), dtype, 0) for name, (n, dtype) in shapes.items()]
    progress, options = Progress(F, "features", what="logits"), {"gain": gain, "layer": layer}
    for chunk in extreme_logits(model, coder, tokenizer, np.arange(F), k=k, bins=bins, **options):
        progress.at(done)
        size = len(chunk[0])
        for array, found in zip(arrays, chunk):
            array[done : done + size] = found
        done += size


def write_neighbours(coder: Coder, layer: int | None, k: int, stage: Stage) -> None:
    """Make `neighbour_ids` and `neighbour_cosines`."""
    ids, cosines = most_similar(written(coder, layer), None, k, "decoder neighbours")
    stage.put("neighbour_ids", ids)
    stage.put("neighbour_cosines", cosines)


def write_comparison(
    coder: Coder,
    layer: int | None,
    other: Coder,
    other_layer: int | None,
    number: int,
    k: int,
    stage: Stage,
) -> None:
    """Make `compared_{number}_ids`, `_cosines` and `_same` against another coder's decoder."""
    mine, theirs = written(coder, layer), written(other, other_layer)
    ids, cosines = most_similar(mine, theirs, k, "neighbours in another coder")
    stage.put(f"compared_{number}_ids", ids)
    stage.put(f"compared_{number}_cosines", cosines)
    same = np.full(len(mine), np.nan, np.float32)
    both = min(len(mine), len(theirs))
    same[:both] = (unit_rows(mine[:both]) * unit_rows(theirs[:both])).sum(-1)
    stage.put(f"compared_{number}_same", same)
