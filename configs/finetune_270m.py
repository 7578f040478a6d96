"""End-to-end finetuning of the packaged SAE by its effect on the model, equation (6) of the paper.

    gemma-scope train configs/finetune_270m.py --out runs/finetune_270m

The model runs twice for every pass, and gradients flow back through its later layers. Passes are
short, since the logits of all tokens are in memory.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

sae = gs.CoderConfig(
    layers=12,
    width=4096,
    target_l0=50,
    prefixes=(256, 1024),
    init_from="gemma-3-270m-resid-post-12-width-4k-l0-50",
    # A batch is one passage here: features may well be active on a tenth of it.
    loss=gs.LossConfig(
        l0_weight=0.1,
        l0_warmup=0,
        per_token=False,
        frequency_weight=0.0,
        dead_after=200,
        kl_weight=1.0,
    ),
)
config = gs.TrainConfig(
    coders=(sae,),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=400_000,
    batch_size=1,
    context_size=512,
    buffer=8192,
    train_batch_size=512,
    updates=1,
    optimizer=gs.OptimizerConfig(
        learning_rate=2e-4, warmup=20, decay=0.25, b1=0.0, clip=1.2, threshold_rate=1.0
    ),
)
