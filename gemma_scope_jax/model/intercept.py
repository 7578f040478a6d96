"""Intercepts: reading and writing activations of a pure forward pass, as data.

The model calls `at(site, x)` once per site; that line is the whole hook system. An `Intercept` says
what happens there. Its `site`, `layers`, `fn` and options are static: they choose the program. Its
`args` are a pytree and only data: a new vector, mask, coder or strength never recompiles.

Three primitives, everything else is sugar over them:

    read(site, layers, fn, *args)         fn(x, ctx, *args) -> pytree, returned in Output.reads
    write(site, layers, fn, *args)        fn(x, ctx, *args) -> the activation that replaces x
    fold(site, layers, fn, init, *args)   fn(x, ctx, state, *args) -> (x, state), layer to layer

`layers` is None (wherever the site occurs), an int, or a tuple of ints. Keyword arguments beyond
those named are static options and reach `fn` as keywords. Pass module-level functions: a fresh
lambda or `functools.partial` is a new program each time.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model.arguments import (
    MisfitError,
    Positions,
    at_positions,
    check_finite,
    check_positions,
    is_abstract,
    whole_number,
)

LAYER_SITES = (
    "resid_pre", "pre_attn_scale", "q", "k", "v", "attn_pattern", "z", "post_attn_scale",
    "attn_out", "resid_mid", "pre_mlp_scale", "mlp_in", "mlp_act", "post_mlp_scale", "mlp_out",
    "resid_post",
)  # fmt: skip
SITES = ("embed", *LAYER_SITES, "resid_final", "final_scale", "logits")


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

    def at_layers(self, count: int) -> tuple[int, ...]:
        """The layers of a model of `count` layers at which this intercept acts, as given."""
        if self.layers is None:
            return tuple(range(count))
        return (self.layers,) if isinstance(self.layers, int) else self.layers


@flax.struct.dataclass
class Context:
    """What an intercept function may know about the place where it acts.

    layer      int, or a traced int32 inside a scan; -1 outside the layers
    positions  int32 [B, T], absolute within the document: <bos> is 0, in prefill and decoding alike
    valid      bool [B, T], False on padding
    seen       activations of the sites already passed in this layer, by name
    site       where this is
    """

    layer: Any
    positions: jax.Array
    valid: jax.Array
    seen: dict[str, jax.Array]
    site: str = flax.struct.field(pytree_node=False, default="")


def _checked_site(site: str) -> str:
    if site not in SITES:
        raise InputError(f"unknown site {site!r}{nearest(site, SITES)} (all: {' '.join(SITES)})")
    return site


def _checked_layers(site: str, layers) -> int | tuple[int, ...] | None:
    if layers is None:
        return None
    if site not in LAYER_SITES:
        raise InputError(f"site {site!r} is not inside a layer: pass layers=None, not {layers!r}")
    given = layers if isinstance(layers, (tuple, list, range)) else (layers,)
    try:
        numbers = tuple(whole_number("layers", l) for l in given)
    except InputError:
        raise InputError(f"layers must be None, an int or several ints, not {layers!r}") from None
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise InputError(f"layers must be distinct, non-negative and not empty, got {layers!r}")
    return numbers if isinstance(layers, (tuple, list, range)) else numbers[0]


def _checked_name(name: str | None) -> str | None:
    if name is not None and not isinstance(name, str):
        raise InputError(f"name must be text, not {name!r}")
    return name


def read(
    site: str, layers, fn: Callable, /, *args, name: str | None = None, **options
) -> Intercept:
    """Put `fn(x, ctx, *args, **options)` into `Output.reads[name]` (default name: the site).

    An int layer gives the value; a tuple, or None at a layer site, stacks over layers first.
    """
    site, layers = _checked_site(site), _checked_layers(site, layers)
    static = tuple(sorted(options.items()))
    return Intercept(args, None, "read", site, layers, fn, _checked_name(name) or site, static)


def write(site: str, layers, fn: Callable, /, *args, **options) -> Intercept:
    """Replace the activation at `site` by `fn(x, ctx, *args, **options)` (same shape and dtype)."""
    site, layers = _checked_site(site), _checked_layers(site, layers)
    return Intercept(args, None, "write", site, layers, fn, None, tuple(sorted(options.items())))


def fold(
    site: str, layers, fn: Callable, init, /, *args, name: str | None = None, **options
) -> Intercept:
    """Carry a state through the layers: `fn(x, ctx, state, *args, **options) -> (x, state)`.

    `init` is the first state (a pytree), or a module-level function `init(embed, *args) -> state`
    of the embeddings [B, T, D], for states whose shape follows the batch. With a `name` the last
    state is returned in `Output.reads[name]`.
    """
    site, layers = _checked_site(site), _checked_layers(site, layers)
    if site not in LAYER_SITES:
        raise InputError(f"fold acts at layer sites only, and {site!r} is not one")
    static, make = tuple(sorted(options.items())), init if callable(init) else None
    data = None if make else jax.tree.map(jnp.asarray, init)
    return Intercept(args, data, "fold", site, layers, fn, _checked_name(name), static, make)


# -------------------------------------------------------------------------------------------------
# Sugar


def _identity(x, ctx):
    return x


def token_mask(
    ctx: Context, x: jax.Array, first: int, positions: Positions | None = None
) -> jax.Array:
    """bool, broadcastable to `x`: valid tokens from position `first` on, in `positions` if given.

    Of an attention pattern, the queries.
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
    """`value` in the dtype of `x` and broadcast to it, or one line that says why it does not."""
    value = jnp.asarray(value).astype(x.dtype)
    sizes = zip(value.shape[::-1], x.shape[::-1])
    if value.ndim > x.ndim or any(a not in (1, b) for a, b in sizes):
        raise MisfitError(
            f"{what} at {ctx.site!r}: a value of shape {list(value.shape)} does not fit the "
            f"activation {list(x.shape)}, whose last axis is {x.shape[-1]}"
        )
    return jnp.broadcast_to(value, x.shape)


def _add(x, ctx, vector, positions, *, first):
    mask = token_mask(ctx, x, first, positions)
    return jnp.where(mask, x + _like(x, ctx, vector, "steer"), x)


def _replace(x, ctx, value, positions, *, first):
    mask = token_mask(ctx, x, first, positions)
    return jnp.where(mask, _like(x, ctx, value, "patch"), x)


def _stop_gradient(x, ctx):
    return jax.lax.stop_gradient(x)


def capture(site: str, layers=None, *, name: str | None = None) -> Intercept:
    """Return the activation itself in `reads[site]`: [B, T, ...] of an int layer, else stacked."""
    return read(site, layers, _identity, name=name)


def steer(site: str, layers, vector, *, positions=None, first: int = 1) -> Intercept:
    """Add `vector` (anything that broadcasts to the site; `per_layer(...)` for one each) to a site.

    Positions below `first` are left alone (default 1: <bos>); `positions` restricts to those
    absolute positions: ints, or a boolean mask [n] over the positions 0 to n - 1. Negative ones are
    refused: a text grows while it is generated. Vector and positions are data.
    """
    where, first = at_positions(positions), whole_number("first", first, 0)
    return write(site, layers, _add, _checked_value("steer", site, vector), where, first=first)


def patch(site: str, layers, value, *, positions=None, first: int = 0) -> Intercept:
    """Replace a site's activation by `value`, at all tokens or only at the `positions` given (as
    `steer` takes them).
    """
    where, first = at_positions(positions), whole_number("first", first, 0)
    return write(site, layers, _replace, _checked_value("patch", site, value), where, first=first)


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


# -------------------------------------------------------------------------------------------------
# Running: which intercepts act where


def flatten(intercepts) -> tuple[Intercept, ...]:
    """Intercepts may be nested in lists and tuples (sugar can be several of them)."""
    if isinstance(intercepts, Intercept):
        return (intercepts,)
    if not isinstance(intercepts, (list, tuple)):
        raise InputError(f"expected intercepts, got {type(intercepts).__name__}")
    return tuple(i for item in intercepts for i in flatten(item))


def check(intercepts: tuple[Intercept, ...], layers: int, stop_at_layer: int | None) -> None:
    """Raise `InputError` for layers that do not exist, reads never reached, and double names."""
    if (
        stop_at_layer is not None
        and not 0 <= whole_number("stop_at_layer", stop_at_layer) <= layers
    ):
        raise InputError(f"stop_at_layer must be in 0..{layers}, got {stop_at_layer}")
    ran = layers if stop_at_layer is None else stop_at_layer
    names = [i.name for i in intercepts if i.name is not None]
    for name in set(names):
        if names.count(name) > 1:
            raise InputError(f"two reads are called {name!r}: give one of them another name=")
    for i in intercepts:
        _check_per_layer(i, layers)
        if i.site in LAYER_SITES:
            last = max(i.at_layers(layers))
            if last >= layers:
                raise InputError(
                    f"layer {last} at {i.site!r}: the model has layers 0..{layers - 1}"
                )
            never = i.layers is not None and last >= ran
        else:
            never = stop_at_layer is not None and i.site != "embed"
        if never and i.name is not None:
            raise InputError(
                f"{i.name!r} at {i.site!r} is never reached: stop_at_layer is {stop_at_layer}"
            )


def _check_per_layer(i: Intercept, layers: int) -> None:
    """On a device, layers beyond the end of an argument would get its last."""
    count = len(i.at_layers(layers)) if i.site in LAYER_SITES else 0
    for arg in i.args:
        if isinstance(arg, PerLayer):
            shapes = [np.shape(leaf) for leaf in jax.tree.leaves(arg.tree)]
            if any(shape[:1] != (count,) for shape in shapes):
                given = ", ".join(str(list(shape)) for shape in shapes)
                raise InputError(
                    f"per_layer at {i.site!r} needs a first axis of {count} layers, got {given}"
                )


def check_data(intercepts: tuple[Intercept, ...], dtype: Any, least: int, most: int) -> None:
    """Raise `InputError` for arguments on the host that this pass cannot mean: positions beyond
    texts of `most` tokens, masks that end before token `least`, values that overflow in `dtype`,
    the model's (norm scales, patterns and logits are float32).
    """
    for i in intercepts:
        for arg in i.args:
            if isinstance(arg, Positions):
                check_positions(arg, least, most)
        if i.fn in (_add, _replace):
            wide = i.site.endswith("_scale") or i.site in ("attn_pattern", "logits")
            value = i.args[0].tree if isinstance(i.args[0], PerLayer) else i.args[0]
            kind = jnp.float32 if wide else dtype
            what = f"the value of {'steer' if i.fn is _add else 'patch'} at {i.site!r}"
            check_finite(what, value, kind, infinite=i.site == "logits")


def reads_whole_pattern(intercepts: tuple[Intercept, ...]) -> bool:
    """Whether somebody needs attention patterns, so that they must be materialised."""
    return any(i.site == "attn_pattern" for i in intercepts)


def segments(intercepts: tuple[Intercept, ...], layers: int) -> list[tuple[int, int, tuple]]:
    """Maximal runs [start, stop) of layers with the same active intercepts (by index)."""
    where = [set(i.at_layers(layers)) if i.site in LAYER_SITES else set() for i in intercepts]
    runs: list[tuple[int, int, tuple]] = []
    for layer in range(layers):
        active = tuple(n for n, at in enumerate(where) if layer in at)
        if runs and runs[-1][2] == active:
            runs[-1] = (runs[-1][0], layer + 1, active)
        else:
            runs.append((layer, layer + 1, active))
    return runs


def _layer_args(intercept: Intercept, layer, layers: int):
    """The arguments at `layer`, with `PerLayer` ones cut to its slice."""
    where = intercept.at_layers(layers)

    def cut(arg):
        if not isinstance(arg, PerLayer):
            return arg
        if isinstance(layer, int):
            return jax.tree.map(lambda a: a[where.index(layer)], arg.tree)
        table = jnp.array([where.index(l) if l in where else 0 for l in range(layers)], jnp.int32)
        take = lambda a: jax.lax.dynamic_index_in_dim(a, table[layer], keepdims=False)
        return jax.tree.map(take, arg.tree)

    return jax.tree.map(cut, intercept.args, is_leaf=lambda a: isinstance(a, PerLayer))


class At:
    """The `at(site, x)` of one layer (or of the top of the model): applies and collects.

    Lives only while a layer is traced. `reads` and `states` are keyed by intercept index.
    """

    def __init__(self, intercepts, active, layer, layers, positions, valid, states):
        self.intercepts, self.active, self.layer, self.layers = intercepts, active, layer, layers
        self.positions, self.valid = positions, valid
        self.seen: dict[str, jax.Array] = {}
        self.reads: dict[int, Any] = {}
        self.states = dict(states)

    def __call__(self, site: str, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x, site)
        for n in self.active:
            i = self.intercepts[n]
            if i.site != site:
                continue
            ctx = Context(self.layer, self.positions, self.valid, self.seen, site)
            args = _layer_args(i, self.layer, self.layers)
            if i.kind == "read":
                self.reads[n] = i.fn(x, ctx, *args, **dict(i.options))
            elif i.kind == "write":
                x = self._same(i, x, i.fn(x, ctx, *args, **dict(i.options)))
            else:
                y, state = i.fn(x, ctx, self.states[n], *args, **dict(i.options))
                x = self._same(i, x, y)
                self._same_state(i, self.states[n], state)
                self.states[n] = state
        self.seen[site] = x
        return x

    @staticmethod
    def _same(i: Intercept, x, y):
        if getattr(y, "shape", None) != x.shape or y.dtype != x.dtype:
            got = f"{y.dtype}{list(y.shape)}" if hasattr(y, "shape") else type(y).__name__
            raise InputError(
                f"the {i.kind} at {i.site!r} ({getattr(i.fn, '__name__', i.fn)}) returned {got} "
                f"for {x.dtype}{list(x.shape)}: return the same shape and dtype"
            )
        return y

    @staticmethod
    def _same_state(i: Intercept, old, new) -> None:
        describe = lambda a: f"{jnp.result_type(a)}{list(jnp.shape(a))}"
        given, got = jax.tree.map(describe, old), jax.tree.map(describe, new)
        if given != got:
            raise InputError(
                f"the fold at {i.site!r} ({getattr(i.fn, '__name__', i.fn)}) was given a state "
                f"{given} and returned {got}: return the same structure, shapes and dtypes"
            )
