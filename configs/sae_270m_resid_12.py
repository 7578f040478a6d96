"""The SAE that ships with the package: Gemma 3 270M, resid_post of layer 12, 4096 features, L0 50.

    gemma-scope train configs/sae_270m_resid_12.py --out runs/sae_270m_resid_12

Four million tokens are few. A run this short needs a higher learning rate and shorter warm-ups
than the published recipe (7e-5, 1,000 and 50,000 updates), smaller batches than its 4,096, and
thresholds that start from the data. The L0 of equation (5) is the batch mean, so that one token may
use more features than another.
"""

import os

from gemma_scope_jax.training.recipe import TrainConfig

CORPUS = os.environ.get("CORPUS", "~/.cache/gemma-scope-corpus")

config = TrainConfig(
    data=(f"{CORPUS}/train/*.txt",),
    layer=12,
    width=4096,
    target_l0=50,
    tokens=4_150_000,
    batch=1024,
    updates=2,
    learning_rate=1.5e-3,
    learning_rate_warmup=100,
    learning_rate_decay=0.25,
    l0_warmup=500,
    per_token=False,
    threshold=None,
    dead_after=400,
)
