"""An SAE on each kind of site, in one run: resid_post, z and mlp_out of layer 9; TopK ones beside.

    gemma-scope train configs/sites_270m.py --out runs/sites_270m

`z` is what the output projection of attention reads: the release calls these SAEs attn_out. A TopK
coder is saved as one, a BatchTopK coder as a JumpReLU coder with one threshold that keeps its L0.
"""

from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig
from gemma_scope_jax.training.short_run import LOSS, RUN

config = TrainConfig(
    coders=(
        *(
            CoderConfig(layers=9, reads=site, width=2048, target_l0=40, threshold=None, loss=LOSS)
            for site in ("resid_post", "z", "mlp_out")
        ),
        *(
            CoderConfig(layers=9, width=2048, target_l0=40, activation=kind, threshold=None)
            for kind in ("topk", "batch_topk")
        ),
    ),
    **RUN,
)
