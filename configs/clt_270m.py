"""A cross-layer transcoder of Gemma 3 270M, all 18 layers, with and without the affine skip.

    gemma-scope train configs/clt_270m.py --out runs/clt_270m

A feature reads mlp_in of its layer and writes to mlp_out of that layer and of all later ones.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works. A short
run needs other settings than the published recipe: see docs/methods/recipe.md.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=tuple(
        gs.CoderConfig(
            layers=tuple(range(18)),
            reads="mlp_in",
            writes="mlp_out",
            width=256,
            target_l0=150,
            skip=skip,
            threshold=None,
            loss=gs.LossConfig(l0_weight=0.1, l0_warmup=200, per_token=False, dead_after=200),
        )
        for skip in (False, True)
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
