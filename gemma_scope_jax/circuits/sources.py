"""The sources of a graph: the features that are active on a prompt, what they write, and the rest.

    mlp_out[l] = what features write + [mlp_in[l] @ W_skip] + constant + error

The features of the first positions are left out, because coders were not trained there: circuit
tracers count neither an error nor features, so all that is left of the MLP there is `constant`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.circuits.linear import Blocks, Frozen, Written, chunk_of, normalised, room_for
from gemma_scope_jax.coders.coder import Coder, by_layer, check_fits, ends, float32, matmul
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.load import decoder_rows
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.attention import Tokens
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run

TOKENS = 256  # encoded at a time
TOGETHER = 1024  # features whose encoder vectors are gathered at a time
BLOCK = 128  # slots of a block: groups of one token and layer each


@dataclasses.dataclass(frozen=True)
class Active:
    """The active features of a prompt, in order of (layer, position, feature): arrays [n].

    A neuron's encoder vector and decoder row have factors of their own at each token.
    """

    layer: np.ndarray  # int32, of the model
    position: np.ndarray  # int32
    feature: np.ndarray  # int32
    activation: np.ndarray  # float32
    gate: np.ndarray | None = None  # float32, of the encoder vector; None: 1
    scale: np.ndarray | None = None  # float32, of the decoder row; None: 1
    kind: str = "feature"

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, index: Any) -> "Active":
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        columns = {k: v[index] for k, v in own.items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **columns)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One pass of the model: what is frozen, and the MLPs' inputs and outputs, float32."""

    frozen: Frozen
    mlp_in: jax.Array  # [L, T, D]
    mlp_out: jax.Array  # [L, T, D]
    post_mlp_scale: jax.Array  # [L, T]: 1 / rms
    resid_final: jax.Array  # [T, D]
    length: int  # real tokens


def read_prompt(model: Model, ids: np.ndarray) -> Prompt:
    """Run the model on ids [T] and keep what the linear model needs, filled up to `room_for`."""
    scales = ("pre_attn_scale", "post_attn_scale", "pre_mlp_scale", "post_mlp_scale")
    names = ("embed", "q", "k", *scales, "mlp_in", "mlp_out", "resid_final", "final_scale")
    length, size = len(ids), room_for(len(ids))
    positions = np.arange(size, dtype=np.int32)[None]
    real = (positions < length).astype(np.int32)
    filled = np.pad(np.asarray(ids, np.int32), (0, size - length))[None]
    captures = [capture(site) for site in names]
    reads = run(model, filled, captures, segments=real).reads
    layered = lambda name: reads[name][:, 0]
    tokens = Tokens(jnp.asarray(positions), jnp.asarray(real))
    by_layer = {name: float32(layered(name)[..., 0]) for name in scales}
    after = by_layer.pop("post_mlp_scale")
    frozen = Frozen(
        q=layered("q"),
        k=layered("k"),
        **by_layer,
        final_scale=float32(reads["final_scale"][0, :, 0]),
        embed=float32(reads["embed"][0]),
        log_sums=jnp.zeros(0),
        tokens=tokens,
    )
    frozen = normalised(model.config, frozen)
    inner, outer = (float32(layered(name)) for name in ("mlp_in", "mlp_out"))
    last = float32(reads["resid_final"][0])
    return Prompt(frozen, inner, outer, after, last, length)


# --- Coders --------------------------------------------------------------------------------------


def check_coders(config: GemmaConfig, coders: CoderSet) -> None:
    """Raise `InputError` unless every layer's MLP has one transcoder, or one CLT has all."""
    for name, coder in coders.items():
        check_fits(config, coder)
        by_layer(coder)
        if (coder.reads, coder.writes) != ("mlp_in", "mlp_out"):
            raise InputError(
                f"{name}: {ends(coder)}: a graph is made with transcoders or a CLT, which read "
                "mlp_in and write mlp_out"
            )
    missing = sorted(set(range(config.layers)) - set(coders.layers))
    if missing:
        have = f"{len(coders)} coder{'s' * (len(coders) > 1)}"
        raise InputError(
            f"no transcoder for layer {missing[0]} of {config.name} ({have} given): "
            "a graph needs one for every layer"
        )
    for layer in range(config.layers):
        coders.at(layer)


@jax.jit
def _encode(coder: Coder, i, x, mask):
    return jnp.where(mask[:, None], coder.encode_layer(i, x), 0.0)


def active_features(coders: CoderSet, prompt: Prompt) -> Active:
    """Every feature that is active on the prompt, at the positions its coder was trained on."""
    found = []
    for layer in range(prompt.mlp_in.shape[0]):
        coder = coders.at(layer)
        bare, i = coder.unplaced(), np.int32(coder.source(layer))
        size = prompt.mlp_in.shape[1]
        size = size if size <= TOKENS else chunk_of(size)
        for start in range(0, prompt.length, size):
            positions = np.arange(start, start + size, dtype=np.int32)
            mask = (positions >= coder.first) & (positions < prompt.length)
            f = np.asarray(_encode(bare, i, prompt.mlp_in[layer, start : start + size], mask))
            t, feature = np.nonzero(f)
            found.append((np.full_like(t, layer), t + start, feature, f[t, feature]))
    layer, position, feature, activation = (np.concatenate(column) for column in zip(*found))
    layer, position, feature = (a.astype(np.int32) for a in (layer, position, feature))
    return Active(layer, position, feature, activation.astype(np.float32))


def encoder_rows(coders: CoderSet, active: Active) -> tuple[np.ndarray, np.ndarray]:
    """The encoder vectors [n, D] and biases [n] of features, float32."""
    d = coders[0].d_in
    rows, biases = np.zeros((len(active), d), np.float32), np.zeros(len(active), np.float32)
    for layer in np.unique(active.layer):
        coder, mine = coders.at(int(layer)), np.flatnonzero(active.layer == layer)
        i = np.int32(coder.source(int(layer)))
        for start in range(0, len(mine), TOGETHER):
            some = mine[start : start + TOGETHER]
            ids = np.pad(active.feature[some], (0, TOGETHER - len(some)))
            found = _encoder_rows(coder.unplaced(), i, ids)
            rows[some], biases[some] = (np.asarray(a)[: len(some)] for a in found)
    if active.gate is not None:
        rows *= active.gate[:, None]
    return rows, biases


def encoder_vectors(coder: Coder, i: np.int32, ids: np.ndarray) -> jax.Array:
    """The encoder vectors [P, C, D] of a block's features [P, C]."""
    return _encoder_rows(coder.unplaced(), i, ids.reshape(-1))[0].reshape(*ids.shape, -1)


@jax.jit
def _encoder_rows(coder: Coder, i, ids):
    encoder = coder.encoder(i)
    return float32(jnp.take(encoder.w_enc, ids, axis=1)).T, float32(jnp.take(encoder.b_enc, ids))


# --- What they write -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Where sources have their slots: `slot` [n] in the results, and the blocks of each layer."""

    slot: np.ndarray  # int64 [n]
    source: np.ndarray  # int32 [blocks, P, C]: the source of each slot, -1: none
    positions: np.ndarray  # int32 [blocks, P]
    layer: np.ndarray  # int32 [blocks]: of the sources


def slots_of(features: int, groups: int) -> int:
    """C: the slots of a group, where so many features are active at so many tokens and layers.

    Larger groups make larger products; but where few features of a token are candidates, most of
    their slots would be empty.
    """
    return 16 if features >= 6 * groups else 4


def laid_out(active: Active) -> SlotLayout:
    """Slots for sources: a block has P groups of C slots, each group at one token of one layer."""
    key = active.layer.astype(np.int64) << 32 | active.position
    _, first, count = np.unique(key, return_index=True, return_counts=True)
    C = slots_of(len(active), len(count))
    P = BLOCK // C
    groups = -(-count // C)  # of each token and layer
    layer_of = active.layer[first]
    sources, positions, layers = [], [], []
    slot = np.zeros(len(active), np.int64)
    for layer in np.unique(layer_of):
        mine = np.flatnonzero(layer_of == layer)
        blocks = -(-int(groups[mine].sum()) // P)
        source = np.full(blocks * BLOCK, -1, np.int32)
        position = np.zeros(blocks * P, np.int32)
        base, group = len(sources) * BLOCK, 0
        for n in mine:
            at = np.arange(count[n]) + group * C
            source[at] = first[n] + np.arange(count[n])
            slot[first[n] : first[n] + count[n]] = base + at
            position[group : group + groups[n]] = active.position[first[n]]
            group += int(groups[n])
        sources += list(source.reshape(blocks, P, C))
        positions += list(position.reshape(blocks, P))
        layers += [layer] * blocks
    shaped = lambda a, *shape: np.asarray(a, np.int32).reshape(-1, *shape)
    return SlotLayout(slot, shaped(sources, P, C), shaped(positions, P), shaped(layers))


def slot_features(active: Active, layout: SlotLayout, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The features [P, C] of block `n`, and what their decoder rows count; 0 in unused slots."""
    source = layout.source[n]
    empty = source < 0
    strength = np.where(empty, np.float32(0), active.activation[source])
    if active.scale is not None:
        strength = strength * active.scale[source]
    return np.where(empty, np.int32(0), active.feature[source]), strength


def writes_to(coder: Coder, layer: int, target: int) -> bool:
    """Whether the features that a coder reads at `layer` write to the MLP of `target`."""
    return layer == target or (layer < target and coder.kind == "clt" and target in coder.layers)


def written_rows(coder: Coder, i: np.int32, j: np.int32, ids: np.ndarray) -> jax.Array:
    """The decoder rows [P, C, D] of a block's features [P, C], from memory or from disk."""
    flat = ids.reshape(-1)
    if coder.w_dec is None:
        found = decoder_rows(coder, flat, layer=int(i), to=int(j)).astype(np.float32)
    else:
        found = _written_rows(coder.unplaced(), i, j, flat)
    return jnp.asarray(found).reshape(*ids.shape, -1)


@jax.jit
def _written_rows(coder: Coder, i, j, ids):
    return coder.written(i, j, ids)


def written_directions(coders: CoderSet, nodes: Any) -> np.ndarray:
    """What features write to the residual stream in all, [n, D], for one unit of activation.

    nodes: their layers and ids, `Active` or `Nodes`
    """
    found = np.zeros((len(nodes), coders[0].d_out), np.float32)
    for layer in np.unique(nodes.layer).tolist():
        coder, mine = coders.at(layer), np.flatnonzero(nodes.layer == layer)
        for start in range(0, len(mine), TOGETHER):
            some = mine[start : start + TOGETHER]
            ids = np.pad(nodes.feature[some], (0, TOGETHER - len(some)))
            for target in coder.layers:
                if writes_to(coder, layer, target):
                    places = np.int32(coder.source(layer)), np.int32(coder.source(target))
                    found[some] += np.asarray(written_rows(coder, *places, ids))[: len(some)]
    return found


@partial(jax.jit, donate_argnums=0)
def _fill(blocks, rows, strength, at):
    return jax.lax.dynamic_update_index_in_dim(blocks, rows * strength[..., None], at, 0)


def written_blocks(
    coders: CoderSet, active: Active, layout: SlotLayout, mesh: Mesh | None = None
) -> Blocks:
    """What each source writes to each layer, gathered from the decoders for these sources alone.

    On a mesh the slots are split over its axis "model".
    """
    pairs = [
        (n, source, target)
        for target in coders.layers
        for n, source in enumerate(layout.layer.tolist())
        if writes_to(coders.at(source), source, target)
    ]
    count, results = room_of(len(pairs)), room_of(len(layout.layer))
    shape = (count, *layout.source.shape[1:], coders[0].d_out)
    blocks = jnp.zeros(shape, jnp.float32, device=_over(mesh, shape[2], 2))
    for at, (n, source, target) in enumerate(pairs):
        coder = coders.at(source)
        places = np.int32(coder.source(source)), np.int32(coder.source(target))
        ids, strength = slot_features(active, layout, n)
        blocks = _fill(blocks, written_rows(coder, *places, ids), strength, np.int32(at))
    number, targets = (np.array([p[k] for p in pairs], np.int32) for k in (0, 2))
    start = np.searchsorted(targets, np.arange(len(coders.layers) + 1)).astype(np.int32)
    room = (0, count - len(pairs))
    positions = np.pad(layout.positions[number], (room, (0, 0)))
    given = map(jnp.asarray, (positions, np.pad(number, room), start))
    return Blocks(blocks, *given, results=results)


def room_of(count: int) -> int:
    """A number of blocks rounded up by an eighth at most, so that few programs are compiled."""
    step = max(8, 1 << max(0, (count - 1).bit_length() - 3))
    return max(8, -(-count // step) * step)


@jax.jit
def _remainders(blocks: Blocks, whole, skip, bias, inner, outer, here, layer):
    """Of one layer [T, D] each: the error, the constant, and features without a slot.

    `whole` is what all features write, if not all have slots; features act at tokens `here` [T].
    """

    def add(i, y):
        return y.at[blocks.positions[i]].add(blocks.rows[i].sum(1))

    y = jax.lax.fori_loop(blocks.start[layer], blocks.start[layer + 1], add, jnp.zeros_like(outer))
    rest = jnp.zeros_like(y) if whole is None else whole - y
    left = outer - y - rest
    if skip is not None:
        left = left - matmul(inner, skip)
    here = here[:, None]
    return jnp.where(here, left - bias[None, :], 0.0), jnp.where(here, bias[None, :], left), rest


def stacked_skips(coders: CoderSet) -> jax.Array | None:
    """The skips of all layers [L, D, D], zeros where there is none; None if no layer has one."""
    own = [skip for coder in coders if (skip := coder.w_skip) is not None]
    if not own:
        return None
    none = jnp.zeros((coders[0].d_in, coders[0].d_out), own[0].dtype)
    of = lambda c, layer: none if c.w_skip is None else c.w_skip[_own(c, layer)]
    return jnp.stack([of(coders.at(layer), layer) for layer in coders.layers])


def _own(coder: Coder, layer: int) -> Any:
    """The index of a layer's weights in those of its coder."""
    return coder.source(layer) if coder.multi_layer else ...


def what_is_written(
    coders: CoderSet,
    prompt: Prompt,
    active: Active,
    layout: SlotLayout,
    *,
    whole: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Written:
    """Everything that stands for the MLPs of a prompt; it adds up to their outputs.

    whole: what all active features write [L, T, D], where `active` are not all of them
    mesh: the devices that the model is on, if several
    """
    blocks, skips = written_blocks(coders, active, layout, mesh), stacked_skips(coders)
    T = prompt.mlp_in.shape[1]
    positions, first = np.arange(T, dtype=np.int32), max([1, *(coder.first for coder in coders)])
    found, biases = [], []
    for layer in coders.layers:
        coder = coders.at(layer)
        here = (positions >= coder.first) & (positions < prompt.length)
        # what exact sources leave is rounding: no error, though it must be somewhere
        here = here & (not getattr(coder, "exact", False))
        skip = None if skips is None else float32(skips[layer])
        biases.append(float32(coder.b_dec[_own(coder, layer)]))
        all_of = None if whole is None else whole[layer]
        given = biases[-1], prompt.mlp_in[layer], prompt.mlp_out[layer], here, np.int32(layer)
        error, constant, rest = _remainders(blocks, all_of, skip, *given)
        found.append((error, constant[: min(first, T)], rest))
    error, start, rest = (jnp.stack(column) for column in zip(*found))
    given = error, jnp.stack(biases), start, None if whole is None else rest, skips
    if mesh is not None:
        given = jax.device_put(given, _over(mesh))
    error, bias, start, rest, skips = given
    return Written(blocks, error, bias, start, rest, skips)


def _over(mesh: Mesh | None, size: int = 1, axis: int = 0) -> NamedSharding | None:
    """Copies on every device, but for an axis that is split over "model" where it divides."""
    if mesh is None:
        return None
    split = size > 1 and size % mesh.shape["model"] == 0
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "model" if split else None))
