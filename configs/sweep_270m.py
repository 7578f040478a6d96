"""Eight SAEs in one run: resid_post of four layers, two target L0s each.

    gemma-scope train configs/sweep_270m.py --out runs/sweep_270m

One model pass feeds all of them, and they are trained as one batch of eight.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works. A short
run needs other settings than the published recipe: see docs/methods/recipe.md.
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
