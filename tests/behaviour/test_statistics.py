"""Intervals cover, tests agree with scipy's, and without a difference there is no alarm."""

import itertools

import numpy as np
import pytest
from scipy import stats

from gemma_scope_jax.behaviour.statistics import (
    Interval,
    auc_interval,
    bootstrap,
    paired_tests,
    share,
    unpaired_tests,
)
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.errors import InputError

RNG = np.random.default_rng


def sparse(rng, n, width):
    """Like features of texts: most are zero in most texts, some are in all, all are skewed."""
    rate = RNG(width).beta(0.3, 1.5, width)  # a feature's, whatever the arm
    return (rng.random((n, width)) < rate) * rng.lognormal(0, 1.5, (n, width))


def test_an_interval_of_the_mean_is_that_of_scipy():
    x = RNG(0).lognormal(0, 1, 60)
    ours = bootstrap(x, draws=20_000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="BCa").confidence_interval
    assert ours.value == pytest.approx(x.mean()) and ours.n == 60
    spread = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * spread > abs(ours.high - theirs.high)


def test_a_statistic_of_rows_is_that_of_scipy():
    x = RNG(1).normal(size=(40, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    r = lambda rows: np.corrcoef(rows.T)[0, 1]
    ours = bootstrap(x, r, draws=4000)
    theirs = stats.bootstrap(
        (x[:, 0], x[:, 1]), lambda a, b: np.corrcoef(a, b)[0, 1],
        paired=True, vectorized=False, n_resamples=4000,
    ).confidence_interval  # fmt: skip
    assert ours.value == pytest.approx(r(x))
    assert abs(ours.low - theirs.low) < 0.03 > abs(ours.high - theirs.high)


@pytest.mark.parametrize("kind", ["own", "mean", "clusters"])
def test_an_interval_covers_as_often_as_it_says(kind):
    rng, hits, studies = RNG(2), 0, 200
    for study in range(studies):
        if kind == "clusters":
            number = np.repeat(np.arange(25), 4)
            x = rng.normal(size=25)[number] + 0.3 * rng.normal(size=100)
            found = bootstrap(x, clusters=number, draws=400, seed=study)
        else:
            x = rng.normal(size=60)
            own = (lambda rows: rows.mean()) if kind == "own" else None
            found = bootstrap(x, own, draws=200 if kind == "own" else 400, seed=study)
        hits += not found.excludes(0.0)
    assert 0.88 < hits / studies < 0.985


def test_rows_of_a_cluster_are_drawn_together():
    """A statistic sees whole clusters; four copies of each row tell no more than one."""
    x = RNG(3).normal(size=30)
    number = np.tile(np.arange(30), 4)
    alone, copies = bootstrap(x), bootstrap(np.tile(x, 4), clusters=number)
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
    named = bootstrap(np.tile(x, 4), clusters=[f"text {i}" for i in number])
    assert named.high - named.low == pytest.approx(alone.high - alone.low, rel=0.2)
    sizes = []

    def seen(rows):
        sizes.append(len(rows))
        assert sorted(np.unique(rows, return_counts=True)[1] % 4)[-1] == 0
        return rows.mean()

    by_rows = bootstrap(np.tile(x, 4), seen, clusters=number, draws=100)
    assert set(sizes) == {120, 116} and by_rows.value == pytest.approx(alone.value)


def test_what_never_varies_has_an_interval_of_no_width():
    assert bootstrap([2.0] * 7) == Interval(2.0, 2.0, 2.0, 7)
    assert bootstrap([3.0]) == Interval(3.0, 3.0, 3.0, 1)
    assert bootstrap([1.0, 2.0], clusters=[0, 0]) == Interval(1.5, 1.5, 1.5, 2)
    nothing = bootstrap(np.zeros((4, 2)), lambda rows: float("nan"), draws=10)
    assert nothing.as_dict() == {"value": None, "low": None, "high": None, "n": 4}


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_a_share_has_the_interval_of_wilson(hits):
    found = share(hits, 20)
    theirs = stats.binomtest(hits, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert (found.value, found.n) == (hits / 20, 20)


def test_the_interval_of_an_auc_is_that_of_drawing_and_ranking():
    rng = RNG(4)
    y = rng.random(70) < 0.4
    scores = np.round(rng.normal(size=70) + y, 1)  # with ties
    ours = auc_interval(y, scores, draws=6000)
    ups, downs, areas = np.flatnonzero(y), np.flatnonzero(~y), []
    for _ in range(6000):
        some = np.concatenate([rng.choice(ups, len(ups)), rng.choice(downs, len(downs))])
        areas.append(auc(y[some], scores[some]))
    assert ours.value == auc(y, scores)
    assert np.allclose([ours.low, ours.high], np.quantile(areas, [0.025, 0.975]), atol=0.01)


def test_an_auc_of_pairs_draws_pairs():
    """Within a pair one is just above the other, and pairs lie far apart."""
    rng = RNG(5)
    base = rng.normal(size=40)
    y, pair = np.repeat([1, 0], 40), np.tile(np.arange(40), 2)
    scores = np.concatenate([base + 0.3, base])
    free, paired = auc_interval(y, scores), auc_interval(y, scores, clusters=pair)
    assert paired.high - paired.low < 0.5 * (free.high - free.low)
    assert not paired.excludes(paired.value)
    perfect = auc_interval(y, y.astype(float))
    assert (perfect.low, perfect.value, perfect.high) == (1, 1, 1)


def test_paired_tests_are_scipys():
    rng = RNG(6)
    a, b = sparse(rng, 40, 30), sparse(rng, 40, 30)
    some = np.flatnonzero(np.count_nonzero(a - b, axis=0) > 1)
    rest = np.setdiff1d(np.arange(30), some)
    found, theirs = paired_tests(a - b), stats.ttest_rel(a[:, some], b[:, some])
    assert len(some) > 10
    assert np.allclose(found.statistic[some], theirs.statistic)
    assert np.allclose(found.p[some], theirs.pvalue)
    never = rest[~(a - b)[:, rest].any(0)]
    assert len(never) and (found.p[never] == 1).all() and (found.adjusted[never] == 1).all()
    assert np.allclose(found.q, stats.false_discovery_control(found.p))
    d = (a - b).mean(0) / (a - b).std(0, ddof=1).clip(1e-9)
    assert np.allclose(found.effect, d)


def test_unpaired_tests_are_welchs():
    rng = RNG(7)
    a, b = sparse(rng, 40, 30) + 0.2, sparse(rng, 25, 30)
    a[:, 3], b[:, 3] = 0.1, 0.1
    found = unpaired_tests(a, b)
    some = np.flatnonzero((a.std(0) > 1e-9) & (b.std(0) > 1e-9))
    theirs = stats.ttest_ind(a[:, some], b[:, some], equal_var=False)
    assert len(some) > 10
    assert np.allclose(found.statistic[some], theirs.statistic)
    assert np.allclose(found.p[some], theirs.pvalue)
    assert (found.p[3], found.adjusted[3], found.effect[3]) == (1, 1, 0)
    pooled = np.sqrt((39 * a.var(0, ddof=1) + 24 * b.var(0, ddof=1)) / 63)
    assert np.allclose(found.effect[some], ((a.mean(0) - b.mean(0)) / pooled)[some])


def test_adjusted_p_is_that_of_all_sign_flips():
    """Against every one of the 2^8 flips, with t computed anew for each."""
    rng = RNG(8)
    x = sparse(rng, 8, 6) - sparse(rng, 8, 6) + 0.4 * rng.random((8, 6))
    found = paired_tests(x, permutations=20_000)
    t = lambda d: np.abs(d.mean(0) / d.std(0, ddof=1))
    flips = np.array(list(itertools.product([1, -1], repeat=8)))[:, :, None]
    largest = np.array([t(x * f).max() for f in flips])
    exact = (largest[:, None] >= t(x) * (1 - 1e-9)).mean(0)
    assert np.allclose(found.adjusted, exact, atol=0.015)
    assert found.family_p == found.adjusted.min()


def test_adjusted_p_is_that_of_all_deals():
    """Against every one of the 462 ways to deal 11 items."""
    rng = RNG(9)
    a, b = sparse(rng, 5, 7) + 0.5, sparse(rng, 6, 7)
    a += rng.random(a.shape)
    found = unpaired_tests(a, b, permutations=20_000)
    x, everyone = np.concatenate([a, b]), set(range(11))

    def t(some):
        one, other = x[list(some)], x[list(everyone - set(some))]
        return np.abs(stats.ttest_ind(one, other).statistic)

    largest = np.array([t(some).max() for some in itertools.combinations(range(11), 5)])
    exact = (largest[:, None] >= t(range(5)) * (1 - 1e-9)).mean(0)
    assert np.allclose(found.adjusted, exact, atol=0.015)


@pytest.mark.parametrize("paired", [True, False])
def test_nothing_planted_raises_the_alarm_in_five_of_a_hundred(paired):
    """The arms of one set of sparse, skewed items, dealt anew 300 times: 5 % of alarms."""
    rng, studies = RNG(10), 300
    items = sparse(rng, 60, 200)
    alarms = 0
    for study in range(studies):
        if paired:
            a, b = items[::2], items[1::2]
            swap = rng.random((30, 1)) < 0.5
            found = paired_tests(np.where(swap, b - a, a - b), permutations=199, seed=study)
        else:
            order = rng.permutation(60)
            a, b = items[order[:35]], items[order[35:]]
            found = unpaired_tests(a, b, permutations=199, seed=study)
        alarms += found.family_p <= 0.05
    # 15 expected, with a spread of 3.8
    assert 4 <= alarms <= 27


@pytest.mark.parametrize("paired", [True, False])
def test_one_planted_feature_of_a_thousand_is_found(paired):
    rng = RNG(11)
    a, b = sparse(rng, 80, 1000), sparse(rng, 80, 1000)
    a[:, 417] += 2.0 * (rng.random(80) < 0.6)
    b[:, 417] *= 0.2
    found = paired_tests(a - b) if paired else unpaired_tests(a, b)
    assert found.family_p == found.adjusted[417] <= 0.01
    assert found.q.argmin() == 417 and found.q[417] < 0.05
    assert found.effect[417] > 0.5 and found.statistic[417] > 0


@pytest.mark.parametrize("tests", [paired_tests, lambda x: unpaired_tests(x + 1, np.ones((6, 3)))])
def test_a_feature_that_tells_the_arms_apart_without_fail_stays_finite(tests):
    x = np.tile([[1.0, 0.0, -2.0]], (9, 1))
    found = tests(x)
    assert np.isfinite([found.statistic, found.p, found.q, found.effect]).all()
    assert found.p[1] == 1 and found.p[0] < 1e-6 > found.p[2]
    assert found.effect[0] > 900 and found.effect[2] < -900
    tiny = tests(x * 1e-200) if tests is paired_tests else None
    assert tiny is None or np.allclose(tiny.p, found.p)


def test_all_zero_features_raise_no_alarm():
    for found in (paired_tests(np.zeros((6, 4))), unpaired_tests(np.ones((6, 4)), np.ones((7, 4)))):
        assert found.family_p == 1 and (found.p == 1).all() and (found.q == 1).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bootstrap([]), "at least one value"),
        (lambda: bootstrap([1.0, np.nan]), "finite"),
        (lambda: bootstrap(np.ones((3, 2))), "a list of finite numbers"),
        (lambda: bootstrap([1.0, 2.0], level=1.0), "0 < level < 1"),
        (lambda: bootstrap([1.0, 2.0], clusters=[1]), "one entry for each of the 2"),
        (lambda: share(3, 2), "3 of 2"),
        (lambda: share(0, 0), "n > 0"),
        (lambda: auc_interval([1, 1], [0.1, 0.2]), "both classes"),
        (lambda: auc_interval([1, 0], [0.1, np.inf]), "finite"),
        (lambda: paired_tests(np.ones((4, 3))), "at least 5 pairs, not 4"),
        (lambda: paired_tests(np.ones(9)), "[items, features]"),
        (lambda: paired_tests(np.full((9, 2), np.nan)), "finite"),
        (lambda: unpaired_tests(np.ones((9, 2)), np.ones((3, 2))), "second arm, not 3"),
        (lambda: unpaired_tests(np.ones((9, 2)), np.ones((9, 3))), "2 and 3 features"),
    ],
)
def test_bad_input_is_refused_in_a_line(call, said):
    with pytest.raises(InputError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)
