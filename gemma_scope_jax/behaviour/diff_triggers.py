"""What the places where two models part have in common: candidates for a trigger, then tested.

Candidates come from the text (tokens that are more frequent at or before the places where the
models part than in the other texts) and from the vocabulary (tokens at which the residual streams
of the two models differ most). A candidate counts only for what it does: it is put into neutral
texts, and how far the models part there is compared with random words in the same place.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.behaviour.diff_tokens import token_differences
from gemma_scope_jax.behaviour.statistics import FEWEST, Interval, bootstrap, unpaired_tests
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.model.config import Model
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
FROM_TEXT, TESTED, FINALISTS = 24, 192, 12  # candidates
ROWS = 256  # tokens of the vocabulary compared at a time


@dataclasses.dataclass(frozen=True)
class TokenExcess:
    """A token that is more frequent where the models part.

    high, low  share of texts with it at or before the place of the largest KL, in the texts where
               the models part, and in the others
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


def split_by_size(values: np.ndarray) -> float:
    """The value that parts the logarithms of `values` into two groups of least variance (Otsu)."""
    logs = np.sort(np.log(np.maximum(values, 1e-9)))
    cuts = range(1, len(logs))
    spread = [logs[:i].var() * i + logs[i:].var() * (len(logs) - i) for i in cuts]
    at = 1 + int(np.argmin(spread)) if spread else 0
    return float(np.exp(logs[at]))


def token_excess(
    texts: Sequence[np.ndarray], kl: Sequence[np.ndarray], tokenizer: Tokenizer, seed: int = 0
) -> tuple[list[TokenExcess], float]:
    """Tokens that are more frequent at or before the largest KL in the texts where it is large, the
    clearest first; and the KL above which a text counts as such. None if too few texts do."""
    peaks = np.array([k.max() for k in kl])
    least = split_by_size(peaks)
    high = peaks >= least
    if min(high.sum(), (~high).sum()) < FEWEST:
        return [], least
    before = [np.unique(ids[1 : int(np.argmax(k)) + 1]) for ids, k in zip(texts, kl)]
    ids, counts = np.unique(
        np.concatenate([b for b, h in zip(before, high) if h]), return_counts=True
    )
    ids = ids[counts >= max(2, FEWEST // 2)]
    if not len(ids):
        return [], least
    has = np.array([np.isin(ids, b) for b in before], np.float64)
    tests = unpaired_tests(has[high], has[~high], seed=seed)
    order = np.lexsort((-tests.statistic, tests.adjusted))
    of_high, of_low = has[high].mean(0), has[~high].mean(0)
    said = tokenizer.decode_tokens(ids)
    rows = [
        TokenExcess(
            int(ids[i]), said[i], float(of_high[i]), float(of_low[i]), float(tests.adjusted[i])
        )
        for i in order
        if tests.statistic[i] > 0
    ]
    return rows[:FROM_TEXT], least


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
    for start in range(0, len(ids), ROWS):
        some = ids[start : start + ROWS]
        rows = np.full((ROWS, 2), tokenizer.bos_id, np.int32)
        rows[: len(some), 1] = some
        pair = [
            run(m, rows, item, stop_at_layer=layer + 1, pad=False).reads["resid_post"]
            for m in (base, other)
        ]
        found[start : start + ROWS] = np.asarray(_moved(*pair))[: len(some)]
        if report is not None:
            report(start + len(some), len(ids))
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

    With many, all are tried in one text and the best dozen in all. chat: the texts are what a user
    says."""
    forms = [_form(tokenizer, *parts, chat) for parts in NEUTRAL]
    words = words_of(tokenizer)
    drawn = np.random.default_rng(seed).permutation(words[: max(4000, WORDS)])[:WORDS].tolist()
    ids = list(candidates)
    if len(ids) > FINALISTS:
        first = _peaks(base, other, forms[:1], ids)[:, 0]
        ids = [ids[i] for i in np.argsort(-first, kind="stable")[:FINALISTS]]
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
    kl = token_differences(base, other, texts, report).kl
    starts = [len(before) for _ in ids for before, _ in forms]
    return np.array([k[s:].max() for k, s in zip(kl, starts)]).reshape(len(ids), len(forms))
