"""The codecs of a store: what goes in comes out."""

import numpy as np
import pytest

from coders import random_coder
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.extraction.store.codec import (
    Entries,
    by_feature,
    differences,
    expand,
    expand_values,
    squeeze,
    store_values,
    undo_differences,
)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<i4", "<f2", "<f4"])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_arrays_survive(dtype, size):
    array = np.random.default_rng(0).integers(0, 200, size).astype(dtype)
    assert (expand(b"".join(squeeze(array)), dtype) == array).all()


@pytest.mark.parametrize("width", [50, 70_000])
def test_entries_survive(width):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 100)
    ids = [np.sort(rng.choice(width, n, replace=False)) for n in counts]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    entries = Entries(offsets, np.concatenate(ids).astype(np.int32), rng.random(offsets[-1]))
    again = undo_differences(differences(entries.ids, offsets), offsets)
    assert (again == entries.ids).all()
    index = by_feature(entries, width)
    back = np.argsort(index.ids, kind="stable")
    features = np.repeat(np.arange(width), np.diff(index.offsets))
    assert (features[back] == entries.ids).all() and (index.values[back] == entries.values).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5, 1e20])
def test_half_floats_reach_over_eight_decades(scale):
    values = np.float32(scale) * np.logspace(-6, 0, 50, dtype=np.float32)
    stored, exponent = store_values(values, "float16")
    np.testing.assert_allclose(expand_values(stored, exponent), values, rtol=1e-3)
    tiny, exponent = store_values(np.array([scale, scale * 1e-15], np.float32), "float16")
    assert (expand_values(tiny, exponent) > 0).all()


CODER_INFO = CoderInfo(l0=12.0)


def test_slots_follow_the_target_l0():
    from gemma_scope_jax.coders.active_features import slots_for

    assert slots_for([random_coder(threshold=1.0, info=CODER_INFO)]) == 64
    assert slots_for([random_coder(threshold=1.0)]) == 256
