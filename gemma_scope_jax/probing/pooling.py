"""Activations and features of whole texts: one model pass, pooled on the device.

A probe needs one vector per text: over its tokens, or the vector at one of them. Texts are packed
into rows of a few lengths, so there is little padding and few programs are compiled. The pass reads
what all coders need, encodes a chunk of tokens at a time and adds it up by text, so an array
[tokens, F] never exists.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma_scope_jax.coders.coder import float32, matmul
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.evaluate import read_sites
from gemma_scope_jax.evaluation.metrics import TOKEN_CHUNK
from gemma_scope_jax.model.batch import TokenBatch, check_ids
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.progress import Report

LENGTHS = (64, 256, 1024)  # of rows; longer ones as needed
FEWEST = 16  # columns that are kept, with inactive ones if need be: ten may be chosen among them
SHORTEST = 6  # a row of the first length holds at most one text for every 6 tokens

SiteLayer = tuple[str, int]  # a site and a layer
OverTokens = Literal["mean", "max", "active"]


class PooledFeatures(NamedTuple):
    """The features of N rows, without those that are nowhere active: most of a wide coder's."""

    values: np.ndarray  # float32 [N, A]
    columns: np.ndarray  # int [A], ascending: the features' numbers


class Pooled(NamedTuple):
    """The activations of N texts, and each coder's features."""

    raw: dict[SiteLayer, np.ndarray]  # float32 [N, D] at each place that a coder reads or writes
    features: list[PooledFeatures]


def pool(
    model: Model,
    coders: Sequence[SparseCoder],
    texts: Sequence[np.ndarray],
    *,
    how: OverTokens | int = "mean",
    first: int = 1,
    where: Sequence[np.ndarray] | None = None,
    places: Sequence[SiteLayer] = (),
    lengths: Sequence[int] = LENGTHS,
    tokens: int | None = None,
    report: Report | None = None,
) -> Pooled:
    """Pooled activations and features of `texts`, int [n] each with its <bos>.

    how      over a text's tokens "mean", a feature's largest activation ("max") or the share of
             tokens where it is not zero ("active"), the mean of the raw activations in each case;
             or the index of one of the text's tokens, such as -1 for the last
    first    tokens before this position are left out (but never a text's last token), for all
             coders alike, unless one token is asked for
    where    for each text bool [n]: the tokens that stand for it, from `first` on if any is there
    places   more places where activations are needed, beside those that the coders read and write
    lengths  of the rows that texts are packed into
    tokens   of a batch; default: 2,048 on a CPU, 16,384 elsewhere

    The result takes 4 N (D + A) bytes of host memory for each coder. Raises `InputError` for a text
    longer than the model's context, and for `where` that names no token of a text.
    """
    context = model.config.context
    for number, ids in enumerate(texts):
        if len(ids) > context:
            have = f"text {number} has {len(ids)} tokens"
            raise InputError(f"{have}; the model's context is {context}")
        check_ids(model.config, np.asarray(ids), f"text {number}: ")
    if where is not None:
        check_where(where, texts)
    if isinstance(how, int):
        sizes = [len(ids) for ids in texts] if where is None else [int(m.sum()) for m in where]
        short = next((n for n, size in enumerate(sizes) if not -size <= how < size), None)
        if short is not None:
            raise InputError(f"text {short} has {sizes[short]} tokens, none at index {how}")
    tokens = tokens or batch_tokens()
    over = how if isinstance(how, str) else None
    static = {"places": tuple(sorted({*places, *places_of(coders)})), "over": over}
    raw: dict[SiteLayer, np.ndarray] = {}
    features = [_Columns(len(texts), coder.width) for coder in coders]
    done, total = 0, sum(map(len, texts))
    for which, *packed in packed_texts(texts, how, first, tokens, lengths, context, where):
        vectors, found = _pool_step(model, tuple(coders), *packed, **static)
        if not raw:
            raw = {p: np.zeros((len(texts), v.shape[1]), np.float32) for p, v in vectors.items()}
        for place, v in vectors.items():
            raw[place][which] = np.asarray(v)[: len(which)]
        for kept, f in zip(features, found):
            kept.add(which, np.asarray(f)[: len(which)])
        done += sum(len(texts[i]) for i in which)
        if report is not None:
            report(done, total)
    return Pooled(raw, [kept.joined() for kept in features])


def check_where(where: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> None:
    """Raise `InputError` unless `where` names a token of each text at least."""
    for number, (ids, some) in enumerate(zip(texts, where, strict=True)):
        if np.shape(some) != (len(ids),) or np.asarray(some).dtype != bool or not np.any(some):
            wanted = f"must be bool [{len(ids)}] with a token at least"
            raise InputError(f"text {number}: the tokens that stand for it {wanted}")


def batch_tokens() -> int:
    """How many tokens a batch of texts has."""
    return 2048 if jax.default_backend() == "cpu" else 16384


class _Columns:
    """Collects features [n, F] of some rows at a time, and keeps their active columns."""

    def __init__(self, rows: int, width: int):
        self.rows, self.active = rows, np.zeros(width, bool)
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, which: Sequence[int] | np.ndarray, f: np.ndarray) -> None:
        columns = np.flatnonzero(f.any(0))
        self.active[columns] = True
        self.parts.append((np.asarray(which), columns, f[:, columns]))

    def joined(self) -> PooledFeatures:
        inactive = np.flatnonzero(~self.active)
        self.active[inactive[: max(FEWEST - int(self.active.sum()), 0)]] = True
        columns = np.flatnonzero(self.active)
        values = np.zeros((self.rows, len(columns)), np.float32)
        while self.parts:  # each part is freed once it is copied
            which, some, f = self.parts.pop()
            values[which[:, None], np.searchsorted(columns, some)] = f
        return PooledFeatures(values, columns)


def places_of(coders: Sequence[SparseCoder]) -> set[SiteLayer]:
    """Where the coders read and write."""
    return {(site, c.layer) for c in coders for site in (c.reads, c.writes)}


def encode_rows(coder: SparseCoder, x: np.ndarray, batch: int = 1024) -> PooledFeatures:
    """encode(x [N, D]), `batch` rows at a time."""
    found = _Columns(len(x), coder.width)
    for start in range(0, len(x), batch):
        some = x[start : start + batch]
        padded = np.pad(some, ((0, batch - len(some)), (0, 0)))
        rows = np.arange(start, start + len(some))
        found.add(rows, np.asarray(_encode(coder, padded))[: len(some)])
    return found.joined()


_encode = jax.jit(SparseCoder.encode)


def packed_texts(
    texts: Sequence[np.ndarray],
    how: OverTokens | int,
    first: int,
    tokens: int,
    lengths: Sequence[int],
    context: int,
    where: Sequence[np.ndarray] | None = None,
) -> Iterator[tuple[list[int], TokenBatch, np.ndarray, np.ndarray]]:
    """The batches of all texts, as by `_batch`; several texts in a row, of `tokens` tokens each."""
    longest = max(map(len, texts))
    steps = [n for n in sorted({min(n, context) for n in lengths}) if n < longest]
    bounds = [*steps, min((n for n in sorted(lengths) if longest <= n <= context), default=longest)]
    below = 0
    for length in bounds:
        chosen = [i for i, ids in enumerate(texts) if below < len(ids) <= length]
        per_row = max(1, length // max(SHORTEST, below + 1))
        rows = packed_rows([(i, len(texts[i])) for i in chosen], length, per_row)
        B = max(1, tokens // length)
        for start in range(0, len(rows), B):
            some = rows[start : start + B]
            yield _batch(texts, some, how, first, (B, length), B * per_row, where)
        below = length


def packed_rows(sizes: list[tuple[int, int]], length: int, most: int) -> list[list[int]]:
    """Rows of texts (number, tokens): the longest first, each in the fullest row with room."""
    by_room: list[list[list[int]]] = [[] for _ in range(length + 1)]
    full: list[list[int]] = []
    for number, size in sorted(sizes, key=lambda item: -item[1]):
        room = next((r for r in range(size, length + 1) if by_room[r]), None)
        row = [] if room is None else by_room[room].pop()
        row.append(number)
        left = (length if room is None else room) - size
        (full if len(row) == most else by_room[left]).append(row)
    return full + [row for rows in by_room for row in rows]


def _batch(
    texts: Sequence[np.ndarray],
    rows: list[list[int]],
    how: OverTokens | int,
    first: int,
    shape: tuple[int, int],
    count: int,
    where: Sequence[np.ndarray] | None,
) -> tuple[list[int], TokenBatch, np.ndarray, np.ndarray]:
    """The indices of the texts in `rows`; the batch [B, T]; for each token which of them includes
    it in its mean, else `count`, int32 [B, T]; and each text's token at `how`, int32 [count], in
    the flattened batch."""
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    owner, picked = np.full(shape, count, np.int32), np.zeros(count, np.int32)
    which: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for n, i in enumerate(row, 1):
            ids = texts[i]
            stop = start + len(ids)
            tokens[r, start:stop], segments[r, start:stop] = ids, n
            own = np.arange(min(first, len(ids) - 1), len(ids))
            one = np.arange(len(ids))  # of which `how` may name one, whatever `first`
            if where is not None:
                one = np.flatnonzero(where[i])
                own = one[one >= first] if (one >= first).any() else one
            owner[r, start + own] = len(which)
            picked[len(which)] = r * shape[1] + start + one[0 if isinstance(how, str) else how]
            which.append(i)
            start = stop
    return which, TokenBatch(tokens, segments), owner, picked


@functools.partial(jax.jit, static_argnames=("places", "over"))
def _pool_step(
    model: Model,
    coders: tuple[SparseCoder, ...],
    batch: TokenBatch,
    owner: jax.Array,
    picked: jax.Array,
    *,
    places: tuple[SiteLayer, ...],
    over: OverTokens | None,
) -> tuple[dict[SiteLayer, jax.Array], tuple[jax.Array, ...]]:
    """{place: [S, D]}, ([S, F] of each coder); rows beyond the batch's texts are meaningless."""
    layers: dict[str, tuple[int, ...]] = {}
    for site, layer in places:
        layers[site] = (*layers.get(site, ()), layer)
    x = read_sites(model, layers, batch)
    at = {(s, l): float32(x[s][n]) for s, some in layers.items() for n, l in enumerate(some)}
    if over is None:
        raw = {place: a[picked] for place, a in at.items()}
        return raw, tuple(c.encode(raw[c.reads, c.layer]) for c in coders)
    owner = owner.reshape(-1)
    mine = owner[None, :] == jnp.arange(picked.shape[0], dtype=jnp.int32)[:, None]
    share = float32(mine) / float32(jnp.maximum(mine.sum(1, keepdims=True), 1))
    raw = {place: _add(share, a) for place, a in at.items()}
    return raw, tuple(_pooled_features(c, at[c.reads, c.layer], share, owner, over) for c in coders)


_add = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _pooled_features(
    coder: SparseCoder, x: jax.Array, share: jax.Array, owner: jax.Array, over: OverTokens
) -> jax.Array:
    """encode(x [N, D]) over each text [S, F], `TOKEN_CHUNK` tokens at a time; share [S, N]: of each
    token in its text's mean, owner [N]: its text, else S."""
    S, size = len(share), min(TOKEN_CHUNK, x.shape[0])
    pad = -x.shape[0] % size
    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, size, x.shape[1])
    share = jnp.pad(share, ((0, 0), (0, pad))).reshape(S, -1, size)
    owner = jnp.pad(owner, (0, pad), constant_values=S).reshape(-1, size)

    def step(total, chunk):
        x, share, owner = chunk
        f = coder.encode(x)
        if over == "max":  # activations are not negative
            return jnp.maximum(total, jax.ops.segment_max(f, owner, S)), None
        return total + _add(share, float32(f != 0) if over == "active" else f), None

    start = jnp.zeros((S, coder.width), jnp.float32)
    return jax.lax.scan(step, start, (x, jnp.moveaxis(share, 1, 0), owner))[0]


def typical_scale(x: np.ndarray) -> float:
    """The factor that brings the median norm of x [N, D] to sqrt(D). A probe's penalty then means
    the same for every model: Gemma 3's norms are a hundred times those for which the penalties of
    SAEBench were chosen."""
    norm = float(np.median(np.linalg.norm(np.asarray(x, np.float64), axis=1)))
    return x.shape[1] ** 0.5 / norm if norm > 0 else 1.0


@jax.jit
def _along(w_dec: ArrayLike, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    w_dec = float32(w_dec)
    return matmul(w_dec, directions.T), jnp.linalg.norm(w_dec, axis=1)


def along_decoder(w_dec: ArrayLike, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w_dec @ directions.T [F, C], for decoder rows w_dec [F, D] and directions [C, D], and the
    norms [F] of the rows."""
    products, norms = _along(w_dec, jnp.asarray(directions, jnp.float32))
    return np.asarray(products, np.float64), np.asarray(norms, np.float64)
