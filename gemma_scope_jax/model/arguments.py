"""Arguments that say where and how much, checked on the host before anything runs.

On a device an index out of range is clamped, wraps around or matches nothing, and nobody is told.
What numpy arrays, lists and numbers say costs nothing to look at; under `jit` there is nothing to
look at yet.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gemma_scope_jax.errors import InputError


class MisfitError(InputError):
    """A value whose shape does not fit the activation it is for."""


def whole_number(what: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; true, 1.0 and "1" are none. Raises `InputError`."""
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
    """Whether there is nothing to look at: a traced value, or a shape to compile for."""
    kinds = (Tracer, jax.ShapeDtypeStruct)
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))


def on_host(what: str, values: Any) -> np.ndarray:
    """Numbers or booleans as a numpy array. Raises `InputError` for anything else."""
    try:
        array = np.asarray(values)
        known = any(map(lambda k: jnp.issubdtype(array.dtype, k), (np.integer, np.floating, bool)))
    except (TypeError, ValueError):
        known = False
    if not known:
        raise InputError(f"{what} must be numbers, not {str(values)[:60]!r}")
    return array


# -------------------------------------------------------------------------------------------------
# Which tokens


@flax.struct.dataclass
class Positions:
    """Which tokens an intercept is for: absolute positions int [n], or a mask bool [n] over them.

    `run` and `generate` look for it among an intercept's arguments, to refuse positions that the
    text does not have.
    """

    which: Any


def at_positions(positions: Any) -> Positions | None:
    """`positions` (ints or a boolean mask over the positions 0, 1, ..) as an argument; None: all.

    An array on a device is fetched to be checked; a traced one is taken as it is. Raises
    `InputError` for anything but positions.
    """
    if positions is None or isinstance(positions, Positions):
        return positions
    wanted = "positions must be ints, or a boolean mask, counted from <bos> = 0"
    which = jnp.asarray(positions) if is_abstract(positions) else on_host("positions", positions)
    if not which.size and which.ndim:
        which = which.astype(np.int32)  # [] is of float64
    ints, mask = jnp.issubdtype(which.dtype, np.integer), which.dtype == bool and which.ndim
    if which.ndim > 1 or not (ints or mask):
        raise InputError(f"{wanted}; got {which.dtype}{list(which.shape)}")
    if isinstance(which, np.ndarray) and ints and which.size:
        low, high = which.min(), which.max()
        if low < 0:
            raise InputError(
                f"position {low}: they count from <bos> = 0; the last of T tokens is T - 1"
            )
        if high >= 2**31:
            raise InputError(f"position {high} is beyond every text")
        which = which.astype(np.int32)
    return Positions(which)


def check_positions(where: Positions, least: int, most: int) -> None:
    """Raise `InputError` if `where`, on the host, names tokens that texts of `most` tokens do not
    have, or is a mask that ends before token `least`.
    """
    which = where.which
    if not isinstance(which, np.ndarray):
        return
    if which.dtype == bool and which.size < least:
        raise InputError(f"a mask of {which.size} positions for a text of {least} tokens")
    named = np.flatnonzero(which) if which.dtype == bool else which
    if named.size and named.max() >= most:
        raise InputError(f"position {named.max()}: the text has positions 0 to {most - 1}")


# -------------------------------------------------------------------------------------------------
# How much


def check_finite(what: str, value: Any, dtype: Any = None, infinite: bool = False) -> None:
    """Raise `InputError` unless `value` (numbers or an array; only looked at on the host) is finite
    in `dtype` (default: float32). `infinite`: infinities that are given as such may be.
    """
    if is_abstract(value) or isinstance(value, jax.Array):
        return
    array = on_host(what, value)
    if not array.size:
        return
    for extreme in (array.min(), array.max()):  # a NaN is both
        if np.isnan(extreme) or (np.isinf(extreme) and not infinite):
            raise InputError(f"{what} holds {'NaN' if np.isnan(extreme) else extreme}")
        most = float(jnp.finfo(dtype or jnp.float32).max)
        if np.isfinite(extreme) and abs(float(extreme)) > most:
            name = jnp.dtype(dtype or jnp.float32).name
            raise InputError(f"{what} holds {extreme:.3g}, which overflows {name}")
