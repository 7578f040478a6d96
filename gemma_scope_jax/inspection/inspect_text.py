"""Inspects one text: next tokens, the features of each token, and the metrics.

    seen = inspect_text(model, coder, tokenizer, "The capital of France is")
    seen.next[0].token, seen.features[3], seen.figures["fvu"]

`Inspection` is plain data: `as_dict` gives its JSON, `page.py` a web page and `terminal.py` tables.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.autointerp.explanations import Explanation, explanation_note
from gemma_scope_jax.cards.labels import Label
from gemma_scope_jax.coders.coder import public_name
from gemma_scope_jax.coders.directions import logit_tokens
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.evaluate import evaluate
from gemma_scope_jax.evaluation.metrics import TOKEN_CHUNK
from gemma_scope_jax.model.batch import TokenBatch, padded
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import forward, unembed
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer

NEXT = 10  # next tokens listed
STRETCH, MOST = 160, 400  # tokens of a stretch; features of the heat map, over all stretches
LISTED = 10  # features per token from which those of the heat map are chosen
SHORTEST = 32  # texts are padded to a power of two from this on: few programs are compiled


@dataclasses.dataclass(frozen=True)
class NextToken:
    """A candidate for the token after the text."""

    token: str
    id: int
    probability: float
    logit: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect_text`. T tokens, `<bos>` first; the coder reads from `first` on."""

    model: str
    coder: str
    kind: str  # sae, transcoder or skip_transcoder
    layer: int
    reads: str
    writes: str
    width: int
    first: int
    ids: list[int]
    tokens: list[str]
    next: list[NextToken]
    features: list[list[tuple[int, float]]]  # [T]: the strongest (feature, activation) per token
    strongest: list[int]  # [S]: see `strongest_features`
    heat: list[list[float]]  # [S][T] their activations
    labels: dict[int, Label]  # of every feature above
    figures: dict[str, Any]  # `Metrics.as_dict` on this text

    def as_dict(self) -> dict[str, Any]:
        """JSON data; activations have four significant digits."""
        return {
            **dataclasses.asdict(self),
            "features": [
                [{"feature": f, "activation": _short(a)} for f, a in some] for some in self.features
            ],
            "heat": [[_short(a) for a in row] for row in self.heat],
            "labels": {str(f): label for f, label in self.labels.items()},
        }


def _short(value: float) -> float:
    return float(f"{value:.4g}") if value else 0


@partial(jax.jit, static_argnames="k")
def _look(model: Model, coder: SparseCoder, batch: TokenBatch, *, k: int):
    """One pass over a row: next tokens, top k features per token, the coder's input and mask."""
    reads = [capture(coder.reads, coder.layer), capture("resid_final")]
    out = forward(model, batch, reads, logits="none")
    last = batch.segments.sum(dtype=jnp.int32) - 1
    end = jax.lax.dynamic_slice_in_dim(out.reads["resid_final"], last, 1, axis=1)
    logits = unembed(model.config, model.params, end)[0, 0]
    best, ids = jax.lax.top_k(logits, NEXT)
    chances = jnp.exp(best - jax.nn.logsumexp(logits))

    x = out.reads[coder.reads][0]
    size = min(TOKEN_CHUNK, x.shape[0])
    strongest = lambda x: jax.lax.top_k(coder.encode(x), k)
    values, features = jax.lax.map(strongest, x.reshape(-1, size, x.shape[-1]))
    mask = batch.counted(coder.first)[0]
    values = jnp.where(mask[:, None], values.reshape(-1, k), 0.0)
    return (ids, best, chances), (values, features.reshape(-1, k)), (x, mask)


@jax.jit
def _heat(coder: SparseCoder, x: jax.Array, mask: jax.Array, features: jax.Array) -> jax.Array:
    """Activations [S, T] of `features` [S] on inputs x [T, D]; 0 outside of `mask` [T]."""
    if coder.k is not None:  # what a TopK coder keeps depends on all features
        size = min(TOKEN_CHUNK, x.shape[0])
        encode = lambda some: coder.encode(some)[:, features]
        f = jax.lax.map(encode, x.reshape(-1, size, x.shape[-1])).reshape(x.shape[0], -1)
        return jnp.where(mask[None, :], f.T, 0.0)
    some = dataclasses.replace(
        coder,
        w_enc=jnp.asarray(coder.w_enc)[:, features],
        b_enc=jnp.asarray(coder.b_enc)[features],
        threshold=jnp.asarray(coder.threshold)[features],
    )
    return jnp.where(mask[None, :], some.encode(x).T, 0.0)


def strongest_features(values: np.ndarray, features: np.ndarray, count: int) -> list[int]:
    """Up to `count` features for each stretch of a text, ordered by the position of their peaks.

    values, features [T, k]: the strongest of each token. The strongest of every token come first,
    then the second strongest, and so on, so every token gets one if there is room; among equal
    ranks the larger activation.
    """
    found: dict[int, None] = {}
    for start in range(0, len(values), STRETCH):
        v, f = values[start : start + STRETCH], features[start : start + STRETCH]
        rank = np.broadcast_to(np.arange(v.shape[1]), v.shape)
        order = np.lexsort((-v.ravel(), rank.ravel()))
        chosen = list(dict.fromkeys(f.ravel()[order][v.ravel()[order] > 0].tolist()))[:count]
        peak = {i: int(np.where(f == i, v, 0.0).max(-1).argmax()) for i in chosen}
        found |= dict.fromkeys(sorted(chosen, key=peak.__getitem__))
    return list(found)[:MOST]


def check_text(
    config: GemmaConfig, coder: SparseCoder, tokenizer: Tokenizer, text: str, *, top_k: int = 5
) -> np.ndarray:
    """The tokens of a text, int32 [T]. Raises `InputError` as `inspect_text`, without a model."""
    if not 1 <= top_k <= coder.width:
        raise InputError(f"top-k {top_k}: this coder has {coder.width} features")
    if not text.strip():
        raise InputError("the text is empty: there is nothing to inspect")
    ids = tokenizer.encode(text)
    if len(ids) <= coder.first:
        raise InputError(
            f"the text has {len(ids)} tokens; this coder skips the first {coder.first}"
        )
    if len(ids) > config.context:
        raise InputError(
            f"the text has {len(ids)} tokens, more than the context of {config.name}, "
            f"{config.context}: shorten it"
        )
    return ids


@own_mesh
def inspect_text(
    model: Model,
    coder: SparseCoder,
    tokenizer: Tokenizer,
    text: str,
    *,
    top_k: int = 5,
    shown: int = 40,
    labels: Sequence[Label] | None = None,
    explanations: Mapping[int, Explanation] | None = None,
) -> Inspection:
    """Run `text` through the model and the coder.

    top_k: features listed for each token; shown: features in the heat map for each stretch of text.
    labels: the coder's label material; without it, only logit tokens are computed.
    explanations: of features, by number; they are added to the labels.
    Raises `InputError` for an empty text, one beyond the context, and a coder that does not fit
    the model.
    """
    if shown < 1:
        raise InputError(f"shown is {shown}: show at least one feature")
    ids = check_text(model.config, coder, tokenizer, text, top_k=top_k)
    length = min(max(SHORTEST, 1 << (len(ids) - 1).bit_length()), model.config.context)
    batch = padded([ids], context_size=length)
    figures = evaluate(model, coder, batch).as_dict()  # also checks the fit
    k = min(max(top_k, LISTED), coder.width)
    next_tokens, per_token, (x, mask) = _look(model, coder, batch, k=k)
    next_ids, logits, chances = map(np.asarray, next_tokens)
    values, features = (np.asarray(a)[: len(ids)] for a in per_token)
    strongest = strongest_features(values, features, shown)
    wanted = np.array(strongest + [0] * (-len(strongest) % shown), np.int32)
    heat = np.asarray(_heat(coder, x, mask, wanted))
    columns = (a.tolist() for a in (next_ids, chances, logits))
    following = [NextToken(*row) for row in zip(tokenizer.decode_tokens(next_ids), *columns)]
    per_token = [
        [(f, a) for f, a in zip(fs, activations) if a > 0]
        for fs, activations in zip(features[:, :top_k].tolist(), values[:, :top_k].tolist())
    ]
    named = sorted({f for some in per_token for f, _ in some} | set(strongest))
    if labels is not None:
        known = {f: labels[f] for f in named}
    else:
        pairs = zip(named, logit_tokens(model, coder, tokenizer, named))
        none: dict[str, Any] = {"examples": [], "density": None}
        known = {f: {"top_logits": a, "bottom_logits": b, **none} for f, (a, b) in pairs}
    for f, e in (explanations or {}).items():
        if f in known:
            more = {"explanation": e["text"], "explained": explanation_note(e)}
            known[f] = {**known[f], **more}
    about = ("kind", "layer", "reads", "writes", "width", "first")
    return Inspection(
        model=model.config.name,
        coder=public_name(coder),
        **{key: getattr(coder, key) for key in about},
        ids=ids.tolist(),
        tokens=tokenizer.decode_tokens(ids),
        next=following,
        features=per_token,
        strongest=strongest,
        heat=heat[: len(strongest), : len(ids)].tolist(),
        labels=known,
        figures=figures,
    )
