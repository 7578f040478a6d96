"""An attribution graph: the direct effect of every source on every target, on one prompt.

Sources are features, reconstruction errors and token embeddings; targets are the selected features
and what was asked about, such as the logits of the next token. `effects` is a rectangle, targets x
sources: only targets have rows, so that a graph of thousands of tokens needs no square matrix.

    targets[r].value = effects[r].sum() + rest[r] + bias[r]

All arrays are numpy arrays. The first n sources and the first n targets are the same n selected
features, in the same order (layer, position, feature).
"""

import dataclasses
from typing import Any

import numpy as np

# Kinds of nodes. A "neuron" stands where a feature would, in graphs without coders.
KINDS = ("feature", "neuron", "error", "token", "logit", "direction")


@dataclasses.dataclass(frozen=True)
class Nodes:
    """A table of nodes, one array [n] a column; `nodes[index]` takes some of the rows.

    kind        str, one of `KINDS`
    layer       int32: of features and errors the model's layer; -1 for tokens; L for logits
    position    int32: the token's position in the prompt
    feature     int32: the feature's id; the vocabulary id of tokens and logits; -1 for errors
    activation  float32: of features their activation, of logits their value, else 1
    label       str: what a reader calls the node; "" where nothing is known
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    activation: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: Any) -> "Nodes":
        index = np.atleast_1d(index) if not isinstance(index, slice) else index
        return Nodes(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Graph:
    """What `attribute` returns.

    sources, targets  the nodes; targets are the n selected features and then what was asked about
    effects  float32 [targets, sources]: direct effects, in units of the target's value
    value    float32 [targets]: of a feature its pre-activation, of a logit its distance from the
             mean logit
    bias     float32 [targets]: the part of the value that no source has: biases, and what the MLPs
             write at the first positions, where coders were not trained
    rest     float32 [targets]: the effect of the active features that were not selected
    weights  float32 [targets]: what influence starts from: probabilities of logits, 0 for features
    ids      int32 [T]: the prompt's tokens, `<bos>` first, and `tokens` their texts [T]
    selected the number n of selected features
    layers   the number of the model's layers
    about    what the graph was made from and how: JSON data
    """

    sources: Nodes
    targets: Nodes
    effects: np.ndarray
    value: np.ndarray
    bias: np.ndarray
    rest: np.ndarray
    weights: np.ndarray
    ids: np.ndarray
    tokens: list[str]
    selected: int
    layers: int
    about: dict[str, Any]
