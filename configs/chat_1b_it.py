"""An SAE for chats from one for text: the release's 1b coder, finetuned on the model's own answers.

    gemma-scope train configs/chat_1b_it.py --out runs/chat_1b_it

$CHATS names JSON Lines files whose records hold "messages", [{"role": ..., "content": ...}]; the
answers should come from the model itself. Tokens of its turns count, and none before the fifth
position. Needs the weights of google/gemma-3-1b-it and the coder from the hub.
"""

import os

from gemma_scope_jax.data.documents import TextData
from gemma_scope_jax.training.recipe import CoderConfig, LossConfig, TrainConfig

config = TrainConfig(
    coders=(
        CoderConfig(
            layers=13,
            width=16_384,
            target_l0=60,
            init_from="gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium",
            loss=LossConfig(l0_warmup=0),
        ),
    ),
    data=TextData(
        files=(os.environ.get("CHATS", "chats.jsonl"),), messages="messages", roles=("model",)
    ),
    model="gemma-3-1b-it",
    first=4,
    tokens=50_000_000,
)
