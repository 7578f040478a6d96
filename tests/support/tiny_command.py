"""The command line with a tiny model in place of the real ones."""

import gemma_scope_jax as gs
from gemma_scope_jax import cli
from gemma_scope_jax.coders import opened
from letters import Letters


def command(*argv):
    """The exit code of `gemma-scope` with these arguments."""
    return cli.main([str(a) for a in argv])


def give_tiny(monkeypatch, model, *, names=("tiny",), tok=None, models=None):
    """The names `names` are a tiny model with a tokenizer of letters; no cache is written.

    tok: another tokenizer. models: a model for each dtype.
    """
    real = opened.model_config
    config = lambda name: model.config if name in names else real(name)
    loaded = lambda name, dtype, progress: (models or {}).get(dtype, model)
    monkeypatch.setattr(opened, "model_config", config)
    monkeypatch.setattr(opened, "load_tokenizer", lambda name: tok or Letters())
    monkeypatch.setattr(gs, "load_tokenizer", lambda name: tok or Letters())
    monkeypatch.setattr(gs, "load_model", loaded)
    monkeypatch.setattr(gs, "use_compilation_cache", lambda: None)
