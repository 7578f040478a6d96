"""SAEs on each kind of site in one run: resid_post, z and mlp_out of layer 9; and two TopK SAEs.

    gemma-scope train configs/sites_270m.py --out runs/sites_270m

`z` is the input of attention's output projection: the release calls these SAEs attn_out. A TopK
coder is saved as such, a BatchTopK coder as a JumpReLU coder with one threshold for the same L0.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works. A short
run needs other settings than the published recipe: see docs/methods/recipe.md.
"""

import gemma_scope_jax as gs

loss = gs.LossConfig(l0_weight=0.1, l0_warmup=200, per_token=False, dead_after=200)
config = gs.TrainConfig(
    coders=(
        *(
            gs.CoderConfig(
                layers=9, reads=site, width=2048, target_l0=40, threshold=None, loss=loss
            )
            for site in ("resid_post", "z", "mlp_out")
        ),
        *(
            gs.CoderConfig(layers=9, width=2048, target_l0=40, activation=kind, threshold=None)
            for kind in ("topk", "batch_topk")
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
