"""What a model and a coder see in one text: next tokens, features token by token, and the figures.

    seen = inspect_text(model, coder, tokenizer, "The capital of France is")
    seen.next[0].token, seen.features[3], seen.figures["fvu"]

`Inspection` is plain data: `as_dict` is its JSON, `inspect_page.py` makes the web page of it and
`inspect_terminal.py` what the command prints.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.autointerp.explanations import Explanation, explanation_note
from gemma_scope_jax.cards.labels import Label, Labels
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
STRETCH, MOST = 160, 400  # features are chosen for every stretch of tokens, so many in all
LISTED = 10  # features of a token among which those of the whole text are chosen
SHORTEST = 32  # texts are padded to a power of two at least this long: few programs to compile


@dataclasses.dataclass(frozen=True)
class NextToken:
    """A candidate for the token after the text."""

    token: str
    id: int
    probability: float
    logit: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect_text` found. T tokens, `<bos>` first; the coder sees those from `first` on."""

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
    features: list[
        list[tuple[int, float]]
    ]  # [T]: the strongest (feature, activation) of each token
    strongest: list[int]  # [S] features that stand for the text: see `strongest_features`
    heat: list[list[float]]  # [S][T] their activations
    labels: dict[int, Label]  # of every feature named above
    figures: dict[str, Any]  # `Metrics.as_dict` on this text

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; activations to four significant digits."""
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
    """One pass over a row: next tokens, top k features a token, what the coder read."""
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
    if coder.k is not None:  # what a TopK coder keeps hangs on all features
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
    """Up to `count` features that stand for each stretch of a text, by where they peak.

    values, features [T, k]: the strongest of each token. First come the strongest of every token,
    then the second strongest, so that no token goes without as long as there is room; among equals
    the larger activation.
    """
    stretches = range(0, len(values), STRETCH)
    parts = [
        _stand_for(values[t : t + STRETCH], features[t : t + STRETCH], count) for t in stretches
    ]
    return list(dict.fromkeys(f for part in parts for f in part))[:MOST]


def _stand_for(values: np.ndarray, features: np.ndarray, count: int) -> list[int]:
    rank = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.lexsort((-values.ravel(), rank.ravel()))
    chosen = list(dict.fromkeys(features.ravel()[order][values.ravel()[order] > 0].tolist()))
    chosen = chosen[:count]
    peak = {f: int(np.where(features == f, values, 0.0).max(-1).argmax()) for f in chosen}
    return sorted(chosen, key=peak.__getitem__)


def check_text(
    config: GemmaConfig, coder: SparseCoder, tokenizer: Tokenizer, text: str, *, top_k: int = 5
) -> np.ndarray:
    """The tokens of a text that can be inspected, int32 [T], before a model is loaded.

    Raises `InputError` as `inspect_text` does.
    """
    if not 1 <= top_k <= coder.width:
        raise InputError(f"top-k {top_k}: this coder has {coder.width} features")
    if not text.strip():
        raise InputError("the text is empty: there is nothing to inspect")
    ids = tokenizer.encode(text)
    if len(ids) <= coder.first:
        raise InputError(
            f"the text has {len(ids)} tokens, and this coder skips the first {coder.first}"
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
    labels: Labels | None = None,
    explanations: Mapping[int, Explanation] | None = None,
) -> Inspection:
    """Run `text` through the model and the coder.

    top_k: features listed a token; shown: features that stand for the text in the heat map, for
        each stretch of it.
    labels: the coder's label material; without it, only the logit tokens of what is shown are
        computed. explanations: of features, by number; they join the labels.
    Raises `InputError` for an empty text, one beyond the context, and a coder that does not fit
    the model.
    """
    if shown < 1:
        raise InputError(f"shown is {shown}: at least one feature must be")
    ids = check_text(model.config, coder, tokenizer, text, top_k=top_k)
    batch = _padded(ids, model.config.context)
    figures = evaluate(model, coder, batch).as_dict()  # also checks the fit
    k = min(max(top_k, LISTED), coder.width)
    next_tokens, per_token, (x, mask) = _look(model, coder, batch, k=k)
    next_ids, logits, chances = map(np.asarray, next_tokens)
    values, features = (np.asarray(a)[: len(ids)] for a in per_token)
    strongest = strongest_features(values, features, shown)
    wanted = np.array(strongest + [0] * (-len(strongest) % shown), np.int32)
    heat = np.asarray(_heat(coder, x, mask, wanted))
    following = [
        NextToken(*row)
        for row in zip(
            tokenizer.decode_tokens(next_ids), next_ids.tolist(), chances.tolist(), logits.tolist()
        )
    ]
    per_token = [
        [(f, a) for f, a in zip(fs, activations) if a > 0]
        for fs, activations in zip(features[:, :top_k].tolist(), values[:, :top_k].tolist())
    ]
    named = sorted({f for some in per_token for f, _ in some} | set(strongest))
    return Inspection(
        model=model.config.name,
        coder=public_name(coder),
        kind=coder.kind,
        layer=coder.layer,
        reads=coder.reads,
        writes=coder.writes,
        width=coder.width,
        first=coder.first,
        ids=ids.tolist(),
        tokens=tokenizer.decode_tokens(ids),
        next=following,
        features=per_token,
        strongest=strongest,
        heat=heat[: len(strongest), : len(ids)].tolist(),
        labels=_explained(_labels_of(model, coder, tokenizer, named, labels), explanations or {}),
        figures=figures,
    )


def _padded(ids: np.ndarray, context: int) -> TokenBatch:
    """One row of T' tokens, T' the next power of two or the whole context."""
    length = min(max(SHORTEST, 1 << (len(ids) - 1).bit_length()), context)
    return padded([ids], context_size=length)


def _labels_of(
    model, coder, tokenizer, features: list[int], labels: Labels | None
) -> dict[int, Label]:
    if labels is not None:
        return {f: labels[f] for f in features}
    empty = {"examples": [], "density": None}
    pairs = logit_tokens(model, coder, tokenizer, features)
    return {f: {"top_logits": t, "bottom_logits": b, **empty} for f, (t, b) in zip(features, pairs)}


def _explained(
    labels: dict[int, Label], explanations: Mapping[int, Explanation]
) -> dict[int, Label]:
    """The labels, with `explanation` (the text) and `explained` (by what, how good) where known."""
    more = lambda e: {"explanation": e["text"], "explained": explanation_note(e)}
    return {
        f: {**a, **more(explanations[f])} if f in explanations else a for f, a in labels.items()
    }
