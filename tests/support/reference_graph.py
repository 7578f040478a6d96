"""An attribution graph by brute force: the linear model is run forwards and differentiated by JAX.

`gs.attribute` writes the backward pass by hand. Here nothing is: one forward pass of the real
model, in which

    attention patterns and the norm scales   have the values of the prompt
    embed [T, D]                             is a variable
    mlp_out of layer j [T, D]                is what the features write + an error + a constant
                                             + mlp_in @ w_skip

so that every target is an affine function of the features' activations, the errors and the
embeddings. An effect is the derivative times the source's value; the bias is the value at zero.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.circuits.graph import Graph, Nodes
from gemma_scope_jax.coders.coder import float32, matmul

FROZEN = ("attn_pattern", "pre_attn_scale", "post_attn_scale", "pre_mlp_scale")
CHUNK = 32  # targets that are differentiated at a time


def reference_graph(model, coders, ids, *, logits=5, features=None) -> Graph:
    """The `Graph` of `coders` (transcoders, plain or affine, or CLTs) on the prompt `ids` [T].

    logits         the number of targets among the last token's logits, the largest first
    features       the selected features, int [n, 3] (layer, position, feature); default: all that
                   are active

    What an MLP writes at a coder's first positions has no source: it counts to the bias, less the
    skip's part. A layer without a coder is all error.
    """
    coders, ids = gs.CoderSet(coders), np.asarray(ids, np.int32)
    c = clean(model, coders, ids)
    if features is None:
        active = [(layer, *at) for layer, f in c.features.items() for at in np.argwhere(f > 0)]
        features = np.array(sorted(active), np.int32)
    features = np.asarray(features, np.int32).reshape(-1, 3)
    tokens = np.argsort(-c.logits, kind="stable")[:logits].astype(np.int32)

    values = jax.jit(lambda leaves: target_values(model, coders, ids, c, leaves, features, tokens))
    leaves = {"features": c.features, "errors": c.errors, "embed": c.embed}
    value, backward = jax.vjp(values, leaves)
    bias, _ = jax.vjp(values, jax.tree.map(jnp.zeros_like, leaves))
    # jitted as a whole: else each call would print all that `backward` holds, for its name
    gradients = jax.jit(lambda backward, rows: jax.vmap(backward)(rows)[0])
    count, n = len(value), len(features)
    hot = np.eye(-(-count // CHUNK) * CHUNK, count, dtype=np.float32)
    rows = [
        effects_of_leaves(gradients(backward, some), leaves, features, c.started)
        for some in hot.reshape(-1, CHUNK, count)
    ]
    effects, whole = (np.concatenate(part)[:count] for part in zip(*rows))
    p = np.exp(c.logits - c.logits.max())
    return Graph(
        sources=_sources(c, features, ids),
        targets=_targets(model.config.layers, features, tokens, len(ids), np.asarray(value)),
        effects=effects,
        value=np.asarray(value),
        bias=np.asarray(bias),
        rest=whole - effects[:, :n].sum(1),
        weights=np.concatenate([np.zeros(n, np.float32), (p / p.sum())[tokens]]),
        ids=ids,
        tokens=[str(i) for i in ids],
        selected=n,
        layers=model.config.layers,
        about={"made by": "reference_graph"},
    )


def clean(model, coders, ids):
    """What the prompt gives: the frozen values, the leaves and the constants.

    features {layer: [T, F]} · errors, constant [L, T, D] · skip [L, T, D, D], zero where there is
    none · embed [T, D] · logits [V] of the last token, less their mean · final_scale [1, T, 1]
    """
    sites = (*FROZEN, "mlp_in", "mlp_out")
    reads = [gs.capture(site) for site in (*sites, "embed", "final_scale")]
    out = gs.run(model, ids[None], reads, pad=False)
    x, y = (np.asarray(out.reads[site][:, 0], np.float32) for site in ("mlp_in", "mlp_out"))
    T = len(ids)
    firsts = {layer: coder.first for coder in coders for layer in coder.layers}
    latest = max(firsts.values())
    started = np.stack(
        [np.arange(T) >= firsts.get(layer, latest) for layer in range(len(x))]
    )  # [L, T]: where coders act
    features, skip = {}, np.zeros((len(x), x.shape[-1], x.shape[-1]), np.float32)
    b_dec = np.zeros_like(x)
    for coder in coders:
        for i, layer in enumerate(coder.layers):
            f = coder.encode_layer(i, x[layer])
            features[layer] = np.where(started[layer][:, None], f, np.float32(0))
            own = i if coder.multi_layer else ...
            b_dec[layer] = np.asarray(float32(coder.b_dec))[own]
            if coder.w_skip is not None:
                skip[layer] = np.asarray(float32(coder.w_skip))[own]
    left = y - np.matmul(x, skip)  # what the skip does not write; it acts at all positions
    inside = started[..., None]
    constant = np.where(inside, b_dec, left)
    errors = np.where(inside, left - b_dec - np.asarray(written(coders, features, x.shape)), 0.0)
    centred = np.asarray(out.logits[0, -1]) - np.asarray(out.logits[0, -1]).mean()
    return SimpleNamespace(
        frozen={site: out.reads[site] for site in FROZEN},
        final_scale=out.reads["final_scale"],
        features=features,
        errors=jnp.asarray(errors),
        constant=jnp.asarray(constant),
        skip=jnp.asarray(skip),
        started=started,
        embed=float32(out.reads["embed"][0]),
        logits=centred,
    )


def written(coders, features, shape):
    """What `features` {layer: [T, F]} write to every mlp_out: [L, T, D]."""
    total = [jnp.zeros(shape[1:], jnp.float32) for _ in range(shape[0])]
    for coder in coders:
        for i, source in enumerate(coder.layers):
            for j, target in enumerate(coder.layers[i:], i):
                total[target] += matmul(features[source], coder.decoder(i, j))
    return jnp.stack(total)


def target_values(model, coders, ids, c, leaves, features, tokens):
    """[targets]: the pre-activations of `features` [n, 3], then the logits of `tokens` less the
    mean logit, in the linear model with these leaves."""
    constant = leaves["errors"] + c.constant
    output = written(coders, leaves["features"], constant.shape) + constant
    frozen = [gs.patch(site, None, gs.per_layer(a)) for site, a in c.frozen.items()]
    items = [
        gs.write("embed", None, _replace, leaves["embed"][None]),
        *frozen,
        gs.patch("final_scale", None, c.final_scale),
        gs.write("mlp_out", None, _mlp_out, gs.per_layer((output[:, None], c.skip))),
        gs.capture("mlp_in"),
    ]
    out = gs.forward(model, jnp.asarray(ids)[None], items)
    x = float32(out.reads["mlp_in"][:, 0])
    values = []
    for layer in np.unique(features[:, 0]):
        coder = coders.at(int(layer))
        encoder = coder.encoder(coder.layers.index(layer))
        _, at, feature = features[features[:, 0] == layer].T
        z = jnp.einsum("nd,dn->n", x[layer][at], float32(encoder.w_enc)[:, feature])
        values.append(z + float32(encoder.b_enc)[feature])
    last = out.logits[0, -1]
    order = np.argsort(features[:, 0], kind="stable")  # as computed: by layer
    flat = jnp.concatenate(values)[np.argsort(order)] if values else jnp.zeros(0, jnp.float32)
    return jnp.concatenate([flat, last[tokens] - last.mean()])


def _replace(x, ctx, value):
    return value.astype(x.dtype)


def _mlp_out(x, ctx, here):
    output, skip = here
    return (output + matmul(float32(ctx.seen["mlp_in"]), skip)).astype(x.dtype)


def effects_of_leaves(gradient, leaves, features, started):
    """Effects [rows, sources], and the sum over all active features [rows]."""
    times = jax.tree.map(lambda g, a: np.asarray(g) * np.asarray(a)[None], gradient, leaves)
    rows = len(times["embed"])
    layer, at, feature = features.T
    from_features = np.zeros((rows, len(features)), np.float32)
    for own in np.unique(layer):
        here = layer == own
        from_features[:, here] = times["features"][own][:, at[here], feature[here]]
    errors, tokens = times["errors"].sum(-1)[:, started], times["embed"].sum(-1)
    effects = np.concatenate([from_features, errors, tokens], 1)
    whole = sum(part.sum((1, 2)) for part in times["features"].values())
    return effects, whole


def _sources(c, features, ids):
    """The selected features, the errors where coders act, the tokens."""
    T, n = len(ids), len(features)
    error_layer, error_at = np.nonzero(c.started)
    m = len(error_at)
    activation = [np.asarray(c.features[int(l)])[t, f] for l, t, f in features]
    return _nodes(
        ["feature"] * n + ["error"] * m + ["token"] * T,
        [features[:, 0], error_layer, np.full(T, -1)],
        [features[:, 1], error_at, np.arange(T)],
        [features[:, 2], np.full(m, -1), ids],
        [np.array(activation), np.ones(m + T)],
    )


def _targets(layers, features, tokens, T, value):
    k, n = len(tokens), len(features)
    return _nodes(
        ["feature"] * n + ["logit"] * k,
        [features[:, 0], np.full(k, layers)],
        [features[:, 1], np.full(k, T - 1)],
        [features[:, 2], tokens],
        [value],
    )


def _nodes(kind, layer, position, feature, activation):
    ints = (np.concatenate(part).astype(np.int32) for part in (layer, position, feature))
    numbers = np.concatenate(activation).astype(np.float32)
    return Nodes(np.array(kind), *ints, numbers, np.array([""] * len(kind)))
