"""Which weights of two models differ, by how much, and of what rank the change is.

A full finetune moves everything a little; a merged low-rank adapter moves some matrices by a few
directions, which the singular values of the difference show.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.model.checkpoints.shapes import LAYER, TOP
from gemma_scope_jax.model.config import Model

SHARE = 0.99  # of the squared size of a change that `rank` directions hold


@dataclasses.dataclass(frozen=True)
class WeightDifference:
    """How one weight differs.

    name, layer  such as w_up, 7; layer is None for the embedding, the final norm and the head
    size      norm of the difference over the norm of base's weight
    rank      directions that hold 99% of the squared difference, of `full` at most; None for norms
    """

    name: str
    layer: int | None
    size: float
    rank: int | None
    full: int | None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def weight_differences(base: Model, other: Model) -> tuple[WeightDifference, ...]:
    """The weights that are not equal, the largest difference first."""
    found = []
    for name in TOP:
        pair = [getattr(m.params, name) for m in (base, other)]
        if name == "head" and any(head is not None for head in pair):
            pair = [m.params.unembedding for m in (base, other)]  # one may be tied
        if pair[0] is not None and pair[1] is not None:
            found.append(_difference(name, None, pair[0], pair[1]))
    for name in LAYER:
        one, two = (getattr(m.params.blocks, name) for m in (base, other))
        found += [_difference(name, layer, one[layer], two[layer]) for layer in range(len(one))]
    kept = [d for d in found if d.size > 0]
    return tuple(sorted(kept, key=lambda d: -d.size))


def _difference(name: str, layer: int | None, one: Any, two: Any) -> WeightDifference:
    inputs = one.ndim - 1 if name == "w_o" else 1
    flat = [
        a.reshape(-1) if a.ndim == 1 else a.reshape(*_sides(a.shape, inputs)) for a in (one, two)
    ]
    size = float(_size(*flat))
    if one.ndim == 1 or not size:
        return WeightDifference(name, layer, size, None, None)
    squares = np.clip(np.asarray(_squares(*flat), np.float64)[::-1], 0.0, None)
    rank = int(np.searchsorted(np.cumsum(squares), SHARE * squares.sum())) + 1
    return WeightDifference(name, layer, size, min(rank, len(squares)), len(squares))


def _sides(shape: tuple[int, ...], inputs: int) -> tuple[int, int]:
    return int(np.prod(shape[:inputs])), int(np.prod(shape[inputs:]))


@jax.jit
def _size(one: jax.Array, two: jax.Array) -> jax.Array:
    a, b = float32(one), float32(two)
    return jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(a), 1e-30)


@jax.jit
def _squares(one: jax.Array, two: jax.Array) -> jax.Array:
    """The squared singular values of the difference, ascending."""
    change = float32(two) - float32(one)
    if change.shape[0] > change.shape[1]:
        change = change.T
    product = jnp.matmul(change, change.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.eigvalsh(product)


def changed_layers(found: tuple[WeightDifference, ...], layers: int) -> tuple[int, int]:
    """The first layer with a changed weight, and the last; all of them if what lies outside the
    layers has changed."""
    if not found or any(d.layer is None for d in found):
        return 0, layers - 1
    at = [d.layer for d in found if d.layer is not None]
    return min(at), max(at)
