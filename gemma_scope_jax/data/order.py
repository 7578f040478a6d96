"""A shuffled order of n things without a list of n: a keyed bijection on 0 to n - 1.

A Feistel network permutes the numbers of an even number of bits, and numbers of n or more are
permuted again (cycle walking). Position p of epoch e is thus a pure function of (seed, e, p, n):
nothing to store, and resuming costs nothing.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_ROUNDS = 8


def shuffled_positions(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The things at `positions` (integers below n, any shape) in an epoch's order, int64."""
    return _walk(positions, n, seed, epoch, back=False)


def positions_of(things: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The positions of `things` in an epoch's order, int64: the inverse of `shuffled_positions`."""
    return _walk(things, n, seed, epoch, back=True)


def _walk(values: np.ndarray, n: int, seed: int, epoch: int, back: bool) -> np.ndarray:
    """Permute until every value lies in 0 to n - 1 (cycle walking)."""
    half = max(2, (max(1, n - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    value = _feistel(np.asarray(values, np.uint64), half, keys, back)
    outside = value >= n
    while outside.any():
        value[outside] = _feistel(value[outside], half, keys, back)
        outside = value >= n
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: int, keys: np.ndarray, back: bool) -> np.ndarray:
    """A permutation of 0 to 4 ** half - 1: rounds of (left, right) -> (right, left ^ f(right)).

    The inverse, `back`, is the same with the halves swapped and the keys reversed.
    """
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    left, right = value >> shift, value & mask
    if back:
        left, right, keys = right, left, keys[::-1]
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (right << shift) | left if back else (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled_window(items: Iterable[T], window: int, seed: int, epoch: int) -> Iterator[T]:
    """All `items`, each drawn at random from the next `window`; for streams of unknown length."""
    rng, held = random.Random(f"{seed} {epoch}"), []
    for item in items:
        if len(held) < window:
            held.append(item)
            continue
        chosen = int(rng.random() * window)
        held[chosen], item = item, held[chosen]
        yield item
    while held:
        chosen = int(rng.random() * len(held))
        held[chosen], held[-1] = held[-1], held[chosen]
        yield held.pop()
