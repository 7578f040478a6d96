"""`run`: the forward pass, jitted, for calls from outside: checks first, few programs.

A program is compiled for the shapes and the static parts of a call. So that a loop over layers or
over texts needs one or two of them, single layers and `stop_at_layer` are passed as data (see
`hooks.py`), and lengths are rounded up to a few (see `buckets.py`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import hooks
from gemma_scope_jax.model.arguments import is_abstract
from gemma_scope_jax.model.batch import check_ids, integers, tokens_and_segments
from gemma_scope_jax.model.buckets import bucket, cut, filled, widened
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import Cache, Logits, Output, Remat, check_pass, one_pass
from gemma_scope_jax.model.intercept import Intercept
from gemma_scope_jax.model.recompilation import note
from gemma_scope_jax.model.sharding import on_auto_axes, own_mesh


@own_mesh
def run(
    model: Model,
    tokens: Any,
    intercepts: Intercept | Sequence = (),
    *,
    positions: Any = None,
    segments: Any = None,
    cache: Cache | None = None,
    stop_at_layer: int | None = None,
    remat: Remat = (),
    logits: Logits = "all",
    pad: bool = True,
) -> Output:
    """`forward`, jitted: same arguments and result. New data of the same shapes compile nothing,
    nor does another single layer for an intercept, nor most other lengths.

    pad  round T up to one of a few lengths, without any effect on the result: not with a cache,
         functions that are not `tokenwise`, or large batches

    Numpy arrays, lists and numbers are checked: token ids against the vocabulary, positions and
    segments, the positions and values of intercepts. Of device arrays only the shapes are checked,
    without waiting; a row with ids outside the vocabulary becomes NaN. In functions, `ctx.layer` is
    a traced int32. Warns (`RecompilationWarning`) if calls that differ in one thing only are
    compiled again and again.
    """
    tokens, segments = tokens_and_segments(tokens, segments)
    tokens, segments = integers("tokens", tokens), integers("segments", segments)
    positions, items = integers("positions", positions), hooks.flatten(intercepts)
    model, tokens, items, positions, segments, cache = on_auto_axes(
        (model, tokens, items, positions, segments, cache)
    )
    room = model.config.context
    check_pass(model, tokens, items, positions, segments, cache, stop_at_layer, remat, logits)
    if isinstance(tokens, np.ndarray):
        check_ids(model.config, tokens)
    _check_places(positions, segments, room)
    # with a cache or given positions, any position may be meant
    length = tokens.shape[1]
    texts = (length, length) if positions is None and cache is None else (0, 2**31)
    hooks.check_data(items, model.dtype, *texts)

    size, stop, stop_data = length, stop_at_layer, None
    if not is_abstract((model, tokens, items, positions, segments, cache)):
        wide = bucket(length, room)
        if pad and cache is None and (more := filled(tokens, items, wide)) is not None:
            (tokens, items), size = more, wide
            positions, segments = widened(positions, wide, -1), widened(segments, wide, -1)
        items = hooks.layers_as_data(items)
        if stop is not None and not hooks.stacks(items):
            stop, stop_data = None, np.int32(stop)
        fixed = (model.config, model.dtype, remat, logits, stop, stop_data is None)
        given = (positions is None, segments is None, cache is None)
        note("run", items, tokens.shape, (*fixed, *given))
    data = {"positions": positions, "segments": segments, "cache": cache, "stop_data": stop_data}
    data["length"] = None if size == length else np.int32(length)
    out = _run(model, tokens, items, **data, stop_at_layer=stop, remat=remat, logits=logits)
    return out if size == length else cut(out, items, length, size)


@partial(jax.jit, static_argnames=("stop_at_layer", "remat", "logits"))
def _run(model, tokens, items, *, length, stop_data, stop_at_layer, remat, logits, **given):
    stop = stop_at_layer if stop_data is None else stop_data
    return one_pass(model, tokens, items, stop, length, **given, remat=remat, logits=logits)


def _check_places(positions: Any, segments: Any, room: int) -> None:
    """Raise `InputError` for impossible values on the host; padding may have any position."""
    if isinstance(segments, np.ndarray) and segments.min() < 0:
        raise InputError(f"segments must not be negative, got {segments.min()}")
    if not isinstance(positions, np.ndarray):
        return
    if segments is not None:
        positions = positions[segments > 0] if isinstance(segments, np.ndarray) else positions[:0]
    if not positions.size:
        return
    if positions.min() < 0:
        raise InputError(f"positions must not be negative, got {positions.min()}")
    if positions.max() >= room:
        raise InputError(f"position {positions.max()} is beyond the model's context of {room}")
