"""Defaults by the length of a run: the published recipe for long ones, another for short ones.

The published recipe is for billions of tokens: at its rate of 7e-5, a run of a thousand updates
ends before it has learned anything. Source of the short ones: docs/methods/recipe.md.
"""

import dataclasses
from functools import partial
from typing import Any

SHORT = 10_000_000  # tokens below which a run is a short one
by_length: Any = None  # a default that `filled` replaces
# By config and field: the default of short runs, and of long ones.
BY_LENGTH: dict[str, dict[str, tuple[Any, Any]]] = {
    "TrainConfig": {"train_batch_size": (1024, 4096), "updates": (None, None)},
    "CoderConfig": {"activation": ("batch_topk", "jumprelu")},
    "LossConfig": {"per_token": (False, True), "l0_warmup": (0, 50_000), "dead_after": (200, 1000)},
    "OptimizerConfig": {
        "learning_rate": (6e-3, 7e-5),
        "warmup": (0.05, 1000),
        "decay": (0.25, 0.0),
        "b1": (0.8, 0.0),
        "clip": (2.0, 1.2),
        "threshold_rate": (0.03, 1.0),
    },
}
BETWEEN_SITES = 4.5e-3  # the learning rate of short runs with transcoders


def filled(config: Any) -> Any:
    """A `TrainConfig` with its defaults by length filled in, in all its parts."""
    long = config.tokens >= SHORT
    coders = tuple(_coder(c, long) for c in config.coders)
    optimizer = config.optimizer
    between = any(c.target != c.reads for c in coders)
    if optimizer.learning_rate is None and between and not long:
        optimizer = dataclasses.replace(optimizer, learning_rate=BETWEEN_SITES)
    config = dataclasses.replace(config, coders=coders, optimizer=_filled(optimizer, long))
    config = _filled(config, long)
    if config.updates is None:
        tokens = config.batch_size * config.context_size
        by_effect = any(c.loss.kl_weight for c in config.coders)
        once = 1 if config.store or by_effect else tokens / config.train_batch_size
        config = dataclasses.replace(config, updates=max(1, round(once)))
    return config


def counted(config: Any) -> Any:
    """A filled `TrainConfig` with warm-ups that are shares of the run as numbers of updates."""
    count = partial(_counted, updates=config.all_updates)
    coders = [dataclasses.replace(c, loss=count(c.loss, "l0_warmup")) for c in config.coders]
    optimizer = count(config.optimizer, "warmup")
    return dataclasses.replace(config, coders=tuple(coders), optimizer=optimizer)


def _filled(config: Any, long: bool) -> Any:
    """One config with its own defaults by length filled in."""
    names = BY_LENGTH[type(config).__name__]
    new = {k: v[long] for k, v in names.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **new)


def _coder(coder: Any, long: bool) -> Any:
    """A coder and its losses, filled in; its folder is not renamed."""
    loss = coder.loss
    own = coder.threshold is not None or coder.init_from or coder.init_layers or loss.kl_weight
    named = coder.name or (coder.folder if coder.activation is None else "")
    coder = dataclasses.replace(coder, name=named)
    coder = _filled(coder, long or bool(own or loss.of_thresholds))
    return dataclasses.replace(coder, loss=_filled(loss, long))


def _counted(config: Any, name: str, updates: int) -> Any:
    """The config with a field that is a share of the run's updates turned into their number."""
    value = getattr(config, name)
    return dataclasses.replace(config, **{name: int(value * updates)}) if 0 < value < 1 else config
