"""Through which attention heads an edge of a graph passes.

    found = gs.edge_heads(model, coders, graph, [(row, column)])
    found.contributions[0].sum() + found.no_head[0] == graph.effects[row, column]

A path from a source to a target passes any number of heads, in layers one above the other, or none:
so an edge splits exactly by the last head of its paths, or by their first one. What takes a given
head, whatever else it takes, is `head_flows`; at a layer that is singled out, every path takes one
head or none (`edge_heads_at`).

The split at one layer follows circuit-tracer 0.5 (attribution/head_loadings.py), which refuses
cross-layer transcoders, skips and errors: here all that has an edge can be split.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np

from gemma_scope_jax.circuits import head_paths
from gemma_scope_jax.circuits.edge_ends import EdgeEnds, checked_edges
from gemma_scope_jax.circuits.graph import Graph
from gemma_scope_jax.circuits.linear import TargetRows
from gemma_scope_jax.circuits.page import Head, node_influence, strongest_links
from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.sharding import own_mesh

By = Literal["last", "first"]
EDGES = 128  # of a device program
WALKED = 1 << 26  # numbers that the residual streams of a program's sources or targets hold
KEPT = 1 << 27  # the same where those of all layers are kept
TOLERANCE = 0.05  # of the largest effect: edges that differ by more are from another graph


@dataclasses.dataclass(frozen=True)
class EdgeHeads:
    """Edges, each split over the attention heads of all layers; it adds up to the edge.

    edges          int64 [E, 2]: row and column of the graph's effects
    by             "last": a path counts for the last head that it takes, "first": for the first
    contributions  float32 [E, L, N, T]: by layer and head, and by token: by last heads the key that
                   the head reads (it writes at the target), by first heads the query that it serves
                   (it reads at the source)
    no_head        float32 [E]: through the residual stream and skips alone
    position       int32 [E]: the source's token
    """

    edges: np.ndarray
    by: By
    contributions: np.ndarray
    no_head: np.ndarray
    position: np.ndarray

    def __repr__(self) -> str:
        """One line without arrays."""
        return f"EdgeHeads({len(self.edges)} edges by their {self.by} heads)"

    @property
    def total(self) -> np.ndarray:
        """The edges themselves: float32 [E]."""
        return self.contributions.sum((1, 2, 3), dtype=np.float32) + self.no_head

    def strongest(self, most: int = 8) -> dict[tuple[int, int], list[Head]]:
        """Of each edge the `most` largest parts, as `graph_page(heads=...)` shows them.

        (row, column) -> [(layer, head, key position, contribution)], the largest first; layer and
        head -1 stand for the path through no head. By first heads the key is the source's token.
        """
        whole_number("most", most, 1)
        found = {}
        for n, (edge, given) in enumerate(zip(self.edges.tolist(), self.contributions)):
            source = int(self.position[n])
            if self.by == "first":
                given = given.sum(-1, keepdims=True)
            best = np.argsort(-np.abs(given).reshape(-1), kind="stable")[:most]
            parts = [(-1, -1, source, float(self.no_head[n]))] + [
                (int(layer), int(head), int(key) if self.by == "last" else source, value)
                for layer, head, key in zip(*np.unravel_index(best, given.shape))
                if (value := float(given[layer, head, key]))
            ]
            parts.sort(key=lambda part: -abs(part[3]))
            found[tuple(edge)] = [part for part in parts[:most] if part[3]]
        return found


@dataclasses.dataclass(frozen=True)
class LayerHeads:
    """Edges, each split over the attention heads of one layer; it adds up to the edge.

    edges          int64 [E, 2]: row and column of the graph's effects
    layer          the layer
    contributions  float32 [E, N, T, T]: by head, query and key
    bypass         float32 [E]: what takes no head of this layer
    """

    edges: np.ndarray
    layer: int
    contributions: np.ndarray
    bypass: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """The edges themselves: float32 [E]."""
        return self.contributions.sum((1, 2, 3), dtype=np.float32) + self.bypass


@own_mesh
def edge_heads(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    graph: Graph,
    edges: Any,
    *,
    by: By = "last",
    targets: Any = None,
) -> EdgeHeads:
    """Split edges of a graph over (layer, head, token), `by` the last head on the way or the first.

    model, coders  those that the graph was made with
    edges    int [E, 2]: (row, column) of `graph.effects`, pruned or not
    targets  as given to `attribute`; only needed for edges to directions and sums with these

    Raises `InputError` for edges outside the graph, for graphs with merged errors, for edges of
    neurons, and where the edges do not add up to those of the graph.
    """
    if by not in get_args(By):
        raise InputError(f"edges are split by the last or the first head, not by {by!r}")
    pairs = checked_edges(graph, edges)
    ends = EdgeEnds(model, coders, graph, pairs, targets)
    c, T = model.config, ends.prompt.length
    found = np.zeros((len(pairs), c.layers, c.heads, T), np.float32)
    none = np.zeros(len(pairs), np.float32)
    most = _room(c, ends, WALKED)
    own, other = (1, 0) if by == "last" else (0, 1)
    for some, (several,) in _batches(pairs[:, [own]], (most,)):
        shared = np.searchsorted(several, pairs[some, own])
        which = np.pad(shared, (0, EDGES - len(shared))).astype(np.int32)
        lone = pairs[some, other]
        room = _filled(len(several), most)
        if by == "last":
            given = ends.writers(several, room), which, ends.rows(lone, EDGES)
            parts, none_of = head_paths.by_last_head(*ends.linear, *given)
        else:
            given = ends.writers(lone, EDGES), which, ends.rows(several, room)
            parts, none_of = head_paths.by_first_head(*ends.linear, *given)
        found[some] = np.asarray(parts).swapaxes(0, 1)[: len(some), ..., :T]
        none[some] = np.asarray(none_of)[: len(some)]
    position = graph.sources.position[pairs[:, 1]]
    made = EdgeHeads(pairs, by, found, none, position)
    _check_total(graph, made.edges, made.total)
    return made


@own_mesh
def head_flows(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    graph: Graph,
    edges: Any,
    *,
    targets: Any = None,
) -> np.ndarray:
    """All of each edge that takes a head: float32 [E, L, N].

    That is the edge, less the edge with this head's frozen pattern set to zero. A path that takes
    several heads counts for each, so that flows do not add up to the edge. Arguments and errors are
    those of `edge_heads`.
    """
    pairs = checked_edges(graph, edges)
    ends = EdgeEnds(model, coders, graph, pairs, targets)
    found = np.zeros((len(pairs), model.config.layers, model.config.heads), np.float32)
    total = np.zeros(len(pairs), np.float32)
    frozen = ends.prompt.frozen
    for some, (r, a), given in _together(model.config, ends, pairs):
        xs, gs, direct = head_paths.all_paths(*ends.linear, *given)
        flows = np.asarray(head_paths.flows(model, frozen, *given, xs, gs))
        found[some] = np.moveaxis(flows[:, :, r, a], -1, 0)
        total[some] = np.asarray(direct).sum(0)[r, a]
    _check_total(graph, pairs, total)
    return found


@own_mesh
def edge_heads_at(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    graph: Graph,
    edges: Any,
    layer: int,
    *,
    targets: Any = None,
) -> LayerHeads:
    """Split edges over the heads, queries and keys of one layer, and a bypass.

    A source that writes to several layers (of a CLT) bypasses this one where it writes to it or
    higher ones. Arguments and errors are those of `edge_heads`.
    """
    c = model.config
    if not 0 <= (layer := whole_number("layer", layer, -(2**31))) < c.layers:
        raise InputError(f"layer {layer}: {c.name} has layers 0 to {c.layers - 1}")
    pairs = checked_edges(graph, edges)
    ends = EdgeEnds(model, coders, graph, pairs, targets)
    T = ends.prompt.length
    found = np.zeros((len(pairs), c.heads, T, T), np.float32)
    bypass = np.zeros(len(pairs), np.float32)
    for some, (r, a), (writers, rows) in _together(c, ends, pairs):
        # what terms below the layer get, bypasses it; sums of targets may have terms on both sides
        low = rows.stage < 2 * layer
        above = TargetRows(np.where(low, -1, rows.stage), rows.position, _only(rows.vector, ~low))
        below = TargetRows(np.where(low, rows.stage, -1), rows.position, _only(rows.vector, low))
        xs, gs, direct = head_paths.all_paths(*ends.linear, writers, above)
        past = np.asarray(direct)[layer + 1 :].sum(0)
        if below.vector.any():
            past += np.asarray(head_paths.all_paths(*ends.linear, writers, below)[2]).sum(0)
        for n, i, j in zip(some, r, a):
            given = np.int32(layer), xs[layer][:, j], gs[layer][:, i]
            parts, through = head_paths.by_heads_of(model, ends.prompt.frozen, *given)
            found[n] = np.asarray(parts)[:, :T, :T]
            bypass[n] = float(through) + past[i, j]
    made = LayerHeads(pairs, layer, found, bypass)
    _check_total(graph, pairs, made.total)
    return made


def link_heads(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    graph: Graph,
    *,
    most_links: int = 200,
    most_heads: int = 8,
    by: By = "last",
    targets: Any = None,
) -> dict[tuple[int, int], list[Head]]:
    """The heads behind the `most_links` links of a graph that carry the most influence, for
    `graph_page(heads=...)`; see `EdgeHeads.strongest` and `edge_heads`."""
    whole_number("most_links", most_links, 1)
    row, column, _ = strongest_links(graph, node_influence(graph)[1], most_links)
    edges = np.stack([row, column], 1)
    if not len(edges):
        return {}
    return edge_heads(model, coders, graph, edges, by=by, targets=targets).strongest(most_heads)


def _together(c: GemmaConfig, ends: EdgeEnds, pairs: np.ndarray) -> Iterator[Any]:
    """Batches of edges: (their numbers, their targets and sources in what follows, what the sources
    write and where the targets begin)."""
    most = _room(c, ends, KEPT // c.layers)
    for some, ids in _batches(pairs, (most, most)):
        found = [np.searchsorted(every, pairs[some, k]) for k, every in enumerate(ids)]
        room = _filled(max(map(len, ids)), most)
        yield some, found, (ends.writers(ids[1], room), ends.rows(ids[0], room))


def _only(vectors: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where[..., None], vectors, np.float32(0))


def _room(c: GemmaConfig, ends: EdgeEnds, numbers: int) -> int:
    """How many residual streams of a prompt fit into so many numbers: 1 to 32."""
    size = ends.prompt.mlp_in.shape[1] * c.d_model
    return int(np.clip(numbers // size, 1, 32))


def _filled(count: int, most: int) -> int:
    """The sources or targets that a program of `count` has room for: two sizes, two programs."""
    return min(most, 8) if count <= 8 else most


def _batches(
    keys: np.ndarray, most: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Edges in batches of at most `EDGES`, with few distinct keys [E, k] in each column.

    (their numbers, the distinct keys of each column in order); keys[:, 0] changes slowest.
    """
    order = np.lexsort(keys.T[::-1])
    batch: list[int] = []
    held: list[set[int]] = [set() for _ in most]
    for n in order.tolist():
        grown = [some | {key} for some, key in zip(held, keys[n].tolist())]
        if len(batch) == EDGES or any(len(a) > b for a, b in zip(grown, most)):
            yield np.array(batch), [np.array(sorted(some)) for some in held]
            batch, grown = [], [{key} for key in keys[n].tolist()]
        batch.append(n)
        held = grown
    yield np.array(batch), [np.array(sorted(some)) for some in held]


def _check_total(graph: Graph, edges: np.ndarray, total: np.ndarray) -> None:
    """Raise `InputError` where edges are not those of the graph; a pruned one has zeros, too."""
    want = graph.effects[edges[:, 0], edges[:, 1]]
    off = np.where(want == 0, 0, np.abs(total - want))
    if not off.max() <= TOLERANCE * np.abs(want).max():
        n = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
        raise InputError(
            f"the edge {tuple(edges[n].tolist())} is {want[n]:.4g} in the graph and {total[n]:.4g} "
            "here: give the model, coders and targets that the graph was made with"
        )
