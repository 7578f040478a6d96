"""The shuffled order is a bijection, and every thing comes everywhere equally often."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_jax.data.order import positions_of, shuffled_positions, shuffled_window


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_shuffled_order_is_a_bijection_of_its_seed_and_epoch(n, seed, epoch):
    order = shuffled_positions(np.arange(n), n, seed, epoch)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n))
    one = shuffled_positions(np.array([n - 1]), n, seed, epoch)
    assert one[0] == order[-1]
    assert (positions_of(order, n, seed, epoch) == np.arange(n)).all()
    if n > 20:
        assert np.any(order != shuffled_positions(np.arange(n), n, seed, epoch + 1))
        assert np.any(order != shuffled_positions(np.arange(n), n, seed + 1, epoch))


def test_every_thing_comes_at_every_place_equally_often():
    n, times = 11, 3000
    seen = np.zeros((n, n))
    for epoch in range(times):
        seen[np.arange(n), shuffled_positions(np.arange(n), n, 0, epoch)] += 1
    chi_squared = np.sum((seen - times / n) ** 2) / (times / n)
    assert chi_squared < 160  # mean (n - 1) ** 2 = 100, standard deviation 14


def test_a_huge_order_needs_no_list():
    n = 10**15
    places = shuffled_positions(np.arange(1000) * 10**9, n, 3, 0)
    assert len(set(places.tolist())) == 1000 and 0 <= places.min() <= places.max() < n
    assert (positions_of(places, n, 3, 0) == np.arange(1000) * 10**9).all()
    assert abs(np.mean(places) / n - 0.5) < 0.05


def test_the_window_shuffle_loses_nothing():
    """It looks no further than its window."""
    shuffle = lambda seed: list(shuffled_window(range(100), 10, seed, 0))
    assert sorted(shuffle(0)) == list(range(100)) and shuffle(0) == shuffle(0) != shuffle(1)
    assert all(item <= place + 10 for place, item in enumerate(shuffle(0)))
    assert shuffle(0)[:10] != list(range(10))
