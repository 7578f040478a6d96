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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.circuits.attribute import ROWS, GraphSearch
from gemma_scope_jax.circuits.candidates import MOST
from gemma_scope_jax.circuits.graph import Nodes
from gemma_scope_jax.circuits.interventions import power_of_two
from gemma_scope_jax.circuits.linear import Frozen, dot, entry, pattern_of
from gemma_scope_jax.circuits.neurons import graph_coders
from gemma_scope_jax.circuits.prompts import checked_prompt
from gemma_scope_jax.circuits.sources import Prompt, read_prompt
from gemma_scope_jax.circuits.tables import text_table
from gemma_scope_jax.circuits.targets import Resolved, Resolver, checked_position
from gemma_scope_jax.circuits.words import node_name
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

Against = int | Iterable[int] | Literal["mean"] | None
Terms = tuple[np.ndarray, np.ndarray]  # tokens [Q] and their weights [Q]
SHOWN = 12  # pairs in a printed score
PAIRS = 2048  # sources of one side whose pairs are formed at a time


@dataclasses.dataclass(frozen=True)
class HeadScore:
    """One attention score, before the softmax, as a sum over pairs of sources.

    layer, head, query, key  which score: two tokens of the prompt
    score        the model's own score, or its difference from others: pairs_total + remainder,
                 up to the rounding of a bfloat16 model
    attention    the probability that the softmax makes of it
    sources      the nodes with a part in it: features, errors and tokens
    query_part   float32 [sources]: scale * q_a . k, what each does at the query, with all that the
                 key has, constants too
    key_part     float32 [sources]: scale * q . k_b
    query_constant, key_constant  the same of the constants of each side: biases, what MLPs write
                 where coders were not trained, and features beyond `max_candidates`. A side's parts
                 and its constant add up to the score
    pairs        int64 [P, 2]: the sources at the query and at the key of the largest pairs
    pair_values  float32 [P]: scale * q_a . k_b, the largest first
    pairs_total  the sum over all pairs of sources, also those that are not listed
    remainder    the sum of all terms with a constant on either side
    """

    layer: int
    head: int
    query: int
    key: int
    score: float
    attention: float
    sources: Nodes
    query_part: np.ndarray
    key_part: np.ndarray
    query_constant: float
    key_constant: float
    pairs: np.ndarray
    pair_values: np.ndarray
    pairs_total: float
    remainder: float

    def __str__(self) -> str:
        name = lambda i: node_name(self.sources[int(i)])
        rows = [(name(q), name(k), f"{v:+.3g}") for (q, k), v in zip(self.pairs, self.pair_values)]
        return (
            f"head {self.layer}.{self.head} from token {self.query} to {self.key}: score "
            f"{self.score:+.3g}, attention {self.attention:.1%}; pairs {self.pairs_total:+.3g}, "
            f"remainder {self.remainder:+.3g}\n"
            + text_table(("at the query", "at the key", "score"), rows[:SHOWN])
        )


@own_mesh
def head_score(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    ids: Any,
    layer: int,
    head: int,
    *,
    query: int = -1,
    key: int | None = None,
    against: Against = None,
    most_pairs: int = 50,
    max_candidates: int = MOST,
    tokenizer: Tokenizer | None = None,
) -> HeadScore:
    """The pairs of sources that make a head look from one token at another.

    coders      a transcoder for each layer, or a CLT; None: the model's own neurons
    ids         the prompt, int [T] or [1, T], `<bos>` first
    query, key  tokens, from the end if negative; default: the last one, and what it looks at most
    against     explain why the head looks at this key rather than at others, which is all that the
                softmax depends on: the score less that of another key, or the mean of several;
                "mean": of all, by their attention
    most_pairs  how many pairs are listed
    max_candidates  consider only so many active features, those of most effect on the score

    Raises `InputError` for coders that do not cover the model's MLPs, for a layer, head or token
    that is not there, and for a key that the query does not see.
    """
    c, coders = model.config, graph_coders(model.config, coders, model)
    for name, value in (("most_pairs", most_pairs), ("max_candidates", max_candidates)):
        whole_number(name, value, 1)
    for name, value, most in (("layer", layer, c.layers), ("head", head, c.heads)):
        if not 0 <= whole_number(name, value, -(2**31)) < most:
            raise InputError(f"{name} {value}: {c.name} has {name}s 0 to {most - 1}")
    ids = checked_prompt(model.config, ids)
    prompt = read_prompt(model, ids)
    resolver = Resolver(model, coders, prompt, tokenizer)
    query = checked_position(query, len(ids))
    seen = np.asarray(_looks(c, prompt.frozen, np.int32(layer), np.int32(head), np.int32(query)))
    key = int(np.argmax(seen)) if key is None else checked_position(key, len(ids))
    weights = _weights(c, resolver, seen, (layer, query, key), against)
    sides = _Sides(model, prompt, ids, layer, head)
    at = {"q": (np.array([query]), np.ones(1)), "k": _few(weights, key)}
    own = {"q": sides.q[query], "k": np.tensordot(weights, sides.k.astype(np.float64), 1)}
    search = GraphSearch(model, coders, prompt, sides.marginals(at, own), max_candidates)
    every, texts = np.arange(len(search.active)), [resolver.text(i) for i in ids.tolist()]
    found = _explained(search, sides, at, search.source_nodes(every, ids, texts), most_pairs)
    score = c.query_scale * (own["q"].astype(np.float64) @ own["k"])
    return HeadScore(layer, head, query, key, float(score), float(seen[key]), **found)


def _weights(c: GemmaConfig, resolver: Resolver, seen, where, against: Against) -> np.ndarray:
    """The sum of keys that is explained: weights [T], 1 at the key less those it stands against."""
    layer, query, key = where
    check = lambda position: _check_seen(c, layer, query, position)
    weights = (np.arange(len(seen)) == check(key)).astype(np.float64)
    if against is None:
        return weights
    if isinstance(against, str):
        if against != "mean":
            raise InputError(f"against is a token, several, or 'mean', not {against!r}")
        return weights - seen
    several = [against] if not isinstance(against, Iterable) else list(against)
    others = [check(checked_position(other, resolver.prompt.length)) for other in several]
    if not others:
        raise InputError("against names no token: give None, 'mean', or at least one")
    np.subtract.at(weights, others, 1 / len(others))
    return weights


def _check_seen(c: GemmaConfig, layer: int, query: int, key: int) -> int:
    if key > query:
        raise InputError(f"key {key} comes after query {query}, which sees no later tokens")
    if not c.is_global(layer) and query - key >= c.window:
        raise InputError(
            f"key {key} is out of reach of query {query}: layer {layer} sees {c.window} tokens"
        )
    return key


def _few(weights: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that have weight, and their weights; of few lengths, so of few programs."""
    tokens = np.flatnonzero(weights)
    room = power_of_two(len(tokens)) - len(tokens)
    tokens = np.pad(tokens, (0, room), constant_values=key)
    return tokens, np.where(np.arange(len(tokens)) < len(tokens) - room, weights[tokens], 0.0)


def _explained(
    search: GraphSearch, sides: "_Sides", at: dict[str, Terms], nodes: Nodes, most: int
) -> dict[str, Any]:
    """The parts of a `HeadScore`."""
    (q, q0), (k, k0) = (_parts(search, sides, side, at[side]) for side in ("q", "k"))
    some = np.flatnonzero(q.any(0) | k.any(0))
    q, k, q0 = q[:, some] * np.float32(sides.query_scale), k[:, some], q0 * sides.query_scale
    pairs, values = largest_products(q, k, most)
    sum_q, sum_k = (a.sum(1, dtype=np.float64) for a in (q, k))
    return {
        "sources": nodes[some],
        "query_part": ((sum_k + k0) @ q).astype(np.float32),
        "key_part": ((sum_q + q0) @ k).astype(np.float32),
        "query_constant": float(q0 @ (sum_k + k0)),
        "key_constant": float((sum_q + q0) @ k0),
        "pairs": pairs,
        "pair_values": values,
        "pairs_total": float(sum_q @ sum_k),
        "remainder": float(q0 @ (sum_k + k0) + sum_q @ k0),
    }


def _parts(
    search: GraphSearch, sides: "_Sides", side: str, at: Terms
) -> tuple[np.ndarray, np.ndarray]:
    """What every source has in each channel of one side [H, columns], and constants [H]."""
    effects, sums = [], []
    for vector in sides.vectors(side, at):
        shape = vector.shape[:2]
        some = np.zeros((len(vector), search.columns), np.float32)
        rest = np.zeros((len(vector), 2), np.float32)
        where = np.broadcast_to(at[0].astype(np.int32)[None], shape)
        search.fill(some, rest, np.full(shape, sides.stage, np.int32), where, vector)
        effects.append(some)
        sums.append(rest)
    return np.concatenate(effects), np.concatenate(sums).sum(1, dtype=np.float64)


def largest_products(a: np.ndarray, b: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
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

    def vectors(self, side: str, at: Terms) -> Iterator[np.ndarray]:
        """The gradients in resid_pre, at tokens, of the channels of a weighted sum of queries or
        keys: batches [R, Q, D], together H channels."""
        (tokens, weights), base, H = at, self.base[side], self.base[side].shape[1]
        factor = (self.scale[side][tokens] * weights).astype(np.float32)[:, None]
        cos, sin = factor * self.cos[tokens], factor * self.sin[tokens]  # [Q, H]
        paired = np.roll(base, H // 2, 1)  # channel i turns with i + H/2
        for start in range(0, H, ROWS):
            h = slice(start, start + ROWS)
            one, two = (w[:, h].T[:, None] for w in (base, paired))
            yield one * cos[:, h].T[..., None] + two * sin[:, h].T[..., None]

    def marginals(self, at: dict[str, Terms], own: dict[str, np.ndarray]) -> Resolved:
        """The score as a target of what is at the query, and of what is at the keys."""
        shape = 2, max(len(tokens) for tokens, _ in at.values())
        position, vector = np.zeros(shape, np.int32), np.zeros((*shape, len(self.base["q"])))
        for n, (side, other) in enumerate((("q", "k"), ("k", "q"))):
            tokens = at[side][0]
            position[n, : len(tokens)] = tokens
            along = np.split(own[other] * self.query_scale, range(ROWS, len(own[other]), ROWS))
            for some, rows in zip(along, self.vectors(side, at[side])):
                vector[n, : len(tokens)] += np.tensordot(some, rows, 1)
        stage, nothing = np.full(shape, self.stage, np.int32), np.zeros(2, np.float32)
        vector = vector.astype(np.float32)
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
