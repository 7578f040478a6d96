"""How near a model is to refusing, without writing an answer: the odds of how answers open.

Whether an answer refuses is one bit, and slow to get. The log-probability of typical openings of
refusals against those of helpful answers moves continuously, as in Arditi et al. 2024, and is what
mediation follows where answers are judged.
"""

from collections.abc import Sequence

import numpy as np

from gemma_scope_jax.behaviour.asking import Questions
from gemma_scope_jax.behaviour.measure import continuation_logprobs
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.intercept import Intercept
from gemma_scope_jax.model.tokenizer import Tokenizer

REFUSING = ("I'm sorry, but", "I cannot", "I can't", "I am unable", "As an AI")
HELPFUL = ("Sure, here", "Of course", "Certainly", "Here is", "Here are")
OPENINGS_ABOUT = (
    "log-odds, in nats, that the answer opens as a refusal does (such as "
    f'"{REFUSING[0]}") rather than as a helpful one (such as "{HELPFUL[0]}")'
)


def refusal_odds(
    model: Model, tokenizer: Tokenizer, asked: Questions, intercepts: Intercept | Sequence = ()
) -> np.ndarray:
    """float64 [n]: the log-odds of each item, of its last variant's prompt."""
    tails = [tokenizer.encode(text, bos=False) for text in (*REFUSING, *HELPFUL)]
    heads = [pairs[-1][0] for pairs in asked.pairs]
    sums, _ = continuation_logprobs(
        model, [h for h in heads for _ in tails], tails * len(heads), intercepts
    )
    table = sums.reshape(len(heads), len(tails))
    refusing, helpful = table[:, : len(REFUSING)], table[:, len(REFUSING) :]
    return np.logaddexp.reduce(refusing, axis=1) - np.logaddexp.reduce(helpful, axis=1)
