"""The command line in the test's process, on a tiny model that goes by the name "tiny"."""

import gemma_scope_jax as gs
from gemma_scope_jax import cli
from gemma_scope_jax.coders import opened
from letters import Letters


def give_tiny(monkeypatch, model, tokenizer=Letters, *, names=("tiny",), models=None):
    """The names `names` are `model`, whose tokenizer `tok` makes; no cache is written.

    models: a model for each dtype, in place of the one.
    """
    real = opened.model_config
    config = lambda name: model.config if name in names else real(name)
    loaded = lambda name, dtype, progress: (models or {}).get(dtype, model)
    monkeypatch.setattr(opened, "model_config", config)
    monkeypatch.setattr(opened, "load_tokenizer", lambda name: tokenizer())
    monkeypatch.setattr(gs, "load_tokenizer", lambda name: tokenizer())
    monkeypatch.setattr(gs, "load_model", loaded)
    monkeypatch.setattr(gs, "use_compilation_cache", lambda: None)


def command(*argv):
    """The exit code of `gemma-scope` with these arguments."""
    return cli.main([str(a) for a in argv])
