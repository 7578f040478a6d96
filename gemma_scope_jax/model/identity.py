"""Which weights these are: results on disk, and stores of activations, belong to one checkpoint.

A name does not tell: a model and what was trained from it share name, shapes and, often, norms.
"""

import hashlib
import weakref
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.model.config import Model
from gemma_scope_jax.storage.strict_json import legible

_read: dict[int, tuple[weakref.ref, str]] = {}  # by id: weights and their checksum
CHUNK = 1 << 20  # numbers of an array in host memory that are taken at a time


def checksum(weights: Any) -> str:
    """16 hexadecimal digits of every number, as float32, of a pytree of arrays, and its place.

    The same whatever the dtype they are kept in and however they are spread over devices or hosts
    (all of which must call it): sums of hashes, modulo 2^32.
    """
    found = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(weights):
        add = _on_host if isinstance(leaf, np.ndarray) else _on_device
        found.update(f"{leaf.shape} {int(add(leaf))}".encode())
    return found.hexdigest()


@jax.jit
def _on_device(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    index = [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) for axis in range(x.ndim)]
    flat = reduce(
        lambda at, axis: at * np.uint32(x.shape[axis]) + index[axis],
        range(x.ndim),
        jnp.zeros(x.shape, jnp.uint32),
    )
    return jnp.sum(_mixed(bits, flat), dtype=jnp.uint32)


def _on_host(x: np.ndarray) -> int:
    flat, total = x.reshape(-1), 0
    for start in range(0, flat.size, CHUNK):
        bits = np.ascontiguousarray(flat[start : start + CHUNK], np.float32).view(np.uint32)
        places = np.arange(start, start + len(bits), dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(bits, places).sum(dtype=np.uint32))
    return total % 2**32


def _mixed(bits: Any, place: Any) -> Any:
    """A hash, uint32, of bits and place: MurmurHash3's finaliser, in which every bit counts."""
    x = bits ^ (place * np.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def model_identity(model: Model) -> dict[str, str]:
    """Name, dtype and checksum of the weights: equal for equal models, and for no others.

    Weights are read once while they live, however often they are asked about.
    """
    params, key = model.params, id(model.params)
    read = _read.get(key)
    if read is None or read[0]() is not params:  # an id is given again when its owner is gone
        read = weakref.ref(params, lambda _: _read.pop(key, None)), checksum(params)
        _read[key] = read
    return {
        "name": legible(model.config.name),
        "dtype": str(params.embed.dtype),
        "weights": read[1],
    }
