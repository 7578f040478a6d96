"""A graph in words: what its features stand for, and the paths that matter most.

labelled = gs.label_graph(graph, gs.feature_details(model, coders, tokenizer, graph))
for path in gs.strongest_paths(labelled, 5):
    print(path)
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.influence import row_sums
from gemma_scope_jax.circuits.neurons import mlp_neurons
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.coders.directions import logit_tokens
from gemma_scope_jax.errors import InputError, shown
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer

WORDS = 3  # tokens in a label


@dataclasses.dataclass(frozen=True)
class FeatureDetails:
    """What is known about a feature.

    label           what it is called; default: the tokens that it raises most
    raises, lowers  the tokens that the feature makes likelier, and less likely, strongest first
    examples        texts where it is active: their tokens, and its activation on each
    """

    label: str = ""
    raises: Sequence[str] = ()
    lowers: Sequence[str] = ()
    examples: Sequence[tuple[Sequence[str], Sequence[float]]] = ()


Details = Mapping[tuple[int, int], FeatureDetails]  # by (layer, feature)


def feature_details(
    model: Model,
    coders: CoderSet | Coder | Sequence[Coder] | None,
    tokenizer: Tokenizer,
    graph: Graph,
    *,
    names: Mapping[tuple[int, int], str] | None = None,
    examples: Mapping[tuple[int, int], Sequence[tuple[Sequence[str], Sequence[float]]]]
    | None = None,
) -> dict[tuple[int, int], FeatureDetails]:
    """The tokens that the selected features of a graph raise and lower, directly, most.

    coders    as `attribute` was given; None: the model's neurons
    names     what features are called, by (layer, feature); else their label is these tokens
    examples  texts where they are active: the tokens and the activations on them. Cards, labels and
              explanations hold both, see `read_known`
    """
    coders = CoderSet(mlp_neurons(model) if coders is None else coders)
    nodes, found = graph.sources[: graph.selected], {}
    names, examples = names or {}, examples or {}
    for layer in np.unique(nodes.layer).tolist():
        coder, mine = coders.at(layer), np.unique(nodes.feature[nodes.layer == layer])
        own = layer if coder.multi_layer else None
        tokens = logit_tokens(model, coder, tokenizer, mine, layer=own)
        for feature, (raises, lowers) in zip(mine.tolist(), tokens):
            which = layer, feature
            known = names.get(which, ""), raises, lowers, examples.get(which, ())
            found[which] = FeatureDetails(*known)
    return found


def features_of(graph: Graph) -> list[tuple[int, int]]:
    """The (layer, feature) of the graph's selected features, each once, in order."""
    nodes = graph.sources[: graph.selected]
    return sorted(set(zip(nodes.layer.tolist(), nodes.feature.tolist())))


def label_graph(graph: Graph, details: Details) -> Graph:
    """The graph with a label on each feature that `details` know.

    The label of a neuron is what it raises on this prompt: what it lowers, if it is negative.
    """

    def named(nodes: Nodes) -> Nodes:
        labels = nodes.label.tolist()
        for n in np.flatnonzero(np.isin(nodes.kind, ("feature", "neuron"))).tolist():
            known = details.get((int(nodes.layer[n]), int(nodes.feature[n])))
            if known is not None:
                negative = nodes.kind[n] == "neuron" and nodes.activation[n] < 0
                words = known.lowers if negative else known.raises
                words = [w.strip() or repr(w) for w in words[:WORDS]]
                labels[n] = known.label or ", ".join(words) or labels[n]
        return dataclasses.replace(nodes, label=np.asarray(labels))

    return dataclasses.replace(graph, sources=named(graph.sources), targets=named(graph.targets))


@dataclasses.dataclass(frozen=True)
class Path:
    """One path from a token or an error to a final target.

    nodes   the sources along it, in order, and `target`, where it ends
    share   of all influence, the part that runs along this path; over all paths these add up to 1
    effect  what the path contributes to the target's value: positive if it raises the target
    """

    nodes: Nodes
    target: Nodes
    share: float
    effect: float

    def __str__(self) -> str:
        steps = " -> ".join(map(node_name, (self.nodes[i] for i in range(len(self.nodes)))))
        verb = "raises" if self.effect > 0 else "lowers" if self.effect < 0 else "acts on"
        return f"{steps} {verb} {node_name(self.target)} ({self.share:.2%} of the influence)"


def node_name(node: Nodes, *, where: bool = True) -> str:
    """A node in a few words: `" Dallas" at 7`, `feature 12/301 at 8 (Texas, Austin)`.

    where: say its position
    """
    kind, layer, feature = str(node.kind[0]), int(node.layer[0]), int(node.feature[0])
    label, at = shown(str(node.label[0])), f" at {node.position[0]}" if where else ""
    if kind == "token":
        return f'"{label}"{at}'
    if kind in ("logit", "direction"):
        return f'"{label}"' if kind == "logit" else label
    if kind == "error":
        return f"error of layer {layer}{at}"
    return f"{kind} {layer}/{feature}{at}" + (f" ({label})" if label else "")


def strongest_paths(graph: Graph, count: int = 10, *, direct: bool = True) -> list[Path]:
    """The paths with the largest shares of influence, at most `count`; prune a large graph first.

    Every target hands its influence to its sources by their shares in its absolute effects; a
    path's share is the product. Effects are signed along the way. `direct`: list also the paths
    that lead from a token or an error to a final target without a feature between.
    """
    count, n = whole_number("count", count, 1), graph.selected
    totals = np.maximum(row_sums(graph.effects), 1e-30)
    size, weights = np.abs(graph.effects) / totals[:, None], graph.weights
    if not weights.sum() > 0:
        raise InputError("the graph has no final target: its paths lead nowhere")
    # kept[row]: the best ways from a feature up to a final target, (share, effect, rows passed)
    kept: dict[int, list[tuple[float, float, tuple[int, ...]]]] = {
        row: [(float(weights[row] / weights.sum()), 1.0, (row,))]
        for row in range(n, len(graph.targets))
    }
    ends: list[tuple[float, float, tuple[int, ...]]] = []
    rows = [*range(n, len(graph.targets)), *np.argsort(-graph.targets.layer[:n], kind="stable")]
    for row in map(int, rows):
        best = heapq.nlargest(count, kept.pop(row, ()))
        for source in np.flatnonzero(size[row]).tolist() if best else ():
            step = float(size[row, source])
            slope = float(graph.effects[row, source])
            slope /= (float(graph.sources.activation[row]) or 1.0) if row < n else 1.0
            ways = [(share * step, e * slope, (source, *way)) for share, e, way in best]
            if source < n:
                there = kept.setdefault(source, [])
                there.extend(ways)
                if len(there) > 4 * count:
                    there[:] = heapq.nlargest(count, there)
            elif row < n or direct:
                ends.extend(ways)
        ends = heapq.nlargest(count, ends)
    return [
        Path(graph.sources[list(way[:-1])], graph.targets[way[-1]], share, effect)
        for share, effect, way in ends
    ]
