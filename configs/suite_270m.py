"""The SAE of configs/sae_270m.py and a transcoder for each layer, in one run.

    gemma-scope train configs/suite_270m.py --out runs/suite_270m

The packaged transcoders come from such a run; their cards have its settings. One model pass feeds
all coders, and the transcoders, which have one shape, are trained as one batch. This is a run for a
GPU: ten times the tokens of the others, with larger batches.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

sae = gs.CoderConfig(
    layers=12,
    width=4096,
    target_l0=50,
    prefixes=(256, 1024),
    # The target L0 falls from 400 over the first half of the updates: with 50 features a token from
    # the beginning, many features die.
    loss=gs.LossConfig(
        l0_weight=0.1,
        l0_start=400,
        l0_warmup=0.5,
        per_token=False,
        frequency_weight=0.01,
        dead_after=200,
    ),
)
transcoders = tuple(
    gs.CoderConfig(
        layers=layer,
        reads="mlp_in",
        writes="mlp_out",
        skip=True,
        width=384,
        target_l0=20,
        loss=gs.LossConfig(l0_weight=0.1, l0_warmup=200, per_token=False, dead_after=200),
    )
    for layer in range(18)
)
config = gs.TrainConfig(
    coders=(sae, *transcoders),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=40_000_000,
    batch_size=8,
    context_size=512,
    buffer=65_536,
    train_batch_size=2048,
    updates=2,
    optimizer=gs.OptimizerConfig(learning_rate=1e-3, warmup=200, decay=0.25),
    checkpoint_every=30.0,
)
