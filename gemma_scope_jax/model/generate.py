"""Generation: prefill and decoding as one jitted program, with intercepts and captures inside it.

The same `forward` runs on the padded prompts and then on one token at a time: an intercept acts on
a prompt and on every generated token alike, and its reads are joined into one array. The KV cache
and the joined reads are in the carry of a `while_loop` and are updated in place; logits are
computed only for the position that is sampled next.

Prompts are padded on the left, to a bucket: every row fills the same cache slot, and a new prompt
length seldom means a new program. The program depends on the batch size, the bucket,
`max_new_tokens`, the static parts of the intercepts, greedy or not, `top_k`, whether `top_p` and
`logits` are requested, and `halt`. Everything else is data: ids, args, single layers, temperature,
`top_p`, key, stops.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import hooks
from gemma_scope_jax.model import intercept as ic
from gemma_scope_jax.model.arguments import MisfitError, whole_number
from gemma_scope_jax.model.batch import TokenBatch, check_ids, padded_left, refuse_text
from gemma_scope_jax.model.buckets import bucket
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.gemma import Cache, forward, init_cache
from gemma_scope_jax.model.recompilation import note
from gemma_scope_jax.model.sharding import on_auto_axes, own_mesh
from gemma_scope_jax.model.token_choice import TokenChoice, checked_draws, checked_sampling, choose

PAD = 0  # as in `batch.padded`
STOP_TOKENS = (1, 106)  # <eos> and <end_of_turn>


@flax.struct.dataclass
class Generation:
    """What `generate` returns.

    tokens   int32 [B, max_new_tokens]: the generated ids, a stop token included, then 0
    lengths  int32 [B]: how many of them were generated
    prompts  the prompts' ids, one int32 array per row
    reads    the intercepts' reads by name, see `generate`
    logits   None, or float32 [B, max_new_tokens, V]: what each token was chosen from
    """

    tokens: jax.Array
    lengths: jax.Array
    prompts: tuple[np.ndarray, ...]
    reads: dict[str, Any]
    logits: jax.Array | None = None

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 [B]: the number of tokens of each prompt."""
        return np.array([len(p) for p in self.prompts], np.int32)

    @property
    def sequences(self) -> list[np.ndarray]:
        """Each row's prompt and generated ids, without padding: int32 [T_row] each."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [np.concatenate([p, t[:n]]) for p, t, n in zip(self.prompts, tokens, lengths)]


@own_mesh
def generate(
    model: Model,
    prompts: Any,
    max_new_tokens: int,
    intercepts: ic.Intercept | Sequence = (),
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | int = 0,
    draws: Any = None,
    stop_tokens: Sequence[int] = STOP_TOKENS,
    logits: bool = False,
    halt: str | None = None,
    pad: bool = True,
) -> Generation:
    """Continue `prompts` by up to `max_new_tokens` tokens each; a row ends at a stop token.

    prompts      int ids [B, T], a list of B 1-D id arrays of any lengths, or a `TokenBatch` (see
                 `gs.tokens`); each row is continued as if it were alone
    intercepts   act on the prompt and on every generated token, by absolute position; args must
                 broadcast over any number of tokens ([D], [B, 1, D], not [B, T, D])
    temperature  0 is greedy, whatever `top_k` and `top_p`. Otherwise logits are divided by it, cut
                 to the `top_k` largest, then to the fewest whose probability reaches `top_p`;
                 ties with the last one kept are kept too
    key          a `jax.random.key` or an int seed; row b draws by the key and b alone
    draws        the numbers that rows draw by instead of b, ints [B]: rows with one number and one
                 distribution draw the same
    logits       also return the logits of every choice (before temperature)
    halt         the name of a read, bool [B, T]: a row ends after the first generated token at
                 which it is true. The prompt's tokens do not count
    pad          round the prompts' length up to one of a few; else only to the longest prompt

    Reads. The token axis of a value is the one whose size follows the number of tokens; the batch
    axis is just before it: [B, T, ...] or [n, B, T, ...] (patterns: [B, N, T, S]). Along it the
    result holds prompt and generated tokens at index = position: longest prompt + max_new_tokens
    entries, zeros past a row's end; the same for the keys S of `attn_pattern`. The last token is
    run too, so reads equal those of a plain forward pass over `sequences`. Values without a token
    axis (means, counts, whole `fold` states) are stacked in front: the prompts', then one per step.
    Functions that reduce over tokens must respect `ctx.valid`, False on padding; those that write
    `attn_pattern` see cache slots, a prompt's padding first. `fold` starts afresh in each pass.

    A host function: call it outside `jit`. Raises `InputError` for empty prompts, ids outside the
    vocabulary, more tokens than the model's context, settings out of range, unfit intercepts.
    """
    items = hooks.flatten(intercepts)
    hooks.check(items, model.config.layers, None)
    rows = _checked_prompts(model.config, prompts)
    new = whole_number("max_new_tokens", max_new_tokens, 1)
    longest = max(len(r) for r in rows)
    if longest + new > model.config.context:
        most = f"the model's context of {model.config.context}"
        advice = "shorten the prompt or lower max_new_tokens"
        raise InputError(f"a prompt of {longest} tokens and {new} new ones exceed {most}: {advice}")
    hooks.check_data(items, model.dtype, longest, longest + new)
    # with one column, the token axis of a read could not be recognised
    width = bucket(longest, 2**31, len(rows)) if pad else max(longest, 2)
    batch = padded_left(rows, context_size=width)
    tokens, segments = batch.tokens, batch.segments
    drawn = checked_draws(draws, len(rows))
    sampling = checked_sampling(model.config, temperature, top_k, top_p, key, stop_tokens, drawn)
    items, new_tokens = hooks.layers_as_data(items), {"numbers of new tokens": new}
    if halt is not None and halt not in (names := [i.name for i in items if i.name is not None]):
        raise InputError(f"halt is {halt!r}, but the reads are {', '.join(names) or 'none'}")
    chosen = (sampling.greedy, sampling.top_k, sampling.nucleus, logits, halt)
    fixed = (model.config, model.dtype, *chosen)
    note("generate", items, tokens.shape, (*fixed, len(sampling.stop)), **new_tokens)
    model, items = on_auto_axes((model, items))
    program = partial(_generate, new=new, logits=bool(logits), halt=halt)
    try:
        ids, lengths, tracks, chosen = program(model, tokens, segments, items, sampling)
    except (TypeError, ValueError) as error:
        if not items or (isinstance(error, InputError) and not isinstance(error, MisfitError)):
            raise
        raise InputError(
            f"an intercept does not fit: {error}. It must take {tokens.shape[0]} x "
            f"{tokens.shape[1]} tokens (the prompts, padded on the left), then {len(rows)} x 1"
        ) from error
    reads = _map_tracks(lambda track: track.cut(longest + new), tracks)
    return Generation(ids, lengths, tuple(rows), reads, chosen)


def _checked_prompts(config: GemmaConfig, prompts: Any) -> list[np.ndarray]:
    """The prompts as int32 arrays, one per row."""
    if isinstance(prompts, TokenBatch):
        tokens, places = np.asarray(prompts.tokens), prompts.document_slices()
        if [row for row, _ in places] != list(range(len(tokens))):
            one = "generate takes one document per row"
            raise InputError(f"{one}, not a packed batch or empty rows")
        prompts = [tokens[place] for place in places]
    refuse_text(prompts)
    wanted = "prompts must be ids [B, T] or a list of 1-D id arrays (for one prompt, ids[None])"
    if getattr(prompts, "ndim", 2) != 2 or isinstance(prompts, str):
        raise InputError(wanted)
    try:
        rows = np.asarray(prompts) if hasattr(prompts, "ndim") else prompts
        rows = [np.asarray(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(f"{wanted}: {error}") from None
    if not rows:
        raise InputError("no prompts: pass at least one")
    for n, row in enumerate(rows):
        if row.ndim == 1 and not row.size:
            raise InputError(f"prompt {n} is empty: it needs at least one token, such as <bos>")
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise InputError(f"{wanted}; prompt {n} is {row.dtype}{list(row.shape)}")
        check_ids(config, row, f"prompt {n}: ")
    return [row.astype(np.int32) for row in rows]


@flax.struct.dataclass
class _Track:
    """One array of a read over all passes: along its token axis, or stacked if it has none."""

    value: jax.Array
    batch: int = flax.struct.field(pytree_node=False, default=0)
    tokens: int | None = flax.struct.field(pytree_node=False, default=None)
    keys: int | None = flax.struct.field(pytree_node=False, default=None)

    def axes(self) -> list[int]:
        return [a for a in (self.tokens, self.keys) if a is not None]

    def put(self, value: jax.Array, step: jax.Array, prompt: int) -> "_Track":
        """Add the value read in decoding step `step`, after a prompt of `prompt` slots."""
        if self.tokens is None:
            value = jax.lax.dynamic_update_index_in_dim(self.value, value, step + 1, 0)
        else:
            place = (step + prompt, self.tokens)
            value = jax.lax.dynamic_update_slice_in_dim(self.value, value, *place)
        return self.replace(value=value)  # type: ignore[attr-defined]

    def aligned(self, slots: jax.Array) -> "_Track":
        """From slots to positions; `slots` [B, S]: where each position is, S if nowhere."""
        value = self.value
        for axis in self.axes():
            take = partial(jnp.take, axis=axis - 1, mode="fill", fill_value=0)
            value = jax.vmap(take, (self.batch, 0), self.batch)(value, slots)
        return self.replace(value=value)  # type: ignore[attr-defined]

    def cut(self, positions: int) -> jax.Array:
        """The value without the positions added by the bucket's padding."""
        value = self.value
        for axis in self.axes():
            value = jax.lax.slice_in_dim(value, 0, min(positions, value.shape[axis]), axis=axis)
        return value


def _map_tracks(fn: Callable, tracks: Any, *rest: Any) -> Any:
    return jax.tree.map(fn, tracks, *rest, is_leaf=lambda a: isinstance(a, _Track))


def _track(item: ic.Intercept, passes: int, B: int, P: int, many: jax.Array, one: Any) -> _Track:
    """Room for one array, starting with the prompts' value `many`; each decoding step adds one
    shaped like `one`."""
    if many.shape == one.shape:
        return _Track(jnp.zeros((passes + 1, *many.shape), many.dtype).at[0].set(many))
    differ = [a for a, (m, o) in enumerate(zip(many.shape, one.shape)) if m != o]
    axis = differ[0] if differ else 0
    pattern = item.site == "attn_pattern" and item.kind == "read"  # heads before the tokens
    batch = (0 if item.of_one_layer else 1) if pattern else axis - 1
    follows = many.ndim == one.ndim and (many.shape[axis], one.shape[axis]) == (P, 1)
    if not follows or len(differ) > 1 or not 0 <= batch < axis or many.shape[batch] != B:
        raise InputError(
            f"the read {item.name!r} is {list(many.shape)} for {B} x {P} tokens but "
            f"{list(one.shape)} for {B} x 1: return [B, T, ...], or a size independent of T"
        )
    keys = many.ndim - 1 if pattern and many.shape[-1] == P + passes else None
    room = [(0, passes if a == axis else 0) for a in range(many.ndim)]
    return _Track(jnp.pad(many, room), batch, axis, keys)


def _check_halt(halt: str | None, one: Any, B: int) -> None:
    """Raise `InputError` unless the read `halt` is bool [B, 1] for one token a row."""
    if halt is None or (getattr(one, "shape", None) == (B, 1) and one.dtype == bool):
        return
    got = f"{one.dtype}{list(one.shape)}" if hasattr(one, "shape") else type(one).__name__
    raise InputError(f"the read {halt!r} is {got} for {B} x 1 tokens: halt needs bool [B, T]")


@flax.struct.dataclass
class _State:
    """The carry of the decoding loop."""

    step: jax.Array  # int32 scalar: the column of `tokens` to run next
    tokens: jax.Array  # int32 [B, passes + 1]
    real: jax.Array  # bool [B]: that column holds a token of the row, not padding
    alive: jax.Array  # bool [B]: and not a stop token, so another one follows
    lengths: jax.Array  # int32 [B]: tokens chosen so far
    cache: Cache | None
    reads: Any  # tracks
    logits: jax.Array | None  # float32 [B, passes + 1, V]


def _emit(sampling: TokenChoice, state: _State, step: jax.Array, logits: jax.Array) -> _State:
    """Choose column `step` of the tokens from `logits` [B, V]."""
    put = partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=1)
    token = jnp.where(state.alive, choose(sampling, logits, step), PAD)
    stops = (token[:, None] == sampling.stop[None, :]).any(-1)
    return state.replace(  # type: ignore[attr-defined]
        step=step,
        tokens=put(state.tokens, token),
        real=state.alive,
        alive=state.alive & ~stops,
        lengths=state.lengths + state.alive.astype(jnp.int32),
        logits=None if state.logits is None else put(state.logits, logits),
    )


@partial(jax.jit, static_argnames=("new", "logits", "halt"))
def _generate(
    model: Model, tokens, segments, items, sampling, *, new: int, logits: bool, halt: str | None
):
    """Tokens [B, new], lengths [B], tracks in order of position, logits [B, new, V] or None."""
    B, P = tokens.shape
    named = {i.name: i for i in items if i.name is not None}
    passes = new if named else new - 1  # the last token is run only if something is read
    prompt = jnp.sum(segments, 1, dtype=jnp.int32)
    run = partial(forward, model, intercepts=items, remat=None)

    def decode(token, step, real, cache):
        positions, valid = (prompt + step)[:, None], real[:, None].astype(jnp.int32)
        return run(token, positions=positions, segments=valid, cache=cache, logits="last")

    def body(s: _State) -> _State:
        token = jax.lax.dynamic_slice_in_dim(s.tokens, s.step, 1, axis=1)
        out = decode(token, s.step, s.real, s.cache)
        reads = _map_tracks(lambda track, value: track.put(value, s.step, P), s.reads, out.reads)
        s = s.replace(cache=out.cache, reads=reads)  # type: ignore[attr-defined]
        if halt is not None:
            s = s.replace(alive=s.alive & ~out.reads[halt][:, 0])  # type: ignore[attr-defined]
        return _emit(sampling, s, s.step + 1, out.logits[:, -1])

    cache = init_cache(model.config, B, P + passes, model.dtype)
    everywhere = any(i.site in ("final_scale", "logits") for i in named.values())
    first = run(tokens, segments=segments, cache=cache, logits="all" if everywhere else "last")
    zero, yes = jnp.zeros((), jnp.int32), jnp.ones(B, bool)
    reads = {}
    if named:
        one = jax.eval_shape(decode, tokens[:, :1], zero, yes, first.cache).reads
        _check_halt(halt, one.get(halt), B)
        for name, item in named.items():
            room = partial(_track, item, passes, B, P)
            reads[name] = jax.tree.map(room, first.reads[name], one[name])
    ids = jnp.full((B, passes + 1), PAD, jnp.int32)
    kept = jnp.zeros((B, passes + 1, model.config.vocab), jnp.float32) if logits else None
    state = _State(zero, ids, yes, yes, jnp.zeros(B, jnp.int32), first.cache, reads, kept)
    state = _emit(sampling, state, zero, first.logits[:, -1])
    more = lambda s: (s.step < passes) & jnp.any(s.real if named else s.alive)
    state = jax.lax.while_loop(more, body, state)

    lengths = jnp.minimum(state.lengths, new)
    # Position p of a row is in slot padding + p; past the row's end there is nothing.
    p = jnp.arange(P + passes, dtype=jnp.int32)[None, :]
    slots = jnp.where(p < (prompt + lengths)[:, None], p + (P - prompt)[:, None], P + passes)
    reads = _map_tracks(lambda track: track.aligned(slots), state.reads)
    kept = None if state.logits is None else state.logits[:, :new]
    return state.tokens[:, :new], lengths, reads, kept
