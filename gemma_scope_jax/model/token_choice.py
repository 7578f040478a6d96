"""How the next token is chosen: greedily, or by temperature, top-k and top-p; and where it ends.

Temperature, `top_p`, key and stop tokens are data; greedy or not, `top_k` and whether there is a
`top_p` choose the program.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import check_ids
from gemma_scope_jax.model.config import GemmaConfig

STOP_SLOTS = 8  # the array of stop tokens grows in these steps
BLOCK = 512  # ids that are drawn among at a time
TINY = float(np.finfo(np.float32).tiny)


@flax.struct.dataclass
class TokenChoice:
    """How the next token is chosen; `greedy`, `top_k` and `nucleus` choose the program."""

    key: jax.Array
    temperature: np.float32
    top_p: np.float32
    stop: np.ndarray  # int32 [n], filled up with -1
    draws: np.ndarray  # int32 [B]
    greedy: bool = flax.struct.field(pytree_node=False)
    top_k: int | None = flax.struct.field(pytree_node=False)
    nucleus: bool = flax.struct.field(pytree_node=False)


def checked_sampling(
    config: GemmaConfig, temperature, top_k, top_p, key, stop_tokens, draws: np.ndarray
) -> TokenChoice:
    """The arguments of `generate` as data. Raises `InputError` for what is out of range."""
    try:
        heat, p = float(temperature), 1.0 if top_p is None else float(top_p)
    except (TypeError, ValueError):
        given = f"{temperature!r} and {top_p!r}"
        raise InputError(f"temperature and top_p must be numbers, got {given}") from None
    if heat != 0.0 and not TINY <= heat < 1 / TINY:
        allowed = f"{TINY:.3g} to {1 / TINY:.3g}"
        raise InputError(f"temperature must be 0 (greedy) or {allowed}, got {heat}")
    if not 0.0 < p <= 1.0:
        raise InputError(f"top_p must be above 0 and at most 1, got {p}")
    if top_k is not None:
        top_k = min(whole_number("top_k", top_k, 1), config.vocab)
    try:
        stop = np.asarray(tuple(stop_tokens))
    except (TypeError, ValueError):
        stop = np.asarray([None])
    if stop.size:
        if stop.ndim != 1 or stop.dtype.kind not in "iu":
            raise InputError(f"stop_tokens must be a tuple of token ids, not {stop_tokens!r}")
        check_ids(config, stop, "stop_tokens: ")
    filled = np.full(max(1, -(-stop.size // STOP_SLOTS)) * STOP_SLOTS, -1, np.int32)
    filled[: stop.size] = stop
    data = (_checked_key(key), np.float32(heat), np.float32(max(p, TINY)), filled, draws)
    greedy = heat == 0.0
    return TokenChoice(*data, greedy, None if greedy else top_k, not greedy and p < 1.0)


def _checked_key(key: Any) -> jax.Array:
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        try:
            return jax.random.key(int(key))
        except OverflowError:
            raise InputError(f"the seed {key} does not fit into 64 bits") from None
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if isinstance(key, jax.Array) and is_key and not key.ndim:
        return key
    raise InputError(f"key must be one jax.random.key or an int seed, not {key!r}")


def checked_draws(draws: Any, rows: int) -> np.ndarray:
    """The number that each row draws by, int32 [rows]; by default its own."""
    if draws is None:
        return np.arange(rows, dtype=np.int32)
    found = np.asarray(draws)
    if found.shape != (rows,) or found.dtype.kind not in "iu":
        raise InputError(f"draws must be one whole number a prompt, ints [{rows}]")
    return found.astype(np.int32)


def choose(sampling: TokenChoice, logits: jax.Array, step: jax.Array) -> jax.Array:
    """The next ids int32 [B] from logits [B, V]: temperature, then top-k, then top-p."""
    if sampling.greedy:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    # relative to the largest, so that small temperatures never overflow
    weights = jnp.exp((logits - jnp.max(logits, -1, keepdims=True)) / sampling.temperature)
    few = weights
    if sampling.top_k is not None:
        few = jax.lax.top_k(weights, sampling.top_k)[0]
        weights = jnp.where(weights < few[:, -1:], 0.0, weights)
    if sampling.nucleus:
        weights = jnp.where(weights < _least_of_nucleus(few, sampling.top_p), 0.0, weights)
    # One key per step and row, so that a row's draws do not depend on the number of rows.
    key = jax.random.fold_in(sampling.key, step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, sampling.draws)
    return _drawn(weights, jax.vmap(jax.random.uniform)(keys)[:, None])


def _least_of_nucleus(weights: jax.Array, top_p: ArrayLike) -> jax.Array:
    """The largest weight [B, 1] such that those not below it are `top_p` of all, weights [B, N].

    Sorting a vocabulary takes longer than the model. Floats that are not negative are ordered as
    their bits are, so 31 halvings find the bound exactly.
    """
    enough = top_p * weights.sum(-1, keepdims=True)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low + 1) // 2
        bound = jax.lax.bitcast_convert_type(middle, jnp.float32)
        kept = jnp.where(weights >= bound, weights, 0.0).sum(-1, keepdims=True) >= enough
        return jnp.where(kept, middle, low), jnp.where(kept, high, middle - 1)

    low = jnp.zeros((len(weights), 1), jnp.int32)
    high = jax.lax.bitcast_convert_type(weights.max(-1, keepdims=True), jnp.int32)
    return jax.lax.bitcast_convert_type(
        jax.lax.fori_loop(0, 31, halve, (low, high))[0], jnp.float32
    )


def _drawn(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Ids int32 [B] drawn in proportion to weights [B, V], by u [B, 1] in [0, 1): first a block of
    ids, then one of its ids. One number a row is drawn, where Gumbel noise takes one a token."""
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    sums = blocks.sum(-1)
    block, u = _pick(sums, u)
    inside = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    return (block * BLOCK + _pick(inside, u)[0])[:, 0].astype(jnp.int32)


def _pick(weights: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where u [B, 1] falls among weights [B, N], int32 [B, 1], and how far into that weight."""
    ends = jnp.cumsum(weights, -1)
    target = u * ends[:, -1:]
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, -1), -1)[:, None]
    at = jnp.minimum((ends <= target).sum(-1, keepdims=True), last).astype(jnp.int32)
    own = jnp.take_along_axis(weights, at, -1)
    before = jnp.take_along_axis(ends, at, -1) - own
    return at, jnp.clip((target - before) / own, 0.0, 1.0)
