"""Lengths in buckets: a text of a new length seldom means a new program.

A batch is filled up on the right with tokens that nobody sees, for attention is causal, and what
comes out is cut back to its own length. The number of tokens that count is data.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.model.arguments import Positions
from gemma_scope_jax.model.hooks import PATCHES
from gemma_scope_jax.model.intercept import LAYER_SITES, Intercept, PerLayer

BUCKET = 32  # above 1, so that an axis of tokens shows itself in `generate`
MOST = 4096  # tokens of a batch that is filled up: larger ones pay more in memory than in compiling


def bucket(length: int, most: int) -> int:
    """`length` rounded up to a multiple of 32, or by an eighth at most; never over `most`."""
    step = max(BUCKET, 1 << max(0, (length - 1).bit_length() - 4))
    return min(-(-length // step) * step, most)


def filled(tokens: Any, items: tuple[Intercept, ...], size: int) -> tuple | None:
    """Tokens and intercepts for `size` columns instead of T; None if a result would tell.

    That is so where a function is not known to treat each token alone, where an argument may have
    an axis of tokens of a meaning unknown here, and where memory matters more.
    """
    length = tokens.shape[1]
    if length == size or tokens.size > MOST or not getattr(tokens, "is_fully_addressable", True):
        return None
    if not all(_is_tokenwise(i, length) for i in items):
        return None
    return widened(tokens, size, -1), tuple(_widened_item(i, length, size) for i in items)


def widened(array: Any, size: int, axis: int) -> Any:
    """`array`, on the host or a device, with zeros up to `size` along `axis`; None stays None."""
    if array is None:
        return None
    room = [(0, 0)] * np.ndim(array)
    room[axis] = (0, size - np.shape(array)[axis])
    return (jnp if isinstance(array, jax.Array) else np).pad(array, room)


def cut(output: Any, items: tuple[Intercept, ...], length: int, size: int) -> Any:
    """An `Output` of `size` columns as that of its first `length`."""
    found, tree = jax.tree.flatten((output.logits, output.reads))
    axes = (
        jax.tree.map(lambda _: (1,), output.logits),
        {
            i.name: jax.tree.map(lambda leaf, i=i: _read_axes(i, leaf.ndim), output.reads[i.name])
            for i in items
            if i.name is not None
        },
    )
    axes = tree.flatten_up_to(axes)
    axes = tuple(tuple(a for a in each if x.shape[a] == size) for x, each in zip(found, axes))
    logits, reads = tree.unflatten(_cut(found, length=length, axes=axes))
    return output.replace(logits=logits, reads=reads)


@partial(jax.jit, static_argnames=("length", "axes"))
def _cut(arrays: list[jax.Array], *, length: int, axes: tuple[tuple[int, ...], ...]):
    """The first `length` along the `axes` of each array."""
    for n, each in enumerate(axes):
        for axis in each:
            arrays[n] = jax.lax.slice_in_dim(arrays[n], 0, length, axis=axis)
    return arrays


def _read_axes(item: Intercept, rank: int) -> tuple[int, ...]:
    """Which axes of what `item` reads are tokens."""
    lead = 0 if item.of_one_layer or item.site not in LAYER_SITES else 1
    if item.site == "attn_pattern":
        return tuple(range(lead + 2, min(lead + 4, rank)))
    return (lead + 1,)


def _token_axes(site: str) -> tuple[int, ...]:
    """The axes of tokens of an activation, from the last."""
    if site == "attn_pattern":
        return -2, -1
    return (-3,) if site in ("q", "k", "v") else (-2,)


def _is_tokenwise(item: Intercept, length: int) -> bool:
    """Whether more tokens behind the others leave what `item` does to these as it is."""
    functions = [item.fn, *(value for _, value in item.options if callable(value))]
    if not all(getattr(fn, "tokenwise", False) for fn in functions):
        return False
    if item.kind == "fold" and (item.name is not None or item.init is not None):
        return False
    if item.fn in PATCHES:
        value = item.args[0].tree if isinstance(item.args[0], PerLayer) else item.args[0]
        shape = np.shape(value)
        return all(shape[a] in (1, length) for a in _token_axes(item.site) if len(shape) >= -a)
    rest = [arg for arg in item.args if not isinstance(arg, Positions)]
    return not any(length in np.shape(leaf) for leaf in jax.tree.leaves(rest))


def _widened_item(item: Intercept, length: int, size: int) -> Intercept:
    """`item` with its masks over positions, and what it patches or adds, for `size` tokens."""

    def value(leaf: Any) -> Any:
        shape = np.shape(leaf)
        for axis in _token_axes(item.site):
            if len(shape) >= -axis and shape[axis] == length > 1:
                leaf = widened(leaf, size, axis)
        return leaf

    def argument(n: int, arg: Any) -> Any:
        if isinstance(arg, Positions):
            short = arg.which.dtype == bool and len(arg.which) < size
            return Positions(widened(arg.which, size, 0)) if short else arg
        return jax.tree.map(value, arg) if n == 0 and item.fn in PATCHES else arg

    return item.replace(args=tuple(argument(n, arg) for n, arg in enumerate(item.args)))  # type: ignore[attr-defined]
