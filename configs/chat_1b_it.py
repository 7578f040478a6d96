"""An SAE for chats: the release's 1b coder for text, finetuned on the model's own answers.

    gemma-scope train configs/chat_1b_it.py --out runs/chat_1b_it --data.files chats.jsonl

Each record of the JSON Lines files holds "messages", [{"role": ..., "content": ...}]; the answers
should come from the model itself. Only tokens of its turns are used, from the fifth position on.
Needs the weights of google/gemma-3-1b-it and the coder from the hub.
"""

import gemma_scope_jax as gs

config = gs.TrainConfig(
    coders=(
        gs.CoderConfig(
            layers=13,
            width=16_384,
            target_l0=60,
            init_from="gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium",
            loss=gs.LossConfig(l0_warmup=0),
        ),
    ),
    data=gs.TextData(files=("chats.jsonl",), messages="messages", roles=("model",)),
    model="gemma-3-1b-it",
    first=4,
    tokens=50_000_000,
)
