"""Putting coders into the model: their features, reconstructions and edits as intercepts.

A coder has its layers and sites, so it can place itself: `features` is a `read`, `splice` and
`edit` are a `write`, or a `fold` for coders of several layers, whose features also write to later
layers. The weights are intercept arguments, that is data: another SAE for the same place never
recompiles.

Coder maths is float32, cast back to the model's dtype. Padding and positions below `first`
(default: the coder's own; 1 skips `<bos>`, 4 the opening of a chat) are never changed, and features
are zero there. Positions are absolute, so everything works the same while generating.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, along_last, by_layer, float32, matmul
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.multi_layer_coder import at_layer
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import arguments, intercept
from gemma_scope_jax.model.arguments import MisfitError, at_positions, is_abstract, whole_number
from gemma_scope_jax.model.intercept import LAYER_SITES, Context, Intercept, token_mask, tokenwise


def features(
    coder: Coder, *, k: int | None = None, first: int | None = None, name: str = "features"
) -> Intercept:
    """Read the feature activations: `reads[name]` is float32 [B, T, F].

    With `k`: (values float32 [B, T, k], indices int32 [B, T, k]), the largest first, and only these
    leave the device. A coder of several layers adds a leading axis X in both forms.
    """
    layers, first = _place(coder, first)
    if k is not None and not 1 <= whole_number("k", k) <= coder.width:
        raise InputError(f"k is {k}: this {coder.kind} has {coder.width} features a layer")
    return intercept.read(coder.reads, layers, _features, coder, name=name, first=first, k=k)


def splice(coder: Coder, *, error: bool = True, first: int | None = None) -> Intercept:
    """Replace the activation that the coder writes by its reconstruction.

    With `error` the reconstruction error is added back as a constant: values stay exactly the same,
    and gradients flow through the features alone. Skip connections are included. A coder of several
    layers reads each layer as changed by its own earlier reconstructions.
    """
    layers, first = _place(coder, first)
    options: dict[str, Any] = dict(error=error, first=first)
    if coder.multi_layer:
        return intercept.fold(coder.writes, layers, _splice_fold, _nothing, coder, **options)
    return intercept.write(coder.writes, layers, _splice, coder, **options)


def replacement(
    coders: Iterable[Coder], *, error: bool = False, first: int | None = None
) -> tuple[Intercept, ...]:
    """The replacement model: the reconstructions of all coders in place of what they write.

    Equals `splice` of each coder, but as one program for any layers: the layer of a coder of one
    layer is data, and each of the model's layers branches to its own coder. Raises `InputError` if
    two coders write the same activation.
    """
    taken: set[tuple[str, int]] = set()
    folds: list[Intercept] = []
    by_site: dict[str, list[Coder]] = {}
    for coder in coders:
        _place(coder, first)
        for layer in coder.layers:
            if (coder.writes, layer) in taken:
                place = f"{coder.writes} of layer {layer}"
                raise InputError(f"two coders write {place}: a replacement model takes only one")
            taken.add((coder.writes, layer))
        if coder.multi_layer:
            folds.append(splice(coder, error=error, first=first))
        else:
            by_site.setdefault(coder.writes, []).append(coder)
    writes = []
    for site, some in by_site.items():
        layers = jnp.asarray([coder.layers[0] for coder in some], jnp.int32)
        bare = tuple(coder.unplaced() for coder in some)
        options = dict(error=error, firsts=tuple(_place(coder, first)[1] for coder in some))
        writes.append(intercept.write(site, None, _splice_own, bare, layers, **options))
    return (*folds, *writes)


def edit(
    coder: Coder, fn: Callable, *args: Any, first: int | None = None, positions: Any = None
) -> Intercept:
    """Change features: `fn(f, ctx, *args)` takes and returns activations float32 [B, T, F].

    decode(fn(f)) - decode(f) is added to the activation that the coder writes, so its
    reconstruction error stays. `args` are data; `fn` is the program, a module-level function such
    as `clamp`. `positions` restricts the change to these absolute positions, as in `steer`.

    For a coder of several layers `fn` is called at each of them (`ctx.layer` is the model's) and
    the change goes to all later layers. A crosscoder's sites lie on the residual stream, so an
    early change also reaches later layers through the model itself.
    """
    layers, first = _place(coder, first)
    positions = at_positions(positions)
    if fn is clamp:
        _check_clamp(coder, *args)
    if coder.multi_layer:
        fold_args = (_edit_fold, _nothing, coder, positions, *args)
        return intercept.fold(coder.writes, layers, *fold_args, fn=fn, first=first)
    return intercept.write(coder.writes, layers, _edit, coder, positions, *args, fn=fn, first=first)


@tokenwise
def clamp(f: jax.Array, ctx: Context, feature: Any, value: Any, layer: Any = None) -> jax.Array:
    """Set `feature` (an id, or ids [n]) of f [B, T, F] to `value` (a number, [n], or [B, T, n]).

    0.0 ablates it. `layer`: the features' model layers, a number or [n], for coders of several
    layers; default: every layer of the coder. An id may occur only once per layer.
    """
    ids = jnp.atleast_1d(jnp.asarray(feature, jnp.int32))
    shape, value = (*f.shape[:-1], *ids.shape), jnp.asarray(value, f.dtype)
    misfit = any(a not in (1, b) for a, b in zip(value.shape[::-1], shape[::-1]))
    if misfit or value.ndim > len(shape):
        raise MisfitError(
            f"clamp: a value of shape {list(value.shape)} for {ids.size} features: give a number, "
            f"[{ids.size}] or {list(shape)}"
        )
    if layer is not None:  # at other layers: an id out of range, which is dropped
        here = jnp.broadcast_to(jnp.asarray(layer, jnp.int32) == ctx.layer, ids.shape)
        ids = jnp.where(here, ids, f.shape[-1])
    return f.at[..., ids].set(jnp.broadcast_to(value, shape), mode="drop")


# --- What runs at the site -----------------------------------------------------------------------


@tokenwise
def _features(x, ctx, coder, *, first, k):
    f = _encode(coder, ctx, x, token_mask(ctx, x, first))
    return f if k is None else jax.lax.top_k(f, k)


@tokenwise
def _splice(x, ctx, coder, *, error, first):
    return _replace(x, ctx, coder.reconstruct(_source(x, ctx, coder)), error, first)


@tokenwise
def _splice_own(x, ctx, coders, layers, *, error, firsts):
    """`_splice` of the current layer's coder, if it has one; `layers` [n] are the coders' own."""
    here = layers == ctx.layer
    which = jnp.where(here.any(), 1 + jnp.argmax(here), 0)

    def branch(coder, first):
        return lambda: _splice(x, ctx, coder, error=error, first=first)

    return jax.lax.switch(which, [lambda: x, *map(branch, coders, firsts)])


@tokenwise
def _splice_fold(x, ctx, written, coder, *, error, first):
    source, i = _source(x, ctx, coder), _index(coder, ctx)
    f = _encode(coder, ctx, source, token_mask(ctx, x, first))
    written = written + coder.contributions(i, f)
    y = at_layer(written, i) + coder.skip_layer(i, source)
    return _replace(x, ctx, y + along_last(at_layer(coder.b_dec, i), y), error, first), written


def _replace(x, ctx, y, error, first):
    _same_shape(x, y)
    if error:  # exactly x in value, and y under differentiation: y + stop_gradient(x - y)
        y = jax.lax.stop_gradient(float32(x)) + (y - jax.lax.stop_gradient(y))
    return jnp.where(token_mask(ctx, x, first), y.astype(x.dtype), x)


@tokenwise
def _edit(x, ctx, coder, positions, *args, fn, first):
    delta = _change(x, ctx, coder, positions, args, fn, first)
    return _add(x, matmul(delta, coder.w_dec))  # biases and skip cancel


@tokenwise
def _edit_fold(x, ctx, written, coder, positions, *args, fn, first):
    delta, i = _change(x, ctx, coder, positions, args, fn, first), _index(coder, ctx)
    written = written + coder.contributions(i, delta)
    return _add(x, at_layer(written, i)), written


def _change(x, ctx, coder, positions, args, fn, first):
    """fn(f) - f [B, T, F], zero where nothing may change."""
    f = _encode(coder, ctx, _source(x, ctx, coder), token_mask(ctx, x, first))
    g = fn(f, ctx, *args)
    if getattr(g, "shape", None) != f.shape:
        raise InputError(
            f"{getattr(fn, '__name__', fn)} returned {getattr(g, 'shape', type(g).__name__)} for "
            f"features of shape {f.shape}: return the same shape"
        )
    return jnp.where(token_mask(ctx, x, first, positions), float32(g) - f, 0.0)


def _add(x, y):
    _same_shape(x, y)
    return (float32(x) + y).astype(x.dtype)


def _nothing(embed, coder, *_):
    """The initial state of the folds, before any layer has written: zeros [X, B, T, D]."""
    return jnp.zeros((len(coder.layers), *embed.shape[:-1], coder.d_out), jnp.float32)


def _encode(coder, ctx, x, mask):
    """Features of the layer the model is at, zero outside `mask`."""
    return jnp.where(mask, coder.encode_layer(_index(coder, ctx), x), 0.0)


def _index(coder: Coder, ctx: Context):
    """The own number of the layer that the model is at; traced if `ctx.layer` is."""
    if isinstance(ctx.layer, int):  # at other layers a branch is traced that is never taken
        return coder.layers.index(ctx.layer) if ctx.layer in coder.layers else 0
    table = np.searchsorted(coder.layers, np.arange(max(coder.layers) + 1)).astype(np.int32)
    return jnp.asarray(table)[ctx.layer]


def _source(x, ctx, coder):
    return x if coder.reads == coder.writes else ctx.seen[coder.reads]


# --- Checks --------------------------------------------------------------------------------------


def _place(coder: Coder, first: int | None) -> tuple[int | tuple[int, ...], int]:
    """The coder's layer or layers and its first position, checked."""
    if not isinstance(coder, Coder):
        hint = "take one with .at(layer)" if isinstance(coder, CoderSet) else "see load_coder"
        raise InputError(f"expected one coder ({hint}), got {type(coder).__name__}")
    by_layer(coder)
    sites = [LAYER_SITES.index(s) if s in LAYER_SITES else -1 for s in (coder.reads, coder.writes)]
    if min(sites) < 0 or sites[0] > sites[1]:
        raise InputError(
            f"a coder that reads {coder.reads!r} and writes {coder.writes!r} has no place in a "
            f"layer; the sites of a layer are, in order: {' '.join(LAYER_SITES)}"
        )
    layers = coder.layers if coder.multi_layer else coder.layers[0]
    return layers, coder.first if first is None else whole_number("first", first, 0)


def _check_clamp(coder: Coder, feature: Any = None, value: Any = 0.0, layer: Any = None) -> None:
    """Out of range, a feature or layer would silently be dropped (or wrap around)."""
    if feature is None:
        raise InputError("clamp needs a feature and a value: edit(coder, clamp, feature, value)")
    arguments.check_finite("the value of clamp", value)
    if is_abstract(feature):
        return
    ids = np.atleast_1d(arguments.on_host("feature", feature))
    known = ids.dtype.kind in "iu" or not ids.size
    bad = ids[(ids < 0) | (ids >= coder.width)] if known else ids.reshape(-1)
    if bad.size:
        raise InputError(f"feature {bad[0]} is not an id from 0 to {coder.width - 1}")
    if ids.ndim > 1:
        raise InputError(f"features must be an id or ids [n], not {list(ids.shape)}")
    if is_abstract(layer):
        return
    at = np.atleast_1d(arguments.on_host("layer", -1 if layer is None else layer))
    if layer is not None and (at.dtype.kind not in "iu" or not np.isin(at, coder.layers).all()):
        raise InputError(f"clamp: layer {layer!r} is not among the coder's, {coder.layers}")
    if at.shape not in ((1,), ids.shape):
        raise InputError(f"clamp: {at.size} layers for {ids.size} features")
    pairs = list(zip(ids.tolist(), np.broadcast_to(at, ids.shape).tolist()))
    if len(set(pairs)) != len(pairs):
        twice = next(pair[0] for pair in pairs if pairs.count(pair) > 1)
        raise InputError(f"clamp: feature {twice} is named twice in a layer")


def _same_shape(x, y) -> None:
    if x.shape != y.shape:
        raise InputError(f"the coder writes {y.shape[-1]} values where the model has {x.shape[-1]}")
