"""What an intervention is: features of a coder, or neurons, set to values, at tokens of a text.

An edit is a row (layer, position, feature, value), as circuit-tracer takes them. Edits are data:
`intervene` runs many sets of them on one prompt in one program; `edit_features` turns one set into
intercepts, for `run` and for `generate`, where a text grows.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, by_layer, check_fits, ends, float32
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.splice import edit
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import check_finite, whole_number
from gemma_scope_jax.model.config import GemmaConfig
from gemma_scope_jax.model.intercept import Intercept, tokenwise, write

END = 2**31 - 1  # beyond every text


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One feature set to a value at one token or several.

    layer     the model's layer that the feature is read at
    position  counted from `<bos>` = 0; a slice, or None for every token of the text, without
              those that the coder was not trained on (`coder.first`)
    value     the feature's new activation, 0 to ablate it; where `relative`, a factor for the
              activation that it has

    A tuple (layer, position, feature, value) is understood wherever an `Intervention` is.
    """

    layer: int
    position: int | slice | None
    feature: int
    value: float = 0.0
    relative: bool = False


@flax.struct.dataclass
class Edits:
    """B sets of E edits each, as arrays [B, E]; unused ones have the layer -1."""

    layer: Any  # int32, of the model
    position: Any  # int32
    feature: Any  # int32
    value: Any  # float32
    relative: Any  # bool


def transcoders(config: GemmaConfig, coders: Coder | Iterable[Coder]) -> CoderSet:
    """`coders` as a set of transcoders or CLTs of this model, one a layer, or its neurons. Raises
    `InputError`."""
    coders = CoderSet(coders)
    for name, coder in coders.items():
        check_fits(config, coder)
        by_layer(coder)
        if (coder.reads, coder.writes) != ("mlp_in", "mlp_out"):
            raise InputError(
                f"{name}: {ends(coder)}: circuits are of transcoders and CLTs, which read mlp_in "
                "and write mlp_out; for other coders use edit"
            )
        if coder.k is not None:
            raise InputError(
                f"{name} keeps the {coder.k} largest features of a token, so that one feature's "
                "activation depends on all others: convert it with as_jump_relu"
            )
    for layer in coders.layers:
        coders.at(layer)
    return coders


def as_intervention(given: Any, coders: CoderSet) -> Intervention:
    """`given`, a tuple or an `Intervention`, with its numbers checked against the coders."""
    if not isinstance(given, Intervention):
        if not isinstance(given, (tuple, list)) or len(given) != 4:
            raise InputError(
                f"an intervention is (layer, position, feature, value), not {str(given)[:60]!r}"
            )
        given = Intervention(*given)
    layer, feature = checked_feature(coders, given.layer, given.feature)
    check_finite("the value of an intervention", given.value)
    if np.ndim(given.value):
        raise InputError(f"the value of an intervention is one number, not {given.value!r:.60}")
    first, last = _span(given.position)
    if not isinstance(given.position, slice) and given.position is not None:
        trained = coders.at(layer).first
        if first < trained:
            raise InputError(f"position {first}: {_begin(coders.at(layer), layer)}")
    elif last <= first:
        raise InputError(f"the slice {given.position} holds no positions")
    elif last <= coders.at(layer).first:
        raise InputError(f"the slice {given.position}: {_begin(coders.at(layer), layer)}")
    return dataclasses.replace(given, layer=layer, feature=feature, value=float(given.value))


def _begin(coder: Coder, layer: int) -> str:
    """From which position on a coder has features, and why."""
    if coder.kind == "neurons":
        return f"these neurons begin at position {coder.first}: mlp_neurons(model, first=0) has all"
    return (
        f"the coder of layer {layer} has features from position {coder.first} on, for it was not "
        "trained on the tokens before"
    )


def checked_feature(coders: CoderSet, layer: Any, feature: Any) -> tuple[int, int]:
    """A layer that has a coder and a feature of it, as ints. Raises `InputError`."""
    layer, feature = whole_number("layer", layer), whole_number("feature", feature)
    coder = coders.at(layer)
    if not 0 <= feature < coder.width:
        last = coder.width - 1
        raise InputError(f"feature {feature}: the coder of layer {layer} has features 0 to {last}")
    return layer, feature


def _span(position: int | slice | None) -> tuple[int, int]:
    """The first position and the one after the last."""
    if position is None:
        return 0, END
    if not isinstance(position, slice):
        at = whole_number("position", position, 0)
        return at, at + 1
    if position.step not in (None, 1):
        raise InputError(f"the slice {position} has steps: name its positions one by one")
    start = 0 if position.start is None else whole_number("position", position.start, 0)
    stop = END if position.stop is None else whole_number("position", position.stop, 0)
    return start, stop


def checked_sets(given: Any, coders: CoderSet) -> list[list[Intervention]]:
    """The sets of interventions, checked; see `intervene`."""
    wanted = "interventions are a list of sets, each a list of (layer, position, feature, value)"
    if not isinstance(given, (list, tuple)):
        raise InputError(f"{wanted}; got {type(given).__name__}")
    if not given:
        raise InputError(f"{wanted}: give at least one set")
    kinds = (Intervention, list, tuple)
    for one in given:
        if not isinstance(one, (list, tuple)) or (one and not isinstance(one[0], kinds)):
            raise InputError(f"{wanted}; of one set: [[...]]")
    return [[as_intervention(it, coders) for it in one] for one in given]


def edits_of(sets: Sequence[Sequence[Intervention]], coders: CoderSet, length: int) -> list[dict]:
    """For each set the edits of single tokens, {(layer, position, feature): (value, relative)}.

    Raises `InputError` for positions beyond a prompt of `length` tokens and for what is set twice.
    """
    rows = []
    for one in sets:
        found: dict[tuple[int, int, int], tuple[float, bool]] = {}
        for it in one:
            first, last = _span(it.position)
            if isinstance(it.position, slice) or it.position is None:
                first, last = max(first, coders.at(it.layer).first), min(last, length)
            if last > length or first >= last:
                at = it.position if isinstance(it.position, slice) else f"position {first}"
                raise InputError(
                    f"{at}: the prompt has no such tokens, with features of layer {it.layer}; its "
                    f"positions are 0 to {length - 1}"
                )
            for position in range(first, last):
                key = (it.layer, position, it.feature)
                if key in found:
                    named = f"feature {it.feature} of layer {it.layer} at position {position}"
                    raise InputError(f"{named} is set twice in one set")
                found[key] = (it.value, it.relative)
        rows.append(found)
    return rows


def as_arrays(rows: Sequence[dict], sets: int, size: int) -> Edits:
    """`edits_of` as arrays [sets, size], filled up."""
    place = np.full((3, sets, size), -1, np.int32)
    value, relative = np.zeros((sets, size), np.float32), np.zeros((sets, size), bool)
    for b, row in enumerate(rows):
        if row:
            place[:, b, : len(row)] = np.array(list(row), np.int32).T
            value[b, : len(row)], relative[b, : len(row)] = zip(*row.values())
    layer, position, feature = place
    return Edits(layer, np.maximum(position, 0), np.maximum(feature, 0), value, relative)


def power_of_two(count: int) -> int:
    """`count` rounded up, so that few programs are compiled."""
    return 1 << max(0, count - 1).bit_length()


# --- While a text is run or generated ------------------------------------------------------------


def edit_features(coders: Coder | Iterable[Coder], interventions: Sequence[Any]) -> list[Intercept]:
    """One set of interventions as intercepts for `run` and `generate`: nothing is frozen.

    coders         any coders that `edit` takes, one a layer; or `mlp_neurons(model)`, whose
                   activations are set at mlp_act
    interventions  `Intervention`s or tuples (layer, position, feature, value). A position of None
                   or an open slice such as `slice(5, None)` goes on through the generated tokens

    decode(new features) - decode(old features) is added to what each coder writes, so that its
    error stays; what a feature is set to holds in prefill and in decoding alike. Other layers,
    positions, features and values compile nothing. Raises `InputError` for what the coders lack.

        off = gs.edit_features(coders, [(12, slice(4, None), 310, 0.0)])
        gs.generate(model, ids[None], 20, off)
    """
    coders = CoderSet(coders)
    if not isinstance(interventions, (list, tuple)) or not interventions:
        raise InputError(
            "edit_features takes a list of (layer, position, feature, value), not empty"
        )
    by_coder: dict[int, list[Intervention]] = {}
    for given in interventions:
        it = as_intervention(given, coders)
        number = next(n for n, coder in enumerate(coders) if it.layer in coder.layers)
        by_coder.setdefault(number, []).append(it)
    return [_edit(coders[number], some) for number, some in by_coder.items()]


def _edit(coder: Coder, some: list[Intervention]) -> Intercept:
    if coder.kind == "neurons":
        return write("mlp_act", None, set_features, *_columns(some, coder.first))
    return edit(coder, set_features, *_columns(some, coder.first))


def _columns(some: list[Intervention], begin: int) -> tuple[np.ndarray, ...]:
    """Layer, first position, the one after the last, feature, value, relative: arrays [n].
    No position is before `begin`."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for it in some:
        first, last = _span(it.position)
        taken = spans.setdefault((it.layer, it.feature), [])
        if any(first < b and a < last for a, b in taken):
            raise InputError(f"feature {it.feature} of layer {it.layer} is set twice at a position")
        taken.append((first, last))
    room = power_of_two(len(some)) - len(some)
    ints = [[i.layer, *_span(i.position), i.feature] for i in some] + [[-1, 0, 0, 0]] * room
    ints = [[layer, max(first, begin), last, feature] for layer, first, last, feature in ints]
    values, relative = ([getattr(i, name) for i in some] for name in ("value", "relative"))
    numbers = np.array(values + [0.0] * room, np.float32)
    return *np.array(ints, np.int32).T, numbers, np.array(relative + [False] * room, bool)


@tokenwise
def set_features(f, ctx, layer, first, last, feature, value, relative):
    """f [B, T, F] with `feature` [n] of `layer` [n] set to `value` [n], or multiplied by it where
    `relative` [n], at the positions `first` [n] to `last` [n], the last left out."""
    at = ctx.positions[..., None]
    wide = lambda a: jnp.asarray(a)[None, None, :]
    here = wide(jnp.asarray(layer) == ctx.layer) & (at >= wide(first)) & (at < wide(last))
    exact = float32(f)  # neurons have the model's dtype, in which a small value would be lost
    old = exact[..., jnp.asarray(feature)]
    new = jnp.where(wide(relative), wide(value) * old, wide(value))
    return exact.at[..., jnp.asarray(feature)].add(jnp.where(here, new - old, 0.0)).astype(f.dtype)
