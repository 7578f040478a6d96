"""A weakly causal crosscoder of Gemma 3 270M over the same four layers as the release's.

    gemma-scope train configs/crosscoder_270m.py --out runs/crosscoder_270m

A feature reads one of the layers and may write to that one and to all later ones; the target L0 is
over all layers of a token.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=(gs.CoderConfig(layers=(5, 9, 12, 15), width=1024, target_l0=50),),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=4_200_000,
    batch_size=4,
    context_size=512,
    buffer=65_536,
)
