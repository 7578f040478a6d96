"""The model, prompt and dictionaries of the attribution goldens, drawn by numpy on both sides.

A shrunken 270M of 8 layers and a prompt longer than its window of 8. The dictionaries are so narrow
because a graph has a row and a column for every active feature.
"""

import numpy as np

from coders import random_coder
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.model.config import PRESETS, GemmaConfig, Params
from golden.weights import random_ids, random_params
from tiny import tiny

SEED, LENGTH, WIDTH = 27, 10, 6
DICTIONARIES = ("plain", "affine", "clt")
TARGETS = (17, 5, 250)  # token ids that are asked about by name


def circuit_model() -> tuple[GemmaConfig, Params, np.ndarray]:
    """The architecture, float32 numpy weights and the token ids [1, T]."""
    config = tiny(PRESETS["gemma-3-270m"])
    return config, random_params(config, SEED), random_ids(config, SEED, LENGTH)


def circuit_coders(name: str, layers: int = 8) -> list[Coder]:
    """Transcoders of every layer, "plain" or "affine" (with a skip), or one CLT.

    The threshold lets about a third of the features through.
    """
    seed = SEED + 100 * DICTIONARIES.index(name)
    shared = {"width": WIDTH, "threshold": 0.43, "reads": "mlp_in", "writes": "mlp_out"}
    if name == "clt":
        return [random_coder(seed=seed, layers=tuple(range(layers)), **shared)]
    affine = name == "affine"
    return [random_coder(seed=seed + i, layer=i, skip=affine, **shared) for i in range(layers)]
