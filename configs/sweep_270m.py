"""Eight SAEs in one run: resid_post of four layers, two target L0s each.

    gemma-scope train configs/sweep_270m.py --out runs/sweep_270m

The model runs once for all of them, and they are trained as one batch of eight.
"""

from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from gemma_scope_jax.training.short_run import LOSS, RUN

config = TrainConfig(
    coders=tuple(
        CoderConfig(layers=layer, width=2048, target_l0=target, threshold=None, loss=LOSS)
        for layer in (5, 9, 12, 15)
        for target in (20, 60)
    ),
    **RUN,
)
