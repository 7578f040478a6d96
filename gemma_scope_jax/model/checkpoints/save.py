"""A model with its tokenizer as a Hugging Face folder: what was changed here is used elsewhere.

The folder is complete in itself: `gs.load_model` and `gs.load_tokenizer` read it, and so do
transformers 4 and 5, for text and chats alike.
"""

import json
import os
import re
from typing import Any

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.huggingface import SHARDS, save_huggingface
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer

# Gemma 3's published chat template for text: a system message precedes the first user's text.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set before = (messages[0]['content'] if messages[0]['content'] is string
        else messages[0]['content'][0]['text']) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set before = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (before if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{ part['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
# of another tokenizer saved in the folder before, which would be read beside ours
_OTHERS = r"tokenizer\.json|added_tokens\.json|special_tokens_map\.json|chat_template\.(jinja|json)"
_SUPERSEDED = re.compile(f"{SHARDS}|{_OTHERS}")


def save_model(model: Model, tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Write a model and its tokenizer as a Hugging Face folder: config.json, model.safetensors,
    tokenizer.model, tokenizer_config.json.

    The weights keep their dtype, and loading gives the same bits. The files get their names when
    all are complete; a model saved in `folder` before is replaced. Raises `InputError` if the
    folder cannot be written (it is unchanged then), if the tokenizer has more tokens than the
    model, and if its chat template is not Gemma's, which it does not keep.
    """
    if len(tokenizer.special) > model.config.vocab:
        count = f"{len(tokenizer.special)} tokens, but {model.config.name} has {model.config.vocab}"
        raise InputError(f"the tokenizer has {count}: it belongs to another model")
    settings = json.dumps(TOKENIZER_CONFIG, indent=2)
    files = {"tokenizer.model": tokenizer.sentencepiece, "tokenizer_config.json": settings.encode()}
    save_huggingface(model, folder, files, _SUPERSEDED)
