"""`attribute`: the direct effects between features, errors, tokens and logits on one prompt.

    graph = gs.attribute(model, gs.load_coders("transcoders/*"), tokenizer.encode(text))

Features beyond `max_feature_nodes` are chosen as circuit-tracer does: after some batches of rows,
the features with the most influence on the targets, through the rows known so far, come next.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gemma_scope_jax.circuits import linear
from gemma_scope_jax.circuits.candidates import MOST, candidates
from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.circuits.influence import partial_influence
from gemma_scope_jax.circuits.linear import Rows
from gemma_scope_jax.circuits.sources import (
    Active,
    Layout,
    Prompt,
    active_features,
    check_coders,
    encoder_rows,
    laid_out,
    read_prompt,
    what_is_written,
)
from gemma_scope_jax.circuits.targets import Resolved, Resolver, Target, feature_vectors
from gemma_scope_jax.coders.coder import Coder, public_name
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import check_ids, integers, refuse_text
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.sharding import own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress, Report

LOG = logging.getLogger(__name__)
ROWS = 64  # of a device program: more make larger products, fewer fit into a processor's cache
PIECE = 1024  # features whose encoder vectors are in memory at a time
BOS = 2


@own_mesh
def attribute(
    model: Model,
    coders: CoderSet | Coder | Iterable[Coder],
    ids: Any,
    targets: Target | int | str | Iterable[Target | int | str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    max_candidates: int = MOST,
    batch_size: int = 256,
    update_interval: int = 4,
    progress: Report | None = None,
) -> Graph:
    """The attribution graph of a prompt.

    coders   a transcoder for each layer, or a CLT
    ids      the prompt, int [T] or [1, T], `<bos>` first: as the model shall see it
    targets  tokens (ids or texts) or `Target`s; default: the most likely next tokens, as many as
             reach `desired_logit_prob` together, at most `max_n_logits`
    tokenizer  for texts of tokens, in targets and in the graph
    max_feature_nodes  explain only this many features, those of most influence; default: all
    max_candidates  consider only this many of the active features: those with the largest total
             effect on the targets. The effect of the others is in `Graph.rest`
    batch_size, update_interval  after `update_interval * batch_size` features the next are chosen
    progress   called with (features done, features to do); default: a line on stderr

    Raises `InputError` for coders that do not cover the model's MLPs, and for prompts and targets
    that cannot be.
    """
    begin = time.perf_counter()
    coders = CoderSet(coders)
    check_coders(model.config, coders)
    ids = checked_prompt(model, ids)
    knobs = {"batch_size": batch_size, "update_interval": update_interval}
    knobs |= {
        "max_feature_nodes": 1 if max_feature_nodes is None else max_feature_nodes,
        "max_candidates": max_candidates,
    }
    for name, value in knobs.items():
        whole_number(name, value, 1)
    prompt = read_prompt(model, ids)
    resolver = Resolver(model, coders, prompt, tokenizer)
    wanted = resolver.resolve(resolver.targets(targets, max_n_logits, desired_logit_prob))
    search = Search(model, coders, prompt, wanted, max_candidates)
    budget = min(max_feature_nodes or len(search.active), len(search.active))
    report = Progress(budget, "features", what="attribution") if progress is None else progress
    search.run(budget, batch_size * update_interval, report)
    settings = {
        "max_n_logits": max_n_logits,
        "desired_logit_prob": desired_logit_prob,
        "max_feature_nodes": max_feature_nodes,
        "max_candidates": max_candidates,
        "batch_size": batch_size,
        "update_interval": update_interval,
    }
    about = {
        "model": model.config.name,
        "dtype": str(model.dtype),
        "coders": [public_name(coder) for coder in coders],
        "active_features": search.found,
        "generation": settings,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    texts = [resolver.text(token) for token in ids.tolist()]
    return search.graph(ids, texts, about)


def checked_prompt(model: Model, ids: Any) -> np.ndarray:
    """The tokens [T] of one prompt that the model can read. Raises `InputError`."""
    refuse_text(ids)
    found = integers("ids", np.asarray(ids))
    if found.ndim == 2 and len(found) == 1:
        found = found[0]
    if found.ndim != 1 or found.dtype.kind not in "iu" or not found.size:
        raise InputError(f"ids must be the tokens of one prompt, int [T], not {list(found.shape)}")
    check_ids(model.config, found)
    if len(found) > model.config.context:
        raise InputError(f"{len(found)} tokens are more than the context of {model.config.context}")
    if len(found) > 1 and found[0] == found[1] == BOS:
        raise InputError("the prompt begins with two <bos>: encode the text once, with bos=True")
    return found


class Search:
    """The rows of a graph as they become known. Rows: first the targets', then the features'."""

    def __init__(
        self, model: Model, coders: CoderSet, prompt: Prompt, wanted: Resolved, most: int
    ) -> None:
        self.model, self.coders, self.prompt, self.wanted = model, coders, prompt, wanted
        self.active: Active = active_features(coders, prompt)
        self.found, whole = len(self.active), None
        if self.found > most:
            some, whole = candidates(model, coders, prompt, self.active, wanted, most)
            self.active = self.active[some]
        self.layout: Layout = laid_out(self.active)
        self.written = what_is_written(coders, prompt, self.active, self.layout, whole)
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
        for start, found in self._rows(stage, position, vector):
            rows = slice(start, min(start + ROWS, len(stage)))
            count = rows.stop - rows.start
            np.take(np.asarray(found.slots)[:count], self.layout.slot, 1, effects[rows, :n])
            errors = np.asarray(found.errors)[:count, :, :T]
            effects[rows, n : n + L * T] = errors.reshape(count, -1)
            effects[rows, n + L * T :] = np.asarray(found.tokens)[:count, :T]
            sums[rows, 0] = np.asarray(found.constant)[:count]
            sums[rows, 1] = np.asarray(found.rest)[:count]

    def _rows(self, stage, position, vector) -> Iterator[tuple[int, linear.Effects]]:
        """(first row, effects) of batches of rows; the next is computed while one is used."""
        waiting: deque[tuple[int, linear.Effects]] = deque()
        for start in range(0, len(stage), ROWS):
            some = (a[start : start + ROWS] for a in (stage, position, vector))
            rows = Rows(*map(_filled, some, (-1, 0, 0)))
            found = linear.effects(self.model, self.prompt.frozen, self.written, rows)
            waiting.append((start, found))
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
        effects = self.effects if len(chosen) == n else self.effects[:, columns]
        effects = effects[rows]
        left = np.delete(np.arange(n), chosen)
        rest = self.effects[:, left].sum(1, dtype=np.float64) + self.sums[:, 1]
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
            np.full(count, "feature"), some.layer, some.position, some.feature, some.activation,
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


def _filled(array: np.ndarray, value: float) -> np.ndarray:
    """`array` with up to `ROWS` entries on its first axis."""
    room = ((0, ROWS - len(array)),) + ((0, 0),) * (array.ndim - 1)
    return np.pad(array, room, constant_values=value)
