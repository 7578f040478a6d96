"""End-to-end finetuning, equation (6) of the paper: the packaged SAE, by what it does to the model.

    gemma-scope train configs/finetune_270m.py --out runs/finetune_270m

The model runs twice on every pass, and gradients come back through its later layers. Passes are
short, since the logits of all tokens are held.

The text is documents separated by a line holding one form feed; name your own files with
`--data.files`. A run of a few million tokens needs a higher learning rate and shorter warm-ups than
the published recipe (7e-5, 1,000 and 50,000 updates), smaller batches than its 4,096, and
thresholds that start from the data. `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

sae = gs.CoderConfig(
    layers=12,
    width=4096,
    target_l0=50,
    prefixes=(256, 1024),
    threshold=None,
    init_from="gemma-3-270m-resid-post-12-width-4k-l0-50",
    # A batch is one passage here: features that are on for a tenth of it are no fault.
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
    optimizer=gs.OptimizerConfig(learning_rate=2e-4, warmup=20, decay=0.25),
)
