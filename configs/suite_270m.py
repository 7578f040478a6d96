"""The SAE of configs/sae_270m.py and a transcoder for each layer, in one run.

    gemma-scope train configs/suite_270m.py --out runs/suite_270m

The transcoders, affine, stand at all 18 layers; the packaged ones come from such a run, their cards
have its settings. One model pass feeds all, and the transcoders, being of one shape, are trained as
one batch. This is a run for a GPU: ten times the tokens of the others, with larger batches.
"""

import os

from gemma_scope_jax.training.recipe import CoderConfig, OptimizerConfig, TrainConfig
from gemma_scope_jax.training.short_run import LOSS, RUN, SAE, falling

TOKENS, BATCH = int(os.environ.get("TOKENS", 40_000_000)), 2048
transcoders = tuple(
    CoderConfig(
        layers=layer,
        reads="mlp_in",
        writes="mlp_out",
        skip=True,
        width=384,
        target_l0=20,
        threshold=None,
        loss=LOSS,
    )
    for layer in range(18)
)

larger = dict(
    tokens=TOKENS,
    rows=8,
    batch=BATCH,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=200, decay=0.25),
    checkpoint_every=30.0,
)
config = TrainConfig(coders=(falling(SAE, TOKENS, BATCH), *transcoders), **RUN | larger)
