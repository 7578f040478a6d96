"""A cross-layer transcoder of Gemma 3 270M, all 18 layers, with and without the affine skip.

    gemma-scope train configs/clt_270m.py --out runs/clt_270m

A feature reads mlp_in of its layer and writes to mlp_out of that layer and of all later ones.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
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
        )
        for skip in (False, True)
    ),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=4_200_000,
    batch_size=4,
    context_size=512,
    buffer=65_536,
)
