"""Sets of transcoders and CLTs for the tiny model of four layers, and a prompt."""

import numpy as np

from coders import random_coder

MLP = {"reads": "mlp_in", "writes": "mlp_out", "threshold": 0.2}
IDS = np.random.default_rng(0).integers(2, 300, 9).astype(np.int32)
SETS = {
    "plain": [random_coder(24, layer=i, seed=i, **MLP) for i in range(4)],
    "affine": [random_coder(24 + i, layer=i, seed=i, skip=True, first=2, **MLP) for i in range(4)],
    "clt": [random_coder(24, layers=(0, 1, 2, 3), skip=True, **MLP)],
    "two layers": [random_coder(24, layer=i, seed=i, skip=i == 2, **MLP) for i in (2, 0)],
    "mixed": [random_coder(24, layers=(0, 2), **MLP), random_coder(20, layer=1, skip=True, **MLP)],
}


def features_of(graph):
    """The graph's features, int [n, 3]: layer, position, feature."""
    nodes = graph.sources[: graph.selected]
    return np.stack([nodes.layer, nodes.position, nodes.feature], 1)
