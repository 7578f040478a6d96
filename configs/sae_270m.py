"""One SAE of Gemma 3 270M: resid_post of layer 12, 4096 features, L0 50. The packaged one.

    gemma-scope train configs/sae_270m.py --out runs/sae_270m

The packaged SAE was trained with `--tokens 8400000 --store FOLDER`, from a store of half as many
activations, in 20 minutes on two CPU cores; expect an FVU of 0.14 on training batches, an L0 within
a per cent of 50, and 1 % of dead features.

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
config = gs.TrainConfig(
    coders=(sae,),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=4_200_000,
    batch_size=4,
    context_size=512,
    buffer=65_536,
    train_batch_size=1024,
    updates=2,
    optimizer=gs.OptimizerConfig(
        learning_rate=1e-3, warmup=100, decay=0.25, b1=0.0, clip=1.2, threshold_rate=1.0
    ),
)
