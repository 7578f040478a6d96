"""A batch of tokens: ids, the document of each token, and which are used; and its checks.

    batch = gs.tokens(["The capital of France is", "Two"], "gemma-3-270m")
    gs.run(model, batch).logits[batch.counted(1)]  # [n, V]: neither padding nor <bos>

Every function that takes tokens takes a `TokenBatch` or arrays. Axes: B rows of T tokens.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.attention import Tokens, by_document
from gemma_scope_jax.model.config import GemmaConfig

if TYPE_CHECKING:
    from gemma_scope_jax.model.gemma import Cache
    from gemma_scope_jax.model.tokenizer import Tokenizer


@flax.struct.dataclass
class TokenLabels:
    """The group of each token: `numbers`, int [B, T], are indices into `names`; -1 is no group."""

    numbers: Any
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def where(self, *names: str) -> Any:
        """bool [B, T]: the tokens of these groups. Raises `InputError` for unknown names."""
        if unknown := set(names) - set(self.names):
            raise InputError(f"no group {min(unknown)!r}; there are {', '.join(self.names)}")
        found = self.numbers != self.numbers
        for name in names:
            found = found | (self.numbers == self.names.index(name))
        return found


@flax.struct.dataclass
class TokenBatch:
    """Rows of tokens, all arrays [B, T]; a pytree.

    tokens    int32 ids
    segments  int32: 0 is padding, each run of equal ids in a row is a document (or a piece of one)
    mask      bool: True for tokens used in training and metrics; None: all but padding
    labels    {kind: TokenLabels}: groups of tokens, such as the roles in a chat
    """

    tokens: Any
    segments: Any
    mask: Any = None
    labels: dict[str, TokenLabels] = flax.struct.field(default_factory=dict)

    @property
    def positions(self) -> jax.Array:
        """int32 [B, T]: the position of each token in its document."""
        return default_positions(jnp.asarray(self.segments))

    @property
    def size(self) -> int:
        """The number of tokens, without padding."""
        return int((np.asarray(self.segments) > 0).sum())

    @property
    def plain(self) -> "TokenBatch":
        """Tokens and segments alone: all that the model reads."""
        return TokenBatch(self.tokens, self.segments)

    def counted(self, first: int) -> jax.Array:
        """bool [B, T]: the mask without padding and the first `first` tokens of each document.

        `batch.counted(coder.first)` selects the tokens to measure a coder on: it was not trained on
        the first of a document (`<bos>`; the opening of a chat).
        """
        found = (jnp.asarray(self.segments) > 0) & (self.positions >= first)
        return found if self.mask is None else found & self.mask

    def document_slices(self) -> list[tuple[int, slice]]:
        """(row, columns) of each document, row by row. Fetches the segments from a device."""
        found = []
        for row, ids in enumerate(np.asarray(self.segments)):
            edges = np.flatnonzero(np.diff(ids, prepend=0, append=0)).tolist()
            found += [(row, slice(a, b)) for a, b in zip(edges, edges[1:]) if ids[a]]
        return found


def padded(
    rows: Sequence[np.ndarray], batch_size: int | None = None, context_size: int | None = None
) -> TokenBatch:
    """A batch of `rows`, int [n] each, padded on the right to the longest, or to `context_size`.

    With `batch_size`, rows of padding follow. The arrays are numpy arrays.
    """
    longest = max(map(len, rows), default=0)
    shape = (len(rows) if batch_size is None else batch_size, context_size or longest)
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    return TokenBatch(tokens, segments)


def padded_left(
    rows: Sequence[np.ndarray], batch_size: int | None = None, context_size: int | None = None
) -> TokenBatch:
    """As `padded`, with the padding on the left: all rows end in one column."""
    flipped = padded([row[::-1] for row in rows], batch_size, context_size)
    return TokenBatch(flipped.tokens[:, ::-1], flipped.segments[:, ::-1])


def tokens(
    texts: Any,
    tokenizer: "Tokenizer | str | os.PathLike",
    *,
    roles: Sequence[str] = ("system", "user", "model"),
    add_generation_prompt: bool = True,
) -> TokenBatch:
    """Texts of any lengths as a batch: one row each, `<bos>` first, padded on the right.

    texts      strings or chats (lists of {"role", "content"}), or one of them
    tokenizer  a `Tokenizer`, or what `load_tokenizer` takes, such as the model's name
    roles      whose messages are in the mask
    add_generation_prompt  open the model's turn at the end of a chat, as `Tokenizer.chat` does

    The mask is False on control tokens (`<bos>`, turn marks) and, in chats, on the template around
    the messages. If any text is a chat, `labels["role"]` gives the role of each token: "turn" (the
    template), "system", "user" or "model". Raises `InputError` for anything but texts and chats.
    """
    # imported here because the tokenizer's files need checkpoints, whose loader shards batches
    from gemma_scope_jax.model.tokenizer import ROLES, SPAN_ROLES, load_tokenizer

    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)
    if isinstance(texts, str) or _is_chat(texts):
        texts = [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise InputError(f"texts must be strings or chats, not {type(texts).__name__}")
    rows: list[np.ndarray] = []
    used, whose, chats = [], [], False
    for text in texts:
        if _is_chat(text):
            chat = tokenizer.chat(text, add_generation_prompt=add_generation_prompt)
            ids, numbers, chats = chat.ids, chat.roles, True
            said = chat.mask(*(ROLES.get(role, role) for role in roles))
        else:
            ids = tokenizer.encode(text)
            said, numbers = np.ones(len(ids), bool), np.full(len(ids), -1, np.int32)
        rows.append(ids)
        used.append(said & ~tokenizer.special[ids])
        whose.append(numbers)
    if not rows:
        raise InputError("no texts: give at least one")
    batch = padded(rows)
    present = np.asarray(batch.segments) > 0
    mask, numbers = np.zeros(present.shape, bool), np.full(present.shape, -1, np.int32)
    mask[present], numbers[present] = np.concatenate(used), np.concatenate(whose)
    labels = {"role": TokenLabels(numbers, SPAN_ROLES)} if chats else {}
    return TokenBatch(batch.tokens, batch.segments, mask, labels)


def _is_chat(text: Any) -> bool:
    return isinstance(text, Sequence) and bool(text) and isinstance(text[0], Mapping)


def as_batch(given: Any) -> TokenBatch:
    """A `TokenBatch` of a `TokenBatch`, of tokens [B, T] or of a tuple (tokens, segments).

    Raises `InputError` for text and for shapes that do not fit.
    """
    if not isinstance(given, TokenBatch):
        refuse_text(given)
        pair = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        tokens, segments = integers("tokens", pair[0]), integers("segments", pair[1])
        given = TokenBatch(tokens, np.ones_like(tokens) if segments is None else segments)
    tokens, segments = np.shape(given.tokens), np.shape(given.segments)
    if tokens != segments or len(tokens) != 2:
        raise InputError(
            f"tokens and segments must have one shape [B, T], got {tokens}, {segments}"
        )
    if given.mask is not None:
        dtype, shape = np.dtype(getattr(given.mask, "dtype", object)), np.shape(given.mask)
        if dtype.kind != "b" or shape != tokens:
            raise InputError(f"mask must be bool {list(tokens)}, got {dtype}{list(shape)}")
    return given


def tokens_and_segments(tokens: Any, segments: Any) -> tuple[jax.Array, jax.Array | None]:
    """The arguments of `forward` and `run` as arrays; `tokens` may be a `TokenBatch`."""
    if not isinstance(tokens, TokenBatch):
        refuse_text(tokens)
        return tokens, segments
    if segments is not None:
        raise InputError("a TokenBatch has its own segments: leave out `segments`")
    return tokens.tokens, tokens.segments


def refuse_text(given: Any) -> None:
    """Raise `InputError` if `given` is text instead of ids."""
    some = given if isinstance(given, list | tuple) else [given]
    if any(isinstance(text, str | Mapping) or _is_chat(text) for text in some):
        raise InputError("tokens must be ids, not text: encode it with gs.tokens(texts, tokenizer)")


def default_positions(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: the position of each token within its run of equal segment ids."""
    return jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :] - _run_starts(segments)


def _run_starts(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: the column where the run of equal segment ids of each token begins."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    before = jnp.concatenate([segments[:, :1], segments[:, :-1]], 1)
    return jax.lax.cummax(jnp.where(segments != before, index, 0), axis=1)


def documents(
    shape: tuple[int, ...], positions, segments, cache: "Cache | None"
) -> tuple[Tokens, Any]:
    """The tokens of a pass, numbered by document, and what a cache keeps of their end.

    `positions` and `segments` are int [B, T] or None, as in `forward`.
    """
    if segments is None:
        segments = jnp.ones(shape, jnp.int32)
    segments = segments.astype(jnp.int32)
    if positions is None:
        starts = _run_starts(segments)
        positions = jnp.arange(shape[1], dtype=jnp.int32)[None, :] - starts
        if cache is None:
            return Tokens(positions, jnp.where(segments > 0, starts + 1, 0)), None
        # The row's first run continues the document before it, if the segment id is the same.
        first = jnp.argmax(segments > 0, axis=1, keepdims=True)
        follows = (starts == first) & (segments == cache.last[:, 1:2])
        positions = positions + jnp.where(follows, cache.last[:, :1] + 1, 0)
    given = Tokens(positions.astype(jnp.int32), segments)
    if cache is None:
        return by_document(given, 0, jnp.zeros((shape[0], 3), jnp.int32))
    return by_document(given, cache.used, cache.last)


def check_tokens(config: GemmaConfig, tokens, cache: "Cache | None", positions, segments) -> None:
    """Raise `InputError` unless shapes and dtypes are those of a batch for the model."""
    if 0 in tokens.shape:
        raise InputError("no tokens: the prompt is empty")
    shape = tokens.shape if len(tokens.shape) == 2 else ("B", "T")
    for what, given in {"tokens": tokens, "positions": positions, "segments": segments}.items():
        if given is None:
            continue
        if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
            wanted = f"integers [{', '.join(map(str, shape))}]"
            raise InputError(f"{what} must be {wanted}, got {given.dtype}{list(given.shape)}")
    room = config.context if cache is None else cache.k.shape[2]
    if (count := tokens.shape[1]) > room:
        what = "the model's context" if cache is None else "the cache's slots"
        raise InputError(f"{count} tokens are more than {what} of {room}: shorten the text")


def check_ids(config: GemmaConfig, ids: np.ndarray, what: str = "") -> None:
    """Raise `InputError`, beginning with `what`, if any of `ids` (at least one) is not a token."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab:
        bad = low if low < 0 else high
        raise InputError(f"{what}token id {bad} is outside 0..{config.vocab - 1}")


def integers(what: str, values: Any) -> Any:
    """Numbers on the host as an array, integers as int32; device arrays and None are unchanged."""
    if values is None or isinstance(values, jax.Array):
        return values
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what} must be [B, T]: pad rows of unequal lengths") from None
    if array.dtype.kind not in "iu" or not array.size:
        return array
    low, high = array.min(), array.max()
    if not -(2**31) <= low <= high < 2**31:
        raise InputError(f"{what} hold {low if low < 0 else high}, beyond 32 bits")
    return array.astype(np.int32)
