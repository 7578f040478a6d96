"""One SAE of Gemma 3 270M: resid_post of layer 12, 4096 features, L0 50. The packaged one.

    gemma-scope train configs/sae_270m.py --out runs/sae_270m

With Matryoshka prefixes and the frequency penalty, and a target L0 that comes down over the first
half of the run: with 50 features a token from the beginning, many come to nothing. The packaged one
had TOKENS=8400000 from a $STORE of half as many, 20 minutes on two CPU cores; expect an FVU of 0.14
on training batches, an L0 within a per cent of 50, and 1 % of dead features.
"""

import dataclasses

from short_run import LOSS, RUN, TOKENS

from gemma_scope_jax.training.recipe import CoderConfig, OptimizerConfig, TrainConfig

fill = 0 if RUN["store"] else RUN["buffer"]  # tokens before the first update
half = max(0, TOKENS - fill) // RUN["batch"] // 2  # of the updates
sae = CoderConfig(
    layers=12,
    width=4096,
    target_l0=50,
    prefixes=(256, 1024),
    threshold=None,
    loss=dataclasses.replace(LOSS, frequency_weight=0.01, l0_start=400.0, l0_warmup=half),
)
config = TrainConfig(
    coders=(sae,),
    **RUN | dict(optimizer=OptimizerConfig(learning_rate=1e-3, warmup=100, decay=0.25)),
)
