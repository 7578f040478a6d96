"""Small attribution graphs: a prompt, transcoders of every kind, comparisons."""

import numpy as np

import gemma_scope_jax as gs
from coders import random_coder

IDS = np.array([2, 5, 9, 33, 77, 120, 8, 9, 33, 211, 17], np.int32)
KINDS = ("plain", "affine", "clt", "affine clt")


def coders_of(kind, layers=4, width=24, **more):
    given = {"reads": "mlp_in", "writes": "mlp_out", "skip": "affine" in kind, **more}
    if "clt" in kind:
        return random_coder(width, seed=3, layers=tuple(range(layers)), **given)
    return gs.CoderSet(random_coder(width, seed=n, layer=n, **given) for n in range(layers))


def key(nodes, n=None):
    """The nodes as tuples, without activation and label."""
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.feature)
    return list(zip(*(c[:n].tolist() for c in columns)))


def near(got, want, share=1e-4):
    np.testing.assert_allclose(got, want, rtol=0, atol=share * np.abs(want).max())


def sums(graph):
    return graph.effects.sum(1, dtype=np.float64) + graph.rest + graph.bias
