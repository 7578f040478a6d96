"""Edges are what happens when their source is changed by a finite amount, all else held fixed.

300 edges of each kind, drawn from all that are at least a thousandth of the largest effect on the
same target: below that, a float32 sum of thousands of products knows few digits of an effect, and
its error is measured against the largest one instead.
"""

import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of, near, sums
from frozen_model import FrozenModel
from gemma_scope_jax.circuits.graph import Graph

COUNT, FLOOR = 300, 1e-3
EDGES = (("feature", "feature"), ("error", "feature"), ("token", "logit"), ("feature", "logit"))
EDGES_OF_NEURONS = (("neuron", "neuron"), ("token", "logit"), ("neuron", "logit"))


def check_edges(graph: Graph, frozen: FrozenModel, most: int, kinds=EDGES) -> None:
    """By interventions on up to `most` sources of each kind: all are doubled, halved or removed."""
    rng, nodes = np.random.default_rng(0), graph.sources
    every = [np.flatnonzero(nodes.kind == kind) for kind in sorted({source for source, _ in kinds})]
    columns = np.concatenate([np.sort(rng.permutation(mine)[:most]) for mine in every])
    sources, amounts = nodes[columns], rng.choice([-1.0, -0.5, 1.0], len(columns))
    clean = frozen.values(frozen.run(nodes[:1], np.zeros(1)), graph.targets)
    near(clean[0], graph.value)
    moved = frozen.values(frozen.run(sources, amounts), graph.targets)
    want = ((moved - clean) / amounts[:, None]).T
    off = np.abs(graph.effects[:, columns] - want)
    largest = np.abs(graph.effects).max(1, keepdims=True)
    assert (off < 1e-5 * largest).all()  # also where there can be no effect
    for source, target in kinds:
        fits = (graph.targets.kind == target)[:, None] & (sources.kind == source)[None]
        edges = np.flatnonzero(fits & (np.abs(want) > FLOOR * largest))
        edges = rng.permutation(edges)[:COUNT]
        share = off.flat[edges] / np.abs(want.flat[edges])
        print(f"{source} -> {target}: median {np.median(share):.1e}, worst {share.max():.1e}")
        assert len(edges) == COUNT and np.median(share) < 1e-4 and share.max() < 1e-3


def check_tiny(model, coders, kinds=EDGES, **options) -> None:
    options |= {"max_n_logits": 50, "desired_logit_prob": 1.0}
    graph = gs.attribute(model, coders, IDS, **options)
    check_edges(graph, FrozenModel(model, coders, IDS), 10**6, kinds)


@pytest.mark.law
@pytest.mark.usefixtures("cut_short")
def test_edges_are_finite_interventions(model):
    check_tiny(model, coders_of("affine"))


@pytest.mark.parametrize("kind", ["plain", "clt"])
def test_edges_of_other_coders(model, kind):
    check_tiny(model, coders_of(kind))


def test_edges_of_neurons(model):
    check_tiny(model, None, EDGES_OF_NEURONS, max_feature_nodes=300)


@pytest.mark.slow
@pytest.mark.usefixtures("cut_short")
def test_real_model():
    """The packaged transcoders on the real 270M: sums, and edges against interventions."""
    model, tok = gs.load_model("gemma-3-270m", dtype="float32"), gs.load_tokenizer("gemma-3-270m")
    coders = gs.load_coders("gemma-3-270m-transcoder-*")
    ids = tok.encode("The capital of France is")
    options = {"max_feature_nodes": 200, "max_n_logits": 100, "desired_logit_prob": 1.0}
    graph = gs.attribute(model, coders, ids, tokenizer=tok, **options)
    near(sums(graph), graph.value)
    n, logits = graph.selected, np.asarray(gs.run(model, ids[None]).logits)[0, -1]
    near(graph.value[n:], logits[graph.targets.feature[n:]] - logits.mean())
    near(graph.value[:n], graph.sources.activation[:n])
    assert " Paris" in graph.targets.label[n:].tolist()
    assert graph.tokens[-1] == " is" and graph.about["active_features"] > n
    check_edges(graph, FrozenModel(model, coders, ids), 40)
