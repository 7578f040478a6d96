"""An SAE of layer 12 of Gemma 3 270M and a transcoder for each layer: the packaged transcoders.

    gemma-scope train configs/suite_270m.py --out runs/suite_270m

One model pass feeds all coders, and the transcoders, which have one shape, are trained as one
batch. It is an hour of two CPU cores; what the coders are worth is on their cards.

Name your own text with `--data.files`; `--tokens 100000` shows in minutes that it works.
"""

import gemma_scope_jax as gs

sae = gs.CoderConfig(layers=12, width=4096, target_l0=50, prefixes=(256, 1024))
transcoders = tuple(
    gs.CoderConfig(
        layers=layer, reads="mlp_in", writes="mlp_out", skip=True, width=1024, target_l0=20
    )
    for layer in range(18)
)
config = gs.TrainConfig(
    coders=(sae, *transcoders),
    data=gs.TextData(files=("~/.cache/gemma-scope-corpus/train/*.txt",)),
    model="gemma-3-270m",
    tokens=2_600_000,
    batch_size=8,
    context_size=512,
    buffer=65_536,
)
