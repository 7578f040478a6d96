"""Attribution graphs for pages: tiny ones of chance, and one that looks like a real circuit."""

import numpy as np

from gemma_scope_jax.circuits.graph import Graph, Nodes

ANSWERS = ((" Austin", 0.41), (" Dallas", 0.12), (" the", 0.07), (" Houston", 0.05), (" a", 0.03))
PROMPT = ("<bos>", "The", " capital", " of", " the", " state", " containing", " Dallas", " is")
# label: first and last layer, position, how strongly it drives the answer
CIRCUIT = {
    "capital (of a place)": (1, 4, 2),
    "state": (1, 5, 5),
    "inside, containing": (2, 6, 6),
    "Dallas and its suburbs": (1, 4, 7),
    "Texas": (4, 9, 7),
    "places in the USA": (5, 10, 7),
    "say a capital": (9, 15, 8),
    "say Austin": (12, 17, 8),
    "say the name of a city": (11, 16, 8),
    "capital cities": (6, 11, 8),
}
LEADS = (
    (" capital", "capital (of a place)", 3),
    (" state", "state", 3),
    (" Dallas", "Dallas and its suburbs", 4),
    ("Dallas and its suburbs", "Texas", 4),
    ("state", "Texas", 1.5),
    ("Texas", "say Austin", 4),
    ("capital (of a place)", "capital cities", 3),
    ("capital cities", "say a capital", 3),
    ("say a capital", "say Austin", 3),
    ("inside, containing", "say a capital", 1.5),
    ("places in the USA", "say the name of a city", 2),
    ("say Austin", " Austin", 6),
    ("say the name of a city", " Dallas", 4),
    ("say Austin", " Dallas", -4),
    ("say a capital", " Austin", 2),
)


def page_graph(
    tokens=("<bos>", "a", "b", "c"),
    layers=3,
    features=6,
    answers=(("x", 0.5), ("y", 0.25)),
    density=0.5,
    seed=0,
):
    """A graph of chance: a link leads from one layer to a later one, and never back in the text."""
    rng = np.random.default_rng(seed)
    t = len(tokens)
    table = sorted(
        (int(rng.integers(layers)), int(1 + (t - 1) * rng.beta(2, 1) * 0.999), int(f))
        for f in rng.choice(16_384, features, replace=False)
    )
    found = _nodes([("feature", *place, float(rng.lognormal(3)), "") for place in table])
    errors = [("error", i, p, -1, 1.0, "") for i in range(layers) for p in range(1, t)]
    words = [("token", -1, p, 1000 + p, 1.0, text) for p, text in enumerate(tokens)]
    asked = [("logit", layers, t - 1, 7 + i, 3.0 - i, text) for i, (text, _) in enumerate(answers)]
    sources, targets = _joined(found, _nodes(errors + words)), _joined(found, _nodes(asked))
    allowed = (sources.layer[None] < targets.layer[:, None]) & (
        sources.position[None] <= targets.position[:, None]
    )
    shape = allowed.shape
    effects = rng.lognormal(-2, 1.3, shape) * np.where(rng.random(shape) < 0.75, 1, -1)
    effects = np.where(allowed & (rng.random(shape) < density), effects, 0).astype(np.float32)
    weights = np.zeros(shape[0], np.float32)
    weights[features:] = [p for _, p in answers]
    return _finished(sources, targets, effects, weights, list(tokens), features, layers)


def dallas_graph(seed=1):
    """About 300 nodes and 5,000 links, among them a circuit that answers "Austin" in two steps.

    Returns the graph and the labels of the circuit's features.
    """
    graph = page_graph(PROMPT, 18, 230, ANSWERS, 0.162, seed)
    rng, n = np.random.default_rng(seed), graph.selected
    names = dict(enumerate([""] * n))
    layer, position = graph.sources.layer[:n], graph.sources.position[:n]
    for name, (low, high, at) in CIRCUIT.items():
        fits = [
            i
            for i in np.flatnonzero((layer >= low) & (layer <= high) & (position == at))
            if not names[i]
        ]
        names |= {int(i): name for i in rng.permutation(fits)[:3]}
    source = np.array([names.get(i, text) for i, text in enumerate(graph.sources.label)])
    target = np.array([names.get(i, text) for i, text in enumerate(graph.targets.label)])
    effects = graph.effects.copy()
    late = graph.sources.layer[None] < graph.targets.layer[:, None]
    for before, after, much in LEADS:
        pairs = (source[None] == before) & (target[:, None] == after) & late
        effects[pairs] += (much * rng.lognormal(0, 0.3, int(pairs.sum()))).astype(np.float32)
    labels = {
        (int(layer[i]), int(graph.sources.feature[i])): name for i, name in names.items() if name
    }
    made = _finished(
        graph.sources, graph.targets, effects, graph.weights, graph.tokens, n, graph.layers
    )
    return made, labels


def _finished(sources, targets, effects, weights, tokens, selected, layers):
    rest = (0.1 * effects.sum(1)).astype(np.float32)
    bias = np.full(len(rest), -0.5, np.float32)
    return Graph(
        sources=sources,
        targets=targets,
        effects=effects,
        value=effects.sum(1) + rest + bias,
        bias=bias,
        rest=rest,
        weights=weights,
        ids=np.arange(1000, 1000 + len(tokens), dtype=np.int32),
        tokens=tokens,
        selected=selected,
        layers=layers,
        about={"model": "gemma-3-270m", "coders": "18 transcoders", "seconds": 12.5},
    )


def _nodes(rows):
    columns = [list(column) for column in zip(*rows)] or [[]] * 6
    kinds = ("U16", np.int32, np.int32, np.int32, np.float32, object)
    return Nodes(*(np.array(column, kind) for column, kind in zip(columns, kinds)))


def _joined(*tables):
    names = ("kind", "layer", "position", "feature", "activation", "label")
    return Nodes(*(np.concatenate([getattr(table, name) for table in tables]) for name in names))
