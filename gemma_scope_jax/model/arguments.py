"""Arguments that say where and how much, checked on the host before anything runs.

On a device an index out of range is silently clamped, wrapped or ignored. Checking numpy arrays,
lists and numbers costs nothing; under `jit` there are no values to check yet.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from gemma_scope_jax.errors import InputError


class MisfitError(InputError):
    """A value whose shape does not fit the activation it is for."""


def whole_number(what: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; True, 1.0 and "1" are refused. Raises `InputError`."""
    try:
        number = int(value.__index__())
    except (AttributeError, TypeError):
        number = None
    if number is None or isinstance(value, (bool, np.bool_)):
        raise InputError(f"{what} must be a whole number, not {value!r}")
    if least is not None and number < least:
        raise InputError(f"{what} must be at least {least}, got {number}")
    return number


def is_abstract(value: Any) -> bool:
    """Whether `value` has no concrete values: it is traced, or a shape to compile for."""
    kinds = (Tracer, jax.ShapeDtypeStruct)
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))


def on_host(what: str, values: Any) -> np.ndarray:
    """Numbers or booleans as a numpy array. Raises `InputError` for anything else."""
    try:
        array = np.asarray(values)
        if any(jnp.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating, bool)):
            return array
    except (TypeError, ValueError):
        pass
    raise InputError(f"{what} must be numbers, not {str(values)[:60]!r}")


@flax.struct.dataclass
class Positions:
    """Which tokens an intercept is for: absolute positions int [n], or a mask bool [n] over them.

    `run` and `generate` check them against the text.
    """

    which: np.ndarray | jax.Array


def at_positions(positions: Any) -> Positions | None:
    """`positions` (ints or a boolean mask over the positions 0, 1, ..) as an argument; None: all.

    An array on a device is fetched to be checked; a traced one is not checked. Raises `InputError`
    for anything but positions.
    """
    if positions is None or isinstance(positions, Positions):
        return positions
    which = jnp.asarray(positions) if is_abstract(positions) else on_host("positions", positions)
    if not which.size and which.ndim:
        which = which.astype(np.int32)  # numpy makes [] float64
    ints, mask = jnp.issubdtype(which.dtype, np.integer), which.dtype == bool and which.ndim
    if which.ndim > 1 or not (ints or mask):
        wanted = "positions must be ints, or a boolean mask, counted from <bos> = 0"
        raise InputError(f"{wanted}; got {which.dtype}{list(which.shape)}")
    if isinstance(which, np.ndarray) and ints and which.size:
        low, high = which.min(), which.max()
        if low < 0:
            raise InputError(f"position {low}: positions count from <bos> = 0 to T - 1")
        if high >= 2**31:
            raise InputError(f"position {high} is beyond every text")
        which = which.astype(np.int32)
    return Positions(which)


def check_positions(where: Positions, least: int, most: int) -> None:
    """Raise `InputError` if `where`, on the host, names tokens beyond texts of `most` tokens, or is
    a mask that ends before token `least`."""
    which = where.which
    if not isinstance(which, np.ndarray):
        return
    if which.dtype == bool and which.size < least:
        raise InputError(f"a mask of {which.size} positions for a text of {least} tokens")
    named = np.flatnonzero(which) if which.dtype == bool else which
    if named.size and named.max() >= most:
        raise InputError(f"position {named.max()}: the text has positions 0 to {most - 1}")


def check_finite(what: str, value: Any, dtype: DTypeLike = jnp.float32, infinite=False) -> None:
    """Raise `InputError` unless `value` (numbers or an array on the host) is finite in `dtype`.
    `infinite` also allows infinities. Traced values and arrays on a device are not checked."""
    if is_abstract(value) or isinstance(value, jax.Array):
        return
    array, known = on_host(what, value), jnp.dtype(dtype)
    if not array.size:
        return
    for extreme in (array.min(), array.max()):  # a NaN is both
        if np.isnan(extreme) or (np.isinf(extreme) and not infinite):
            raise InputError(f"{what} holds {'NaN' if np.isnan(extreme) else extreme}")
        if np.isfinite(extreme) and abs(float(extreme)) > float(jnp.finfo(known).max):
            raise InputError(f"{what} holds {extreme:.3g}, which overflows {known.name}")
