"""Running intercepts: which of them act where, and the `at(site, x)` that the model calls.

`run` and `generate` pass a single layer as data: its intercept is present in every layer, under a
`cond` on the layer's number, and a read carries its value on from that layer. A loop over layers
then compiles once, and the model stays one scan. Intercepts at several layers, and all of them
inside a caller's `jit`, are static: the scan is cut into segments where the set of active ones
changes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import Positions, check_finite, check_positions, whole_number
from gemma_scope_jax.model.intercept import LAYER_SITES, Context, Intercept, PerLayer, add, replace

PATCHES = (add, replace)  # their first argument is a value for the site


def flatten(intercepts) -> tuple[Intercept, ...]:
    """One intercept, or lists and tuples of them, nested in any way, as a tuple."""
    if isinstance(intercepts, Intercept):
        return (intercepts,)
    if not isinstance(intercepts, (list, tuple)):
        raise InputError(f"expected intercepts, got {type(intercepts).__name__}")
    return tuple(i for item in intercepts for i in flatten(item))


def check(intercepts: tuple[Intercept, ...], layers: int, stop_at_layer: int | None) -> None:
    """Raise `InputError` for layers that do not exist, reads never reached, and double names."""
    ran = layers if stop_at_layer is None else whole_number("stop_at_layer", stop_at_layer)
    if not 0 <= ran <= layers:
        raise InputError(f"stop_at_layer must be in 0..{layers}, got {stop_at_layer}")
    names = [i.name for i in intercepts if i.name is not None]
    for name in set(names):
        if names.count(name) > 1:
            raise InputError(f"two reads are called {name!r}: give one of them another name=")
    for i in intercepts:
        _check_per_layer(i, layers)
        never = stop_at_layer is not None and i.site != "embed"
        if i.site in LAYER_SITES:
            last = max(i.at_layers(layers))
            if last >= layers:
                known = f"the model has layers 0..{layers - 1}"
                raise InputError(f"layer {last} at {i.site!r}: {known}")
            never = not ran or (i.layers is not None and last >= ran)
        if never and i.name is not None:
            why = f"stop_at_layer is {stop_at_layer}"
            raise InputError(f"{i.name!r} at {i.site!r} is never reached: {why}")


def _check_per_layer(i: Intercept, layers: int) -> None:
    """On a device, layers beyond the end of an argument would silently get its last slice."""
    count = len(i.at_layers(layers)) if i.site in LAYER_SITES else 0
    count = 1 if i.layer is not None else count
    trees = [arg.tree for arg in i.args if isinstance(arg, PerLayer)]
    for shapes in ([np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in trees):
        if any(shape[:1] != (count,) for shape in shapes):
            given = ", ".join(str(list(shape)) for shape in shapes)
            wanted = f"needs a first axis of {count} layers"
            raise InputError(f"per_layer at {i.site!r} {wanted}, got {given}")


def check_data(intercepts: tuple[Intercept, ...], dtype: DTypeLike, least: int, most: int) -> None:
    """Raise `InputError` for arguments on the host that cannot be meant: positions beyond texts of
    `most` tokens, masks that end before token `least`, values that overflow in the model's `dtype`
    (norm scales, patterns and logits are float32)."""
    for i in intercepts:
        for arg in i.args:
            if isinstance(arg, Positions):
                check_positions(arg, least, most)
        if i.fn in PATCHES:
            wide = i.site.endswith("_scale") or i.site in ("attn_pattern", "logits")
            value = i.args[0].tree if isinstance(i.args[0], PerLayer) else i.args[0]
            what = f"the value of {'steer' if i.fn is add else 'patch'} at {i.site!r}"
            kind = jnp.float32 if wide else dtype
            check_finite(what, value, kind, infinite=i.site == "logits")


def layers_as_data(intercepts: tuple[Intercept, ...]) -> tuple[Intercept, ...]:
    """The same intercepts, with each single layer as data: a loop over layers compiles once."""
    as_data = lambda i: i.replace(layers=None, layer=np.int32(i.layers))
    return tuple(as_data(i) if isinstance(i.layers, int) else i for i in intercepts)


def stacks(intercepts: tuple[Intercept, ...]) -> bool:
    """Whether values of several layers are returned, or some layers run differently from others."""
    return any(
        i.layers is not None or (i.kind == "read" and i.layer is None and i.site in LAYER_SITES)
        for i in intercepts
    )


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


def _layer_args(intercept: Intercept, layer: int | jax.Array, layers: int) -> tuple:
    """The arguments at `layer`, with `PerLayer` ones cut to its slice."""
    where = intercept.at_layers(layers)

    def cut(arg: Any) -> Any:
        if not isinstance(arg, PerLayer):
            return arg
        if intercept.layer is not None or isinstance(layer, int):
            n = 0 if intercept.layer is not None else where.index(layer)
            return jax.tree.map(lambda a: a[n], arg.tree)
        table = jnp.array([where.index(l) if l in where else 0 for l in range(layers)], jnp.int32)
        take = lambda a: jax.lax.dynamic_index_in_dim(a, table[layer], keepdims=False)
        return jax.tree.map(take, arg.tree)

    return jax.tree.map(cut, intercept.args, is_leaf=lambda a: isinstance(a, PerLayer))


def _named(i: Intercept) -> str:
    return f"{i.kind} at {i.site!r} ({getattr(i.fn, '__name__', i.fn)})"


class At:
    """The `at(site, x)` of one layer (or of the top of the model): applies intercepts and collects
    reads.

    Exists only while a layer is traced. `reads` and `states` are keyed by intercept index.
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
            act, kept = partial(self._act, n, ctx), self.states.get(n)
            if i.layer is None or (i.kind == "read" and n not in self.states):
                x, kept = act(x, kept)
            else:
                here = jnp.int32(self.layer) == i.layer
                x, kept = jax.lax.cond(here, act, lambda *same: same, x, kept)
            if n in self.states:
                self.states[n] = kept
            elif i.kind == "read":
                self.reads[n] = kept
        self.seen[site] = x
        return x

    def _act(self, n: int, ctx: Context, x: jax.Array, kept: Any) -> tuple[jax.Array, Any]:
        """The activation that intercept `n` makes of `x`, and a fold's state or a read's value."""
        i = self.intercepts[n]
        state = (kept,) if i.kind == "fold" else ()
        args = _layer_args(i, self.layer, self.layers)
        with jax.named_scope(f"{i.kind}_{i.site}"):
            made = i.fn(x, ctx, *state, *args, **dict(i.options))
        if i.kind == "read":
            return x, made
        if i.kind == "write":
            return self._same(i, x, made), kept
        y, state = made
        self._same_state(i, kept, state)
        return self._same(i, x, y), state

    @staticmethod
    def _same(i: Intercept, x: jax.Array, y: Any) -> jax.Array:
        if getattr(y, "shape", None) != x.shape or y.dtype != x.dtype:
            got = f"{y.dtype}{list(y.shape)}" if hasattr(y, "shape") else type(y).__name__
            wanted = f"{x.dtype}{list(x.shape)}: return the same shape and dtype"
            raise InputError(f"the {_named(i)} returned {got} for {wanted}")
        return y

    @staticmethod
    def _same_state(i: Intercept, old: Any, new: Any) -> None:
        describe = lambda a: f"{jnp.result_type(a)}{list(jnp.shape(a))}"
        given, got = jax.tree.map(describe, old), jax.tree.map(describe, new)
        if given != got:
            wanted = "return the same structure, shapes and dtypes"
            raise InputError(f"the {_named(i)} returned the state {got} for {given}: {wanted}")
