"""Heads by brute force: edges of the reference linear model under altered attention patterns."""

from types import SimpleNamespace

import jax
import numpy as np

import gemma_scope_jax as gs
from reference_graph import clean, effects_of_leaves, target_values


def reference_edges(model, coders, ids, graph, edges):
    """The edges [E, 2] of a graph as a function of the attention patterns [L, N, T, T], and the
    prompt's own patterns. Targets are features and logits of the last token."""
    coders = gs.CoderSet(coders)
    c = clean(model, coders, ids)
    rows, columns = edges.T
    targets, sources = graph.targets[rows], graph.sources[columns]
    table = lambda nodes: np.stack([nodes.layer, nodes.position, nodes.feature], 1)
    of_features = targets.kind == "feature"
    wanted, tokens = table(targets)[of_features], targets.feature[~of_features]
    at = np.concatenate([np.flatnonzero(of_features), np.flatnonzero(~of_features)])
    leaves = {"features": c.features, "errors": c.errors, "embed": c.embed}

    @jax.jit
    def gradients(pattern):
        frozen = SimpleNamespace(**vars(c))
        frozen.frozen = c.frozen | {"attn_pattern": pattern[:, None]}
        given = model, coders, ids, frozen
        values = lambda leaves: target_values(*given, leaves, wanted, tokens)
        every, backward = jax.vjp(values, leaves)
        return jax.vmap(backward)(np.eye(len(every), dtype=np.float32))[0]

    features = table(sources)[sources.kind == "feature"]
    order = np.zeros(len(edges), np.int64)  # of the sources, among all columns of the reference
    layer, position = np.nonzero(c.started)
    for n, kind in enumerate(sources.kind.tolist()):
        if kind == "feature":
            order[n] = (sources.kind[:n] == "feature").sum()
        elif kind == "error":
            found = (layer == sources.layer[n]) & (position == sources.position[n])
            order[n] = len(features) + np.flatnonzero(found)[0]
        else:
            order[n] = len(features) + len(layer) + sources.position[n]

    def of(pattern):
        found, _ = effects_of_leaves(gradients(pattern), leaves, features, c.started)
        values = np.zeros(len(edges), np.float32)
        values[at] = found[np.arange(len(at)), order[at]]
        return values

    return of, np.asarray(c.frozen["attn_pattern"][:, 0])


def by_last_head(of, pattern):
    """[E, L, N, T]: paths that take a head, and no head in any higher layer."""
    L, N, T, _ = pattern.shape
    found = []
    for layer in range(L):
        below = pattern.copy()
        below[layer:] = 0
        without = of(below)
        for head in range(N):
            for key in range(T):
                one = below.copy()
                one[layer, head, :, key] = pattern[layer, head, :, key]
                found.append(of(one) - without)
    return np.stack(found, 1).reshape(-1, L, N, T)


def by_first_head(of, pattern):
    """[E, L, N, T]: paths that take a head at a query, and no head in any lower layer."""
    L, N, T, _ = pattern.shape
    found = []
    for layer in range(L):
        above = pattern.copy()
        above[: layer + 1] = 0
        without = of(above)
        for head in range(N):
            for query in range(T):
                one = above.copy()
                one[layer, head, query] = pattern[layer, head, query]
                found.append(of(one) - without)
    return np.stack(found, 1).reshape(-1, L, N, T)


def through_heads(of, pattern):
    """[E, L, N]: the edges, less the edges without a head."""
    (L, N, _, _), whole = pattern.shape, of(pattern)
    found = []
    for layer in range(L):
        for head in range(N):
            without = pattern.copy()
            without[layer, head] = 0
            found.append(whole - of(without))
    return np.stack(found, 1).reshape(-1, L, N)
