"""The coders that ship with the package, in one run: an SAE and a transcoder for each layer.

    gemma-scope train configs/suite_270m.py --out runs/suite_270m

The SAE stands at resid_post of layer 12, with Matryoshka prefixes and the frequency penalty; the
transcoders, affine, at all 18 layers. One model pass feeds them all, and the transcoders, being of
one shape, are trained as one batch. This is a run for a GPU: ten times the tokens of the others,
with larger batches and a lower learning rate.
"""

import dataclasses
import os

from short_run import LOSS, RUN

from gemma_scope_jax.training.recipe import CoderConfig, OptimizerConfig, TrainConfig

sae = CoderConfig(
    layers=12,
    width=4096,
    target_l0=50,
    prefixes=(256, 1024),
    threshold=None,
    # From more features on: with 50 of them from the beginning, two thirds of all come to nothing.
    loss=dataclasses.replace(LOSS, frequency_weight=0.01, l0_start=400.0, l0_warmup=6000),
)
transcoders = tuple(
    CoderConfig(
        layers=layer, reads="mlp_in", writes="mlp_out", skip=True, width=384, target_l0=20,
        threshold=None, loss=LOSS,
    )
    for layer in range(18)
)  # fmt: skip

larger = dict(
    tokens=int(os.environ.get("TOKENS", 40_000_000)),
    rows=8,
    batch=2048,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=200, decay=0.25),
    checkpoint_every=30.0,
)
config = TrainConfig(coders=(sae, *transcoders), **RUN | larger)
