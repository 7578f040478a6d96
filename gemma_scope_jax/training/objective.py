"""The loss of a group of coders on a batch, and its gradients: over all features, or active ones.

The loss is written once over `Codes`: pre-activations with their thresholds, either for all F
features or for those of each token that are active or within the kernel of the straight-through
estimator, in lists of K. Both give the same gradients; the second needs one dense product with the
encoder and otherwise touches active features only (`kernels.active`). A few tokens (early on,
outlier tokens) may need several lists; if too many do, the whole batch is dense (`lax.cond`). So
the result never depends on K.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.coder import largest
from gemma_scope_jax.kernels import active
from gemma_scope_jax.kernels.xla import used_slots
from gemma_scope_jax.model.sharding import mesh_of, place
from gemma_scope_jax.training import losses
from gemma_scope_jax.training.recipe import LossConfig
from gemma_scope_jax.training.weights import CoderGroup, Weights, encoder_bias

NEVER = 1e9  # the threshold of an unused slot
# Of the last cut-off of BatchTopK: entries above this share of it, less a little, have slots. Where
# it comes near zero, it falls to zero from one batch to the next.
BELOW, NEAR = 0.85, 0.01
TOKENS = 64  # one token in this many may need several lists
LISTS = 8  # of which there is one for this many tokens
SOURCES = 8  # both are for one source, and up to this many add up
Parts = dict[str, jax.Array]  # of the loss, for the log: [N] each


@flax.struct.dataclass
class Dials:
    """The weights of a group's losses that change during a run."""

    l0_weight: jax.Array  # float32 [N]: of the L0 penalty
    l0_target: jax.Array  # float32 [N]
    dead: jax.Array  # float32 [N, X, F]: 0 for a feature in use, up to 1 for a dead one


@flax.struct.dataclass
class Codes:
    """Pre-activations and thresholds of all features, or of the `feature` ids in L lists, the first
    B those of the tokens in their order (`active.ActiveEntries`)."""

    z: jax.Array  # [N, X, B, F] or [N, X, L, K]
    threshold: jax.Array  # likewise, or [N, X, 1, F]
    feature: jax.Array | None = None  # int32 [N, X, L, K]; None: all features
    count: Any = None  # int32 [N, X, L], slots in use
    token: Any = None  # int32 [L]
    edge: jax.Array | None = None  # the `cutoff` of BatchTopK, if it is known or that of others


def gradients(
    w: Weights, x: jax.Array, y: jax.Array, dials: Dials, group: CoderGroup, capacity: int
) -> tuple[Weights, Parts]:
    """(gradients, parts) of a batch x [N, X, B, D], y [N, X, B, E], unit mean squared norms.

    `capacity` is K, 0 for dense products. Parts are [N] each, and `frequency` [N, X, F], shares of
    tokens; a sparse step adds `dense`, 1 if too many tokens needed more than K, or the cut-off fell
    below `BELOW` of the last one, and the whole batch was done densely.
    """
    on_all = lambda w: jax.grad(
        lambda w: loss(w, encode(w, x, group), x, y, dials, group), has_aux=True
    )(w)
    if not capacity:
        return on_all(w)
    shape, kind = x.shape[:3], group.template.activation
    slots = shape[0] * shape[1]
    low = jax.lax.stop_gradient(w.threshold)
    half = 0.5 * group.template.loss.bandwidth
    low = jax.nn.relu(BELOW * low - NEAR) if kind == "batch_topk" else low - half

    def find(w_enc: jax.Array, b_enc: jax.Array, b_dec: jax.Array):
        moved = dataclasses.replace(w, w_enc=w_enc, b_enc=b_enc, b_dec=b_dec)
        bias = encoder_bias(moved, group.template.apply_b_dec_to_input)
        x_, enc, bias, low_ = (a.reshape(slots, *a.shape[2:]) for a in (x, w_enc, bias, low))
        if kind == "topk":
            found = active.encode_active(x_, enc, bias, None, capacity)
            return found.z, found
        many = min(slots, SOURCES)  # a token with many entries in one source has lists in all
        more = max(1, many * shape[2] // TOKENS), max(2, many * shape[2] // LISTS)
        found = active.encode_active(x_, enc, bias, low_, capacity, more)
        return found.z, found

    z, pull, found = jax.vjp(find, w.w_enc, w.b_enc, w.b_dec, has_aux=True)
    unflat = lambda a: a.reshape(*shape[:2], *a.shape[1:])
    feature, count, many, edge = found.feature, found.count, ~found.complete, None
    if kind == "batch_topk":
        edge = _kth(jnp.where(used_slots(count, capacity), z, -NEVER), group, shape[2])
        least = jnp.max(low, (1, 2))  # above 0, it may hide some of those that are kept
        many = many | jnp.any((edge[:, 0, 0, 0] <= least) & (least > 0))
    elif kind == "topk":
        edge = unflat(jnp.where(count == capacity, jnp.min(z, -1), 0.0))[..., None]

    def on_active(w):
        def total(w, z):
            threshold = active.lookup(w.threshold.reshape(slots, -1), feature, count, NEVER)
            slotted = (unflat(z), unflat(threshold), unflat(feature), unflat(count))
            return loss(w, Codes(*slotted, found.token, edge), x, y, dials, group)

        (grads, dz), parts = jax.grad(total, (0, 1), has_aux=True)(w, z)
        d_enc, d_bias, d_dec = pull(dz)
        grads = dataclasses.replace(
            grads, w_enc=grads.w_enc + d_enc, b_enc=grads.b_enc + d_bias, b_dec=grads.b_dec + d_dec
        )
        return grads, parts

    if kind == "topk":  # k slots are always enough
        return on_active(w)
    grads, parts = jax.lax.cond(many, on_all, on_active, w)
    share = jnp.broadcast_to(many, parts["loss"].shape).astype(jnp.float32)
    return grads, parts | {"dense": share}


def encode(w: Weights, x: jax.Array, group: CoderGroup) -> Codes:
    """Pre-activations of all features on x [N, X, B, D]."""
    if x.shape[0] * x.shape[1] == 1:  # a plain product is faster than a batch of one
        z = (x[0, 0] @ w.w_enc[0, 0].T)[None, None]
    else:
        z = jnp.einsum("nxbd,nxfd->nxbf", x, w.w_enc)
    z = z + encoder_bias(w, group.template.apply_b_dec_to_input)[:, :, None, :]
    z = place(mesh_of(w.w_enc), z, None, None, "data", "model")
    return Codes(z, w.threshold[:, :, None, :])


def activate(codes: Codes, group: CoderGroup) -> tuple[jax.Array, jax.Array]:
    """(feature activations, 1 where active), both like `codes.z`, with their gradients."""
    z, config = codes.z, group.template
    if config.activation == "jumprelu":
        threshold, width = jnp.broadcast_to(codes.threshold, z.shape), config.loss.bandwidth
        return losses.jumprelu(z, threshold, width), losses.step(z, threshold, width)
    if config.activation == "topk" and codes.feature is not None:  # the lists hold no others
        return jax.nn.relu(z), jax.lax.stop_gradient(z > 0).astype(z.dtype)
    if config.activation == "topk":  # as saved coders compute it
        N, X, B, F = z.shape
        together = jnp.moveaxis(jax.nn.relu(z), 2, 1).reshape(N, B, X * F)
        kept = largest(together, int(config.target_l0)).reshape(N, B, X, F)
        f = jnp.moveaxis(kept, 1, 2)
        return f, jax.lax.stop_gradient(f > 0).astype(z.dtype)
    edge = cutoff(z, group) if codes.edge is None else codes.edge
    on = jax.lax.stop_gradient((z >= edge) & (z > 0)).astype(z.dtype)
    return z * on, on


def cutoff(z: jax.Array, group: CoderGroup) -> jax.Array:
    """The smallest z [N, X, B, F] that TopK or BatchTopK keeps, with axes that broadcast.

    TopK takes the k largest of a token over all layers, BatchTopK the k B largest of the batch.
    """
    k, (N, X, B, F) = group.template.target_l0, z.shape
    if group.template.activation == "topk":
        together = jnp.moveaxis(z, 2, 1).reshape(N, B, X * F)
        return jax.nn.relu(jax.lax.top_k(together, int(k))[0][:, None, :, -1:])
    return _kth(z, group, B)


def _kth(z: jax.Array, group: CoderGroup, tokens: int) -> jax.Array:
    """The target_l0 * tokens largest of each coder's z, of N * X in all, or 0, as [N, 1, 1, 1]."""
    count, k = len(group.coders), round(group.template.target_l0 * tokens)
    z = jax.lax.stop_gradient(z).reshape(count, -1)
    edges = jnp.stack([active.kth_largest(z[n], k) for n in range(count)])
    return jax.nn.relu(edges)[:, None, None, None]


def by_token(codes: Codes, values: jax.Array, axis: int, tokens: int) -> jax.Array:
    """Sums over the lists of each token: an axis of L lists -> B tokens."""
    if codes.feature is None:
        return values
    values = jnp.moveaxis(values, axis, 0)
    sums = values[:tokens].at[codes.token[tokens:]].add(values[tokens:])
    return jnp.moveaxis(sums, 0, axis)


def decode(
    w: Weights, f: jax.Array, codes: Codes, x: jax.Array, group: CoderGroup
) -> list[jax.Array]:
    """The nested reconstructions of each of X output layers: a list of [N, M, B, E]."""
    outputs, N = [], x.shape[0]
    for j, w_dec in enumerate(w.w_dec):
        if codes.feature is None:
            parts = _dense_parts(f[:, : j + 1], w_dec, group.ends)
        else:
            pairs = tuple((n * group.X + i, n) for n in range(N) for i in range(j + 1))
            flat = lambda a: a.reshape(-1, *a.shape[2:])
            parts = active.decode_active(
                flat(f), flat(codes.feature), flat(codes.count), flat(w_dec), pairs, N, group.ends
            )
            parts = by_token(codes, parts, 2, x.shape[2])
        constant = w.b_dec[:, j, None, None, :]
        if w.w_skip is not None:
            constant = constant + jnp.einsum("nbd,nde->nbe", x[:, j], w.w_skip[:, j])[:, None]
        outputs.append(jnp.cumsum(parts, 1) + constant if len(group.ends) > 1 else parts + constant)
    return outputs


def _dense_parts(f: jax.Array, w_dec: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """f [N, X, B, F] times w_dec [N, X, F, E] by prefixes: [N, M, B, E], not yet summed up."""
    parts, begin = [], 0
    for end in ends:
        if f.shape[0] * f.shape[1] == 1:
            parts.append((f[0, 0, :, begin:end] @ w_dec[0, 0, begin:end])[None])
        else:
            g, v = f[..., begin:end], w_dec[:, :, begin:end]
            parts.append(jnp.einsum("nxbf,nxfe->nbe", g, v))
        begin = end
    return jnp.stack(parts, 1)


def per_feature(codes: Codes, values: jax.Array, group: CoderGroup) -> jax.Array:
    """Sums over the batch: values like `codes.z` -> [N, X, F]."""
    if codes.feature is None:
        return jnp.sum(values, 2)
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    slots = flat(values), flat(codes.feature), flat(codes.count)
    sums: jax.Array = active.per_feature(*slots, group.template.width)
    return sums.reshape(*values.shape[:2], -1)


def loss(
    w: Weights,
    codes: Codes,
    x: jax.Array,
    y: jax.Array,
    dials: Dials,
    group: CoderGroup,
    kl: jax.Array | None = None,
) -> tuple[jax.Array, Parts]:
    """The sum of the group's losses, and their parts: [N] each, `frequency` [N, X, F].

    `kl` [N], if given, joins the reconstruction as in equation (6).
    """
    config, B = group.template.loss, x.shape[2]
    edge = codes.edge
    if edge is None and group.template.activation != "jumprelu":
        edge = cutoff(codes.z, group)
    if group.template.activation == "batch_topk":
        codes = dataclasses.replace(codes, edge=edge)
    f, on = activate(codes, group)
    outputs = decode(w, f, codes, x, group)
    l0 = sparsity = by_token(codes, jnp.sum(on, (1, 3)), 1, B)  # [N, B]
    if config.sparsity == "tanh":
        sparsity = by_token(codes, jnp.sum(losses.tanh_l0(f, config.tanh_scale), 1), 1, B)
    centre = None if edge is None else jax.lax.stop_gradient(jnp.mean(edge, 2, keepdims=True))
    if edge is None:
        above = jax.nn.relu(codes.z - codes.threshold)
    else:  # the last to be kept is the cut-off itself
        above = on * (codes.z - jax.lax.stop_gradient(edge))
    fired = per_feature(codes, on, group)  # [N, X, F]
    excess = per_feature(codes, above, group)
    whole, nested, variance = reconstruction(outputs, y, config.outlier)
    total = nested if kl is None else losses.end_to_end(nested, kl, config.kl_weight)
    if group.template.activation == "jumprelu":
        total = total + dials.l0_weight * _penalty(sparsity, dials.l0_target, config)
        if config.frequency_weight:
            share = losses.share_of_tokens(fired, excess, w.threshold, B, config.bandwidth)
            share = share.reshape(len(group.coders), -1)
            penalty = losses.frequency_penalty(share, config.frequency_limit)
            total = total + group.of("frequency_weight") * penalty
    if config.dead_weight:
        mean_x = jnp.mean(x, 2)
        if centre is None:
            below = _below_threshold(w, mean_x, excess / B, fired / B, group)
        else:  # the gradient goes to z
            below = centre[..., 0] - _mean_z(w, mean_x, group) + excess / B
        revival = jnp.sum(dials.dead * below, (1, 2))
        total = total + group.of("dead_weight") * revival
    parts = {
        "loss": total,
        "mse": whole,
        "fvu": whole / jnp.maximum(variance, 1e-20),
        "l0": jnp.mean(l0, -1),
        "frequency": jax.lax.stop_gradient(fired) / B,
    }
    if edge is not None and group.template.activation == "batch_topk":
        parts["edge"] = jnp.squeeze(edge, (1, 2, 3))
    return jnp.sum(total), parts


def reconstruction(
    outputs: list[jax.Array], y: jax.Array, outlier: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Squared errors [N] of the whole and of the mean over prefixes, and the variance [N].

    They are means over tokens, with outlier tokens weighted down, and sums over layers; `outputs`
    has X of [N, M, B, E], y is [N, X, B, E].
    """
    weight = losses.token_weight(y, outlier)  # [N, X, B]
    each = [jnp.sum((y[:, j, None] - out) ** 2, -1) for j, out in enumerate(outputs)]
    error = weight[:, :, None] * jnp.stack(each, 1)  # [N, X, M, B]
    centred = jnp.sum((y - jnp.mean(y, 2, keepdims=True)) ** 2, -1)
    over = lambda e: jnp.sum(jnp.mean(e, -1), 1)
    return over(error[:, :, -1]), over(jnp.mean(error, 2)), over(weight * centred)


def _penalty(sparsity: jax.Array, target: jax.Array, config: LossConfig) -> jax.Array:
    """The sparsity term [N] without its weight, from the numbers [N, B] of active features."""
    if config.sparsity != "quadratic":
        return jnp.mean(sparsity, -1)
    if config.per_token:
        return jnp.mean(losses.quadratic_l0(sparsity, target[:, None]), -1)
    return losses.quadratic_l0(jnp.mean(sparsity, -1), target)


def _below_threshold(
    w: Weights, mean_x: jax.Array, excess: jax.Array, fired: jax.Array, group: CoderGroup
) -> jax.Array:
    """The mean over tokens of relu(threshold - z) of JumpReLU coders: [N, X, F].

    mean_x [N, X, D] is the mean token; excess and fired [N, X, F] are the means of relu(z -
    threshold) and of the active tokens. relu(t - z) = (t - z) + relu(z - t), and the first part is
    linear in the mean token: dead features need no dense product.

    The gradient goes to the thresholds, so that a dead feature begins to fire on the tokens that it
    points to most. Through its bias, it would write a constant wherever it fires, which the
    sparsity penalty undoes; the bias is raised only where the threshold is already 0.
    """
    stop = jax.lax.stop_gradient
    lever = jnp.where(w.threshold > 0, w.threshold, -w.b_enc)
    below = stop(w.threshold - _mean_z(w, mean_x, group) + excess)
    return below + stop(1.0 - fired) * (lever - stop(lever))


def _mean_z(w: Weights, mean_x: jax.Array, group: CoderGroup) -> jax.Array:
    """Pre-activations of the mean token: [N, X, F]."""
    z = jnp.einsum("nxd,nxfd->nxf", mean_x, w.w_enc)
    return z + encoder_bias(w, group.template.apply_b_dec_to_input)


def calibrated(w: Weights, x: jax.Array, group: CoderGroup) -> Weights:
    """A threshold for each coder of a TopK or BatchTopK group, at which x has the target L0.

    x is [N, X, B, D] of unit mean squared norm, from tokens that were not trained on: on others,
    more pre-activations are large. For BatchTopK this is the cut-off of training itself, on a
    larger batch; for TopK, the fixed number of features of a token becomes a mean. It is 0 or more.
    """
    batch = dataclasses.replace(group.template, activation="batch_topk")
    batch = CoderGroup((batch, *group.coders[1:]))
    edge = jnp.squeeze(cutoff(encode(w, x, group).z, batch), -1)
    edge = jnp.maximum(jnp.nextafter(edge, -jnp.inf), 0.0)  # JumpReLU is strict, and a ReLU
    return dataclasses.replace(w, threshold=jnp.broadcast_to(edge, w.threshold.shape))
