"""What benchmarks/circuits_clt.py computes: the CLT to start from, and steps of influence."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from attribution import coders_of
from graphs import random_graph

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    path = BENCHMARKS / "circuits_clt.py"
    spec = importlib.util.spec_from_file_location("circuits_clt_script", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_clt_made_of_transcoders_writes_what_they_do(script):
    coders = coders_of("affine")
    clt = script.as_clt(coders)
    x = np.random.default_rng(0).standard_normal((4, 7, 32)).astype(np.float32)
    f = np.asarray(clt.encode(x))
    want = [np.asarray(c.decode(c.encode(x[i]), x[i])) for i, c in enumerate(coders)]
    assert clt.kind == "clt" and (f > 0).any()
    np.testing.assert_allclose(clt.decode(f, x), np.stack(want), atol=1e-5)
    assert not np.asarray(clt.decoder(0, 3)).any()


def test_steps_are_the_features_that_influence_passes(script):
    """All of it through both features of a chain; half, once a token drives the answer, too."""
    graph = random_graph(0, features=2, layers=4, logits=1)
    layer = graph.sources.layer[:2]
    assert layer[0] < layer[1]
    effects = np.zeros_like(graph.effects)
    effects[0, -1], effects[1, 0], effects[2, 1] = 5.0, -3.0, 2.0
    chain = dataclasses.replace(graph, effects=effects)
    assert script.steps(chain) == pytest.approx(2)
    effects[2, -1] = -2.0
    assert script.steps(chain) == pytest.approx(1)
