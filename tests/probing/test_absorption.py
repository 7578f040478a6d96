"""Feature absorption against loops over words and features, and planted cases: all, half, none."""

import numpy as np
import pytest
import scipy.optimize

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.probing import absorption as spelling
from gemma_scope_jax.probing.absorption import (
    LETTERS,
    absorbed,
    absorption,
    fit_letters,
    leading_features,
    main_features,
    spelling_prompts,
)
from gemma_scope_jax.probing.logistic import f1
from probing_data import Spelled, reference_fit

USED, EACH, D = 6, 30, 32  # letters, words of each, dimensions


# -------------------------------------------------------------------------------------------------
# The formulas


def absorbed_loop(f, projection, cosine, main):
    """Section 2 of SAEBench's absorption, for one word."""
    explained = sum(f[i] * cosine[i] for i in main)
    others = [
        f[i] * cosine[i]
        for i in range(len(f))
        if i not in main and cosine[i] >= 0.1 and f[i] * cosine[i] > 0
    ]
    absorbing = sum(sorted(others, reverse=True)[:3])
    if explained >= projection or absorbing / projection < 0.4:
        fraction = 0.0
    elif explained <= 0:
        fraction = 1.0
    else:
        taken = min(absorbing, projection - explained)
        fraction = taken / (taken + explained)
    top = max(range(len(f)), key=lambda i: f[i] * cosine[i])
    full = all(abs(f[i]) < 1e-8 for i in main)
    full = full and cosine[top] >= 0.025 and projection >= 0
    return fraction, bool(full and f[top] * cosine[top] / projection >= 0.4)


@pytest.mark.parametrize("main", [(0,), (1, 4), ()])
def test_fractions_equal_a_loop_over_words(main):
    rng = np.random.default_rng(0)
    f = np.maximum(rng.standard_normal((300, 9)), 0)
    f[rng.random((300, 9)) < 0.4] = 0
    cosine = rng.uniform(-0.3, 0.6, 9)
    projection = np.abs(rng.standard_normal(300)) * np.sign(rng.random(300) - 0.1)
    got = absorbed(f, projection, cosine, list(main))
    want = [absorbed_loop(a, p, cosine, main) for a, p in zip(f, projection)]
    np.testing.assert_allclose(got[0], [w[0] for w in want], atol=1e-12)
    assert got[1].tolist() == [w[1] for w in want]
    assert {0.0, 1.0} <= set(got[0]) and 0 < got[1].sum() < 300


@pytest.mark.parametrize(
    ("f", "projection", "fraction", "full"),
    [
        ([2.0, 0, 0], 2.0, 0.0, False),  # the main feature does it all
        ([0.0, 2, 0], 2.0, 1.0, True),  # silent, another stands in
        ([1.0, 1, 0], 2.0, 0.5, False),  # half and half
        ([1.0, 5, 0], 2.0, 0.5, False),  # more than is missing is not counted
        ([0.0, 0.7, 0], 2.0, 0.0, False),  # too little to count
        ([0.0, 0, 9], 2.0, 0.0, False),  # does not point along the probe
        ([0.0, 2, 0], -1.0, 0.0, False),  # the word is none of this letter
    ],
)
def test_known_cases(f, projection, fraction, full):
    got = absorbed(np.array([f]), np.array([projection]), np.array([1.0, 1.0, 0.01]), [0])
    assert (got[0][0], got[1][0]) == (fraction, full)


# -------------------------------------------------------------------------------------------------
# Probes and main features


def world(share=0.0, seed=0):
    """Words whose activation is their letter's direction and some of their own; a coder with a
    feature a letter, which is silent on a `share` of the words, where one of the word's own stands
    in for it, letter included.

    Returns x [W, D], features [W, F], letters [W], the coder and which words are absorbed.
    """
    rng = np.random.default_rng(seed)
    letters = np.repeat(np.arange(USED), EACH)
    basis = np.linalg.qr(rng.standard_normal((D, D)))[0]
    own = basis[USED + rng.integers(0, D - USED, len(letters))]
    x = basis[letters] * 2.0 + own + 0.02 * rng.standard_normal((len(letters), D))
    taken = rng.random(len(letters)) < share
    f = np.zeros((len(letters), USED + len(letters)), np.float32)
    w_dec = np.concatenate([basis[:USED], basis[letters] * 2.0 + own])
    for word, letter in enumerate(letters):
        if taken[word]:
            f[word, USED + word] = np.linalg.norm(w_dec[USED + word])
        else:
            f[word, letter] = 2.0
    w_dec = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    zeros = np.zeros(len(w_dec), np.float32)
    coder = SparseCoder(
        w_dec.T.astype(np.float32), zeros, zeros, w_dec.astype(np.float32), np.zeros(D), layer=0
    )
    return x.astype(np.float32), f, letters, coder, taken


def test_nothing_absorbed_scores_zero_and_the_main_feature_is_the_letters():
    x, f, letters, coder, _ = world()
    got = absorption(coder.w_dec, x, f, letters, fit_letters(x, letters))
    assert got["used"] == USED and got["fraction"] == got["full"] == 0.0
    assert [row["features"] for row in got["letters"]] == [[i] for i in range(USED)]
    assert [row["letter"] for row in got["letters"]] == list(LETTERS[:USED])
    assert (got["split"], got["split_std"]) == (1.0, 0.0)


def test_words_with_features_of_their_own_are_counted_exactly():
    x, f, letters, coder, taken = world(share=0.4, seed=3)
    probes = fit_letters(x, letters)
    got = absorption(coder.w_dec, x, f, letters, probes)
    want = []
    for letter, row in enumerate(got["letters"]):
        right = [
            n
            for i, n in enumerate(probes.test)
            if letters[n] == letter and probes.scores[letter, i] > 0
        ]
        assert row["features"] == [letter] and row["words"] == len(right)
        want.append(np.mean([taken[n] for n in right]))
        assert row["fraction"] == row["full"] == pytest.approx(want[-1])
    assert got["fraction"] == pytest.approx(np.mean(want)) and 0.1 < np.mean(want) < 0.7
    assert got["fraction_std"] == pytest.approx(np.std(want, ddof=1))


def test_letter_probes_are_balanced_logistic_regressions():
    x, _, letters, _, _ = world()
    x = x * 500  # the scale of the activations is nobody's business
    probes = fit_letters(x, letters)
    assert not set(probes.train) & set(probes.test)
    assert probes.scale == pytest.approx(
        D**0.5 / np.median([np.linalg.norm(x[n]) for n in probes.train])
    )
    y = (letters[probes.train] == 2).astype(float)
    weight = np.where(y > 0, len(y) / (2 * y.sum()), len(y) / (2 * (len(y) - y.sum())))
    w, b = reference_fit(x[probes.train].astype(float) * probes.scale, y, 1.0, weight)
    np.testing.assert_allclose(probes.w[2] / probes.scale, w, atol=1e-4)
    scores = x[probes.test] @ (w * probes.scale) + b
    np.testing.assert_allclose(probes.scores[2], scores, atol=1e-2)
    assert probes.f1[2] == f1(letters[probes.test] == 2, scores)
    assert np.isnan(probes.f1[USED:]).all() and (probes.w[USED:] == 0).all()


def test_leading_features_have_the_largest_weights_of_an_l1_probe():
    """Against scipy, with w = a - b and a, b >= 0."""
    rng = np.random.default_rng(5)
    letters = np.repeat([0, 1], 40)
    f = np.maximum(rng.standard_normal((80, 8)), 0).astype(np.float32)
    f[:, 3] += 1.5 * (letters == 0)
    f[:, 5] += 1.0 * (letters == 0)
    f[:, 6] = 0
    y, x = (letters == 0).astype(float), f.astype(float)

    def loss(p):
        w, b = p[:8] - p[8:16], p[16]
        margin = x @ w + b
        error = (1 / (1 + np.exp(-margin)) - y) / 80
        slope = x.T @ error
        value = np.mean(np.logaddexp(0, margin) - y * margin) + 0.01 * p[:16].sum()
        return value, np.concatenate([slope + 0.01, 0.01 - slope, [error.sum()]])

    bounds = [(0, None)] * 16 + [(None, None)]
    best = scipy.optimize.minimize(loss, np.zeros(17), jac=True, bounds=bounds, method="L-BFGS-B")
    w = best.x[:8] - best.x[8:16]
    got = leading_features(f, letters, most=8)[0]
    order = [j for j in np.argsort(-w, kind="stable") if j != 6]
    assert got[:3].tolist() == order[:3] and got[:2].tolist() == [3, 5]
    assert got[-1] == 6  # never active


def test_a_split_letter_has_two_main_features():
    """Two features that each fire on half of the letter's words, and a third that adds nothing."""
    rng = np.random.default_rng(0)
    y = np.repeat([1, 0], 100)
    f = np.zeros((200, 5), np.float32)
    f[:50, 4], f[50:100, 2] = 1 + rng.random(50), 1 + rng.random(50)
    f[:, 1] = rng.random(200)
    order = rng.permutation(200)
    train, test = order[:120], order[120:]
    leading = np.array([4, 2, 1, 0, 3])
    assert main_features(f[:, leading], y, train, test) == 2


def test_too_few_letters_to_probe_or_to_trust():
    x, f, letters, coder, _ = world()
    assert absorption(coder.w_dec, x, f, letters, fit_letters(x, letters))["enough"] is False
    with pytest.raises(InputError, match="too few words to spell"):
        fit_letters(x[:30], letters[:30])


def test_no_probe_that_works_is_said():
    rng = np.random.default_rng(0)
    x, f, letters, coder, _ = world()
    noise = rng.standard_normal(x.shape).astype(np.float32)
    with pytest.raises(InputError, match="no letter's probe has an F1 above 0.6"):
        absorption(coder.w_dec, noise, f, letters, fit_letters(noise, letters))


# -------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_spell_ten_other_words_and_end_with_the_question():
    tok = Spelled()
    task = spelling_prompts(tok, 6)
    assert len({len(p) for p in task.prompts}) == 1 and task.at == -2
    assert np.bincount(task.letters).tolist() == [6] * 26
    for word, letter, prompt in zip(task.words, task.letters, task.prompts):
        parts = tok.decode_tokens(prompt)
        assert parts[:2] == ["<bos>", "\n"] and parts[task.at] == word
        assert word.strip()[0].lower() == LETTERS[letter]
        lines = "".join(parts[2:]).split("\n")
        assert len(lines) == 11 and lines[-1] == word + spelling.QUESTION
        for line in lines[:-1]:
            example, answer = line.split(spelling.QUESTION)
            assert answer == f" {example.strip()[0].upper()}" and example != word
    again = spelling_prompts(tok, 6)
    assert all((a == b).all() for a, b in zip(task.prompts, again.prompts))


def test_only_letters_count_as_words():
    found = spelling.alphabetic_tokens(Spelled())[1]
    assert not {"12", "a-b", " ", "", "\n"} & set(found) and " ax" in found and " A" in found


def test_a_vocabulary_without_words_is_refused():
    tok = Spelled()
    tok.pieces = [
        p if i < 35 and not p[1:].isalpha() else f"#{i}" for i, p in enumerate(tok.pieces)
    ]
    with pytest.raises(InputError, match="too few to spell"):
        spelling_prompts(tok)
