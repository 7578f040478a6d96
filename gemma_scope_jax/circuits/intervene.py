"""Interventions on features or neurons: what the model does when a circuit's parts are changed.

A batch holds the prompt itself in row 0 and one set of edits in each other row. Whatever is frozen
at the prompt's values is copied from row 0 as the rows run together, so nothing has to be stored,
and the prompt and its edits are computed alike. Edits, and which layers are frozen, are data.

Source: Ameisen et al. 2025, Circuit Tracing; `freeze` covers circuit-tracer's `freeze_attention`
and `constrained_layers`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.edit_neurons import edited_neurons, neuron_edits
from gemma_scope_jax.circuits.edit_rows import (
    EditRows,
    columns_of_layer,
    gathered,
    of_layer,
    own_layers,
    rows_on_disk,
)
from gemma_scope_jax.circuits.interventions import (
    as_arrays,
    checked_feature,
    checked_sets,
    edits_of,
    power_of_two,
    transcoders,
)
from gemma_scope_jax.circuits.linear import room_for
from gemma_scope_jax.circuits.neurons import mlp_neurons, neurons_of
from gemma_scope_jax.circuits.prompts import checked_prompt
from gemma_scope_jax.coders.coder import Coder, float32, jump_relu, matmul
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.multi_layer_coder import at_layer
from gemma_scope_jax.coders.release.files import files_of
from gemma_scope_jax.errors import InputError, nearest
from gemma_scope_jax.model import intercept
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import check_ids
from gemma_scope_jax.model.block import gelu
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import one_pass
from gemma_scope_jax.model.intercept import per_layer, tokenwise
from gemma_scope_jax.model.sharding import on_auto_axes, own_mesh

Freeze = Literal["nothing", "attention", "attention+norms", "direct", "replacement"]
SCALES = ("pre_attn_scale", "post_attn_scale", "pre_mlp_scale", "post_mlp_scale", "final_scale")
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Intervened:
    """What `intervene` returns: numpy arrays, float32, one row for each of the n sets.

    logits           [n, V] of the last token, [n, T, V] of all, or None
    pre_activations  [n, R] of the features `read`, of neurons gelu(gate) * up; or None
    token_logits     [n, K] of the `tokens`, each less the mean of all logits; or None
    clean            the same of the prompt without edits, with one row
    """

    logits: np.ndarray | None
    pre_activations: np.ndarray | None
    token_logits: np.ndarray | None
    clean: "Intervened | None" = None

    def __repr__(self) -> str:
        """One line without arrays."""
        names = ("logits", "pre_activations", "token_logits")
        held = ((name, getattr(self, name)) for name in names)
        shapes = [f"{name} {list(array.shape)}" for name, array in held if array is not None]
        return f"Intervened({', '.join(shapes)})"


@own_mesh
def intervene(
    model: Model,
    coders: Coder | Iterable[Coder] | None,
    ids: Any,
    interventions: Sequence[Sequence[Any]],
    *,
    freeze: Freeze = "nothing",
    layers: Iterable[int] | None = None,
    read: Sequence[Sequence[int]] | np.ndarray | None = None,
    tokens: Sequence[int] | np.ndarray | None = None,
    logits: Literal["last", "all", "none"] = "last",
    control: int | None = None,
    batch: int = 16,
) -> Intervened:
    """Run one prompt under many sets of interventions on features of transcoders or of a CLT, or
    on MLP neurons.

    coders         transcoders (plain or affine) or CLTs, one a layer; layers may have none. Of a
                   decoder left on disk the rows of the edits are read; freeze="replacement"
                   needs it in memory. None: the model's own neurons, see `mlp_neurons`
    ids            the prompt, int [T] or [1, T], `<bos>` first
    interventions  n sets, each a list of `Intervention`s or tuples (layer, position, feature,
                   value); an empty set leaves the prompt as it is
    freeze         what keeps the prompt's values; see below
    layers         with "direct": the layers whose MLPs are frozen (default: all), as
                   circuit-tracer's `constrained_layers`
    read           features [R, 3] (layer, position, feature) whose pre-activations are returned
    tokens         vocabulary ids [K] whose logits after the last token are returned, less the mean
                   of all; or [K, 2] (position, id), which needs the memory of all logits. With
                   logits="none" nothing larger leaves the device
    control        a seed: instead of its own decoder row each feature writes that of a random other
                   feature of its layer, resized to the same norm; another in every set
    batch          rows run together, one of them the prompt

    decode(new features) - decode(old features) is added to what the MLP writes, so that a coder's
    error stays, as `edit` does; of a CLT to all later layers. A neuron's value is set in mlp_act,
    before the down projection and the norm after the MLP. Old features are those of the run:

        "nothing"          the real model
        "attention"        attention patterns are frozen
        "attention+norms"  and the scales of all norms
        "direct"           and what the MLPs write, but for the edits and affine skips, which stay
                           live: the linear model of an attribution graph. Old features are the
                           prompt's, and changes are the graph's edges, exactly
        "replacement"      patterns and norms frozen, each MLP is its coder plus a constant error:
                           features downstream respond, with their thresholds

    With neurons, "direct" and "replacement" also freeze gelu(gate).

    One program serves all sets of the same sizes, rounded up to powers of two: other features,
    layers, positions and values compile nothing. Raises `InputError` for coders of another model,
    features, layers and positions that do not exist, and values that are not finite.
    """
    _check_choices(freeze, logits)
    ids = checked_prompt(model.config, ids).astype(np.int32)
    coders = mlp_neurons(model) if coders is None else coders
    coders = _checked_coders(model.config, coders, freeze)
    rows = edits_of(checked_sets(interventions, coders), coders, len(ids))
    where = _checked_reads(coders, read, len(ids))
    vocabulary, everywhere = _checked_tokens(model.config, tokens, len(ids))
    frozen = _frozen_layers(model.config, layers, freeze)
    wanted, back = _by_layer(where, model.config.layers)
    size = max(1, power_of_two(max(map(len, rows))))
    chunk = min(whole_number("batch", batch, 2) - 1, power_of_two(len(rows)))
    room = min(room_for(len(ids)), model.config.context)
    model, given = on_auto_axes((model, tuple(coders)))
    seed = None if control is None else whole_number("control", control, 0)
    parts = []
    for start in range(0, len(rows), chunk):
        some = as_arrays([{}, *rows[start : start + chunk]], chunk + 1, size)
        filled = np.tile(np.pad(ids, (0, room - len(ids))), (chunk + 1, 1))
        numbers = np.arange(start - 1, start + chunk, dtype=np.int32)
        noise = (np.bool_(seed is not None), np.uint32(seed or 0), numbers)
        data = (some, wanted, vocabulary, frozen, noise, rows_on_disk(tuple(coders), some, noise))
        found = _intervene(
            model, given, filled, np.int32(len(ids)), data,
            freeze=freeze, logits=logits, everywhere=logits == "all" or everywhere,
        )  # fmt: skip
        found = tuple(None if a is None else np.asarray(a) for a in found)
        parts.append((found, min(chunk, len(rows) - start)))
    return _joined(parts, len(ids), back, 0 if tokens is None else len(tokens))


def _joined(parts, length: int, back: np.ndarray | None, tokens: int) -> Intervened:
    """The chunks' results, each with its number of sets, without what they were filled up with."""

    def cut(found, rows: slice) -> list:
        every, pre, chosen = (None if a is None else a[rows] for a in found)
        if every is not None and every.ndim == 3:
            every = every[:, :length]
        if pre is not None:
            pre = pre.reshape(len(pre), -1)[:, back]
        return [every, pre, None if chosen is None else chosen[:, :tokens]]

    clean = Intervened(*cut(parts[0][0], slice(0, 1)))
    some = zip(*(cut(found, slice(1, 1 + count)) for found, count in parts))
    every, pre, chosen = (None if a[0] is None else np.concatenate(a) for a in some)
    return Intervened(every, pre, chosen, clean)


# --- The program ---------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("freeze", "logits", "everywhere"))
def _intervene(
    model: Model, coders: tuple[Coder, ...], tokens, length, data, *, freeze, logits, everywhere
):
    """Logits, pre-activations [B, L, R] and chosen logits [B, K] of rows, of which 0 is clean."""
    edits, wanted, vocabulary, frozen, noise, stored = data
    own, neurons = own_layers(coders, model.config.layers), neurons_of(coders)
    held = frozen if freeze in ("direct", "replacement") else jnp.zeros_like(frozen)
    if neurons is None:
        written = gathered(coders, own, edits, noise, stored)
        given, static = (written, frozen, coders), {"freeze": freeze, "own": own}
        items = [intercept.fold("mlp_out", None, _mlp_out, _no_change, *given, **static)]
    else:
        given = neuron_edits(neurons, edits, noise), held, neurons
        items = [intercept.write("mlp_act", None, edited_neurons, *given, freeze=freeze)]
    if freeze != "nothing":
        items.append(intercept.write("attn_pattern", None, _clean))
    if freeze not in ("nothing", "attention"):
        items += [intercept.write(site, None, _clean) for site in SCALES]
    if wanted is not None:
        position, feature = wanted
        found = [columns_of_layer(coders, own, l, ids)[:2] for l, ids in enumerate(feature)]
        w, b = (jnp.stack(a) for a in zip(*found))
        gates = None if neurons is None else neurons.gate_columns(feature)
        args = per_layer((w, b, gates, position))
        items.append(intercept.read("mlp_in", None, _pre_activations, args, held, name="z"))
    run = "all" if everywhere else "last"
    out = one_pass(model, tokens, tuple(items), None, length, logits=run)
    pre = None if wanted is None else jnp.moveaxis(out.reads["z"], 0, 1)
    chosen = None
    if vocabulary is not None:
        at, token = vocabulary
        at = at if everywhere else jnp.zeros_like(at)
        chosen = out.logits[:, at, token] - out.logits.mean(-1)[:, at]
    every = {"none": None, "all": out.logits, "last": out.logits[:, -1]}[logits]
    return every, pre, chosen


@tokenwise
def _clean(x, ctx):
    """The prompt's own value, that of row 0, in every row."""
    return jnp.broadcast_to(x[:1], x.shape)


@tokenwise
def _pre_activations(x, ctx, here, held):
    w, b, gate, position = here
    x = float32(x[:, position])
    z = jnp.einsum("brd,rd->br", x, w, precision=EXACT) + b[None]
    if gate is None:
        return z
    x = jnp.where(held[ctx.layer], x[:1], x)  # a frozen gate has the prompt's value
    return z * gelu(jnp.einsum("brd,rd->br", x, gate, precision=EXACT))


def _no_change(embed, written, frozen, coders):
    """The fold's first state: how much each edit changes its feature [B, E], and in the replacement
    model what each CLT's features write in addition [X, B, T, D]."""
    more = tuple(
        jnp.zeros((len(c.layers), *embed.shape[:-1], c.d_out), jnp.float32) if c.multi_layer else ()
        for c in coders
    )
    return jnp.zeros(written.b_enc.shape, jnp.float32), more


def _mlp_out(x, ctx, state, written: EditRows, frozen, coders, *, freeze, own):
    """What the MLP of this layer writes under the edits; the state as `_no_change` says."""
    deltas, more = state
    edits, inner, y = written.edits, float32(ctx.seen["mlp_in"]), float32(x)
    constant = frozen[ctx.layer]
    old = jnp.where(constant, inner[:1], inner) if freeze == "direct" else inner
    if freeze in ("direct", "replacement"):
        change = inner - inner[:1]
        clean = y[:1] + of_layer(coders, own, ctx.layer, change, _skip)
        y = clean if freeze == "replacement" else jnp.where(constant, clean, y)
    if freeze == "replacement":
        y = y + of_layer(coders, own, ctx.layer, inner, _respond)
        more, added = _cross_layer(coders, own, ctx.layer, inner, more)
        y = y + added
    at = jnp.take_along_axis(old, edits.position[..., None], axis=1)
    z = jnp.einsum("bed,bed->be", at, written.w_enc, precision=EXACT) + written.b_enc
    f = jump_relu(z, written.threshold)
    new = jnp.where(edits.relative, edits.value * f, edits.value)
    deltas = jnp.where(edits.layer == ctx.layer, new - f, deltas)
    size = jnp.where(written.layers == ctx.layer, deltas[..., None], 0.0)
    rows = jnp.einsum("bew,bewd->bed", size, written.rows, precision=EXACT)
    each = jnp.arange(len(rows), dtype=jnp.int32)[:, None]
    return y.at[each, edits.position].add(rows).astype(x.dtype), (deltas, more)


def _skip(coder: Coder, i, change):
    """What the affine skip makes of a change of mlp_in."""
    if coder.w_skip is None:
        return jnp.zeros((*change.shape[:-1], coder.d_out), jnp.float32)
    return matmul(change, at_layer(coder.w_skip, i) if coder.multi_layer else coder.w_skip)


def _respond(coder: Coder, i, inner):
    """What features write in addition to the prompt's own; CLTs: see `_cross_layer`."""
    if coder.multi_layer:
        return jnp.zeros((*inner.shape[:-1], coder.d_out), jnp.float32)
    f = coder.encode(inner)
    return matmul(f - f[:1], coder.w_dec)


def _cross_layer(coders, own, layer, inner, more):
    """The CLTs' states after this layer, and what they write to it."""
    states, added = [], jnp.zeros_like(inner)
    for n, (coder, state) in enumerate(zip(coders, more)):
        if coder.multi_layer:
            here, i = jnp.asarray(own[0])[layer] == n, jnp.asarray(own[1])[layer]
            f = coder.encode_layer(i, inner)
            state = state + coder.contributions(i, jnp.where(here, f - f[:1], 0.0))
            added = added + jnp.where(here, at_layer(state, i), 0.0)
        states.append(state)
    return tuple(states), added


# --- Checks --------------------------------------------------------------------------------------


def _check_choices(freeze: str, logits: str) -> None:
    for what, value, known in (
        ("freeze", freeze, get_args(Freeze)),
        ("logits", logits, ("last", "all", "none")),
    ):
        if value not in known:
            hint = nearest(str(value), known)
            raise InputError(f"{what} is {value!r}, expected one of {', '.join(known)}{hint}")


def _checked_coders(config: GemmaConfig, coders: Any, freeze: str) -> CoderSet:
    coders = transcoders(config, coders)
    for name, coder in coders.items():
        if coder.w_dec is None:
            files_of(coder)  # which says where there are none
            if freeze == "replacement":
                raise InputError(
                    f"{name}: its decoder was left on disk, and freeze='replacement' needs all of "
                    "it: load it with load_decoder"
                )
    return coders


def _checked_reads(coders: CoderSet, read: Any, length: int) -> np.ndarray | None:
    """The features to read, int32 [R, 3]."""
    if read is None:
        return None
    table = np.asarray(read)
    if table.ndim != 2 or table.shape[1] != 3 or table.dtype.kind not in "iu":
        raise InputError(
            f"read: give features [R, 3] (layer, position, feature), not {table.shape}"
        )
    for layer, position, feature in table.tolist():
        checked_feature(coders, layer, feature)
        if not 0 <= position < length:
            raise InputError(f"position {position}: the prompt has positions 0 to {length - 1}")
    return table.astype(np.int32)


def _checked_tokens(config: GemmaConfig, tokens: Any, length: int) -> tuple[Any, bool]:
    """Positions and vocabulary ids, filled up to a power of two, and whether a position is not the
    last."""
    if tokens is None:
        return None, False
    ids = np.asarray(tokens)
    if not ids.size or ids.dtype.kind not in "iu" or (ids.ndim != 1 and ids.shape[1:] != (2,)):
        raise InputError(
            f"tokens must be vocabulary ids [K], or [K, 2] (position, id), not {ids.dtype}"
            f"{list(ids.shape)}"
        )
    pairs = np.stack([np.full(len(ids), length - 1), ids], 1) if ids.ndim == 1 else ids
    table = pairs.T.astype(np.int64)
    check_ids(config, table[1], "tokens: ")
    if table[0].min() < 0 or table[0].max() >= length:
        raise InputError(f"tokens: the prompt has positions 0 to {length - 1}")
    room = ((0, 0), (0, power_of_two(len(ids)) - len(ids)))
    at, token = np.pad(table, room, mode="edge").astype(np.int32)
    return (at, token), bool((at != length - 1).any())


def _frozen_layers(config: GemmaConfig, layers: Any, freeze: str) -> np.ndarray:
    """bool [L]: the layers whose MLPs are frozen."""
    if layers is None:
        return np.ones(config.layers, bool)
    if freeze != "direct":
        raise InputError(f"layers says whose MLPs are frozen, and freeze={freeze!r} freezes none")
    named = [whole_number("layers", layer, 0) for layer in layers]
    if not named or max(named) >= config.layers:
        raise InputError(f"layers {named}: the model has layers 0 to {config.layers - 1}")
    return np.isin(np.arange(config.layers), named)


def _by_layer(where: np.ndarray | None, layers: int) -> tuple[tuple | None, np.ndarray | None]:
    """Reads sorted by layer, as position and feature [L, R'], and where each went, in order."""
    if where is None:
        return None, None
    layer = where[:, 0]
    count = np.bincount(layer, minlength=layers)
    size = power_of_two(int(count.max(initial=1)))
    order = np.argsort(layer, kind="stable")
    slot = np.empty(len(layer), np.int64)
    slot[order] = np.arange(len(layer)) - np.repeat(np.cumsum(count) - count, count)
    table = np.zeros((2, layers, size), np.int32)
    table[:, layer, slot] = where[:, 1:].T
    return (table[0], table[1]), layer * size + slot
