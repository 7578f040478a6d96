"""What is known about the features that an audit found, so that a reader can judge them."""

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_scope_jax.cards.known import KnownFeatures, read_known
from gemma_scope_jax.coders.directions import logit_tokens
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer

EXAMPLES, TOKENS = 3, 8  # of a feature


def evidence(
    model: Model,
    coder: SparseCoder,
    tokenizer: Tokenizer,
    contrasted: Mapping[str, Any],
    known: KnownFeatures | None = None,
) -> list[dict[str, Any]]:
    """Of each feature chosen: its figures, its explanation, the tokens that it raises and lowers,
    and texts on which it is active.

    contrasted  the JSON data of the contrast
    known       what to take explanations and texts from; default: what is beside the coder
    """
    chosen: Sequence[int] = contrasted.get("chosen", [])
    if not chosen:
        return []
    known = read_known([coder]) if known is None else known
    pairs = [(coder.layer, int(feature)) for feature in chosen]
    names, texts = known.names(pairs), known.examples(pairs, tokenizer)
    figures = {row["feature"]: row for row in contrasted["features"]}
    tokens = logit_tokens(model, coder, tokenizer, [f for _, f in pairs], k=TOKENS)
    return [
        {
            "feature": pair[1],
            "name": names.get(pair, ""),
            "figures": figures.get(pair[1]),
            "raises": list(raises),
            "lowers": list(lowers),
            "examples": [
                {"tokens": list(words), "values": [round(float(v), 2) for v in values]}
                for words, values in texts.get(pair, ())[:EXAMPLES]
            ],
        }
        for pair, (raises, lowers) in zip(pairs, tokens)
    ]
