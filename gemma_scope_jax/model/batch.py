"""A batch of tokens: where documents begin, which tokens count, and what is no batch.

Axes: B rows of T tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.attention import Tokens, by_document
from gemma_scope_jax.model.config import GemmaConfig


def default_positions(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: the position of each token within its run of equal segment ids."""
    return jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :] - _run_starts(segments)


def _run_starts(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: where the run of equal segment ids begins that each token belongs to."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    before = jnp.concatenate([segments[:, :1], segments[:, :-1]], 1)
    return jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)


def documents(shape, positions, segments, cache: Any) -> tuple[Tokens, Any]:
    """The tokens of a pass, numbered by document, and what a cache keeps of their end.

    `positions` and `segments` int [B, T] or None, as `forward` takes them, and its `cache`.
    """
    if segments is None:
        segments = jnp.ones(shape, jnp.int32)
    segments = segments.astype(jnp.int32)
    if positions is None:
        starts = _run_starts(segments)
        positions = jnp.arange(shape[1], dtype=jnp.int32)[None, :] - starts
        if cache is None:
            return Tokens(positions, jnp.where(segments > 0, starts + 1, 0)), None
        # The row's first run goes on with the document before it, if the segment id is the same.
        first = jnp.argmax(segments > 0, axis=1, keepdims=True)
        follows = (starts == first) & (segments == cache.last[:, 1:2])
        positions = positions + jnp.where(follows, cache.last[:, :1] + 1, 0)
    slot, last = (
        (0, jnp.zeros((shape[0], 3), jnp.int32)) if cache is None else (cache.used, cache.last)
    )
    return by_document(Tokens(positions.astype(jnp.int32), segments), slot, last)


def counted(segments: jax.Array, first: int) -> jax.Array:
    """bool [B, T]: tokens that a coder was trained on; not padding, nor before `first`."""
    return (segments > 0) & (default_positions(segments) >= first)


def check_tokens(config: GemmaConfig, tokens, cache: Any, positions, segments) -> None:
    """Raise `InputError` unless shapes and dtypes are those of a batch that the model takes."""
    if 0 in tokens.shape:
        raise InputError("no tokens: the prompt is empty")
    shape = tokens.shape if len(tokens.shape) == 2 else ("B", "T")
    for what, given in {"tokens": tokens, "positions": positions, "segments": segments}.items():
        if given is None:
            continue
        if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
            wanted = f"integers [{', '.join(map(str, shape))}]"
            raise InputError(f"{what} must be {wanted}, got {given.dtype}{list(given.shape)}")
    room = config.context if cache is None else cache.k.shape[2]
    if tokens.shape[1] > room:
        what = "the model's context" if cache is None else "the cache's slots"
        count = tokens.shape[1]
        raise InputError(f"{count} tokens are more than {what} of {room}: shorten the text")


def check_ids(config: GemmaConfig, ids: np.ndarray, what: str = "") -> None:
    """Raise `InputError` if any of `ids` (some of them) is not a token; `what` begins the line."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab:
        bad = low if low < 0 else high
        raise InputError(f"{what}token id {bad} is outside 0..{config.vocab - 1}")


def integers(what: str, values: Any) -> Any:
    """Numbers on the host as an array, integers as int32; a device's array and None as they are."""
    if values is None or isinstance(values, jax.Array):
        return values
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what} must be [B, T]: pad rows of unequal lengths") from None
    if array.dtype.kind not in "iu" or not array.size:
        return array
    low, high = array.min(), array.max()
    if not -(2**31) <= low <= high < 2**31:
        raise InputError(f"{what} hold {low if low < 0 else high}, beyond 32 bits")
    return array.astype(np.int32)
