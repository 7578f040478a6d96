"""Examples of planted features, metrics and labels against plain loops."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from gemma_scope_jax.autointerp import examples as ex
from gemma_scope_jax.autointerp import scores as metrics
from gemma_scope_jax.autointerp.judges import statistics
from gemma_scope_jax.autointerp.judges.statistics import RuleJudge, token_label
from gemma_scope_jax.autointerp.neighbours import cooccurring, decoder_neighbours
from gemma_scope_jax.autointerp.questions import ShownText, marks_of
from gemma_scope_jax.autointerp.scores import SCORES
from gemma_scope_jax.errors import InputError
from planted_store import AFTER_X, DEAD, DENSE, PLANTED, WIDTH, PlantedStore, Tok


@pytest.fixture(scope="module")
def store():
    return PlantedStore()


@pytest.fixture(scope="module")
def corpus(store):
    return ex.open_corpus(store, Tok(), ex.Sampling(hard=10))


@pytest.fixture(scope="module")
def material(corpus):
    found = ex.gather(corpus, 1, (0, 2))
    assert found is not None
    return found


def everything(material):
    return [*material.train, *material.test, *material.non_activating, *material.strong]


def test_windows_are_the_stores(store, corpus, material):
    """Tokens and activations of every window by a loop over the store; `<bos>` is never shown."""
    tok = Tok()
    for e in everything(material):
        fires = store.values[1]
        tokens, values = [], []
        for row in range(e.row - 16, e.row + 16):
            if 0 <= row < len(store) and store.piece[row] == store.piece[e.row]:
                if store.tokens[row] == tok.bos_id:
                    continue
                if row == e.row:
                    assert e.centre == len(tokens)
                tokens.append(tok.decode_tokens([store.tokens[row]])[0])
                values.append(fires[row])
        assert list(e.tokens) == tokens and "<bos>" not in e.tokens
        np.testing.assert_array_equal(e.values, np.array(values, np.float32))


def test_no_piece_is_on_both_sides(store, corpus, material):
    begins = lambda some: {e.row - store.positions[e.row] for e in some}
    train = begins(material.train)
    scored = begins([*material.test, *material.non_activating, *material.strong])
    assert train and scored and not train & scored
    half = ex.in_test(corpus.starts, 0)
    assert 0.3 < half.mean() < 0.7
    assert (ex.in_test(corpus.starts, 1) != half).any()


def test_token_counts_are_those_of_the_train_half(store, corpus):
    counts = np.zeros(300, int)
    halves = dict(zip(corpus.starts.tolist(), ex.in_test(corpus.starts, 0).tolist()))
    for row, token in enumerate(store.tokens):
        if store.positions[row] > 0 and not halves[row - store.positions[row]]:
            counts[token] += 1
    np.testing.assert_array_equal(corpus.counts, counts)


def test_hard_negatives_are_windows_of_a_neighbour(store, material):
    assert len(material.non_activating) == 50
    hard = [e for e in material.non_activating if e.other is not None]
    assert len(hard) == 10 and all(e.peak == 0 for e in material.non_activating)
    letters = {c for e in hard for c, m in zip(e.tokens, marks_of(e.other)) if m}
    assert letters == {"a", "d"}  # of the features 0 and 2
    rows = sorted(e.row for e in material.non_activating if e.other is None)
    assert min(np.diff(rows)) >= 32


def test_test_windows_are_spread_over_quantiles(material):
    peaks = [[e.peak for e in material.test if e.quantile == q] for q in range(10)]
    sizes = list(map(len, peaks))
    assert sum(sizes) == len(material.test) and max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    assert all(min(a) >= max(b) for a, b in zip(peaks, peaks[1:]))


def test_train_windows_are_the_top_ones_and_some_others(corpus, material):
    rows, values = corpus.feature(1)
    pieces = corpus.pieces(rows)
    at = ex.peaks(rows, values, pieces, 32)
    train = np.sort(values[at][~ex.in_test(pieces[at], 0)])[::-1]
    found = [e.peak for e in material.train]
    assert len(found) == 15
    np.testing.assert_array_equal(np.array(found[:10], np.float32), train[:10])
    assert set(found[10:]) <= set(train[10:].tolist()) and found[10:] == sorted(found[10:])[::-1]


@pytest.mark.parametrize("held", [1, 500, 2000])
def test_features_that_are_read_together_are_those_read_alone(monkeypatch, held):
    monkeypatch.setattr(ex, "HELD", held)
    store = PlantedStore(pieces=40)
    corpus = ex.open_corpus(store, Tok())
    for feature in [*range(store.width()), 0, store.width() - 1]:
        for got, wanted in zip(corpus.feature(feature), store.feature(feature), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert len(corpus._runs) - 1 > (1 if held < 2000 else 0)


def test_peaks_by_a_loop():
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(2000, 300, replace=False)).astype(np.int64)
    values, pieces = rng.uniform(1, 2, 300).astype(np.float32), rows // 500 * 500
    best = {}
    for i, (row, piece) in enumerate(zip(rows.tolist(), pieces.tolist())):
        key = piece, (row - piece) // 32
        if key not in best or values[i] > values[best[key]]:
            best[key] = i
    listed = sorted(best.values())
    near = lambda i, j: pieces[i] == pieces[j] and abs(rows[i] - rows[j]) < 32
    kept = [
        i
        for n, i in enumerate(listed)
        if not any(
            near(i, j) and values[j] > values[i]
            for j in listed[max(0, n - 1) : n] + listed[n + 1 : n + 2]
        )
    ]
    assert ex.peaks(rows, values, pieces, 32).tolist() == kept and len(kept) < len(listed)
    assert ex.peaks(rows[:0], values[:0], pieces[:0], 32).tolist() == []


def test_importance_weighting_prefers_the_strong():
    rng, counts = np.random.default_rng(0), np.zeros(6)
    values = np.array([9.0, 8.0, 4.0, 2.0, 1.0, 1.0])
    for _ in range(4000):
        chosen = ex.top_and_weighted(values, 2, 1, rng)
        assert chosen[:2].tolist() == [0, 1] and len(chosen) == 3
        counts[chosen[2]] += 1
    np.testing.assert_allclose(counts[2:] / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)


def test_the_same_seed_draws_the_same(store, corpus, material):
    again = ex.gather(ex.open_corpus(store, Tok(), ex.Sampling(hard=10)), 1, (0, 2))
    rows = lambda m: [e.row for e in everything(m)]
    assert rows(again) == rows(material)
    other = ex.gather(ex.open_corpus(store, Tok(), ex.Sampling(hard=10, seed=1)), 1, (0, 2))
    assert rows(other) != rows(material)


def test_the_split_does_not_depend_on_segments(corpus):
    one = ex.open_corpus(PlantedStore(segments=1), Tok(), ex.Sampling(hard=10))
    np.testing.assert_array_equal(one.pool, corpus.pool)
    np.testing.assert_array_equal(one.pool_tokens, corpus.pool_tokens)


def test_features_that_fire_too_seldom_or_everywhere(corpus):
    assert ex.gather(corpus, DEAD) is None
    dense = ex.gather(corpus, DENSE)
    assert dense.non_activating == [] and len(dense.test) == 50


def test_cut_keeps_the_centre():
    e = ex.Window(tuple("abcdefgh"), np.arange(8, dtype=np.float32), 5, 105, 100)
    cut = e.cut(2)
    assert cut.tokens == tuple("defgh") and cut.values.tolist() == [3, 4, 5, 6, 7]
    assert cut.tokens[cut.centre] == "f" and e.cut(10).tokens == e.tokens


def test_marks_are_tokens_of_three_tenths_of_the_peak():
    assert marks_of(np.array([0, 2.9, 3.0, 10.0], np.float32)) == (False, False, True, True)
    assert marks_of(np.zeros(3, np.float32)) == (False,) * 3
    shown = ShownText(("a", "b", "\n", "c"), (False, True, True, False))
    assert shown.text() == "a<<b↵>>c" and ShownText(("x", "y"), (False, True)).text() == "x<<y>>"


def test_fuzzing_marks_as_many_tokens_on_both_sides(corpus, material):
    questions = SCORES["fuzzing"][0](material, "b or c", corpus.sampling)
    pairs = [(s, t) for q in questions for s, t in zip(q.examples, q.truth)]
    assert len(pairs) == len(material.test) + 50 and all(
        len(q.examples) == 5 for q in questions[:-1]
    )
    true = [sum(s.marks) for s, t in pairs if t]
    hard = {e.tokens for e in material.non_activating if e.other is not None}
    random = {sum(s.marks) for s, t in pairs if not t and s.tokens not in hard}
    assert random == {math.ceil(np.mean(true))}
    marked = {t for s, fires in pairs if fires for t, m in zip(s.tokens, s.marks) if m}
    assert marked <= {"b", "c"}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_by_loops(seed):
    rng = np.random.default_rng(seed)
    truth = (rng.uniform(size=40) < 0.4).astype(float)
    confidence = np.round(rng.uniform(size=40) + 0.3 * truth, 1)  # with ties
    said = (confidence > 0.5).astype(float)
    found = metrics.binary_metrics(truth, said, confidence)
    tp = sum(t and s for t, s in zip(truth, said))
    tn = sum(not t and not s for t, s in zip(truth, said))
    pos, neg = truth.sum(), 40 - truth.sum()
    assert found["accuracy"] == pytest.approx((tp + tn) / 40)
    assert found["balanced_accuracy"] == pytest.approx((tp / pos + tn / neg) / 2)
    precision, recall = tp / said.sum(), tp / pos
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, t in zip(confidence, truth)
        if t
        for b, u in zip(confidence, truth)
        if not u
    ]
    assert found["auc"] == pytest.approx(np.mean(wins))
    a, b = rng.normal(size=30), rng.normal(size=30)
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)


def test_metrics_that_are_undefined():
    assert metrics.binary_metrics([], [])["accuracy"] is None
    one = metrics.binary_metrics([1, 1], [1, 0], [0.9, 0.1])
    assert one["balanced_accuracy"] is None and one["auc"] is None and one["accuracy"] == 0.5
    assert metrics.binary_metrics([0, 0], [0, 0])["f1"] is None
    assert metrics.pearson([1, 1], [1, 2]) is None and metrics.pearson([], []) is None
    assert metrics.pearson([0.1] * 3, [1, 2, 4]) is None  # the mean of these is not 0.1
    assert metrics.pearson([0, 1e-200, 0], [1, 2, 4]) is None  # its square is 0


# --- token statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("feature", range(5))
def test_a_label_names_the_planted_letters(corpus, feature):
    text, rule = token_label(corpus, feature)
    assert rule.place == "this" and set(rule.tokens) == set(PLANTED[feature])
    assert text.startswith("token statistics: fires on ") and "(100 % of where it fires" in text
    assert all(f'"{c}"' in text for c in PLANTED[feature])
    assert all(share == 1.0 for share, _ in rule.tokens.values())


def test_a_label_says_what_stands_before(corpus):
    text, rule = token_label(corpus, AFTER_X, ("yes", "\n", "\x1b[2J"))
    assert rule.place == "previous" and list(rule.tokens) == ["x"] and 'after "x"' in text
    assert text.endswith('; raises "yes", "↵", "\\x1b[2J"')
    assert [s > 0 for s, _ in rule.strengths("axbx")] == [False, False, True, False]


def test_rules_are_measured_like_any_explanation(corpus):
    """A planted feature's rule is right but for strengths, which vary; intruders are found by
    tokens in common, of which a feature of two letters has fewer."""
    for feature in (0, 1, AFTER_X):
        material, judge = ex.gather(corpus, feature), RuleJudge()
        text, rule = token_label(corpus, feature)
        judge.learn(text, rule)
        for name, (ask, grade) in SCORES.items():
            questions = ask(material, text, corpus.sampling)
            score = grade(questions, judge.answer(questions))
            assert score["unparsed"] == 0
            if name in ("detection", "fuzzing"):
                assert score["auc"] > 0.99 and score["balanced_accuracy"] > 0.97
            elif name == "simulation":
                assert 0.8 < score["correlation"] < 1
            elif name == "saebench":
                assert score["score"] == 1 and score["n"] == 14
            else:
                assert score["accuracy"] > 0.8 and score["chance"] == pytest.approx(0.2)
    assert (
        RuleJudge().answer(SCORES["detection"][0](material, "?", corpus.sampling))[0].values is None
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_best_set_of_tokens_is_that_of_all_sets(seed, monkeypatch):
    monkeypatch.setattr(statistics, "NAMED", 4)
    rng = np.random.default_rng(seed)
    total = rng.integers(1, 200, 10)
    hits = rng.binomial(total, rng.uniform(0, 1, 10)).astype(float)
    fired = hits.sum() + 50

    def f_half(some):
        precision = hits[list(some)].sum() / total[list(some)].sum()
        recall = hits[list(some)].sum() / fired
        return 1.25 * precision * recall / (0.25 * precision + recall) if recall else 0.0

    sets = [s for k in range(1, 5) for s in itertools.combinations(range(10), k)]
    chosen, found = statistics.best_set(hits, total, fired)
    assert found == pytest.approx(max(map(f_half, sets))) and f_half(chosen) == pytest.approx(found)
    assert (np.diff(hits[chosen]) <= 0).all()


def test_labels_count_what_is_sampled(corpus, monkeypatch):
    """A label from a fifth of the firings says the same, but for what chance does."""
    whole = token_label(corpus, DENSE)[1]
    monkeypatch.setattr(statistics, "MOST", len(corpus.feature(DENSE)[0]) // 10)
    part = token_label(corpus, DENSE)[1]
    shares = lambda rule: np.mean([s for s, _ in rule.tokens.values()])
    assert shares(whole) == 1 and shares(part) > 0.8


# --- neighbours ----------------------------------------------------------------------------------


def test_neighbours_by_loops(corpus, store):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(20, 6)).astype(np.float32)
    unit = w.astype(np.float64) / np.linalg.norm(w.astype(np.float64), axis=1, keepdims=True)
    for f, found in decoder_neighbours(w, [3, 11], k=4).items():
        order = sorted((g for g in range(20) if g != f), key=lambda g: -unit[f] @ unit[g])
        assert found == order[:4]
    both = (store.values > 0).astype(float)
    for f, found in cooccurring(corpus, [0, AFTER_X], k=3).items():
        score = {
            g: (both[f] * both[g]).sum() / max(1, math.sqrt(both[f].sum() * both[g].sum()))
            for g in range(WIDTH)
            if g != f
        }
        wanted = [g for g in sorted(score, key=lambda g: -score[g]) if score[g] > 0][:3]
        assert found == wanted and found[0] == DENSE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"length": 4}, "length is 4: at least 8"),
        ({"test": 1}, "test is 1"),
        ({"hard": 60}, "hard is 60, more than the 50 non_activating windows"),
        ({"seed": -1}, "seed is -1"),
        ({"least": 0}, "least is 0"),
    ],
)
def test_settings_that_make_no_sense(change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(ex.Sampling(), **change)


def test_a_store_with_too_little_text():
    with pytest.raises(InputError, match="too little text"):
        ex.open_corpus(PlantedStore(pieces=1, segments=1), Tok())
