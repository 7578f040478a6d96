"""Coders, a text and the core evaluation of the one on the other, in folders."""

import numpy as np
import pytest

from core_runs import coder, setup
from gemma_scope_jax.coders.load import load_coder
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.evaluation.core_run import evaluate_core

RUNS = 3


@pytest.fixture
def runs_at_once(monkeypatch):
    """Few, so that two coders and both together take several steps a batch."""
    monkeypatch.setattr("gemma_scope_jax.evaluation.evaluate.RUNS_AT_ONCE", RUNS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("coders")
    for i in range(2):
        save_coder(coder(seed=i), root / f"sae_{i}", config_extra={"model_name": "acme/tiny"})
    return root


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Two files of documents of several lengths."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["plum", "pear", "fig", "quince", "damson", "medlar", "sloe"]
    for name in ("a.txt", "b.txt"):
        documents = [" ".join(rng.choice(words, rng.integers(2, 20))) for _ in range(12)]
        (folder / name).write_text("\n\f\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def measured(model, folders, text, tmp_path_factory):
    """Two coders and the replacement model of one of them with a transcoder, in a folder."""
    data, plan, config = setup(model, text)
    coders = [
        load_coder(folders / "sae_0"),
        coder(seed=5, layer=0, reads="mlp_in", writes="mlp_out"),
    ]
    out = str(tmp_path_factory.mktemp("out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma_scope_jax.evaluation.evaluate.RUNS_AT_ONCE", RUNS)
        results = evaluate_core(model, coders, data, plan, config, out, replacement=True)
    return out, coders, results
