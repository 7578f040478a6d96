"""What features write, from the weights alone: the tokens they promote, and similar features.

    logits  = unembedding @ (gain * row)      gain = 1 + w of the final norm
    similar = rows whose cosine with a row is largest, within a coder or in another one

The official notebook multiplies by w, not by 1 + w as the norm itself does, which ranks tokens
differently; `gain="notebook"` reproduces it.

Source: Gemma Scope 2 tutorial ("logit lens"); for `gain` see `model.block.rms_norm`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.coders.load import decoder_rows
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress

ROWS = 128  # decoder rows through the unembedding at a time: logits [128, V] are 134 MB
BLOCK = 1024  # rows compared with all others at a time
TO_LOGITS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
Gain = Literal["exact", "notebook"]
Features = Sequence[int] | np.ndarray


def written(coder: Coder, layer: int | None = None) -> jax.Array:
    """All that the features of a layer write [F, D]; several outputs are concatenated along D."""
    i = coder.source(layer)
    blocks = [float32(coder.decoder(i, j)) for j in range(i, len(coder.layers))]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, -1)


def check_comparable(
    coder: Coder, layer: int | None, other: Coder, other_layer: int | None
) -> None:
    """Raise `InputError` unless the features of both layers write equally many values."""
    mine = coder.d_out * (len(coder.layers) - coder.source(layer))
    theirs = other.d_out * (len(other.layers) - other.source(other_layer))
    if mine != theirs:
        raise InputError(
            f"{other.info.path or other.kind}: its features write {theirs} values, those of "
            f"{coder.info.path or coder.kind} {mine}: they cannot be compared"
        )


def to_residual(model: Model, coder: Coder, layer: int | None, features: jax.Array) -> jax.Array:
    """The directions [n, D] that features write to the final residual stream, each by itself.

    A CLT's features write to every layer from their own on, which adds up; a crosscoder's write the
    same stream at several layers, of which the last is taken. Rows at `z` pass a norm after the
    output projection, so only their direction is right.
    """
    i, last = coder.source(layer), len(coder.layers) - 1
    outputs = {"clt": range(i, last + 1), "crosscoder": [last]}.get(coder.kind, [i])
    if coder.w_dec is None:  # left on disk
        rows = sum(decoder_rows(coder, np.asarray(features), layer=i, to=j) for j in outputs)
        rows = float32(rows)
    else:
        rows = jnp.stack([coder.written(i, j, features) for j in outputs]).sum(0)
    if coder.writes == "z":
        blocks = jax.tree.map(lambda w: w[coder.layers[last]], model.params.blocks)
        out = float32(blocks.w_o).reshape(-1, model.config.d_model)
        rows = (rows @ out) * (1.0 + blocks.post_attn_norm)[None, :]
    return rows


@partial(jax.jit, static_argnames=("k", "gain", "bins"))
def _extreme_tokens(model: Model, rows, allowed, *, k: int, gain: Gain, bins: int):
    """The k largest and smallest logits of rows [n, D], their ids; range and histogram of all."""
    factor = float32(model.params.final_norm) + (1.0 if gain == "exact" else 0.0)
    directions = (rows * factor[None, :]).astype(model.dtype)
    logits = jnp.einsum(
        "nd,vd->nv", directions, model.params.unembedding, preferred_element_type=jnp.float32
    )
    top = jax.lax.top_k(jnp.where(allowed[None, :], logits, -jnp.inf), k)
    bottom = jax.lax.top_k(jnp.where(allowed[None, :], -logits, -jnp.inf), k)
    low = jnp.where(allowed[None, :], logits, jnp.inf).min(-1)
    high = jnp.where(allowed[None, :], logits, -jnp.inf).max(-1)
    if not bins:
        return top, bottom, (low, high), None
    share = (logits - low[:, None]) / jnp.maximum(high - low, 1e-30)[:, None]
    bin_of = jnp.clip((share * bins).astype(jnp.int32), 0, bins - 1)
    count = lambda b: jnp.zeros(bins, jnp.int32).at[b].add(allowed.astype(jnp.int32))
    return top, bottom, (low, high), jax.lax.map(count, bin_of)


def extreme_logits(
    model: Model,
    coder: Coder,
    tokenizer: Tokenizer,
    features: Features,
    *,
    k: int,
    gain: Gain = "exact",
    bins: int = 0,
    layer: int | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """In chunks of `features` (ints, [n]): ids and values [n, k] of the largest logits, then of the
    smallest, the range [n, 2], and with `bins` the histogram over the range, int32 [n, bins].

    The direct path only, without control tokens. The coder writes at one of `TO_LOGITS`.
    """
    special = np.ones(model.config.vocab, bool)  # True, too, for embedding rows without a token
    special[: len(tokenizer.special)] = tokenizer.special[: len(special)]
    features, allowed = np.asarray(features, np.int32), jnp.asarray(~special)
    chunk = min(ROWS, 1 << max(0, len(features) - 1).bit_length())
    for start in range(0, len(features), chunk):
        some = features[start : start + chunk]
        padded = jnp.asarray(np.pad(some, (0, chunk - len(some))))
        rows = to_residual(model, coder, layer, padded)
        top, bottom, ends, counts = _extreme_tokens(model, rows, allowed, k=k, gain=gain, bins=bins)
        found = (top[1], top[0], bottom[1], -bottom[0], jnp.stack(ends, -1))
        found += () if counts is None else (counts,)
        yield tuple(np.asarray(a)[: len(some)] for a in found)


def logit_tokens(
    model: Model,
    coder: Coder,
    tokenizer: Tokenizer,
    features: Features,
    *,
    k: int = 10,
    layer: int | None = None,
) -> list[tuple[list[str], list[str]]]:
    """The `k` tokens that each of `features` (ints, [n]) raises and lowers most, strongest first.

    layer: the model's layer that reads the features, for coders of several. Empty lists for coders
    that do not write to the residual stream.
    """
    if coder.writes not in TO_LOGITS:
        return [([], []) for _ in features]
    return [
        (tokenizer.decode_tokens(top), tokenizer.decode_tokens(bottom))
        for chunk in extreme_logits(model, coder, tokenizer, features, k=k, layer=layer)
        for top, bottom in zip(chunk[0], chunk[2])
    ]


# --- Similar rows --------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="k")
def _most_similar(rows: jax.Array, others: jax.Array, own: jax.Array, *, k: int):
    """The k largest cosines of unit rows [n, D] with `others` [G, D], except number `own` [n]."""
    cosines = jnp.einsum("nd,gd->ng", rows, others, precision=jax.lax.Precision.HIGHEST)
    same = own[:, None] == jnp.arange(others.shape[0], dtype=jnp.int32)[None, :]
    return jax.lax.top_k(jnp.where(same, -jnp.inf, cosines), k)


def unit_rows(rows: jax.Array) -> jax.Array:
    """Rows [F, D] at length 1; zeros stay zeros."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)


def most_similar(
    rows: jax.Array,
    others: jax.Array | None,
    k: int,
    what: str = "",
    features: Features | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and cosines [F, k] of the rows of `others` [G, D] nearest to each of rows [F, D];
    None: of the other rows. -1 where there are fewer than k.

    features: the rows to look up, default all; then the results are [len(features), k].
    """
    itself = others is None
    some = np.asarray(range(len(rows)) if features is None else features, np.int32)
    rows = unit_rows(rows)
    others = rows if others is None else unit_rows(others)
    F, G = len(some), len(others) - itself
    ids, cosines = np.full((F, k), -1, np.int32), np.zeros((F, k), np.float32)
    block, progress = min(BLOCK, F), Progress(F, "features", what=what)
    for start in range(0, F, max(block, 1)):
        progress.at(start)
        begin = min(start, F - block)  # the last block overlaps: one shape to compile
        here = some[begin : begin + block]
        own = here if itself else np.full_like(here, -1)
        found, numbers = _most_similar(rows[here], others, own, k=min(k, G))
        ids[begin : begin + block, : min(k, G)] = numbers
        cosines[begin : begin + block, : min(k, G)] = found
    return ids, cosines
