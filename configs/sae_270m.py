"""One SAE of Gemma 3 270M: resid_post of layer 12, 4096 features, L0 50. The packaged one.

    gemma-scope train configs/sae_270m.py --out runs/sae_270m

The packaged one had TOKENS=8400000 from a $STORE of half as many, 20 minutes on two CPU cores;
expect an FVU of 0.14 on training batches, an L0 within a per cent of 50, and 1 % of dead features.
"""

from gemma_scope_jax.training.recipe import OptimizerConfig, TrainConfig
from gemma_scope_jax.training.short_run import RUN, SAE, TOKENS, falling

config = TrainConfig(
    coders=(falling(SAE, TOKENS, RUN["batch"]),),
    **RUN | dict(optimizer=OptimizerConfig(learning_rate=1e-3, warmup=100, decay=0.25)),
)
