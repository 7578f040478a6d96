"""Label material: what lets a person see at a glance what a feature is about.

For each feature: the tokens its decoder row pushes up and down most (through the final norm's gain
and the unembedding), a few short snippets of text on which it is strongest, and how often it fires.
`build_labels` computes it in one pass over a text, all on the device; `labels.json.gz` beside a
coder keeps it.
"""

import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.sparse_coder import SparseCoder, float32
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.evaluate import check_fits, read_sites, text_batches
from gemma_scope_jax.evaluation.metrics import OUTLIER, median_norm
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import counted

FILES = ("labels.json.gz", "labels.json")
FORMAT = 1
BEFORE, AFTER = 11, 4  # tokens of a snippet around the one on which the feature is strongest
WINDOW = BEFORE + 1 + AFTER
ROWS = 128  # decoder rows through the unembedding at a time: logits [128, V] are 134 MB
TO_LOGITS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")

Label = dict[
    str, Any
]  # top_logits, bottom_logits: tokens; examples: {tokens, values, source}; density


# -------------------------------------------------------------------------------------------------
# Decoder rows as tokens


@partial(jax.jit, static_argnames="k")
def _extreme_tokens(model: Model, rows: jax.Array, allowed: jax.Array, *, k: int):
    """Ids [n, k] of the tokens with the largest and the smallest logits of rows [n, D]."""
    gain = 1.0 + float32(model.params.final_norm)
    directions = (rows * gain[None, :]).astype(model.dtype)
    logits = jnp.einsum(
        "nd,vd->nv", directions, model.params.embed, preferred_element_type=jnp.float32
    )
    top = jax.lax.top_k(jnp.where(allowed[None, :], logits, -jnp.inf), k)[1]
    bottom = jax.lax.top_k(jnp.where(allowed[None, :], -logits, -jnp.inf), k)[1]
    return top, bottom


@jax.jit
def _to_residual(model: Model, coder: SparseCoder, features: jax.Array) -> jax.Array:
    """The directions [n, D] that features write to the residual stream, up to positive scale."""
    rows = float32(jnp.asarray(coder.w_dec)[features])
    if coder.writes == "z":
        blocks = jax.tree.map(lambda w: w[coder.layer], model.params.blocks)
        out = float32(blocks.w_o).reshape(-1, model.config.d_model)
        rows = (rows @ out) * (1.0 + blocks.post_attn_norm)[None, :]
    return rows


def logit_tokens(
    model: Model, coder: SparseCoder, tok: Any, features: Any, *, k: int = 10
) -> list[tuple[list[str], list[str]]]:
    """The `k` tokens that each of `features` (ints, [n]) raises and lowers most, strongest first.

    The direct path only: decoder row x (1 + w) of the final norm x unembedding. Control tokens are
    left out. Empty lists for coders that do not write to the residual stream.
    """
    features = np.asarray(features, np.int32)
    if coder.writes not in TO_LOGITS or features.size == 0:
        return [([], []) for _ in features]
    special = np.zeros(model.config.vocab, bool)
    special[: len(tok.special)] = tok.special[: len(special)]
    allowed, found = jnp.asarray(~special), []
    chunk = min(ROWS, 1 << int(features.size - 1).bit_length())
    for start in range(0, len(features), chunk):
        some = features[start : start + chunk]
        padded = jnp.asarray(np.pad(some, (0, chunk - len(some))))
        rows = _to_residual(model, coder, padded)
        top, bottom = map(np.asarray, _extreme_tokens(model, rows, allowed, k=k))
        found += [
            (tok.decode_tokens(t), tok.decode_tokens(b))
            for t, b in zip(top[: len(some)], bottom[: len(some)])
        ]
    return found


# -------------------------------------------------------------------------------------------------
# Snippets


@flax.struct.dataclass
class _Best:
    """The best snippets so far, K a feature; unordered. Nothing found yet: value 0."""

    value: jax.Array  # [F, K] the activation at the snippet's strongest token
    row: jax.Array  # int32 [F, K] which row of text it is from
    tokens: jax.Array  # int32 [F, K, WINDOW], -1 outside of the document
    values: jax.Array  # [F, K, WINDOW]
    fired: jax.Array  # int32 [F]
    seen: jax.Array  # int32 scalar: tokens counted


def _nothing_yet(width: int, k: int) -> _Best:
    none = lambda *shape: jnp.zeros((width, *shape), jnp.float32)
    ids = lambda *shape: jnp.full((width, *shape), -1, jnp.int32)
    return _Best(none(k), ids(k), ids(k, WINDOW), none(k, WINDOW),
                 jnp.zeros(width, jnp.int32), jnp.int32(0))  # fmt: skip


@partial(jax.jit, donate_argnames="best")
def _update(model: Model, coder: SparseCoder, best: _Best, tokens, segments, row) -> _Best:
    """Look at one batch [B, T], whose first row of text has the number `row`."""
    x = read_sites(model, {coder.reads: (coder.layer,)}, tokens, segments)[coder.reads][0]
    mask = counted(segments, coder.first)
    norms = jnp.linalg.norm(float32(x), axis=-1).reshape(tokens.shape)
    usual = norms <= OUTLIER * median_norm(x[None], mask.reshape(-1))[0]
    rows = row + jnp.arange(tokens.shape[0], dtype=jnp.int32)
    step = lambda best, r: (_update_row(coder, best, *r), None)
    per_row = (x.reshape(*tokens.shape, -1), tokens, jnp.where(mask, segments, 0), usual, rows)
    return jax.lax.scan(step, best, per_row)[0]


def _update_row(coder: SparseCoder, best: _Best, x, tokens, documents, usual, row) -> _Best:
    """One row of text: x [T, D], tokens and documents [T] (0: a token that does not count).

    It gives a feature at most one snippet, cut at the ends of its document, and never one around a
    token of enormous norm (`usual` [T] is False): every feature is strong there.
    """
    mask = documents > 0
    f = jnp.where(mask[:, None], coder.encode(x), 0.0).T  # [F, T]
    here = jnp.where(usual[None, :], f, 0.0)
    peak, at = here.max(-1), here.argmax(-1)
    index = at[:, None] + jnp.arange(-BEFORE, AFTER + 1, dtype=jnp.int32)[None, :]
    inside = (index >= 0) & (index < tokens.shape[0])
    index = jnp.clip(index, 0, tokens.shape[0] - 1)
    inside &= documents[index] == documents[at][:, None]
    window = jnp.where(inside & (peak > 0)[:, None], tokens[index], -1)
    values = jnp.where(inside, jnp.take_along_axis(f, index, -1), 0.0)

    worst = best.value.argmin(-1)
    better = peak > best.value.min(-1)
    put = (jnp.arange(best.value.shape[1])[None, :] == worst[:, None]) & better[:, None]  # [F, K]
    return _Best(
        jnp.where(put, peak[:, None], best.value),
        jnp.where(put, row, best.row),
        jnp.where(put[..., None], window[:, None, :], best.tokens),
        jnp.where(put[..., None], values[:, None, :], best.values),
        best.fired + (f > 0).sum(-1, dtype=jnp.int32),
        best.seen + mask.sum(dtype=jnp.int32),
    )


def build_labels(
    model: Model,
    coder: SparseCoder,
    tok: Any,
    texts: Iterable[tuple[str, str]],
    *,
    examples: int = 3,
    logits: int = 10,
    length: int = 128,
    batch: int = 8,
) -> dict[str, Any]:
    """The label material of every feature of `coder`, as `write_labels` takes it.

    texts: (source, text) pairs; the source is named beside each snippet. They should be long and
        of many kinds, and their licences must let snippets be shipped with the labels.
    examples: snippets a feature, each from another row of `length` tokens; logits: tokens listed.
    Raises `InputError` if the coder does not fit the model or the texts are empty.
    """
    check_fits(model.config, coder)
    best = _nothing_yet(coder.width, examples)
    sources: list[str] = []  # of each batch
    for source, group in itertools.groupby(texts, key=lambda pair: pair[0]):
        only_texts = (text for _, text in group)
        for tokens, segments in text_batches(tok, only_texts, length=length, batch=batch):
            row = np.int32(len(sources) * batch)
            best = _update(model, coder, best, tokens, segments, row)
            sources.append(source)
    if not sources:
        raise InputError("no text to take examples from")
    best = jax.tree.map(np.asarray, best)
    tokens_of = logit_tokens(model, coder, tok, range(coder.width), k=logits)
    order = np.argsort(-best.value, axis=-1, kind="stable")
    source_of = lambda row: sources[row // batch]
    features = []
    for i, (top, bottom) in enumerate(tokens_of):
        snippets = [_snippet(best, i, j, tok, source_of) for j in order[i] if best.value[i, j] > 0]
        density = round(float(best.fired[i] / best.seen), 7)
        features.append(
            {"top_logits": top, "bottom_logits": bottom, "examples": snippets, "density": density}
        )
    return {"format": FORMAT, "tokens": int(best.seen), "features": features}


def _snippet(best: _Best, feature: int, j: int, tok: Any, source_of: Any) -> dict[str, Any]:
    ids, values = best.tokens[feature, j], best.values[feature, j]
    kept = ids >= 0
    return {
        "tokens": tok.decode_tokens(ids[kept]),
        "values": [float(f"{v:.3g}") for v in values[kept].tolist()],
        "source": source_of(best.row[feature, j]),
    }


# -------------------------------------------------------------------------------------------------
# The file


@dataclasses.dataclass(frozen=True)
class Labels:
    """The label material of a coder: `labels[feature]`."""

    features: list[Label]
    tokens: int  # how many the snippets and densities come from

    def __getitem__(self, feature: int) -> Label:
        return self.features[feature]

    def __len__(self) -> int:
        return len(self.features)


def write_labels(labels: dict[str, Any], folder: str | os.PathLike) -> Path:
    """Write what `build_labels` returned beside a coder, as labels.json.gz; returns its path."""
    text = json.dumps(labels, ensure_ascii=False, separators=(",", ":"))
    path = Path(folder) / FILES[0]
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def read_labels(folder: str | os.PathLike, width: int) -> Labels | None:
    """The label material beside a coder of `width` features; None if there is none.

    Raises `InputError` for a file that cannot be understood or is another coder's.
    """
    path = next((p for name in FILES if (p := Path(folder) / name).is_file()), None)
    if path is None:
        return None
    try:
        raw = path.read_bytes()
        content = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        features, tokens = content["features"], int(content["tokens"])
        fine = isinstance(features, list) and all(map(_is_label, features))
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); delete it or download it again"
        ) from None
    if not fine:
        raise InputError(f"{path}: not the label material of a coder; delete it")
    if len(features) != width:
        raise InputError(f"{path}: has {len(features)} features, the coder beside it {width}")
    return Labels(features, tokens)


def _is_label(label: Any) -> bool:
    """Whether this has the form of a `Label`, so that nothing later trips over it."""

    def strings(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)

    return (
        isinstance(label, dict)
        and strings(label.get("top_logits"))
        and strings(label.get("bottom_logits"))
        and isinstance(label.get("density"), (int, float))
        and isinstance(label.get("examples"), list)
        and all(
            isinstance(e, dict)
            and strings(e.get("tokens"))
            and numbers(e.get("values"))
            and len(e["tokens"]) == len(e["values"])
            and isinstance(e.get("source"), str)
            for e in label["examples"]
        )
    )
