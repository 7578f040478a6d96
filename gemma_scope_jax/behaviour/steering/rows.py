"""The program of steering: what a batch's steps do to an activation.

Every operation changes an activation along one or two directions, by amounts that depend on one or
two inner products. So of a coder only the columns and rows of the features named are used, and the
operation, layer, strength, tokens and condition are numbers in arrays: a sweep over features,
strengths and prompts is one batch, and nothing recompiles.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gemma_scope_jax.behaviour.steering.spec import OPS
from gemma_scope_jax.coders.coder import float32, jump_relu
from gemma_scope_jax.model.intercept import tokenwise

EXACT = jax.lax.Precision.HIGHEST
ALWAYS = -1  # the layer of a step without a condition


@flax.struct.dataclass
class Lines:
    """Affine functions of activations: for each source site the vectors [..., D]; bias, threshold
    [...]. Where a step reads another site its vector is 0."""

    vectors: tuple[Any, ...]
    bias: Any
    threshold: Any  # -inf: a plain direction


@flax.struct.dataclass
class SteeringRows:
    """B rows of E steps at one site, as arrays [B, E, ...], float32 unless said otherwise.

    op        int32, index into `OPS`; -1: nothing
    layer     int32: where the features are read and directions act
    strength  in_norms bool
    target    what is read, [B, E, 2, ...]: the feature or direction, and the other one of a swap
    write     [B, E, 2, W, D] directions, and int32 [B, E, W] the layers they are written to
    when      [B, E, ...] the conditions, at `when_layer` (int32; -1: always), `below` bool
    where     bool [B, E, S] by position, and bool [B, E] after it
    """

    op: Any
    layer: Any
    strength: Any
    in_norms: Any
    target: Lines
    write: Any
    write_layer: Any
    when: Lines
    when_layer: Any
    below: Any
    where: Any
    after: Any


def nothing_yet(embed, rows: SteeringRows):
    """The first state: no condition holds, and nothing is carried to later layers."""
    shape = (*embed.shape[:2], rows.op.shape[1])
    return jnp.zeros(shape, bool), jnp.zeros((*shape, 2), jnp.float32)


@tokenwise
def steered(x, ctx, state, rows: SteeringRows, *, sources):
    """The activation under the steps of each row, and the state (see `nothing_yet`): whether each
    condition holds, and how far each step moved along its directions."""
    here = [rows.layer == ctx.layer, rows.when_layer == ctx.layer, rows.write_layer == ctx.layer]
    active = jnp.stack([a.any() for a in here]).any()
    act = lambda: _steer(x, ctx, state, rows, sources)
    return jax.lax.cond(active, act, lambda: (x, state))


def _steer(x, ctx, state, rows: SteeringRows, sources):
    holds, moved = state
    y = float32(x)
    seen = [{**{s: float32(a) for s, a in ctx.seen.items() if s in some}, ctx.site: y}
            for some in sources]  # fmt: skip
    value = _values(rows.when, [seen[1][s] for s in sources[1]], y.shape[:2])
    fires = (value > rows.when.threshold[:, None]) ^ rows.below[:, None]
    at = lambda layers: (layers == ctx.layer)[:, None]  # [B, 1, E]
    holds = jnp.where(at(rows.when_layer), fires, holds)
    tokens = jnp.moveaxis(_tokens(rows, ctx), 1, 2) & (holds | (rows.when_layer == ALWAYS)[:, None])
    for e in range(rows.op.shape[1]):
        step = jax.tree.map(lambda a, e=e: a[:, e], rows)
        inputs = [y if s == ctx.site else seen[0][s] for s in sources[0]]
        new = _amounts(step, y, inputs)
        new = jnp.where((at(rows.layer) & tokens)[:, :, e, None], new, 0.0)
        own = jnp.where(at(rows.layer)[:, :, e, None], new, moved[:, :, e])
        moved = moved.at[:, :, e].set(own)
        write = jnp.where((step.write_layer == ctx.layer)[:, None, :, None], step.write, 0.0)
        change = jnp.einsum("btk,bkd->btd", own, write.sum(2), precision=EXACT)
        y = y + change
    changed = jnp.where(
        (rows.write_layer == ctx.layer).any(-1)[:, None], (moved != 0).any(-1), False
    )
    return jnp.where(changed.any(-1)[..., None], y.astype(x.dtype), x), (holds, moved)


def _tokens(rows: SteeringRows, ctx):
    """bool [B, E, T]: the tokens that each step is for."""
    size, positions = rows.where.shape[-1], ctx.positions[:, None]
    where = jnp.broadcast_to(rows.where, (positions.shape[0], *rows.where.shape[1:]))
    inside = jnp.take_along_axis(where, jnp.minimum(positions, size - 1), axis=-1)
    return jnp.where(positions < size, inside, rows.after[..., None]) & ctx.valid[:, None]


def _values(lines: Lines, inputs, shape):
    """x . v + bias at every token: [B, T, ...] of lines [B, ...]."""
    total = jnp.broadcast_to(lines.bias[:, None], (*shape, *lines.bias.shape[1:]))
    for x, v in zip(inputs, lines.vectors):
        flat = v.reshape(v.shape[0], -1, v.shape[-1])
        found = jnp.einsum("btd,bnd->btn", x, flat, precision=EXACT)
        total = total + found.reshape(*shape, *lines.bias.shape[1:])
    return total


def _amounts(step: SteeringRows, y, inputs):
    """How far one step [B, ...] moves along its two directions: [B, T, 2]; see `SteeringStep`."""
    z = _values(step.target, inputs, y.shape[:2])
    f = jump_relu(z, step.target.threshold[:, None])
    s, p = step.strength[:, None], z[..., 0]
    norm = jnp.linalg.norm(y, axis=-1)
    level = jnp.where(step.in_norms[:, None], s * norm, s)
    one, other = f[..., 0], f[..., 1]
    amounts = {
        "add": level,
        "rescale": (s - 1.0) * p,
        "cap": jnp.minimum(level - p, 0.0),
        "floor": jnp.maximum(level - p, 0.0),
        "project_out": -p,
        "clamp": s - one,
        "clamp_min": jnp.maximum(s - one, 0.0),
        "clamp_max": jnp.minimum(s - one, 0.0),
        "scale": (s - 1.0) * one,
        "ablate": -one,
        "swap": other - one,
    }
    each = jnp.stack([jnp.broadcast_to(amounts[op], p.shape) for op in OPS])
    chosen = jnp.take_along_axis(each, jnp.maximum(step.op, 0)[None, :, None], axis=0)[0]
    chosen = jnp.where(step.op[:, None] < 0, 0.0, chosen)
    swapped = jnp.where((step.op == OPS.index("swap"))[:, None], -chosen, 0.0)
    return jnp.stack([chosen, swapped], -1)
