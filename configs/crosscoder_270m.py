"""A weakly causal crosscoder of Gemma 3 270M over the same four layers as the release's.

    gemma-scope train configs/crosscoder_270m.py --out runs/crosscoder_270m

A feature reads one of the layers and may write to that one and to all later ones; the target L0 is
over all layers of a token.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works. A short
run needs other settings than the published recipe: see docs/methods/recipe.md.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=(
        gs.CoderConfig(
            layers=(5, 9, 12, 15),
            width=1024,
            target_l0=50,
            threshold=None,
            loss=gs.LossConfig(l0_weight=0.1, l0_warmup=200, per_token=False, dead_after=200),
        ),
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
