"""Cards of two coders with every export, made by one command."""

import numpy as np
import pytest

from card_folders import EXPLAINED, HOSTILE, card_coder
from commands import command, give_tiny
from gemma_scope_jax.autointerp.explanations import write_explanations
from gemma_scope_jax.cards.card_files import FeatureCards
from gemma_scope_jax.coders.release.files import save_coder


@pytest.fixture(scope="session")
def made(tmp_path_factory, model):
    """One command over two coders, compared with each other, with all exports."""
    tmp = tmp_path_factory.mktemp("made")
    for name, place in {"one": {}, "two": {"layer": 2, "seed": 2}}.items():
        save_coder(card_coder(**place), tmp / name, config_extra={"model_name": "acme/tiny"})
    write_explanations(tmp / "one", "one", EXPLAINED)
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 150)]
    (tmp / "text.txt").write_text(HOSTILE + "\n\f\n" + " ".join(words), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        give_tiny(patch, model)
        assert command(
            "cards", tmp / "one", tmp / "two", "--text", tmp / "text.txt", "--tokens", 5000,
            "--context-size", 64,
            "--out", tmp / "out", "--model", "tiny", "--top", 9, "--each", 2, "--before", 14,
            "--after", 9, "--compare", tmp / "two", "--export", "saedashboard", "neuronpedia",
            "anthropic", "anthropic-json",
        ) == 0  # fmt: skip
    return tmp / "out"


@pytest.fixture(scope="session")
def cards(made):
    return FeatureCards(made / "one" / "cards")
