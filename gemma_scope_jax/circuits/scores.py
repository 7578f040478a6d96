"""Why a head looks where it looks: pairs of sources that make up one of its attention scores.

    score(t, s) = scale * q(t) . k(s)

q and k come after their norms and RoPE. With the norms' scales frozen, q is linear in what the
residual stream holds at the query t, and k in what it holds at the key s. In the linear model of
the prompt both are sums over features, errors and tokens, and constants:

    score = sum over a, b of scale * q_a . k_b, and the terms with a constant on either side

The matrix of all pairs has the rank of a head's width, so its largest entries are found without it.

Source: Kamath et al. 2025, Tracing Attention Computation Through Feature Interactions (QK
attributions); there without Gemma's norms of queries and keys.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.attribute import ROWS, Search, checked_prompt
from gemma_scope_jax.circuits.candidates import MOST
from gemma_scope_jax.circuits.graph import Nodes
from gemma_scope_jax.circuits.linear import Frozen, dot, entry, pattern_of
from gemma_scope_jax.circuits.sources import Prompt, check_coders, read_prompt
from gemma_scope_jax.circuits.targets import Resolved, Resolver
from gemma_scope_jax.coders.coder import Coder, float32
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.block import rope_tables
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer

PAIRS = 2048  # sources of one side whose pairs are formed at a time


@dataclasses.dataclass(frozen=True)
class HeadScore:
    """One attention score, before the softmax, as a sum over pairs of sources.

    layer, head, query, key  which score: two tokens of the prompt
    relative     whether it is this score less the mean score of the query, by its attention
    score        the model's own score; pairs_total + remainder
    attention    the probability that the softmax makes of it
    sources      the nodes with a part in it: features, errors and tokens
    query_part   float32 [sources]: scale * q_a . k, what each does at the query, with all that the
                 key has, constants too
    key_part     float32 [sources]: scale * q . k_b
    pairs        int64 [P, 2]: the sources at the query and at the key of the largest pairs
    pair_values  float32 [P]: scale * q_a . k_b, largest size first
    pairs_total  the sum over all pairs of sources
    remainder    the sum of all terms with a constant on either side: biases, MLPs at the first
                 positions, and features beyond `max_candidates`
    """

    layer: int
    head: int
    query: int
    key: int
    relative: bool
    score: float
    attention: float
    sources: Nodes
    query_part: np.ndarray
    key_part: np.ndarray
    pairs: np.ndarray
    pair_values: np.ndarray
    pairs_total: float
    remainder: float


@own_mesh
def head_score(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder],
    ids: Any,
    layer: int,
    head: int,
    query: int = -1,
    key: int | None = None,
    *,
    relative: bool = False,
    most_pairs: int = 50,
    max_candidates: int = MOST,
    tokenizer: Tokenizer | None = None,
) -> HeadScore:
    """The pairs of sources that make a head look from one token at another.

    coders      a transcoder for each layer, or a CLT
    ids         the prompt, int [T] or [1, T], `<bos>` first
    query, key  tokens, from the end if negative; default: the last one, and what it looks at most
    relative    explain what sets this key apart from what the query looks at on the whole: the key
                less the mean of the keys by attention. The softmax ignores what they share
    most_pairs  how many pairs are returned
    max_candidates  consider only so many active features, those of most effect on the score

    Raises `InputError` for coders that do not cover the model's MLPs, for a layer, head or token
    that is not there, and for a key that the query does not see.
    """
    c, coders = model.config, CoderSet(coders)
    check_coders(c, coders)
    whole_number("most_pairs", most_pairs, 1)
    whole_number("max_candidates", max_candidates, 1)
    for name, value, most in (("layer", layer, c.layers), ("head", head, c.heads)):
        if not 0 <= whole_number(name, value, -(2**31)) < most:
            raise InputError(f"{name} {value}: {c.name} has {name}s 0 to {most - 1}")
    ids = checked_prompt(model, ids)
    prompt = read_prompt(model, ids)
    resolver = Resolver(model, coders, prompt, tokenizer)
    query = resolver.position(query)
    seen = np.asarray(_looks(c, prompt.frozen, np.int32(layer), np.int32(head), np.int32(query)))
    key = int(np.argmax(seen)) if key is None else resolver.position(key)
    _check_seen(c, layer, query, key)

    sides = _Sides(model, prompt, ids, layer, head)
    weights = (np.arange(len(seen)) == key) - relative * seen.astype(np.float64)
    at_query = np.array([query]), np.ones(1)
    at_keys = (np.arange(len(seen)), weights) if relative else (np.array([key]), np.ones(1))
    q, k = sides.q[query], np.tensordot(weights, sides.k.astype(np.float64), 1)
    wanted = sides.marginals(at_query, at_keys, q, k.astype(np.float32))
    search = Search(model, coders, prompt, wanted, max_candidates)
    parts = [
        _parts(search, sides.stage, at, sides.vectors(side, *at))
        for side, at in (("q", at_query), ("k", at_keys))
    ]
    (of_q, constant_q), (of_k, constant_k) = parts
    nodes = search.source_nodes(
        np.arange(len(search.active)), ids, [resolver.text(token) for token in ids.tolist()]
    )
    some = np.flatnonzero(of_q.any(0) | of_k.any(0))
    of_q, of_k = of_q[:, some] * np.float32(c.query_scale), of_k[:, some]
    constant_q = constant_q * c.query_scale
    sum_q, sum_k = (a.sum(1, dtype=np.float64) for a in (of_q, of_k))
    pairs, values = largest_products(of_q, of_k, most_pairs)
    total_q, total_k = sum_q + constant_q, sum_k + constant_k
    return HeadScore(
        layer, head, query, key, bool(relative),
        score=float(c.query_scale * (q.astype(np.float64) @ k)),
        attention=float(seen[key]),
        sources=nodes[some],
        query_part=(total_k @ of_q).astype(np.float32),
        key_part=(total_q @ of_k).astype(np.float32),
        pairs=pairs,
        pair_values=values,
        pairs_total=float(sum_q @ sum_k),
        remainder=float(total_q @ constant_k + constant_q @ sum_k),
    )  # fmt: skip


def _check_seen(c: GemmaConfig, layer: int, query: int, key: int) -> None:
    if key > query:
        raise InputError(f"key {key} comes after query {query}: a token sees those before it only")
    if not c.is_global(layer) and query - key >= c.window:
        raise InputError(
            f"key {key} is out of the reach of query {query}: layer {layer} sees {c.window} tokens"
        )


def _parts(
    search: Search, stage: int, at: tuple[np.ndarray, np.ndarray], vectors: Iterator[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What every source has in each channel of one side [H, columns], and constants [H]."""
    tokens, _ = at
    effects, sums = [], []
    for vector in vectors:
        shape = vector.shape[:2]
        some = np.zeros((len(vector), search.columns), np.float32)
        rest = np.zeros((len(vector), 2), np.float32)
        where = np.broadcast_to(tokens.astype(np.int32)[None], shape)
        search.fill(some, rest, np.full(shape, stage, np.int32), where, vector)
        effects.append(some)
        sums.append(rest)
    return np.concatenate(effects), np.concatenate(sums).sum(1, dtype=np.float64)


def largest_products(
    a: np.ndarray, b: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `most` entries of a.T @ b of the largest size, and where they are: [P, 2], [P].

    a [H, n], b [H, m]. Columns are taken by their lengths, whose product bounds an entry, until no
    entry can be among the largest.
    """
    lengths = [np.linalg.norm(x, axis=0) for x in (a, b)]
    order = [np.argsort(-some, kind="stable") for some in lengths]
    (rows, columns), (high, wide) = order, (some[n] for some, n in zip(lengths, order))
    sizes, values = np.zeros(0, np.float32), np.zeros(0, np.float32)
    places, least = np.zeros((0, 2), np.int64), 0.0
    for start in range(0, len(rows), PAIRS):
        mine = rows[start : start + PAIRS]
        enough = int((high[start] * wide > least).sum())
        if not enough:
            break
        block = a[:, mine].T @ b[:, columns[:enough]]
        size = np.abs(block).reshape(-1)
        best = np.argpartition(-size, min(most, size.size) - 1)[:most]
        i, j = np.unravel_index(best, block.shape)
        places = np.concatenate([places, np.stack([mine[i], columns[j]], 1)])
        values = np.concatenate([values, block[i, j]])
        sizes = np.abs(values)
        kept = np.argsort(-sizes, kind="stable")[:most]
        places, values = places[kept], values[kept]
        least = float(sizes[kept[-1]]) if len(kept) == most else 0.0
    return places[values != 0], values[values != 0]


class _Sides:
    """Queries and keys of one head as linear functions of its layer's resid_pre.

    stage  where they begin in the linear model
    q, k   float32 [T, H]: the model's own, after their norms and RoPE
    """

    def __init__(self, model: Model, prompt: Prompt, ids: np.ndarray, layer: int, head: int):
        c, frozen = model.config, prompt.frozen
        read = run(model, ids[None], [capture("resid_pre", layer)], logits="none").reads
        size = prompt.mlp_in.shape[1]
        x = jnp.pad(read["resid_pre"][0], ((0, size - len(ids)), (0, 0)))
        found = _projections(model, frozen, np.int32(layer), np.int32(head), x)
        self.base, self.scale, own = ({s: np.asarray(v) for s, v in d.items()} for d in found)
        self.q, self.k = own["q"], own["k"]
        self.stage, self.query_scale = 2 * layer - 1, c.query_scale
        base = c.global_rope_base if c.is_global(layer) else c.local_rope_base
        divisor = c.global_rope_divisor if c.is_global(layer) else 1.0
        there = jnp.arange(size, dtype=jnp.int32)[None]
        cos, sin = (np.asarray(a)[0, :, 0] for a in rope_tables(there, c.head_dim, base, divisor))
        self.cos, self.sin = np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1)

    def vectors(self, side: str, tokens: np.ndarray, weights: np.ndarray) -> Iterator[np.ndarray]:
        """The gradients of the channels of a weighted sum of queries or keys in resid_pre at the
        `tokens`: batches [R, Q, D], together H channels."""
        base, H = self.base[side], self.base[side].shape[1]
        factor = (self.scale[side][tokens] * weights).astype(np.float32)[:, None]
        cos, sin = factor * self.cos[tokens], factor * self.sin[tokens]  # [Q, H]
        paired = np.roll(base, H // 2, 1)  # channel i turns with i + H/2
        for start in range(0, H, ROWS):
            h = slice(start, start + ROWS)
            one, two = (w[:, h].T[:, None] for w in (base, paired))
            yield one * cos[:, h].T[..., None] + two * sin[:, h].T[..., None]

    def marginals(self, at_query, at_keys, q: np.ndarray, k: np.ndarray) -> Resolved:
        """The score as a target of what is at the query, and of what is at the keys."""
        most, D = max(len(at_query[0]), len(at_keys[0])), len(self.base["q"])
        stage = np.full((2, most), self.stage, np.int32)
        position, vector = np.zeros((2, most), np.int32), np.zeros((2, most, D), np.float32)
        sides = (("q", at_query, k), ("k", at_keys, q))
        for n, (side, (tokens, weights), other) in enumerate(sides):
            position[n, : len(tokens)] = tokens
            some = zip(self.vectors(side, tokens, weights), range(0, len(other), ROWS))
            for rows, start in some:
                along = other[start : start + ROWS] * np.float32(self.query_scale)
                vector[n, : len(tokens)] += np.tensordot(along, rows, 1)
        nothing = np.zeros(2, np.float32)
        return Resolved(stage, position, vector, nothing, nothing + 1, [], [], [], [], [])


@jax.jit
def _projections(model: Model, frozen: Frozen, layer, head, x):
    """Of q and k of a head: the projection with both norms' gains [D, H]; the product of both
    norms' scales at every token [T]; and the model's own [T, H]. x: resid_pre [T, D]."""
    c, b = model.config, model.params.blocks
    kv = head // (c.heads // c.kv_heads)
    take = lambda w, i=layer, axis=0: jax.lax.dynamic_index_in_dim(w, i, axis, keepdims=False)
    scale = entry(frozen.pre_attn_scale, layer)
    gain = (1.0 + entry(b.pre_attn_norm, layer))[:, None]
    h = (float32(x) * scale[:, None] * gain.T).astype(x.dtype)
    base, scales, own = {}, {}, {}
    sides = (("q", b.w_q, b.q_norm, frozen.q, head), ("k", b.w_k, b.k_norm, frozen.k, kv))
    for side, weights, norm, given, n in sides:
        w = float32(take(take(weights), n, 1))
        base[side] = gain * w * (1.0 + float32(take(norm)))[None, :]
        wide = dot("td,dh->th", float32(h), w)
        scales[side] = scale * jax.lax.rsqrt(jnp.mean(wide * wide, -1) + c.norm_epsilon)
        own[side] = float32(take(take(given), n, 1))
    return base, scales, own


@partial(jax.jit, static_argnames="c")
def _looks(c: GemmaConfig, frozen: Frozen, layer, head, query) -> jax.Array:
    """The attention [T] of a head's query."""
    one = lambda x, axis: jnp.take(x, query[None], axis)
    p = pattern_of(c, frozen, layer, one, lambda x, axis: x)
    return p.reshape(c.heads, -1)[head]
