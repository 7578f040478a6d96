"""SAEs on each kind of site in one run: resid_post, z and mlp_out of layer 9; and two TopK SAEs.

    gemma-scope train configs/sites_270m.py --out runs/sites_270m

`z` is the input of attention's output projection: the release calls these SAEs attn_out. A TopK
coder is saved as such, a BatchTopK coder, the default of short runs, as a JumpReLU coder with one
threshold for the same L0.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=(
        *(
            gs.CoderConfig(layers=9, reads=site, width=2048, target_l0=40, activation="batch_topk")
            for site in ("resid_post", "z", "mlp_out")
        ),
        *(
            gs.CoderConfig(layers=9, width=2048, target_l0=40, activation=kind)
            for kind in ("topk", "jumprelu")
        ),
    ),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=4_200_000,
    batch_size=4,
    context_size=512,
    buffer=65_536,
)
