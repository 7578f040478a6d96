"""Eight SAEs in one run: resid_post of four layers, two target L0s each.

    gemma-scope train configs/sweep_270m.py --out runs/sweep_270m

One model pass feeds all of them, and they are trained as one batch of eight.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=tuple(
        gs.CoderConfig(layers=layer, width=2048, target_l0=target)
        for layer in (5, 9, 12, 15)
        for target in (20, 60)
    ),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=4_200_000,
    batch_size=4,
    context_size=512,
    buffer=65_536,
)
