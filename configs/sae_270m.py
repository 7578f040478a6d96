"""One SAE of Gemma 3 270M: resid_post of layer 12, 4096 features, L0 50.

    gemma-scope train configs/sae_270m.py --out runs/sae_270m

Expect an FVU of about 0.13 on training batches after four million tokens (an hour or two on two CPU
cores, most of it the model's pass), at an L0 within a few per cent of 50.
"""

from short_run import LOSS, RUN

from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig

config = TrainConfig(
    coders=(CoderConfig(layers=12, width=4096, target_l0=50, threshold=None, loss=LOSS),), **RUN
)
