"""A cross-layer transcoder of Gemma 3 270M, all 18 layers, with and without the affine skip.

    gemma-scope train configs/clt_270m.py --out runs/clt_270m

A feature reads mlp_in of its layer and writes to mlp_out of that layer and of all later ones.
"""

from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from gemma_scope_jax.training.short_run import LOSS, RUN

config = TrainConfig(
    coders=tuple(
        CoderConfig(
            layers=tuple(range(18)),
            reads="mlp_in",
            writes="mlp_out",
            width=256,
            target_l0=150,
            skip=skip,
            threshold=None,
            loss=LOSS,
        )
        for skip in (False, True)
    ),
    **RUN,
)
