"""The prompt of a circuit: one row of tokens that a model can read."""

from typing import Any

import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import check_ids, integers, refuse_text
from gemma_scope_jax.model.config import GemmaConfig

BOS = 2


def checked_prompt(config: GemmaConfig, ids: Any) -> np.ndarray:
    """The tokens [T] of one prompt that a model can read. Raises `InputError`."""
    refuse_text(ids)
    found = np.asarray(integers("ids", ids))
    if found.ndim == 2 and len(found) == 1:
        found = found[0]
    if found.ndim != 1 or found.dtype.kind not in "iu" or not found.size:
        raise InputError(f"ids must be the tokens of one prompt, int [T], not {list(found.shape)}")
    check_ids(config, found)
    if len(found) > config.context:
        raise InputError(f"{len(found)} tokens are more than the context of {config.context}")
    if len(found) > 1 and found[0] == found[1] == BOS:
        raise InputError("the prompt begins with two <bos>: encode the text once, with bos=True")
    return found
