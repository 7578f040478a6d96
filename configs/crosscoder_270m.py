"""A weakly causal crosscoder of Gemma 3 270M over the four layers of the release's.

    gemma-scope train configs/crosscoder_270m.py --out runs/crosscoder_270m

A feature is read at one of the layers and may write to that one and to all later ones; the target
L0 counts all of a token's features.
"""

from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from gemma_scope_jax.training.short_run import LOSS, RUN

config = TrainConfig(
    coders=(
        CoderConfig(layers=(5, 9, 12, 15), width=1024, target_l0=50, threshold=None, loss=LOSS),
    ),
    **RUN,
)
