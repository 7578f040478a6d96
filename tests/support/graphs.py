"""Random graphs with planted layers, and the plain formulas of what is computed on graphs.

The formulas are those of circuit-tracer's graph.py, on the square matrix of all nodes: [features,
errors, tokens, logits], rows of targets, columns of sources.
"""

import dataclasses

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes


def nodes(kind, layer, position, feature, activation=None, label=None):
    """A table of nodes; what is not given is 1 and ""."""
    n = len(kind)
    return Nodes(
        kind=np.array(kind, str),
        layer=np.array(layer, np.int32),
        position=np.array(position, np.int32),
        feature=np.array(feature, np.int32),
        activation=np.ones(n, np.float32) if activation is None else np.float32(activation),
        label=np.array([""] * n if label is None else label, str),
    )


def random_graph(
    seed=0, *, features=12, layers=4, tokens=5, logits=3, density=0.6, draw=None, width=50
):
    """A graph whose effects go from lower layers to higher ones; draw(rng, shape) are their values,
    of which a share is zero."""
    rng = np.random.default_rng(seed)
    draw = draw or (lambda rng, shape: rng.standard_normal(shape) ** 3)
    code = np.sort(rng.choice(layers * tokens * width, features, replace=False))
    layer, position, feature = np.unravel_index(code, (layers, tokens, width))
    ids = rng.integers(3, 200, tokens)
    chosen = nodes(["feature"] * features, layer, position, feature, rng.uniform(1, 9, features))
    errors = nodes(
        ["error"] * (layers * tokens),
        np.repeat(np.arange(layers), tokens),
        np.tile(np.arange(tokens), layers),
        np.full(layers * tokens, -1),
    )
    embedded = nodes(["token"] * tokens, [-1] * tokens, range(tokens), ids)
    words = [f' "w{i}' for i in range(logits)]
    asked = nodes(
        ["logit"] * logits,
        [layers] * logits,
        [tokens - 1] * logits,
        rng.choice(200, logits, replace=False),
        rng.standard_normal(logits),
        words,
    )
    sources, targets = Nodes.joined(chosen, errors, embedded), Nodes.joined(chosen, asked)
    effects = draw(rng, (len(targets), len(sources))).astype(np.float32)
    effects[rng.random(effects.shape) > density] = 0
    effects[targets.layer[:, None] <= sources.layer[None]] = 0
    bias, rest = rng.standard_normal((2, len(targets))).astype(np.float32)
    weights = np.zeros(len(targets), np.float32)
    weights[features:] = np.sort(rng.dirichlet(np.ones(logits)))[::-1]
    return Graph(
        sources=sources,
        targets=targets,
        effects=effects,
        value=(effects.sum(axis=1) + bias + rest).astype(np.float32),
        bias=bias,
        rest=rest,
        weights=weights,
        ids=ids.astype(np.int32),
        tokens=["<bos>", *(f" t{i}" for i in range(1, tokens))],
        selected=features,
        layers=layers,
        about={"model": "acme/tiny", "coders": ["acme/a", "acme/b"], "generation": {"budget": 9}},
    )


def square(graph):
    """The matrix of all nodes, float64, and the weights of its rows."""
    size, n = len(graph.sources), graph.selected
    finals = len(graph.targets) - n
    matrix, weights = np.zeros((size + finals, size + finals)), np.zeros(size + finals)
    matrix[:n, :size], matrix[size:, :size] = graph.effects[:n], graph.effects[n:]
    weights[:n], weights[size:] = graph.weights[:n], graph.weights[n:]
    return matrix, weights


def normalised(matrix, least=1e-10):
    matrix = np.abs(matrix)
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), least)


def influence(shares, weights):
    """w A + w A A + ..., until the product is zero."""
    now = weights @ shares
    found = now.copy()
    while now.any():
        now = now @ shares
        found += now
    return found


def scores(graph):
    """Replacement and completeness."""
    matrix, weights = square(graph)
    shares = normalised(matrix)
    found, kind = influence(shares, weights), graph.sources.kind
    tokens, errors = np.flatnonzero(kind == "token"), np.flatnonzero(kind == "error")
    replacement = found[tokens].sum() / (found[tokens].sum() + found[errors].sum())
    rows = 1 - shares[:, errors].sum(axis=1)
    return replacement, (rows * (found + weights)).sum() / (found + weights).sum()


def threshold(values, share):
    """The least value kept, by sorting: zeros never are, and rounding does not decide."""
    values = np.sort(values[values > 0])[::-1]
    total = np.cumsum(values)
    reached = np.searchsorted(total, share * total[-1] * (1 - 1e-12)) if share < 1 else len(values)
    return values[min(reached, len(values) - 1)]


def pruned(graph, node_share, edge_share):
    """Masks of the nodes and of the edges of the square matrix that are kept, and every node's
    cumulative share."""
    matrix, weights = square(graph)
    size, n = len(graph.sources), graph.selected
    found = influence(normalised(matrix), weights)
    keep = found >= threshold(found, node_share)
    always = np.ones(len(keep), bool)
    always[:size] = graph.sources.kind == "token"
    keep |= always
    matrix[~keep] = 0
    matrix[:, ~keep] = 0
    shares = normalised(matrix)
    edge = shares * (influence(shares, weights) + weights)[:, None]
    edges = edge >= threshold(edge.ravel(), edge_share)
    while True:
        before = keep.copy()
        keep &= edges.any(axis=0) | always
        keep[:n] &= edges[:n].any(axis=1)
        edges[~keep] = False
        edges[:, ~keep] = False
        if (keep == before).all():
            break
    order = np.argsort(-found, kind="stable")
    cumulative = np.empty(len(found))
    cumulative[order] = np.cumsum(found[order]) / found.sum()
    return keep, edges, cumulative


def same_graph(one, other, skip=()):
    """Two graphs are equal, NaN in the same places, except for the fields in `skip`."""
    for f in dataclasses.fields(Graph):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if f.name in skip:
            continue
        if isinstance(a, Nodes):
            for column in dataclasses.fields(Nodes):
                np.testing.assert_array_equal(
                    getattr(a, column.name), getattr(b, column.name), f"{f.name}.{column.name}"
                )
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, f.name)
            assert a.dtype == b.dtype, f.name
        else:
            assert a == b, f.name
