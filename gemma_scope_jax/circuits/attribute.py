"""`attribute`: the direct effects between features, errors, tokens and logits on one prompt.

    graph = gs.attribute(model, gs.load_coders("transcoders/*"), tokenizer.encode(text))

Features beyond `max_feature_nodes` are chosen as circuit-tracer does: after some batches of rows,
the features with the most influence on the targets, through the rows known so far, come next.
"""

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gemma_scope_jax.circuits import linear
from gemma_scope_jax.circuits.candidates import MOST, candidates
from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.influence import partial_influence
from gemma_scope_jax.circuits.linear import TargetRows
from gemma_scope_jax.circuits.neurons import graph_coders
from gemma_scope_jax.circuits.prompts import checked_prompt
from gemma_scope_jax.circuits.sources import (
    Prompt,
    SlotLayout,
    encoder_rows,
    laid_out,
    read_prompt,
    what_is_written,
)
from gemma_scope_jax.circuits.targets import (
    Resolved,
    Resolver,
    Target,
    checked_targets,
    feature_vectors,
)
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.sharding import mesh_under, own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress, Report, byte_size

LOG = logging.getLogger(__name__)
ROWS = 64  # of a device at a time: more make larger products, fewer fit into a processor's cache
PIECE = 4096  # features whose encoder vectors are in memory at a time


@dataclasses.dataclass(frozen=True)
class AttributionSettings:
    """What a graph takes in; names and defaults as in circuit-tracer."""

    max_n_logits: int = 10
    """Explain at most this many of the likeliest next tokens."""
    desired_logit_prob: float = 0.95
    """Explain the fewest tokens that reach this probability together."""
    max_feature_nodes: int | None = None
    """Explain this many features, those of most influence. The default is all."""
    max_candidates: int = MOST
    """Consider this many of the active features, those with the largest total effect."""
    batch_size: int = 256
    """Explain this many features at a time, as far as the choice of the next ones goes."""
    update_interval: int = 4
    """Choose the next features after this many batches."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "desired_logit_prob" and value is not None:
                whole_number(field.name, value, 1)
        if not 0.0 < self.desired_logit_prob <= 1.0:
            share = self.desired_logit_prob
            raise InputError(f"desired_logit_prob is {share}: give a share above 0, at most 1")


Wanted = Target | int | str | Iterable[Target | int | str] | None


def check_attribution(
    config: GemmaConfig,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    ids: Any,
    targets: Wanted = None,
    *,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> tuple[CoderSet, np.ndarray, list[Target] | None, AttributionSettings]:
    """The arguments of `attribute`, checked without the model's weights. Raises `InputError`."""
    coders, how = graph_coders(config, coders), AttributionSettings(**settings)
    ids = checked_prompt(config, ids)
    return coders, ids, checked_targets(targets, config, coders, len(ids), tokenizer), how


@own_mesh
def attribute(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder] | None,
    ids: Any,
    targets: Wanted = None,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Report | None = None,
    **settings: Any,
) -> Graph:
    """The attribution graph of a prompt.

    coders     a transcoder for each layer, or a CLT; None: the model's own neurons, see
               `mlp_neurons`
    ids        the prompt, int [T] or [1, T], `<bos>` first: as the model shall see it
    targets    tokens (ids or texts) or `Target`s; default: the likeliest next tokens
    tokenizer  for texts of tokens, in targets and in the graph
    progress   called with (features done, features to do); default: a line on stderr
    settings   fields of `AttributionSettings`: which tokens, how many features

    Raises `InputError` for coders that do not cover the model's MLPs, and for prompts and targets
    that cannot be.
    """
    begin = time.perf_counter()
    given = {"tokenizer": tokenizer, **settings}
    coders = graph_coders(model.config, coders, model)
    coders, ids, asked, how = check_attribution(model.config, coders, ids, targets, **given)
    prompt = read_prompt(model, ids)
    resolver = Resolver(model, coders, prompt, tokenizer)
    if asked is None:
        asked = resolver.likely(how.max_n_logits, how.desired_logit_prob)
    search = GraphSearch(model, coders, prompt, resolver.resolve(asked), how.max_candidates)
    budget = min(how.max_feature_nodes or len(search.active), len(search.active))
    _check_room(budget + len(asked), search.columns)
    report = Progress(budget, "features", what="attribution") if progress is None else progress
    search.run(budget, how.batch_size * how.update_interval, report)
    about = {
        "model": model.config.name,
        "dtype": str(model.dtype),
        "coders": [public_name(coder) for coder in coders],
        "active_features": search.found,
        "targets": [target.described() for target in asked],
        "generation": dataclasses.asdict(how),
        "seconds": round(time.perf_counter() - begin, 3),
    }
    texts = [resolver.text(token) for token in ids.tolist()]
    return search.graph(ids, texts, about)


def _check_room(rows: int, columns: int) -> None:
    """Raise `InputError` if the rows, of which there are two copies at the end, cannot fit."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (needed := 2 * 4 * rows * columns) > there:
        raise InputError(
            f"{rows:,} rows of {columns:,} sources take {byte_size(needed)}, more than this "
            f"machine's {byte_size(there)}: give max_feature_nodes, the number of rows"
        )


def rows_together(mesh: Mesh | None) -> int:
    """How many rows are found at a time."""
    return ROWS * (1 if mesh is None else mesh.shape["data"])


class GraphSearch:
    """The rows of a graph as they become known. Rows: first the targets', then the features'."""

    def __init__(
        self, model: Model, coders: CoderSet, prompt: Prompt, wanted: Resolved, most: int
    ) -> None:
        self.model, self.coders, self.prompt, self.wanted = model, coders, prompt, wanted
        self.active, self.found, whole = candidates(model, coders, prompt, wanted, most)
        self.layout: SlotLayout = laid_out(self.active)
        mesh = mesh_under(model.params.embed)
        given = {"whole": whole, "mesh": mesh}
        self.written = what_is_written(coders, prompt, self.active, self.layout, **given)
        self.together = rows_together(mesh)
        L, T = model.config.layers, prompt.length
        self.columns = len(self.active) + L * T + T

    def run(self, budget: int, queue_size: int, report: Report) -> None:
        """Find the rows of the targets, and of up to `budget` features."""
        n, most = len(self.active), len(self.wanted.bias)
        self.effects = np.zeros((most + budget, self.columns), np.float32)
        self.sums = np.zeros((most + budget, 2), np.float32)  # constant, rest
        self.bias = np.zeros(most + budget, np.float32)
        self.row_of = np.zeros(budget, np.int64)  # the feature of each row after the targets'
        self._put(0, self.wanted.stage, self.wanted.position, self.wanted.vector)
        self.bias[:most] = self.wanted.bias
        done = 0
        chosen = np.zeros(n, bool)
        while done < budget:
            queue = np.arange(n) if budget == n else self._next(done, chosen, queue_size)
            queue = np.sort(queue[: budget - done])
            chosen[queue] = True
            for start in range(0, len(queue), PIECE):
                piece = queue[start : start + PIECE]
                self._explain(done, piece)
                done += len(piece)
                report(done, budget)

    def _next(self, done: int, chosen: np.ndarray, count: int) -> np.ndarray:
        """The features of most influence whose rows are not known yet."""
        n, most = len(self.active), len(self.wanted.bias)
        known = self.row_of[:done]
        layer = np.concatenate([np.full(most, self.model.config.layers), self.active.layer[known]])
        node = np.concatenate([np.full(most, -1), known])
        weights = np.concatenate([self.wanted.weights, np.zeros(done)])
        influence = partial_influence(self.effects, layer, node, weights)[:n]
        order = np.argsort(-influence, kind="stable")
        return order[~chosen[order]][:count]

    def _explain(self, done: int, features: np.ndarray) -> None:
        """Put the rows of `features` after the `done` ones before."""
        some, at = self.active[features], len(self.wanted.bias) + done
        encoder, bias = encoder_rows(self.coders, some)
        vector = feature_vectors(self.model, self.prompt, some, encoder)
        self.row_of[done : done + len(features)] = features
        self.bias[at : at + len(features)] = bias
        self._put(at, 2 * some.layer[:, None], some.position[:, None], vector[:, None])

    def _put(self, at: int, stage: np.ndarray, position: np.ndarray, vector: np.ndarray) -> None:
        self.fill(self.effects[at:], self.sums[at:], stage, position, vector)

    def fill(self, effects: np.ndarray, sums: np.ndarray, stage, position, vector) -> None:
        """Put rows that begin at stage and position [R, Q] with vector [R, Q, D] into the first R
        of effects [., columns] and sums [., 2]: of constants, of features without a column."""
        n, L = len(self.active), self.model.config.layers
        T = self.prompt.length
        for rows, found in self._rows(stage, position, vector):
            count, size = len(rows), min(T, found.tokens.shape[1])
            effects[rows, :n] = np.asarray(found.slots)[:count, self.layout.slot]
            errors = np.zeros((count, L, T), np.float32)
            errors[..., :size] = np.asarray(found.errors)[:count, :, :size]
            effects[rows, n : n + L * T] = errors.reshape(count, -1)
            effects[rows, n + L * T : n + L * T + size] = np.asarray(found.tokens)[:count, :size]
            sums[rows, 0] = np.asarray(found.constant)[:count]
            sums[rows, 1] = np.asarray(found.rest)[:count]

    def _rows(self, stage, position, vector) -> Iterator[tuple[np.ndarray, linear.Effects]]:
        """(their numbers, effects) of batches of rows; the next is computed while one is used.

        Rows that end early in a short prompt run apart, without the tokens after them.
        """
        waiting: deque[tuple[np.ndarray, linear.Effects]] = deque()
        sizes = linear.prefixes(self.prompt.mlp_in.shape[1])
        last = np.where(stage < -1, 0, position).max(1)
        group = np.searchsorted(sizes, last + 1)
        for g, size in enumerate(sizes):
            mine, together = np.flatnonzero(group == g), self.together * (sizes[-1] // size)
            for start in range(0, len(mine), together):
                some = mine[start : start + together]
                columns = zip((stage, position, vector), (-1, 0, 0))
                rows = TargetRows(*(_filled(a[some], together, v) for a, v in columns))
                given = self.model, self.prompt.frozen, self.written, rows
                waiting.append((some, linear.effects(*given, size=size)))
                if len(waiting) > 1:
                    yield waiting.popleft()
        yield from waiting

    def graph(self, ids: np.ndarray, texts: list[str], about: dict[str, Any]) -> Graph:
        """The graph of the rows found, features in order."""
        n, most, L = len(self.active), len(self.wanted.bias), self.model.config.layers
        order = np.argsort(self.row_of, kind="stable")
        chosen = self.row_of[order]
        rows = np.concatenate([most + order, np.arange(most)])
        columns = np.concatenate([chosen, np.arange(n, self.columns)])
        if len(chosen) == n and (order == np.arange(n)).all():
            effects = np.concatenate([self.effects[most:], self.effects[:most]])
        else:
            effects = self.effects[np.ix_(rows, columns)]
        left = np.delete(np.arange(n), chosen)
        blocks = (self.effects[start : start + ROWS, left] for start in range(0, len(rows), ROWS))
        rest = np.concatenate([block.sum(1, dtype=np.float64) for block in blocks])
        rest = rest + self.sums[:, 1]
        bias = (self.sums[:, 0] + self.bias)[rows]
        rest = rest[rows].astype(np.float32)
        value = (effects.sum(1, dtype=np.float64) + rest + bias).astype(np.float32)
        sources = self.source_nodes(chosen, ids, texts)
        final = self._final_nodes(value[len(chosen) :])
        targets = Nodes.joined(sources[: len(chosen)], final)
        weights = np.concatenate([np.zeros(len(chosen), np.float32), self.wanted.weights])
        return Graph(
            sources, targets, effects, value, bias, rest, weights, ids.astype(np.int32), texts,
            len(chosen), L, about,
        )  # fmt: skip

    def source_nodes(self, chosen: np.ndarray, ids: np.ndarray, texts: list[str]) -> Nodes:
        """The nodes of the columns: the `chosen` features, the errors, the tokens."""
        L, T, some = self.model.config.layers, len(ids), self.active[chosen]
        count, every = len(chosen), np.arange(T, dtype=np.int32)
        features = Nodes(
            np.full(count, some.kind), some.layer, some.position, some.feature, some.activation,
            np.full(count, ""),
        )  # fmt: skip
        errors = Nodes(
            np.full(L * T, "error"), np.repeat(np.arange(L, dtype=np.int32), T), np.tile(every, L),
            np.full(L * T, -1, np.int32), np.ones(L * T, np.float32), np.full(L * T, ""),
        )  # fmt: skip
        tokens = Nodes(
            np.full(T, "token"), np.full(T, -1, np.int32), every, ids.astype(np.int32),
            np.ones(T, np.float32), np.asarray(texts),
        )  # fmt: skip
        return Nodes.joined(features, errors, tokens)

    def _final_nodes(self, values: np.ndarray) -> Nodes:
        w = self.wanted
        layer, position, feature = (np.asarray(a, np.int32) for a in (w.layer, w.at, w.feature))
        return Nodes(np.asarray(w.kind), layer, position, feature, values, np.asarray(w.labels))


def _filled(array: np.ndarray, size: int, value: float) -> np.ndarray:
    """`array` with entries of `value` up to `size` on its first axis."""
    room = ((0, size - len(array)),) + ((0, 0),) * (array.ndim - 1)
    return np.pad(array, room, constant_values=value)
