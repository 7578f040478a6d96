"""A tokenizer with Gemma's kinds of pieces."""

import pytest

from gemma_scope_jax.model.tokenizer import load_tokenizer
from tiny_tokenizer import tiny_proto, write_model


@pytest.fixture(scope="session")
def gemma_like(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return load_tokenizer(write_model(path, tiny_proto()))
