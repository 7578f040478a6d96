"""What an audit measures a model by: log-probabilities of continuations, loss on text, and answers.

Items are packed into rows of a few lengths, so a set of thousands needs two or three programs and
little padding; where many continuations follow one prompt, it runs once and they go on from its
keys and values. The model's last residuals never leave the device: only the log-probabilities of
the wanted tokens do. Logits are computed for those tokens alone, a chunk at a time.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import hooks
from gemma_scope_jax.model.arguments import whole_number
from gemma_scope_jax.model.batch import TokenBatch, check_ids, padded, padded_left
from gemma_scope_jax.model.buckets import bucket
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import Cache, init_cache, unembed
from gemma_scope_jax.model.generate import generate
from gemma_scope_jax.model.intercept import Intercept, capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.sharding import mesh_under, own_mesh, shard_batch
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.probing.pooling import packed_rows
from gemma_scope_jax.progress import Report

ROW = 256  # tokens of a row, which holds several short items
CHUNK = 128  # tokens whose logits [128, V] exist at a time
FINAL = "final residual of the scored tokens"

Ids = np.ndarray  # int [n]


@own_mesh
def continuation_logprobs(
    model: Model,
    prompts: Sequence[Any],
    continuations: Sequence[Any],
    intercepts: Intercept | Sequence = (),
    *,
    tokens: int = 2048,
    report: Report | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each continuation after its prompt, teacher-forced, in nats.

    prompts        int ids [n] each, at least one token (`<bos>`)
    continuations  int ids [m] each; none gives a log-probability of 0
    intercepts     act on prompt and continuation by position in the item; several items share a
                   row, so values must fit any number of rows and tokens ([D], not [B, T, D])
    tokens         of a batch, about

    Returns the sums over the continuation's tokens, float64 [N], and the numbers of tokens, int
    [N]. Raises `InputError` for items that are not ids of the model or exceed its context.
    """
    if len(prompts) != len(continuations):
        had = f"{len(prompts)} prompts and {len(continuations)} continuations"
        raise InputError(f"each prompt needs one continuation: got {had}")
    tokens = whole_number("tokens", tokens, 1)
    heads = [_ids(model, p, f"prompt {n}", 1) for n, p in enumerate(prompts)]
    tails = [_ids(model, c, f"continuation {n}", 0) for n, c in enumerate(continuations)]
    items = (*hooks.flatten(intercepts), capture("resid_final", name=FINAL))
    mesh = mesh_under(model.params.embed)
    put = (lambda a: a) if mesh is None else partial(shard_batch, mesh)
    sums, counts = np.zeros(len(heads)), np.array([len(t) for t in tails], int)
    done, total = 0, sum(len(h) + len(t) for h, t in zip(heads, tails))
    if mesh is None and (groups := _shared(model, heads, tails)):
        batches = _after_prompts(model, items, heads, tails, groups, tokens)
    else:
        batches = _whole_items(model, items, heads, tails, tokens, put, mesh)
    for which, states, places in batches:
        wanted = np.concatenate([tails[i] for i in which])
        size = states.shape[0] * states.shape[1]
        found = _log_p(model, states, *_filled(places, wanted, size))
        ends = np.cumsum(counts[which])
        values = np.asarray(found)[: ends[-1]].astype(np.float64)
        for i, part in zip(which, np.split(values, ends[:-1])):
            sums[i] = part.sum()
        done += sum(len(heads[i]) + len(tails[i]) for i in which)
        if report is not None:
            report(done, total)
    return sums, counts


# Items in turn, the final states [B, T, D] of a batch, and for each token of their continuations
# the place, in the flattened batch, of the state that it is predicted from.
_Batches = Iterator[tuple[list[int], jax.Array, np.ndarray]]


def _whole_items(model, items, heads, tails, tokens: int, put, mesh) -> _Batches:
    """Prompts with their continuations, several in a row."""
    texts = [np.concatenate(pair) for pair in zip(heads, tails)]
    multiple = 1 if mesh is None else mesh.shape["data"]
    for rows, shape in _batches(model, texts, tokens, multiple):
        batch, starts = _packed(texts, rows, shape)
        which = [i for row in rows for i in row]
        at = [start + len(heads[i]) - 1 for start, i in zip(starts, which)]
        places = np.concatenate([np.arange(a, a + len(tails[i])) for a, i in zip(at, which)])
        out = run(
            model, put(batch.tokens), items, segments=put(batch.segments), logits="none", pad=False
        )
        yield which, out.reads[FINAL], places


def _shared(model: Model, heads: Sequence[Ids], tails: Sequence[Ids]) -> list[list[int]]:
    """Items by prompt, if running each prompt once saves a third of the tokens; else none."""
    found: dict[bytes, list[int]] = {}
    for i, (head, tail) in enumerate(zip(heads, tails)):
        if len(head) + len(tail) > model.config.context:
            return []  # refused where items are packed
        found.setdefault(head.tobytes(), []).append(i)
    groups = list(found.values())
    after = sum(len(t) for t in tails)
    once = sum(len(heads[group[0]]) for group in groups) + after
    return groups if 1.5 * once < sum(map(len, heads)) + after else []


def _after_prompts(model, items, heads, tails, groups: list[list[int]], tokens: int) -> _Batches:
    """Each prompt once, and all its continuations from a copy of its keys and values."""
    longest = max(map(len, tails))
    more = -(-max(longest - 1, 0) // 8) * 8  # the last token predicts nothing that is asked
    each = max(map(len, groups))
    for width, which in _by_width(model, [heads[group[0]] for group in groups], 1):
        mine = [groups[n] for n in which]
        # powers of 4: few sizes of batches
        rows = min(_power(sum(map(len, mine))), _power(tokens // (width + more) // 4 + 1))
        rows = max(rows, _power(each))
        count = min(_power(len(mine)), _power(rows // each // 4 + 1))
        for start in range(0, len(mine), count):
            some = mine[start : start + count]
            yield _one_batch(model, items, heads, tails, some, (count, width, rows, more))


def _one_batch(model, items, heads, tails, groups: list[list[int]], shape: tuple[int, ...]):
    count, width, rows, more = shape
    before = padded_left([heads[group[0]] for group in groups], count, width)
    cache = init_cache(model.config, count, width + more, model.dtype)
    options: dict[str, Any] = {"logits": "none", "pad": False}
    out = run(model, before.tokens, items, segments=before.segments, cache=cache, **options)
    which = [i for group in groups for i in group]
    owner = np.zeros(rows, np.int32)
    owner[: len(which)] = [n for n, group in enumerate(groups) for _ in group]
    states, cache = _copied(out.reads[FINAL], out.cache, owner)
    if more:
        fed = padded([tails[i][:-1] for i in which], rows, more)
        starts = np.ones(rows, np.int32)
        starts[: len(which)] = [len(heads[i]) for i in which]
        at = starts[:, None] + np.arange(more, dtype=np.int32)
        at = np.minimum(at, model.config.context - 1)  # where there are no tokens
        options |= {"positions": at, "segments": fed.segments, "cache": cache}
        states = jnp.concatenate([states, run(model, fed.tokens, items, **options).reads[FINAL]], 1)
    places = [r * (1 + more) + np.arange(len(tails[i])) for r, i in enumerate(which)]
    return which, states, np.concatenate(places)


@jax.jit
def _copied(states: jax.Array, cache: Cache, owner: jax.Array) -> tuple[jax.Array, Cache]:
    """The last states [R, 1, D] and the cache, each row that of its owner."""
    take = lambda a, axis=0: jnp.take(a, owner, axis=axis)
    rows = {"k": take(cache.k, 1), "v": take(cache.v, 1), "last": take(cache.last)}
    rows["tokens"] = jax.tree.map(take, cache.tokens)
    return take(states[:, -1:]), cache.replace(**rows)  # type: ignore[attr-defined]


def text_loss(
    model: Model,
    texts: Sequence[Any],
    intercepts: Intercept | Sequence = (),
    *,
    tokens: int = 2048,
    report: Report | None = None,
) -> np.ndarray:
    """The mean loss of each text, in nats a token after the first: float64 [N].

    texts  int ids [n] each, `<bos>` first, at least two tokens
    """
    for number, ids in enumerate(texts):
        if len(ids) < 2:
            raise InputError(f"text {number} has {len(ids)} tokens: a loss needs at least 2")
    heads, tails = [ids[:1] for ids in texts], [ids[1:] for ids in texts]
    options: dict[str, Any] = {"tokens": tokens, "report": report}
    sums, counts = continuation_logprobs(model, heads, tails, intercepts, **options)
    return -sums / np.maximum(counts, 1)


def generated(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Any],
    max_new_tokens: int,
    intercepts: Intercept | Sequence = (),
    *,
    rows: int = 16,
    report: Report | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt (int ids [n]), without control tokens.

    Prompts of like lengths share a batch of `rows`. Raises `InputError` as `generate` does.
    """
    ids = generated_ids(model, prompts, max_new_tokens, intercepts, rows=rows, report=report)
    return [tokenizer.decode(some) for some in ids]


def generated_ids(
    model: Model,
    prompts: Sequence[Any],
    max_new_tokens: int,
    intercepts: Intercept | Sequence = (),
    *,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = 16,
    report: Report | None = None,
) -> list[np.ndarray]:
    """What the model writes after each prompt (int ids [n]), int32 [m] with a stop token at its
    end, if there is one. A prompt draws by its number, in whatever batch."""
    whole_number("rows", rows, 1)
    order = np.argsort([len(p) for p in prompts], kind="stable")
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for start in range(0, len(order), rows):
        which = order[start : start + rows].tolist()
        # the last batch is filled up, so that its number of rows compiles nothing
        filled = which + [which[0]] * (rows - len(which))
        how: dict[str, Any] = {"temperature": temperature, "key": seed, "draws": filled}
        out = generate(model, [prompts[i] for i in filled], max_new_tokens, intercepts, **how)
        ids, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        for r, i in enumerate(which):
            found[i] = ids[r, : lengths[r]]
        if report is not None:
            report(min(start + rows, len(order)), len(order))
    return found


def _ids(model: Model, given: Any, what: str, least: int) -> Ids:
    ids = np.asarray(given)
    if not ids.size and ids.ndim == 1:
        ids = ids.astype(np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{what} must be token ids int [n], got {ids.dtype}{list(ids.shape)}")
    if len(ids) < least:
        raise InputError(f"{what} is empty: it needs at least one token, such as <bos>")
    if len(ids):
        check_ids(model.config, ids, f"{what}: ")
    return ids.astype(np.int32)


def _batches(
    model: Model, texts: Sequence[Ids], tokens: int, multiple: int
) -> Iterator[tuple[list[list[int]], tuple[int, int]]]:
    """Rows of indices of texts, several in a row, and the shape (rows, width) of each batch: few
    shapes, little padding. A batch has a multiple of `multiple` rows, as a mesh needs."""
    for width, which in _by_width(model, texts, ROW):
        rows = packed_rows([(i, len(texts[i])) for i in which], width, width)
        most = max(1, tokens // width)
        for start in range(0, len(rows), most):
            some = rows[start : start + most]
            step = max(multiple, most // 8)  # few sizes of the last batch
            yield some, (-(-len(some) // step) * step, width)


def _packed(
    texts: Sequence[Ids], rows: list[list[int]], shape: tuple[int, int]
) -> tuple[TokenBatch, list[int]]:
    """The batch [B, T] of rows of texts, and where each text starts in the flattened batch."""
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    starts = []
    for r, row in enumerate(rows):
        at = 0
        for number, i in enumerate(row, 1):
            stop = at + len(texts[i])
            tokens[r, at:stop], segments[r, at:stop] = texts[i], number
            starts.append(r * shape[1] + at)
            at = stop
    return TokenBatch(tokens, segments), starts


def like_lengths(
    model: Model, texts: Sequence[Ids], tokens: int, multiple: int
) -> Iterator[tuple[list[int], int, int]]:
    """(indices of texts, rows, width) of each batch, a text a row, texts of like lengths together.
    A batch has a multiple of `multiple` rows, as a mesh needs."""
    for width, which in _by_width(model, texts, 1):
        most = max(1, tokens // width)
        for start in range(0, len(which), most):
            some = which[start : start + most]
            rows = min(most, _power(len(some)))  # few sizes of the last
            yield some, -(-rows // multiple) * multiple, width


def _power(count: int) -> int:
    """The least power of 4 that is not below `count`."""
    return 4 ** -(-(max(count, 1) - 1).bit_length() // 2)


def _by_width(model: Model, texts: Sequence[Ids], least: int) -> list[tuple[int, list[int]]]:
    """The widths of rows, `least` at least, and the indices of their texts. Raises `InputError`
    for a text that is longer than the model's context."""
    context, found = model.config.context, {}
    for i, ids in enumerate(texts):
        if len(ids) > context:
            raise InputError(
                f"item {i} has {len(ids)} tokens; the model's context is {context}: shorten it"
            )
        width = max(min(least, context), bucket(len(ids), context, len(texts)))
        found.setdefault(width, []).append(i)
    return sorted(found.items())


def _filled(places: np.ndarray, wanted: np.ndarray, size: int) -> tuple[Any, Any, Any]:
    """The places and ids of the wanted tokens, filled up to the batch's `size`, and their number;
    so that it is data."""
    size = -(-size // CHUNK) * CHUNK
    fill = lambda a: np.pad(a.astype(np.int32), (0, size - len(a)))
    return fill(places), fill(wanted), np.int32(len(places))


@jax.jit
def _log_p(model: Model, states: jax.Array, places: jax.Array, wanted: jax.Array, count: jax.Array):
    """log p(wanted) [N] from the final residuals [B, T, D] at flat `places` [N]; only the first
    `count` are computed, in chunks."""
    flat = states.reshape(-1, states.shape[-1])

    def step(number, found):
        at = number * CHUNK
        some = jax.lax.dynamic_slice_in_dim(places, at, CHUNK)
        ids = jax.lax.dynamic_slice_in_dim(wanted, at, CHUNK)
        logits = float32(unembed(model.config, model.params, flat[some][None])[0])
        picked = jnp.take_along_axis(logits, ids[:, None], -1)[:, 0]
        values = picked - jax.nn.logsumexp(logits, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(found, values, at, 0)

    chunks = (count + CHUNK - 1) // CHUNK
    return jax.lax.fori_loop(0, chunks, step, jnp.zeros(places.shape, jnp.float32))
