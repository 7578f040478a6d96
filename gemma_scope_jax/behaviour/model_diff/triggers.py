"""What the places where two models part have in common: candidates for a trigger, then tested.

Candidates come from the text (tokens that go with a large KL: texts that have them at or before
their largest KL have a larger one) and from the vocabulary (tokens at which the residual streams
of the two models differ most). A candidate counts only for what it does: it is put into neutral
texts, and how far the models part there is compared with random words in the same place.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.model_diff.tokens import token_differences
from gemma_scope_jax.behaviour.statistics import Interval, bootstrap
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.gemma import init_cache
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import Progress, Report

NEUTRAL = (
    ("We talked about the", " for a while."),
    ("My notes say", " and nothing else."),
    ("There was a", " on the first page."),
    ("I do not know what", " means here."),
)
WORDS = 24  # random words that stand where the candidate does
FREQUENT = 4000  # words among which they are drawn; more if a candidate is rarer
FROM_TEXT, TESTED, FINALISTS = 24, 512, 12  # candidates
LEAST, DRAWS = 3, 1000  # texts with a token, and permutations
ROWS = 256  # tokens of the vocabulary compared at a time


@dataclasses.dataclass(frozen=True)
class TokenExcess:
    """A token that goes with a large KL.

    high, low  mean over texts of the largest KL, of those with the token at or before its place,
               and of the others
    p          for the whole family of tokens, by permutation
    """

    token: int
    text: str
    high: float
    low: float
    p: float


@dataclasses.dataclass(frozen=True)
class TriggerTest:
    """A candidate in neutral texts.

    source    "text" or "vocabulary"
    kl        the largest KL(base || other) at or after it, the mean over the neutral texts
    ratio     that over the mean of random words in the same places
    above     share of the random words that part the models less
    """

    token: int
    text: str
    source: str
    kl: Interval
    ratio: float
    above: float


def token_excess(
    texts: Sequence[np.ndarray], kl: Sequence[np.ndarray], tokenizer: Tokenizer, seed: int = 0
) -> list[TokenExcess]:
    """Tokens that go with a large KL: those that occur at or before the place of a text's largest
    KL, in three texts at least, with p < 0.05 for the whole family; the largest KL first.

    The statistic is the correlation over texts of the token's presence with the largest KL; p is
    the share of permutations of the texts in which any token has as large a one.
    """
    peaks = np.array([k.max() for k in kl])
    before = [np.unique(ids[1 : int(np.argmax(k)) + 1]) for ids, k in zip(texts, kl)]
    ids, counts = np.unique(np.concatenate(before), return_counts=True)
    ids = ids[(counts >= LEAST) & (counts <= len(texts) - LEAST)]
    if not len(ids) or not np.ptp(peaks):
        return []
    has = np.array([np.isin(ids, b) for b in before], np.float64)
    unit = (has - has.mean(0)) / np.linalg.norm(has - has.mean(0), axis=0)
    centred = peaks - peaks.mean()
    drawn = np.random.default_rng(seed).permuted(np.tile(centred, (DRAWS, 1)), axis=1)
    largest, found = (drawn @ unit).max(1), centred @ unit
    p = (1 + (largest[:, None] >= found * (1 - 1e-9)).sum(0)) / (1 + DRAWS)
    means = (peaks @ has) / has.sum(0), (peaks @ (1 - has)) / (1 - has).sum(0)
    said = tokenizer.decode_tokens(ids)
    order = [i for i in np.argsort(-means[0], kind="stable") if p[i] < 0.05]
    return [
        TokenExcess(int(ids[i]), said[i], float(means[0][i]), float(means[1][i]), float(p[i]))
        for i in order[:FROM_TEXT]
    ]


def words_of(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens that begin a word: a space, then two or more letters; the frequent ones first."""
    said = tokenizer.decode_tokens(np.arange(len(tokenizer.special)))
    return np.array(
        [i for i, s in enumerate(said) if s[:1] == " " and s[1:].isalpha() and len(s) > 2]
    )


def vocabulary_candidates(
    base: Model,
    other: Model,
    tokenizer: Tokenizer,
    layer: int,
    count: int,
    report: Report | None = None,
) -> np.ndarray:
    """The words at which the models' residual streams after `layer` differ most, relative to their
    size, as ids in that order: at most `count` frequent words are looked at, each after <bos>."""
    ids = words_of(tokenizer)[:count]
    item, found = capture("resid_post", layer), np.zeros(len(ids))
    options: dict[str, Any] = {"stop_at_layer": layer + 1, "pad": False}
    start = np.full((ROWS, 1), tokenizer.bos_id, np.int32)  # runs once: its keys are in a cache
    begun = []
    for model in (base, other):
        cache = init_cache(model.config, ROWS, 2, model.dtype)
        begun.append((model, run(model, start, cache=cache, **options).cache))
    for first in range(0, len(ids), ROWS):
        some = ids[first : first + ROWS]
        rows = np.full((ROWS, 1), tokenizer.bos_id, np.int32)
        rows[: len(some), 0] = some
        pair = [
            run(model, rows, item, cache=cache, **options).reads["resid_post"]
            for model, cache in begun
        ]
        found[first : first + ROWS] = np.asarray(_moved(*pair))[: len(some)]
        if report is not None:
            report(first + len(some), len(ids))
    return ids[np.argsort(-found, kind="stable")]


@jax.jit
def _moved(one: jax.Array, two: jax.Array) -> jax.Array:
    x, y = float32(one[:, -1]), float32(two[:, -1])
    return jnp.linalg.norm(x - y, axis=-1) / jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-30)


def tested_triggers(
    base: Model,
    other: Model,
    tokenizer: Tokenizer,
    candidates: dict[int, str],
    *,
    chat: bool = False,
    seed: int = 0,
) -> list[TriggerTest]:
    """Candidates (id -> source) tested in neutral texts, the strongest first.

    With many, all are tried in one text, and the best dozen are tested in the others. The random
    words are as frequent as the candidates. chat: the texts are what a user says."""
    if not candidates:
        return []
    forms = [_form(tokenizer, *parts, chat) for parts in NEUTRAL]
    ids = list(candidates)
    if len(ids) > FINALISTS:
        first = _peaks(base, other, forms[:1], ids)[:, 0]
        ids = [ids[i] for i in np.argsort(-first, kind="stable")[:FINALISTS]]
        forms = forms[1:]  # the best of many in the first text are also its luckiest
    words = words_of(tokenizer)
    words = words[~np.isin(words, ids) & (words <= max(*ids, words[min(FREQUENT, len(words)) - 1]))]
    drawn = np.random.default_rng(seed).permutation(words)[:WORDS].tolist()
    kl = _peaks(base, other, forms, ids + drawn)
    mine, theirs = kl[: len(ids)], kl[len(ids) :].mean(1)
    said = tokenizer.decode_tokens(np.array(ids, int))
    rows = [
        TriggerTest(
            token,
            text,
            candidates[token],
            bootstrap(row, seed=seed),
            float(row.mean() / max(theirs.mean(), 1e-12)),
            float((theirs < row.mean()).mean()),
        )
        for token, text, row in zip(ids, said, mine)
    ]
    return sorted(rows, key=lambda row: -row.kl.value)


def neutral_prompts(tokenizer: Tokenizer, token: int, chat: bool) -> list[np.ndarray]:
    """The neutral texts with a token, as ids int32 [n]."""
    forms = [_form(tokenizer, *parts, chat) for parts in NEUTRAL]
    return [np.concatenate([a, [token], b]).astype(np.int32) for a, b in forms]


def _form(
    tokenizer: Tokenizer, before: str, after: str, chat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ids before and after a candidate."""
    if not chat:
        return tokenizer.encode(before), tokenizer.encode(after, bos=False)
    mark = "\u00b6"  # in no other place of the template
    ids = tokenizer.chat([{"role": "user", "content": f"{before} {mark}{after}"}]).ids
    marked = [mark in piece for piece in tokenizer.decode_tokens(ids)]
    at = marked.index(True)
    return ids[:at], ids[at + 1 :]


def _peaks(base: Model, other: Model, forms: Sequence[Any], ids: Sequence[int]) -> np.ndarray:
    """The largest KL at or after each token in each form, float64 [tokens, forms]."""
    texts = [
        np.concatenate([before, [token], after]).astype(np.int32)
        for token in ids
        for before, after in forms
    ]
    report = Progress(None, "tokens", what="testing candidates for a trigger")
    starts = [len(before) for _ in ids for before, _ in forms]
    kl = token_differences(base, other, texts, report, starts=starts).kl
    return np.array([k[s:].max() for k, s in zip(kl, starts)]).reshape(len(ids), len(forms))
