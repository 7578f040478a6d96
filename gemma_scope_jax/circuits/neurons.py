"""Graphs without dictionaries: the nodes are the MLPs' own neurons.

    graph = gs.attribute(model, None, ids)      # or gs.mlp_neurons(model) instead of None

A neuron's activation is gelu(gate) * up. With the gate frozen at the prompt's value, it is linear
in the MLP's input, and what it writes passes the norm after the MLP, frozen like all norms:

    value  = gelu(mlp_in @ w_gate[:, m]) * (mlp_in @ w_up[:, m])
    writes   value * w_down[m] * post_mlp_scale * (1 + post_mlp_norm)   to mlp_out

The neurons are the whole MLP: there is no error, no bias and no threshold. So they look like one
more coder, whose encoder and decoder have a factor a token: `Active.gate` and `Active.scale`.
All of them are active at every token; `max_candidates` says how many may become nodes.

Source: Jafari et al. 2025, RelP (gates frozen); Ameisen et al. 2025 (frozen norms and patterns).
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma_scope_jax.circuits.linear import TargetRows, begun_at, chunk_of, dot, down_a_layer
from gemma_scope_jax.circuits.sources import TOKENS, Active, Prompt, check_coders
from gemma_scope_jax.coders.coder import Coder, CoderInfo, Encoder, Index, float32, static_field
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.multi_layer_coder import at_layer
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.block import gelu
from gemma_scope_jax.model.config import GemmaConfig, Model, abstract_params

if TYPE_CHECKING:
    from gemma_scope_jax.circuits.targets import Resolved


@flax.struct.dataclass
class MlpNeurons(Coder):
    """The MLPs of a model in the shape of a coder of L layers, without a copy of a weight.

    w_enc [L, D, M] is w_up, w_dec [L, M, D] is w_down, a layer writing to itself only; w_gate
    [L, D, M]; norm [L, D], the weights of the norm after the MLP. Activations need the gates, see
    `sources_at`: nothing here encodes.
    """

    multi_layer = True
    exact = True  # nothing of the MLP is left over
    axes = ("L D M", "L M", "L M", "L M D", "L D", "")
    layers: tuple[int, ...] = static_field()
    w_gate: Any = flax.struct.field(kw_only=True)
    norm: Any = flax.struct.field(kw_only=True)

    @property
    def kind(self) -> str:
        return "neurons"

    def gain(self, i: Index) -> jax.Array:
        """1 + w of the norm after layer i's MLP, [1, D]."""
        return 1.0 + float32(at_layer(self.norm, i))[None, :]

    def encoder(self, i: Index) -> Encoder:
        return Encoder(*(at_layer(a, i) for a in (self.w_enc, self.b_enc, self.threshold)))

    def decoder(self, i: Index, j: Index) -> jax.Array:
        return float32(at_layer(self.w_dec, i)) * self.gain(i)

    def written(self, i: Index, j: Index, features: ArrayLike) -> jax.Array:
        rows = jnp.asarray(self.w_dec)[i, jnp.asarray(features)]
        return float32(rows) * self.gain(i)

    def gate_columns(self, features: ArrayLike) -> jax.Array:
        """The gates' weights [L, R, D], float32, of neurons [L, R] of each layer."""
        layer = jnp.arange(len(self.layers), dtype=jnp.int32)[:, None]
        return float32(jnp.asarray(self.w_gate)[layer, :, jnp.asarray(features)])

    def unplaced(self) -> "MlpNeurons":
        return self.replace(first=0)

    def encode_layer(self, i: Index, x: ArrayLike) -> NoReturn:
        raise InputError("neurons are no coder: their activations are those at mlp_act")

    def pre_activations(self, x: ArrayLike) -> NoReturn:
        self.encode_layer(0, x)

    encode = pre_activations

    def decode(self, f: ArrayLike, x: ArrayLike | None = None) -> NoReturn:
        self.encode_layer(0, f)


def mlp_neurons(model: Model, *, first: int = 1) -> MlpNeurons:
    """The MLP neurons of a model, to make graphs of: they stand where coders do.

    first: what the MLPs write before this position counts to the bias, as it does with coders,
        which were not trained there; 0 makes sources of all positions. Raises `InputError`.
    """
    c, b = model.config, model.params.blocks
    zeros = lambda size: jnp.zeros((c.layers, size), jnp.float32)
    return MlpNeurons(
        w_enc=b.w_up,
        b_enc=zeros(c.d_mlp),
        threshold=zeros(c.d_mlp),
        w_dec=b.w_down,
        b_dec=zeros(c.d_model),
        w_gate=b.w_gate,
        norm=b.post_mlp_norm,
        layers=tuple(range(c.layers)),
        reads="mlp_in",
        writes="mlp_out",
        first=whole_number("first", first, 0),
        info=CoderInfo(type="neurons", l0=c.layers * c.d_mlp, width=c.layers * c.d_mlp),
    )


def graph_coders(
    config: GemmaConfig,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    model: Model | None = None,
) -> CoderSet:
    """What a graph is made with, checked: coders, or for None the neurons of `model`, or of the
    shapes of a model of `config`. Raises `InputError`."""
    if coders is None:
        coders = mlp_neurons(model or Model(abstract_params(config), config))
    coders = CoderSet(coders)
    check_coders(config, coders)
    return coders


def neurons_of(coders: Sequence[Coder]) -> MlpNeurons | None:
    """The neurons, if `coders` are these."""
    first = coders[0]
    return first if isinstance(first, MlpNeurons) else None


# --- As sources ----------------------------------------------------------------------------------


def sources_at(coders: CoderSet, prompt: Prompt, layer: Any, position: Any, feature: Any) -> Active:
    """Features or neurons as sources of activation 1, active or not; columns of n numbers."""
    columns = [np.asarray(a, np.int32) for a in (layer, position, feature)]
    ones = np.ones(len(columns[0]), np.float32)
    neurons = neurons_of(coders)
    if neurons is None:
        return Active(columns[0], columns[1], columns[2], ones)
    gate, scale = ones.copy(), ones.copy()
    for number in np.unique(columns[0]).tolist():
        mine = np.flatnonzero(columns[0] == number)
        at, which = (column[mine] for column in columns[1:])
        x, given = prompt.mlp_in[number, at], jnp.asarray(neurons.w_gate)[number][:, which]
        gate[mine] = gelu(dot("nd,dn->n", x, float32(given)))
        scale[mine] = prompt.post_mlp_scale[number, at]
    return Active(columns[0], columns[1], columns[2], ones, gate, scale, "neuron")


def neuron_candidates(
    model: Model, neurons: MlpNeurons, prompt: Prompt, wanted: "Resolved", most: int
) -> tuple[Active, int, jax.Array]:
    """The `most` neurons with the largest total effect on the targets, in order; how many there
    are; and what all of them write [L, T, D].

    As `candidates`, but dense: where all of a layer's neurons are active, products with its
    weights are faster than gathering rows.
    """
    L, size = model.config.layers, prompt.mlp_in.shape[1]
    rows = TargetRows(*map(jnp.asarray, (wanted.stage, wanted.position, wanted.vector)))
    g = jnp.zeros((size, len(wanted.bias), model.config.d_model), jnp.float32)
    step = size if size <= TOKENS else chunk_of(size)
    found, written = [], []
    for layer in reversed(range(L)):
        g = begun_at(rows, g, np.int32(2 * layer + 1))
        parts = []
        for start in range(0, size, step):
            some = slice(start, start + step)
            positions = np.arange(start, start + step, dtype=np.int32)
            here = (positions >= neurons.first) & (positions < prompt.length)
            tokens = _Tokens(
                prompt.mlp_in[layer, some],
                prompt.frozen.pre_mlp_scale[layer, some],
                prompt.post_mlp_scale[layer, some],
                jnp.asarray(here),
            )
            given = np.int32(layer), tokens, g[some], wanted.weights
            parts.append(_layer(model, neurons.unplaced(), *given))
        *arrays, back, wrote = (jnp.concatenate(part) for part in zip(*parts))
        found.append(_largest(layer, list(map(np.asarray, arrays)), most))
        written.append(wrote)
        g = down_a_layer(model, prompt.frozen, None, np.int32(layer), rows, g, back)
    layer, position, feature, effect, act, gate = map(np.concatenate, zip(*found[::-1]))
    best = np.arange(len(effect))
    if len(effect) > most:
        best = np.sort(np.argpartition(-effect, most - 1)[:most])
    layer, position, feature = (
        column[best].astype(np.int32) for column in (layer, position, feature)
    )
    scale = np.asarray(prompt.post_mlp_scale)[layer, position]
    active = Active(layer, position, feature, act[best], gate[best], scale, "neuron")
    count = L * max(0, prompt.length - neurons.first) * neurons.width
    return active, count, jnp.stack(written[::-1])


def _largest(layer: int, arrays: list[np.ndarray], most: int) -> tuple[np.ndarray, ...]:
    """The layer, position, number, effect, activation and gate of a layer's `most` neurons, in
    order; arrays: the last three [T, M]."""
    effect = arrays[0]
    some = np.flatnonzero(np.isfinite(effect))
    if len(some) > most:
        some = np.sort(some[np.argpartition(-effect.reshape(-1)[some], most - 1)[:most]])
    position, feature = np.divmod(some, effect.shape[1])
    columns = (a.reshape(-1)[some] for a in arrays)
    return np.full(len(some), layer), position, feature, *columns


class _Tokens(NamedTuple):
    """Tokens before one layer's MLP."""

    x: jax.Array  # [T, D], mlp_in
    before: jax.Array  # [T], the scale of the norm before the MLP
    after: jax.Array  # [T], of the norm after it
    here: jax.Array  # bool [T]: whether neurons act


@jax.jit
def _layer(model: Model, neurons: MlpNeurons, i, tokens: _Tokens, g, weights):
    """Of one layer's neurons at T tokens: the total effect [T, M], -inf where they do not act;
    activations and gates [T, M]; what they hand on to resid_mid [T, R, D]; what they write [T, D].
    """
    x, before, after, here = tokens
    w_gate, w_up, w_down = (
        float32(at_layer(w, i)) for w in (neurons.w_gate, neurons.w_enc, neurons.w_dec)
    )
    gain = neurons.gain(i) * after[:, None]  # of what they write [T, D]
    norm = float32(at_layer(model.params.blocks.pre_mlp_norm, i))
    inner = (1.0 + norm)[None, :] * before[:, None]
    gate = jnp.where(here[:, None], gelu(dot("td,dm->tm", x, w_gate)), 0.0)
    act = gate * dot("td,dm->tm", x, w_up)
    slope = dot("trd,md->trm", g * gain[:, None], w_down)
    effect = dot("trm,r->tm", jnp.abs(slope), weights) * jnp.abs(act)
    back = dot("trm,dm->trd", slope * gate[:, None], w_up) * inner[:, None]
    wrote = dot("tm,md->td", act, w_down) * gain
    return jnp.where(here[:, None], effect, -jnp.inf), act, gate, back, wrote
