"""Identifies weights: results on disk, and stores of activations, belong to one checkpoint.

A name is not enough: a model and its fine-tunes share name, shapes and, often, norms.
"""

import hashlib
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.model.config import Model
from gemma_scope_jax.storage.strict_json import legible

_read: dict[int, tuple[weakref.ref, str]] = {}  # by id: weights and their checksum
CHUNK = 1 << 20  # numbers of an array in host memory processed at a time


def checksum(weights: Any) -> str:
    """16 hexadecimal digits of every number, as float32, and its place in a pytree of arrays.

    Independent of the dtype and of how the arrays are spread over devices or hosts (all of which
    must call it): sums of hashes, modulo 2^32.
    """
    found = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(weights):
        add = _on_host if isinstance(leaf, np.ndarray) else _on_device
        found.update(f"{leaf.shape} {int(add(leaf))}".encode())
    return found.hexdigest()


@jax.jit
def _on_device(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    flat = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        flat = flat * np.uint32(size) + index
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
    """Name, dtype and checksum of the weights: equal for equal models only.

    The weights are read once while they live, however often this is called.
    """
    params, key = model.params, id(model.params)
    read = _read.get(key)
    if read is None or read[0]() is not params:  # ids are reused when their owner is gone
        read = weakref.ref(params, lambda _: _read.pop(key, None)), checksum(params)
        _read[key] = read
    name, dtype = legible(model.config.name), str(params.embed.dtype)
    return {"name": name, "dtype": dtype, "weights": read[1]}
