"""How the next token is chosen: greedily, or by temperature, top-k and top-p; and where it ends.

Temperature, `top_p`, key and stop tokens are data; greedy or not, `top_k` and whether there is a
`top_p` choose the program.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import check_ids
from gemma_scope_jax.model.config import GemmaConfig

STOP_SLOTS = 8  # the array of stop tokens grows in these steps
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
    scores = (logits - jnp.max(logits, -1, keepdims=True)) / sampling.temperature
    ordered = None
    if sampling.top_k is not None:
        ordered = jax.lax.top_k(scores, sampling.top_k)[0]
        scores = jnp.where(scores < ordered[:, -1:], -jnp.inf, scores)
    if sampling.nucleus:
        if ordered is None:
            ordered = jnp.sort(scores, -1, descending=True)
        probs = jnp.exp(ordered - jax.nn.logsumexp(scores, -1, keepdims=True))
        before = jnp.cumsum(probs, -1) - probs
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    # One key per step and row, so that a row's draws do not depend on the number of rows.
    key = jax.random.fold_in(sampling.key, step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, sampling.draws)
    return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
