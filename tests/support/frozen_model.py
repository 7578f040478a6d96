"""The model of a prompt with what graphs hold fixed, run forwards in float64 by numpy.

`gs.attribute` walks down the layers with gradients. Here nothing is differentiated: a source is
changed by a finite amount, the layers above run again, and results are compared. Attention
patterns and norm scales keep the prompt's values; so does each MLP's output, but for what a changed
source writes to it and, through an affine skip, for what has changed in its input. No feature is
computed anew: effects are direct. Neurons keep their gates. In float32 small effects would drown.
"""

import dataclasses
from typing import Any

import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.circuits.graph import Nodes
from gemma_scope_jax.coders.multi_layer_coder import block_index

SCALES = ("pre_attn_scale", "post_attn_scale", "pre_mlp_scale", "post_mlp_scale")
SITES = (*SCALES, "attn_pattern", "embed", "mlp_in", "mlp_act", "mlp_out", "final_scale")


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


@dataclasses.dataclass(frozen=True)
class Run:
    """S runs: the inputs of the MLPs [S, L, T, D], and the last token's stream [S, D], normed."""

    mlp_in: np.ndarray
    last: np.ndarray


class FrozenModel:
    """coders: transcoders or CLTs of all layers; None: the model's own neurons"""

    def __init__(self, model: gs.Model, coders: Any, ids: np.ndarray) -> None:
        reads = gs.run(model, ids[None], [gs.capture(site) for site in SITES], pad=False).reads
        once = ("embed", "final_scale")
        self.clean = {s: wide(reads[s][0] if s in once else reads[s][:, 0]) for s in SITES}
        params, self.config = model.params, model.config
        names = ("w_v", "w_o", "w_gate", "w_up", "w_down")
        gains = ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm")
        self.weights = {name: np.asarray(getattr(params.blocks, name)) for name in names}
        self.gains = {name: 1 + wide(getattr(params.blocks, name)) for name in gains}
        self.final_gain = 1 + wide(params.final_norm)
        self.unembedding = np.asarray(params.unembedding)
        self.mean = self.unembedding.mean(0, dtype=np.float64)
        coders = [] if coders is None else gs.CoderSet(coders)
        self.of_layer = dict(sorted((layer, c) for c in coders for layer in c.layers))
        self.skips = {
            i: self._own(i, "w_skip") for i, c in self.of_layer.items() if c.w_skip is not None
        }
        self.active = {layer: self._activations(layer) for layer in self.of_layer}
        self.decoders = {layer: self._decoders(layer) for layer in self.of_layer}

    def run(self, sources: Nodes, amounts: np.ndarray) -> Run:
        """One run for each source, of which `amounts` [S] are added: -1 takes it away."""
        c, clean, w = self.config, self.clean, self.weights
        (T, D), S = clean["embed"].shape, len(sources)
        norm = lambda at: clean[f"{at}_scale"][layer] * self.gains[f"{at}_norm"][layer]
        of_tokens = lambda x, w: (x.reshape(S * T, -1) @ w).reshape(S, T, -1)
        changes = [self.written(sources[i : i + 1]) for i in range(S)]

        def change(x, layer):
            for i, at in enumerate(sources.position):
                x[i, at] += amounts[i] * changes[i].get(layer, 0.0)

        x, inputs = np.tile(clean["embed"], (S, 1, 1)), np.empty((S, c.layers, T, D))
        change(x, -1)
        for layer in range(c.layers):
            v = of_tokens(x * norm("pre_attn"), wide(w["w_v"][layer]).reshape(D, -1))
            v = np.repeat(v.reshape(S, T, c.kv_heads, -1), c.heads // c.kv_heads, 2)
            z = np.einsum("nts,bsnh->btnh", clean["attn_pattern"][layer], v, optimize=True)
            x = x + of_tokens(z, wide(w["w_o"][layer]).reshape(-1, D)) * norm("post_attn")
            inputs[:, layer] = x * norm("pre_mlp")
            x = x + clean["mlp_out"][layer]
            if layer in self.skips:
                x = x + of_tokens(inputs[:, layer] - clean["mlp_in"][layer], self.skips[layer])
            change(x, layer)
        return Run(inputs, x[:, -1] * clean["final_scale"][-1] * self.final_gain)

    def values(self, run: Run, targets: Nodes) -> np.ndarray:
        """[S, R]: pre-activations of features, values of neurons, logits less the mean logit."""
        found, logits = np.empty((len(run.last), len(targets))), targets.kind == "logit"
        rows = wide(self.unembedding[targets.feature[logits]]) - self.mean
        found[:, logits] = run.last @ rows.T
        for layer in np.unique(targets.layer[~logits]):
            mine = np.flatnonzero((targets.layer == layer) & ~logits)
            at, vectors, biases = targets.position[mine], *self._read(layer, targets[mine])
            found[:, mine] = np.einsum("srd,rd->sr", run.mlp_in[:, layer, at], vectors) + biases
        return found

    def written(self, source: Nodes) -> dict[int, np.ndarray]:
        """What a source writes [D] at its token to the MLPs' outputs, by layer; -1: embeddings."""
        columns = source.layer, source.position, source.feature
        kind, (layer, at, feature) = str(source.kind[0]), (int(a[0]) for a in columns)
        if kind == "token":
            return {-1: self.clean["embed"][at]}
        if kind == "error":
            return {layer: self._error(layer, at)}
        if kind == "feature":
            strength = self.active[layer][at, feature]
            return {to: strength * rows[feature] for to, rows in self.decoders[layer].items()}
        assert kind == "neuron"
        scale = self.clean["mlp_act"][layer, at, feature] * self.clean["post_mlp_scale"][layer, at]
        return {
            layer: scale
            * self.weights["w_down"][layer, feature]
            * self.gains["post_mlp_norm"][layer]
        }

    def _error(self, layer: int, at: int) -> np.ndarray:
        """What neither features nor skip nor bias write; none at the first tokens."""
        if at < self.of_layer[layer].first:
            return np.zeros_like(self.final_gain)
        left = self.clean["mlp_out"][layer, at] - self._own(layer, "b_dec")
        if layer in self.skips:
            left = left - self.clean["mlp_in"][layer, at] @ self.skips[layer]
        for below, decoders in self.decoders.items():
            if layer in decoders:
                left = left - self.active[below][at] @ decoders[layer]
        return left

    def _read(self, layer: int, some: Nodes) -> tuple[np.ndarray, np.ndarray]:
        """The vectors [R, D] that make targets of an MLP's input, and their biases [R]."""
        if layer in self.of_layer:
            vectors, biases = self._own(layer, "w_enc").T, self._own(layer, "b_enc")
            return vectors[some.feature], biases[some.feature]
        w_gate, w_up = (self.weights[k][layer][:, some.feature].T for k in ("w_gate", "w_up"))
        gate = (self.clean["mlp_in"][layer, some.position] * w_gate).sum(1)
        gelu = gate * (1 + np.tanh((gate + 0.044715 * gate**3) * (2 / np.pi) ** 0.5)) / 2
        return gelu[:, None] * w_up, np.zeros(len(some))

    def _own(self, layer: int, name: str) -> np.ndarray:
        """A layer's part of an array of its coder."""
        coder = self.of_layer[layer]
        array = np.asarray(getattr(coder, name))
        return wide(array[coder.source(layer)] if coder.multi_layer else array)

    def _activations(self, layer: int) -> np.ndarray:
        """[T, F]: JumpReLU, and none at the tokens on which the coder was not trained."""
        z = self.clean["mlp_in"][layer] @ self._own(layer, "w_enc") + self._own(layer, "b_enc")
        acting = np.arange(len(z))[:, None] >= self.of_layer[layer].first
        return np.where(acting & (z > self._own(layer, "threshold")), z, 0.0)

    def _decoders(self, layer: int) -> dict[int, np.ndarray]:
        """The decoders [F, D] of a layer's features, by the layer that they write to."""
        coder, rows = self.of_layer[layer], wide(self.of_layer[layer].w_dec)
        if not coder.multi_layer:
            return {layer: rows}
        own, count = coder.source(layer), len(coder.layers)
        return {coder.layers[j]: rows[block_index(own, j, count)] for j in range(own, count)}
