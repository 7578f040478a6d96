"""The arms of an honest sweep: a feature at several strengths, and what it must be compared with.

Features lose to prompting in every public table of steering, so a sweep of a feature alone says
little. Beside it stand the unsteered text, a random feature of the same size, the same direction at
another layer and, as far as there are words and texts for them, a prompt, the difference of means
and a trained vector.
"""

from collections.abc import Sequence

import numpy as np

from gemma_scope_jax.behaviour.steering.calibrate import CLEAN
from gemma_scope_jax.behaviour.steering.spec import Reading, adding
from gemma_scope_jax.behaviour.steering.sweep import SweepArm
from gemma_scope_jax.behaviour.steering.vectors import contrast_vector, train_vector
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model

STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7)  # norms of each token's activation
NEUTRAL_PROMPTS = (
    "I went to the window and",
    "The first thing you should know is",
    "My friend told me that",
    "In the morning we",
    "She opened the letter and",
    "There is a place where",
    "What I remember best is",
    "He could not believe that",
    "On the table there was",
    "People often say that",
)
RANDOM, OTHER_LAYER, PROMPT = "random feature", "other layer", "prompt"


def steering_arms(
    model: Model,
    coder: Coder,
    feature: int,
    *,
    strengths: Sequence[float] = STRENGTHS,
    about: str = "",
    positive: Sequence[np.ndarray] = (),
    negative: Sequence[np.ndarray] = (),
    other_layer: int | None = None,
    seed: int = 0,
) -> list[SweepArm]:
    """Arms for `sweep`: what the feature writes, added at each strength, and its baselines.

    strengths    in norms of each token's own activation, so that all directions are comparable
    about        the concept in words, for the prompt "Write about ..."; "": without this arm
    positive, negative  texts with and without the concept (ids), for the difference of means and
                 the trained vector; none: without these arms
    other_layer  where the feature's direction does not belong; default: half the model away
    seed         draws the random feature
    Raises `InputError` for features that do not exist and coders that write to several layers.
    """
    if coder.multi_layer:
        raise InputError("a sweep of a feature needs a coder that writes to one layer")
    if not 0 <= feature < coder.width:
        raise InputError(f"feature {feature}: the coder has 0 to {coder.width - 1}")
    levels = check_strengths(strengths)
    layers = model.config.layers
    far = (coder.layers[0] + layers // 2) % layers if other_layer is None else other_layer
    if not 0 <= far < layers or far == coder.layers[0]:
        raise InputError(f"other_layer {far}: another one of 0 to {layers - 1} is needed")
    other = (feature + 1 + int(np.random.default_rng(seed).integers(coder.width - 1))) % coder.width
    row = np.asarray(coder.written(0, 0, np.array([feature])), np.float32)[0]
    arms = [SweepArm(CLEAN)]
    arms += at_strengths(f"feature {feature}", Reading(feature=feature), levels, coder.first)
    arms += at_strengths(RANDOM, Reading(feature=other), levels, coder.first)
    elsewhere = Reading(vector=row, layer=far, site=coder.writes)
    arms += at_strengths(OTHER_LAYER, elsewhere, levels, coder.first)
    if len(positive) or len(negative):
        place = (coder.writes, coder.layers[0])
        for make in (contrast_vector, train_vector):
            made = make(model, positive, negative, *place)
            arms += at_strengths(made.made["method"], made.reading(), levels, coder.first)
    if about.strip():
        arms.append(SweepArm(PROMPT, before=f"Write about {about.strip()}. "))
    return arms


def at_strengths(
    name: str, target: Reading, strengths: Sequence[float], first: int | None = None
) -> list[SweepArm]:
    """One group: a direction added at each strength, in norms, from position `first` on."""
    spec = lambda s: adding(target, s, first)
    return [SweepArm(f"{name} x {s:g}", spec(s), group=name, strength=s) for s in strengths]


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Distinct finite numbers, ascending. Raises `InputError`."""
    try:
        levels = sorted(float(s) for s in strengths)
    except (TypeError, ValueError):
        levels = []
    if not levels or len(set(levels)) != len(levels) or not np.isfinite(levels).all():
        raise InputError(f"strengths must be different numbers, at least one; got {strengths!r}")
    return levels
