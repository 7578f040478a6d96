"""Eight SAEs in one run: resid_post of four layers, two target L0s each.

    gemma-scope train configs/sweep_270m.py --out runs/sweep_270m

The model runs once for all of them, and they are trained as one batch of eight.

The text is documents separated by a line holding one form feed; name your own files with
`--data.files`. A run of a few million tokens needs a higher learning rate and shorter warm-ups than
the published recipe (7e-5, 1,000 and 50,000 updates), smaller batches than its 4,096, and
thresholds that start from the data. `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=tuple(
        gs.CoderConfig(
            layers=layer,
            width=2048,
            target_l0=target,
            threshold=None,
            loss=gs.LossConfig(l0_weight=0.1, l0_warmup=200, per_token=False, dead_after=200),
        )
        for layer in (5, 9, 12, 15)
        for target in (20, 60)
    ),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=4_200_000,
    batch_size=4,
    context_size=512,
    buffer=65_536,
    train_batch_size=1024,
    updates=2,
    optimizer=gs.OptimizerConfig(learning_rate=1.5e-3, warmup=100, decay=0.25),
)
