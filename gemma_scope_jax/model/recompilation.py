"""A warning when one call is compiled again and again, naming what changes each time.

Compiling takes seconds where running takes milliseconds, and looks like a slow model.
"""

import sys
import warnings
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.model.buckets import bucket
from gemma_scope_jax.model.intercept import Intercept

AGAIN = 6  # programs that differ in one thing only before the warning
MOST_KNOWN = 4096  # calls remembered before all are forgotten

ADVICE = {
    "functions": "a new lambda or functools.partial is a new program each time: define the "
    "function once, at module level, and pass what changes as arguments",
    "lengths": "pad the tokens to fewer lengths, or mark the intercepts' functions `gs.tokenwise` "
    "if each treats every token alone, so that lengths are rounded up",
    "batch sizes": "fill up the last batch with rows of padding (segments 0)",
    "sets of layers": "pass one layer (an int), which is data, or all (None)",
    "shapes of arguments": "pad the intercepts' arguments to one shape",
    "numbers of new tokens": "request the largest and stop earlier by stop_tokens",
}
_known: set[Hashable] = set()
_changes: dict[Hashable, set[Hashable]] = {}


class RecompilationWarning(UserWarning):
    """One call was compiled for many programs; the message names what changes between them."""


def note(door: str, items: tuple[Intercept, ...], shape: tuple[int, int], fixed: Hashable, **more):
    """Remember a call of `door` on tokens of `shape`; warn once many of its programs differ
    in one thing only.

    fixed  everything else that chooses the program
    more   more things that change, by their keys in `ADVICE`
    """
    functions, named = zip(*map(_functions, items)) if items else ((), ())
    kinds = tuple((i.kind, i.site, i.name, i.layer is None) for i in items)
    parts: dict[str, Hashable] = {
        "functions": functions,
        "sets of layers": tuple(i.layers for i in items),
        "batch sizes": shape[0],
        "lengths": shape[1],
        "shapes of arguments": tuple(_shapes(i, shape) for i in items),
        **more,
    }
    rest = (door, fixed, named, kinds)
    call = (rest, *parts.values())
    if call in _known:
        return
    if len(_known) >= MOST_KNOWN:
        _known.clear()
        _changes.clear()
    _known.add(call)
    rounded = shape[1] == bucket(shape[1], sys.maxsize, shape[0])
    for what, value in parts.items():
        if what == "lengths" and rounded:  # of these there are few
            continue
        others = () if what == "functions" else tuple(v for k, v in parts.items() if k != what)
        values = _changes.setdefault((what, rest, others), set())
        values.add(value)
        if len(values) == AGAIN:
            text = f"{door} has been compiled for {AGAIN} {what}, all else being equal"
            warnings.warn(f"{text}: {ADVICE[what]}", RecompilationWarning, stacklevel=4)


def _functions(item: Intercept) -> tuple[Hashable, Hashable]:
    """The item's functions as `jit` distinguishes them, and as their author does; with options."""
    given = {"fn": item.fn, "init": item.init_fn, **dict(item.options)}
    made = tuple(hash(v) for v in given.values() if callable(v))
    named = tuple((k, _name(v) if callable(v) else v) for k, v in given.items())
    return made, named


def _name(fn: Any) -> str:
    inner = getattr(fn, "func", fn)  # the function inside a partial
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner))}"


def _shapes(item: Intercept, shape: tuple[int, int]) -> Hashable:
    """Shapes and dtypes of the arguments, sizes equal to those of the batch replaced by names."""
    leaves, tree = jax.tree.flatten((item.args, item.init))
    axes = dict(zip(shape, "BT"))
    each = ((tuple(axes.get(n, n) for n in np.shape(a)), jax.dtypes.result_type(a)) for a in leaves)
    return tree, tuple(each)
