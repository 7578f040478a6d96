"""Lengths in buckets: a text of a new length seldom means a new program.

A batch is filled up on the right with tokens that no other token sees (attention is causal), and
the result is cut back to the original length. The number of real tokens is data.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.model.arguments import Positions
from gemma_scope_jax.model.gemma import Output
from gemma_scope_jax.model.hooks import PATCHES
from gemma_scope_jax.model.intercept import LAYER_SITES, Intercept, PerLayer

BUCKET = 32  # above 1, so that `generate` can recognise an axis of tokens
MOST = 4096  # tokens of a batch that is filled up: beyond it, memory costs more than compiling


def bucket(length: int, most: int, rows: int = 1) -> int:
    """`length` rounded up to a multiple of 32, or by an eighth at most; never above `most`.

    Up to 32, for 16 `rows` or more, to a multiple of 8: there, filling costs more than compiling.
    """
    least = BUCKET // 4 if rows >= 16 and length <= BUCKET else BUCKET
    step = max(least, 1 << max(0, (length - 1).bit_length() - 4))
    return min(-(-length // step) * step, most)


def filled(tokens: Any, items: tuple[Intercept, ...], size: int) -> tuple | None:
    """Tokens and intercepts for `size` columns instead of T; None if the filling could show in a
    result.

    It could where a function may not treat each token alone and where an argument may have an axis
    of tokens. Large batches are not filled either, to save memory.
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


def cut(output: Output, items: tuple[Intercept, ...], length: int, size: int) -> Output:
    """An `Output` of `size` columns cut to its first `length`."""
    named = {i.name: i for i in items}

    def axes(path: Any, x: jax.Array) -> tuple[int, ...]:
        tokens = (1,) if path[0].idx == 0 else _read_axes(named[path[1].key], x.ndim)
        return tuple(a for a in tokens if x.shape[a] == size)

    found, tree = jax.tree_util.tree_flatten_with_path((output.logits, output.reads))
    every = tuple(axes(path, x) for path, x in found)
    parts = _cut([x for _, x in found], length=length, axes=every)
    logits, reads = jax.tree.unflatten(tree, parts)
    return output.replace(logits=logits, reads=reads)  # type: ignore[attr-defined]


@partial(jax.jit, static_argnames=("length", "axes"))
def _cut(arrays: list[jax.Array], *, length: int, axes: tuple[tuple[int, ...], ...]):
    """The first `length` entries along the `axes` of each array."""
    first = partial(jax.lax.slice_in_dim, start_index=0, limit_index=length)
    for n, each in enumerate(axes):
        for axis in each:
            arrays[n] = first(arrays[n], axis=axis)
    return arrays


def _read_axes(item: Intercept, rank: int) -> tuple[int, ...]:
    """The token axes of what `item` reads."""
    lead = 0 if item.of_one_layer or item.site not in LAYER_SITES else 1
    if item.site == "attn_pattern":
        return tuple(range(lead + 2, min(lead + 4, rank)))
    return (lead + 1,)


def _token_axes(site: str) -> tuple[int, ...]:
    """The token axes of an activation, counted from the last."""
    if site == "attn_pattern":
        return -2, -1
    return (-3,) if site in ("q", "k", "v") else (-2,)


def _is_tokenwise(item: Intercept, length: int) -> bool:
    """Whether extra tokens at the end leave what `item` does to the others unchanged."""
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

    args = tuple(argument(n, arg) for n, arg in enumerate(item.args))
    return item.replace(args=args)  # type: ignore[attr-defined]
