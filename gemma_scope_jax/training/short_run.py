"""What the configs of the 270M share: the corpus, and a recipe for runs of a few million tokens.

Such a run needs a higher learning rate and shorter warm-ups than the published recipe (7e-5, 1,000
and 50,000 updates), smaller batches than its 4,096, and thresholds that start from the data. The L0
of equation (5) is the batch mean, so that one token may use more features than another.

$CORPUS is a folder with train/*.txt, documents separated by a line holding one form feed; $STORE a
folder of stored activations to read instead; $TOKENS shortens a run: TOKENS=100000 shows in minutes
that it works.
"""

import dataclasses
import os
from typing import Any

from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, OptimizerConfig

TOKENS = int(os.environ.get("TOKENS", 4_200_000))
CORPUS = os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")

LOSS = LossConfig(l0_weight=0.1, l0_warmup=200, per_token=False, dead_after=200)

RUN: dict[str, Any] = dict(
    data=TextData(files=(f"{CORPUS}/train/*.txt",)),
    store=os.environ.get("STORE", ""),
    model="gemma-3-270m",
    tokens=TOKENS,
    rows=4,
    length=512,
    buffer=65_536,
    batch=1024,
    updates=2,
    optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup=100, decay=0.25),
)

# The packaged SAE, but for the way its target L0 comes down.
SAE = CoderConfig(
    layers=12,
    width=4096,
    target_l0=50,
    prefixes=(256, 1024),
    threshold=None,
    loss=dataclasses.replace(LOSS, frequency_weight=0.01),
)


def falling(coder: CoderConfig, tokens: int, batch: int) -> CoderConfig:
    """The coder with a target L0 that comes down from 400 over the first half of the updates.

    With 50 features a token from the beginning, many come to nothing.
    """
    first = 0 if RUN["store"] else RUN["buffer"]  # tokens before the first update
    half = max(0, tokens - first) // batch // 2
    loss = dataclasses.replace(coder.loss, l0_start=400.0, l0_warmup=half)
    return dataclasses.replace(coder, loss=loss)
