"""Feature absorption: "starts with A" does not fire on words that have features of their own.

Words of the vocabulary are spelt in a prompt with ten examples, and read at the word's token. A
probe on the activation predicts the first letter; the features that together predict it best are
the letter's main features. Where the probe is right and the main features do not explain it, other
features along the probe have absorbed them. With unit probe p, activation x, features f:

    P = x . p     a_i = f_i cos(p, w_dec_i)     M = sum of a over the main features
    A = sum of the 3 largest a_i > 0 of others with cos >= 0.1        A' = min(A, P - M)
    fraction = 0 if M >= P or A < 0.4 P;  1 if M <= 0;  else A' / (A' + M)
    full     = no main feature is active, the largest a has cos >= 0.025 and is >= 0.4 P, P >= 0

A letter's scores are means over the words that its probe gets right; the coder's are means over
letters whose probe has an F1 above 0.6.

Source: Chanin et al. 2024, "A is for Absorption"; Karvonen et al. 2025, SAEBench,
`evals/absorption`. Differences: probes and the choice of features are fitted to the optimum, with
activations and features scaled to norm sqrt(D), where SAEBench runs Adam for 50 epochs without
scaling; each word has one prompt; and up to `per_letter` words are drawn for each letter, where
SAEBench takes the whole vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.probing.logistic import f1, fit_logistic, l1_logistic
from gemma_scope_jax.probing.pooling import along_decoder, typical_scale
from gemma_scope_jax.probing.tables import SEED, held_out

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTION = " has the first letter:"
EXAMPLES = 10  # words spelt in a prompt before the one in question
MOST_FEATURES = 10  # of the sparse probes
JUMP = 0.03  # a main feature raises F1 by more than this
L1_DECAY = 0.01
PROBE_F1 = 0.6
ENOUGH_LETTERS = 20  # SAEBench gives no score with fewer
ABSORBER_COSINE, FULL_COSINE = 0.1, 0.025
PROPORTION = 0.4  # of P: absorbers account for at least this share
ABSORBERS = 3
INACTIVE = 1e-8  # activations below this


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Prompts in which the word's token is at index `at` from the end."""

    words: list[str]  # as in the vocabulary, some with a space before
    letters: np.ndarray  # int [W], 0 for a
    prompts: list[np.ndarray]  # int32 [T] each, <bos> first
    at: int  # negative


def alphabetic_tokens(tokenizer: Tokenizer) -> tuple[np.ndarray, list[str]]:
    """The ids and texts of the vocabulary's words: a to z in either case, with or without a space
    before. Of several ids with one text, which would be on both sides of the split, the first."""
    texts = tokenizer.decode_tokens(np.arange(len(tokenizer.special)))
    wanted = set(LETTERS + LETTERS.upper())
    once = dict(zip(reversed(texts), reversed(range(len(texts)))))
    found = [i for t, i in once.items() if (w := t.removeprefix(" ")) and set(w) <= wanted]
    found.sort()
    return np.array(found, np.int32), [texts[i] for i in found]


def spelling_prompts(tokenizer: Tokenizer, per_letter: int | None = 200) -> Spelling:
    """Up to `per_letter` words of each letter (None: all), each in a prompt with ten others. Raises
    `InputError` if the vocabulary has too few words."""
    ids, words = alphabetic_tokens(tokenizer)
    if len(ids) <= EXAMPLES:
        raise InputError(f"the vocabulary has {len(ids)} words of letters a to z: too few to spell")
    letters = np.array([LETTERS.index(w.strip()[0].lower()) for w in words])
    draw = np.random.default_rng(SEED)
    by_letter = [np.flatnonzero(letters == letter) for letter in range(len(LETTERS))]
    chosen = np.concatenate([draw.permutation(some)[:per_letter] for some in by_letter])
    encode = lambda text: tokenizer.encode(text, bos=False)
    question, newline = encode(QUESTION), encode("\n")
    answers = [np.append(encode(f" {letter.upper()}"), newline) for letter in LETTERS]
    prompts = []
    for word in chosen:
        others = draw.choice(len(ids), EXAMPLES + 1, replace=False)
        others = others[others != word][:EXAMPLES]
        spelt = [part for o in others for part in (ids[[o]], question, answers[letters[o]])]
        parts = [[tokenizer.bos_id], newline, *spelt, ids[[word]], question]
        prompts.append(np.concatenate(parts).astype(np.int32))
    return Spelling([words[i] for i in chosen], letters[chosen], prompts, -len(question) - 1)


@dataclasses.dataclass(frozen=True)
class LetterProbes:
    """Probes on the activations at a site, the same for every coder that writes there."""

    train: np.ndarray  # rows
    test: np.ndarray
    scale: float
    w: np.ndarray  # float64 [26, D], for unscaled activations; 0 for letters with too few words
    scores: np.ndarray  # float64 [26, test]
    f1: np.ndarray  # [26], NaN for letters with too few words


def fit_letters(x: np.ndarray, letters: np.ndarray) -> LetterProbes:
    """A balanced probe for each letter with five words or more, on x [W, D]; a fifth are tested."""
    learnt, held = held_out(letters, SEED)
    train, test = np.concatenate(learnt), np.concatenate(held)
    scale = typical_scale(x[train])
    w = np.zeros((len(LETTERS), x.shape[1]))
    scores = np.full((len(LETTERS), len(test)), -np.inf)
    quality = np.full(len(LETTERS), np.nan)
    asked = np.flatnonzero(np.bincount(letters, minlength=len(LETTERS)) >= 5)
    if len(asked) < 2:
        raise InputError("too few words to spell: at least two letters need 5 words each")
    rows = np.asarray(x[train], np.float64) * scale
    y = (letters[train] == asked[:, None]).astype(float)
    weight = np.stack([_balanced(each) for each in y])
    fitted = fit_logistic(rows[None], y[None], np.ones(len(asked)), weight[None])
    for letter, one, b in zip(asked, fitted.w[0], fitted.b[0]):
        w[letter] = one * scale
        scores[letter] = np.asarray(x[test], np.float64) @ w[letter] + b
        quality[letter] = f1(letters[test] == letter, scores[letter])
    return LetterProbes(train, test, scale, w, scores, quality)


def _balanced(y: np.ndarray) -> np.ndarray:
    """Weights that balance both classes, 1 on average (scikit-learn's "balanced")."""
    share = y.mean()
    return np.where(y > 0, 0.5 / share, 0.5 / (1 - share))


def leading_features(f: np.ndarray, letters: np.ndarray, most: int = MOST_FEATURES) -> np.ndarray:
    """For each letter, the `most` features of f [N, F] with the largest weights in an L1 probe of
    all features, int [26, most]; features that are never active come last."""
    active = np.flatnonzero(np.any(f != 0, 0))
    y = (letters[:, None] == np.arange(len(LETTERS))).astype(np.float32)
    positive = np.maximum(y.sum(0), 1)
    weight = np.where(y > 0, (len(y) - positive) / positive, 1.0)
    found = np.zeros((0, len(LETTERS)))
    if len(active):
        some = f if len(active) == f.shape[1] else f[:, active]
        found = np.asarray(l1_logistic(some, y, weight, L1_DECAY))
    order = np.argsort(-found, 0, kind="stable").T
    dead = np.setdiff1d(np.arange(f.shape[1]), active)
    return np.stack([np.concatenate([active[row], dead])[:most] for row in order])


def main_features(f: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> int:
    """How many of a letter's leading features, f [N, F], are main features: each raises the F1 of a
    balanced probe of y [N] on the test rows by more than `JUMP`."""
    most = f.shape[1]
    kept = np.tril(np.ones((most, most)))[:, None, :]  # the probe of k features sees the first k
    train_y = np.broadcast_to(y[train].astype(float), (most, len(train)))
    weight = np.broadcast_to(_balanced(train_y[0]), (most, 1, len(train)))
    fitted = fit_logistic(f[train][None] * kept, train_y, 1.0, weight)
    best = -np.inf
    for k, scores in enumerate(fitted.scores(f[test][None] * kept)[:, 0]):
        quality = f1(y[test], scores)
        if quality <= best + JUMP:
            return k
        best = quality
    return most


def absorbed(
    f: np.ndarray, projection: np.ndarray, cosine: np.ndarray, main: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The absorption fraction float64 [N] of each word, and whether its absorption is full, bool. f
    [N, F] features, projection [N] = x . p, cosine [F] of decoder rows with p, `main` features."""
    f = np.asarray(f, np.float64)
    mains = np.asarray(main, int)
    a = f * cosine
    explained = a[:, mains].sum(1)
    others = np.setdiff1d(np.flatnonzero(cosine >= ABSORBER_COSINE), mains)
    candidates = np.maximum(a[:, others], 0)
    if len(others) > ABSORBERS:
        candidates = np.partition(candidates, -ABSORBERS, axis=1)[:, -ABSORBERS:]
    absorbing = candidates.sum(1)
    missing = np.minimum(absorbing, projection - explained)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = missing / (missing + explained)
    fraction = np.where(explained <= 0, 1.0, np.clip(share, 0, 1))
    nothing = (explained >= projection) | (absorbing < PROPORTION * projection) | (projection <= 0)
    fraction = np.where(nothing, 0.0, fraction)

    top = a.argmax(1)
    largest = a[np.arange(len(a)), top]
    full = (np.abs(f[:, mains]) < INACTIVE).all(1) & (cosine[top] >= FULL_COSINE)
    full &= (projection >= 0) & (largest >= PROPORTION * projection)
    return fraction, full


def absorption(
    w_dec: ArrayLike, x: np.ndarray, f: np.ndarray, letters: np.ndarray, probes: LetterProbes
) -> dict[str, Any]:
    """Absorption of a coder with features f [W, F] and decoder rows w_dec [F, D], on words with
    activations x [W, D] where it writes.

    {"fraction", "full", "split": means over letters, "fraction_std", ...: their spread, "letters":
    [a row for each letter], "used": the number of letters with a good probe, "enough": whether
    SAEBench would give a score with so few}. Raises `InputError` if no letter has a good probe.
    """
    train, test = probes.train, probes.test
    f = f * np.float32(probes.scale)
    leading = leading_features(f[train], letters[train])
    products, norms = along_decoder(w_dec, probes.w)
    rows: list[dict[str, Any]] = []
    for letter, name in enumerate(LETTERS):
        if not probes.f1[letter] > PROBE_F1:
            continue
        y, leads = (letters == letter).astype(np.int64), leading[letter]
        main = leads[: main_features(f[:, leads], y, train, test)].tolist()
        length = np.linalg.norm(probes.w[letter])
        right = test[(y[test] > 0) & (probes.scores[letter] > 0)]
        cosine = products[:, letter] / np.maximum(norms * length, 1e-30)
        projection = np.asarray(x[right], np.float64) @ probes.w[letter] / length * probes.scale
        fraction, full = absorbed(f[right], projection, cosine, main)
        rows.append(
            {
                "letter": name,
                "fraction": float(fraction.mean()),
                "full": float(full.mean()),
                "full_count": int(full.sum()),
                "words": len(right),
                "features": main,
                "probe_f1": float(probes.f1[letter]),
            }
        )
    if not rows:
        best = np.nanmax(probes.f1) if np.isfinite(probes.f1).any() else 0.0
        raise InputError(
            f"no letter's probe has an F1 above {PROBE_F1} (the best: {best:.2f}): the activations "
            "do not hold the spelling, or there are too few words"
        )
    columns = [[r[key] for r in rows] for key in ("fraction", "full")]
    table = np.array([*columns, [len(r["features"]) for r in rows]], np.float64)
    spread = table.std(1, ddof=1) if len(rows) > 1 else np.zeros(3)
    names = ("fraction", "full", "split", "fraction_std", "full_std", "split_std")
    means = dict(zip(names, [*table.mean(1).tolist(), *spread.tolist()]))
    return {**means, "letters": rows, "used": len(rows), "enough": len(rows) >= ENOUGH_LETTERS}
