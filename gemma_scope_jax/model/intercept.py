"""Intercepts: reading and writing activations of a pure forward pass, as data.

The model calls `at(site, x)` once per site; that line is the whole hook system. An `Intercept` says
what happens there. Its `site`, `layers`, `fn` and options are static: they choose the program. Its
`args` are a pytree of data: a new vector, mask, coder or strength never recompiles.

Three primitives; everything else is sugar over them:

    read(site, layers, fn, *args)         fn(x, ctx, *args) -> pytree, returned in Output.reads
    write(site, layers, fn, *args)        fn(x, ctx, *args) -> the activation that replaces x
    fold(site, layers, fn, init, *args)   fn(x, ctx, state, *args) -> (x, state), layer to layer

`layers` is None (wherever the site occurs), an int, or a tuple of ints. Other keyword arguments are
static options and reach `fn` as keywords. Pass module-level functions: a fresh lambda or
`functools.partial` is a new program each time.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.arguments import (
    MisfitError,
    Positions,
    at_positions,
    check_finite,
    is_abstract,
    whole_number,
)

LAYER_SITES = (
    "resid_pre", "pre_attn_scale", "q", "k", "v", "attn_pattern", "z", "post_attn_scale",
    "attn_out", "resid_mid", "pre_mlp_scale", "mlp_in", "mlp_act", "post_mlp_scale", "mlp_out",
    "resid_post",
)  # fmt: skip
SITES = ("embed", *LAYER_SITES, "resid_final", "final_scale", "logits")
Layers = int | Sequence[int] | None  # where an intercept acts, as users give it
_F = TypeVar("_F", bound=Callable)


@flax.struct.dataclass
class PerLayer:
    """An argument with a leading axis over the intercept's layers; `fn` sees one layer's slice."""

    tree: Any


per_layer = PerLayer


@flax.struct.dataclass
class Intercept:
    """What happens at a site. Built by `read`, `write`, `fold` and the sugar below."""

    args: Any
    init: Any = None
    kind: str = flax.struct.field(pytree_node=False, default="read")
    site: str = flax.struct.field(pytree_node=False, default="")
    layers: int | tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    fn: Callable = flax.struct.field(pytree_node=False, default=None)  # type: ignore[assignment]
    name: str | None = flax.struct.field(pytree_node=False, default=None)
    options: tuple = flax.struct.field(pytree_node=False, default=())
    init_fn: Callable | None = flax.struct.field(pytree_node=False, default=None)
    layer: Any = None  # int32 scalar: the one layer as data; `layers` is None then

    @property
    def of_one_layer(self) -> bool:
        """Whether values have no axis of layers."""
        return self.layer is not None or isinstance(self.layers, int)

    def at_layers(self, count: int) -> tuple[int, ...]:
        """The layers of a model of `count` layers at which this intercept acts, as given."""
        if self.layers is None:
            return tuple(range(count))
        return (self.layers,) if isinstance(self.layers, int) else self.layers


@flax.struct.dataclass
class Context:
    """What an intercept function can learn about the place where it acts.

    layer      int, or a traced int32 inside a scan; -1 outside the layers
    positions  int32 [B, T], absolute within the document: <bos> is 0, in prefill and decoding alike
    valid      bool [B, T], False on padding
    seen       activations of the sites already passed in this layer, by name
    site       the site where it acts
    """

    layer: Any
    positions: jax.Array
    valid: jax.Array
    seen: dict[str, jax.Array]
    site: str = flax.struct.field(pytree_node=False, default="")


def tokenwise(fn: _F) -> _F:
    """Decorator for an intercept's function that treats every token alone, so that tokens added as
    filling change nothing: `run` then rounds lengths up to a few (see `pad`).

    Its result starts with the axes of `x` up to the tokens, and its arguments have no token axis.
    """
    fn.tokenwise = True  # type: ignore[attr-defined]
    return fn


def _checked_layers(site: str, layers: Layers) -> int | tuple[int, ...] | None:
    if layers is None:
        return None
    if site not in LAYER_SITES:
        raise InputError(f"site {site!r} is not inside a layer: pass layers=None, not {layers!r}")
    several = isinstance(layers, (tuple, list, range))
    try:
        numbers = tuple(whole_number("layers", l) for l in (layers if several else (layers,)))
    except InputError:
        raise InputError(f"layers must be None, an int or several ints, not {layers!r}") from None
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise InputError(f"layers must be distinct, non-negative and not empty, got {layers!r}")
    return numbers if several else numbers[0]


def _intercept(
    kind: str, site: str, layers: Layers, fn: Callable, args: tuple, name: str | None, options: dict
) -> Intercept:
    if site not in SITES:
        raise InputError(f"unknown site {site!r}{nearest(site, SITES)} (all: {' '.join(SITES)})")
    if kind == "fold" and site not in LAYER_SITES:
        raise InputError(f"fold acts at layer sites only, and {site!r} is not one")
    if name is not None and not isinstance(name, str):
        raise InputError(f"name must be text, not {name!r}")
    if kind == "read":
        name = name or site
    static = tuple(sorted(options.items()))
    return Intercept(args, None, kind, site, _checked_layers(site, layers), fn, name, static)


def read(
    site: str, layers: Layers, fn: Callable, /, *args, name: str | None = None, **options
) -> Intercept:
    """Put `fn(x, ctx, *args, **options)` into `Output.reads[name]` (default name: the site).

    An int layer gives the value; a tuple, or None at a layer site, stacks over layers first.
    """
    return _intercept("read", site, layers, fn, args, name, options)


def write(site: str, layers: Layers, fn: Callable, /, *args, **options) -> Intercept:
    """Replace the activation at `site` by `fn(x, ctx, *args, **options)` (same shape and dtype)."""
    return _intercept("write", site, layers, fn, args, None, options)


def fold(
    site: str, layers: Layers, fn: Callable, init: Any, /, *args, name=None, **options
) -> Intercept:
    """Carry a state through the layers: `fn(x, ctx, state, *args, **options) -> (x, state)`.

    `init` is the first state (a pytree), or a module-level function `init(embed, *args) -> state`
    of the embeddings [B, T, D], for states whose shape follows the batch. With a `name`, the last
    state is returned in `Output.reads[name]`.
    """
    made = _intercept("fold", site, layers, fn, args, name, options)
    if callable(init):
        return made.replace(init_fn=init)  # type: ignore[attr-defined]
    return made.replace(init=jax.tree.map(jnp.asarray, init))  # type: ignore[attr-defined]


@tokenwise
def _identity(x, ctx):
    return x


def token_mask(
    ctx: Context, x: jax.Array, first: int, positions: Positions | None = None
) -> jax.Array:
    """bool, broadcastable to `x`: valid tokens from position `first` on, in `positions` if given.

    Selects the queries of an attention pattern.
    """
    mask = ctx.valid & (ctx.positions >= first)
    if positions is not None:
        which = jnp.atleast_1d(jnp.asarray(positions.which))
        if which.dtype == bool:
            mask = mask & jnp.take(which, ctx.positions, mode="fill", fill_value=False)
        else:
            wanted = which.astype(jnp.int32)
            mask = mask & (ctx.positions[..., None] == wanted[None, None, :]).any(-1)
    if ctx.site == "attn_pattern":
        return mask[:, None, :, None]
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _like(x: jax.Array, ctx: Context, value: Any, what: str) -> jax.Array:
    """`value` in the dtype of `x` and broadcast to it; raises `MisfitError` if it does not fit."""
    value = jnp.asarray(value).astype(x.dtype)
    sizes = zip(value.shape[::-1], x.shape[::-1])
    if value.ndim > x.ndim or any(a not in (1, b) for a, b in sizes):
        raise MisfitError(
            f"{what} at {ctx.site!r}: a value of shape {list(value.shape)} does not fit the "
            f"activation {list(x.shape)}, whose last axis is {x.shape[-1]}"
        )
    return jnp.broadcast_to(value, x.shape)


@tokenwise
def add(x, ctx, vector, positions, *, first):
    mask = token_mask(ctx, x, first, positions)
    return jnp.where(mask, x + _like(x, ctx, vector, "steer"), x)


@tokenwise
def replace(x, ctx, value, positions, *, first):
    mask = token_mask(ctx, x, first, positions)
    return jnp.where(mask, _like(x, ctx, value, "patch"), x)


@tokenwise
def _stop_gradient(x, ctx):
    return jax.lax.stop_gradient(x)


def capture(site: str, layers: Layers = None, *, name: str | None = None) -> Intercept:
    """Return the activation itself in `reads[site]`: [B, T, ...] for an int layer, else stacked."""
    return read(site, layers, _identity, name=name)


def steer(
    site: str, layers: Layers, vector: Any, *, positions: Any = None, first: int = 1
) -> Intercept:
    """Add `vector` (anything that broadcasts to the site; `per_layer(...)` for one each) to a site.

    Positions below `first` are left alone (default 1: <bos>). `positions` restricts steering to
    these absolute positions: ints, or a boolean mask [n] over the positions 0 to n - 1. Negative
    ones are refused: a text grows while it is generated. Vector and positions are data.
    """
    where, first = at_positions(positions), whole_number("first", first, 0)
    return write(site, layers, add, _checked_value("steer", site, vector), where, first=first)


def patch(
    site: str, layers: Layers, value: Any, *, positions: Any = None, first: int = 0
) -> Intercept:
    """Replace a site's activation by `value`, at all tokens or at the `positions` (see `steer`)."""
    where, first = at_positions(positions), whole_number("first", first, 0)
    return write(site, layers, replace, _checked_value("patch", site, value), where, first=first)


def _checked_value(what: str, site: str, value: Any) -> Any:
    """`value`, an array, a number or a list of numbers, or `per_layer` of one; see `check_data`."""
    tree = value.tree if isinstance(value, PerLayer) else value
    check_finite(f"the value of {what}", tree, infinite=site == "logits")
    if isinstance(tree, (list, tuple)) and not is_abstract(tree):
        tree = np.asarray(tree)
    return PerLayer(tree) if isinstance(value, PerLayer) else tree


def freeze(*sites: str) -> list[Intercept]:
    """Treat the `sites` as constants under differentiation (attention patterns, norm scales)."""
    return [write(site, None, _stop_gradient) for site in sites]
