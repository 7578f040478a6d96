"""The command line in the test's process, on a tiny model that goes by the name "tiny"."""

from gemma_scope_jax import cli
from gemma_scope_jax.cli import shared
from gemma_scope_jax.model import tokenizer
from gemma_scope_jax.model.checkpoints import load
from letters import Letters


def give_tiny(monkeypatch, model, tok=Letters):
    """The name "tiny" is `model`, whose tokenizer `tok` makes; no cache is written."""
    real = load.model_config
    monkeypatch.setattr(load, "model_config", lambda n: model.config if n == "tiny" else real(n))
    monkeypatch.setattr(load, "load_model", lambda name, dtype, progress: model)
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda name: tok())
    monkeypatch.setattr(shared, "use_compilation_cache", lambda: None)


def command(*argv):
    return cli.main([str(a) for a in argv])
