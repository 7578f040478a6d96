"""End-to-end finetuning, equation (6) of the paper: the packaged SAE, by what it does to the model.

    gemma-scope train configs/finetune_270m.py --out runs/finetune_270m

The model runs twice on every pass, and gradients come back through its later layers. Passes are
short, since the logits of all tokens are held.
"""

import dataclasses

from gemma_scope_jax.training.recipe import OptimizerConfig, TrainConfig
from gemma_scope_jax.training.short_run import RUN, SAE

coder = dataclasses.replace(
    SAE,
    init_from="gemma-3-270m-resid-post-12-width-4k-l0-50",
    # A batch is one passage here: features that are on for a tenth of it are no fault.
    loss=dataclasses.replace(SAE.loss, kl_weight=1.0, frequency_weight=0.0, l0_warmup=0),
)
short = dict(
    store="",
    tokens=min(RUN["tokens"], 400_000),
    rows=1,
    length=512,
    updates=1,
    buffer=8192,
    batch=512,
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup=20, decay=0.25),
)
config = TrainConfig(coders=(coder,), **RUN | short)
