"""Densities and geometry of a dictionary."""

import numpy as np
import pytest

from assertions import close
from coders import random_coder
from core_runs import MEASURED
from gemma_scope_jax.evaluation.figures import density_histogram, frequencies
from gemma_scope_jax.evaluation.geometry import geometry


def test_density_summaries():
    density = np.array([0.0, 0.005, 0.02, 0.02, 0.5])
    found = frequencies(density)
    assert found == pytest.approx(
        {
            "frac_alive": 0.8,
            "freq_over_1_percent": 0.6,
            "freq_over_10_percent": 0.2,
            "normalized_freq_over_1_percent": 0.54 / 0.545,
            "normalized_freq_over_10_percent": 0.5 / 0.545,
        }
    )
    histogram = density_histogram(density)
    edges = histogram["log10_edges"]
    where = {
        np.searchsorted(edges, np.log10(d), side="right") - 1: k
        for d, k in ((0.005, 1), (0.02, 2), (0.5, 1))
    }
    assert {i: n for i, n in enumerate(histogram["counts"]) if n} == where
    assert histogram["never"] == 1


def test_geometry_equals_numpy(monkeypatch):
    monkeypatch.setattr("gemma_scope_jax.coders.directions.BLOCK", 24)  # 48 is no multiple of it
    c = MEASURED["skip_transcoder"]
    got = geometry(c)
    enc, dec = np.asarray(c.w_enc, np.float64).T, np.asarray(c.w_dec, np.float64)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    largest = lambda a: (unit(a) @ unit(a).T - 3 * np.eye(len(a))).max(1)
    close(got.encoder_norm, np.linalg.norm(enc, axis=1))
    close(got.decoder_norm, np.linalg.norm(dec, axis=1))
    close(got.encoder_decoder_cosine, (unit(enc) * unit(dec)).sum(1))
    close(got.max_encoder_cosine, largest(enc))
    close(got.max_decoder_cosine, largest(dec))


def test_geometry_of_several_layers():
    c = random_coder(seed=9, layers=(0, 2))
    got = geometry(c)
    rows = np.asarray(c.full_decoder(), np.float64)[0].reshape(48, -1)  # of the first layer
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    close(got.max_decoder_cosine[0], (unit @ unit.T - 3 * np.eye(48)).max(1))
    close(got.decoder_norms_by_layer, np.linalg.norm(np.asarray(c.full_decoder()), axis=-1))
