"""The codecs of a store: what goes in comes out."""

import numpy as np
import pytest

from coders import random_coder
from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction.store.codec import Entries, kept_values, turned


@pytest.mark.parametrize("width", [50, 70_000])
def test_entries_are_turned_and_back(width):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 100)
    ids = [np.sort(rng.choice(width, n, replace=False)) for n in counts]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    values = rng.random(offsets[-1], np.float32)
    entries = Entries(offsets, np.concatenate(ids).astype(np.int32), values)
    index = turned(entries, width)
    back = np.argsort(index.ids, kind="stable")
    features = np.repeat(np.arange(width), np.diff(index.offsets))
    assert (features[back] == entries.ids).all() and (index.values[back] == entries.values).all()
    assert all(np.array_equal(a, b) for a, b in zip(turned(index, 100), entries))


@pytest.mark.parametrize("scale", [2e-38, 1e-6, 1.0, 3e5, 1e38])
def test_values_keep_as_many_bits_as_float16_has(scale):
    values = np.float32(scale) * np.random.default_rng(0).uniform(1, 3, 999).astype(np.float32)
    kept = kept_values(values, "float16")
    np.testing.assert_allclose(kept, values, rtol=2**-11)
    mantissas, exponents = np.frexp(values)
    by_numpy = np.ldexp(mantissas.astype(np.float16).astype(np.float32), exponents)
    np.testing.assert_array_equal(kept, by_numpy)
    assert kept_values(values, "float32") is values


def test_what_is_active_stays_above_zero_and_what_is_not_finite_is_refused():
    extremes = np.array([1e-45, 1e-40, 3.4028e38], np.float32)
    kept = kept_values(extremes, "float16")
    assert (kept > 0).all() and np.isfinite(kept).all()
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="not finite"):
            kept_values(np.array([1.0, bad], np.float32), "float16")


CODER_INFO = CoderInfo(l0=12.0)


def test_slots_follow_the_target_l0():
    from gemma_scope_jax.coders.active_features import slots_for

    assert slots_for([random_coder(threshold=1.0, info=CODER_INFO)]) == 64
    assert slots_for([random_coder(threshold=1.0)]) == 256
