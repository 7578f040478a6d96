"""Gemma Scope 2 as a system, in JAX: see README.md for the map of the rooms.

Everything public is importable from here; names resolve on first use, so that importing the package
costs nothing beyond jax.
"""

import importlib
from typing import Any

_PUBLIC = {
    "errors": ["InputError"],
    "model.config": ["GemmaConfig", "Model", "PRESETS", "Params", "init_params", "preset"],
    "model.batch": ["TokenBatch", "TokenLabels", "tokens"],
    "model.gemma": ["Cache", "Output", "forward", "init_cache"],
    "model.run": ["run"],
    "model.recompilation": ["RecompilationWarning"],
    "model.intercept": [
        "Intercept",
        "SITES",
        "capture",
        "fold",
        "freeze",
        "patch",
        "per_layer",
        "read",
        "steer",
        "tokenwise",
        "write",
    ],
    "model.generate": ["generate"],
    "model.sharding": ["make_mesh", "param_shardings", "shard_batch"],
    "model.tokenizer": ["Tokenizer", "load_tokenizer"],
    "model.checkpoints.load": ["load_model", "model_config"],
    "coders.sparse_coder": ["SparseCoder"],
    "coders.multi_layer_coder": ["MultiLayerCoder"],
    "coders.coder": ["Coder", "as_jump_relu"],
    "coders.coder_set": ["CoderSet"],
    "coders.masked": ["encode"],
    "coders.splice": ["clamp", "edit", "features", "replacement", "splice"],
    "coders.load": ["decoder_rows", "load_coder", "load_coders", "load_decoder"],
    "coders.release.files": ["save_coder"],
    "coders.release.catalog": ["addresses"],
    "training.train": ["train"],
    "evaluation.evaluate": ["evaluate"],
    "extraction.extract": ["extract"],
    "extraction.store.store": ["FeatureStore"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
