"""The configs that come with the package: each is a file to copy and change."""

import shutil
from pathlib import Path

import pytest

from gemma_scope_jax.training.config_file import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def test_there_are_the_configs_that_the_readme_names():
    assert len(CONFIGS) == 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_runs_from_wherever_it_is_copied(tmp_path, path):
    copied = tmp_path / "my_config.py"
    shutil.copy(path, copied)
    found = load_config(copied)
    assert found == load_config(path) and found.coders and found.tokens >= 100_000
