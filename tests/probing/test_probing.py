"""Probes against scipy's float64 optimum, texts pooled against one at a time, and planted features
whose answer is known."""

import numpy as np
import pytest
import scipy.optimize

from coders import random_coder
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.intercept import capture
from gemma_scope_jax.model.run import run
from gemma_scope_jax.probing import pooling, probing
from gemma_scope_jax.probing.logistic import accuracy, f1, fit_logistic, l1_logistic, weighted_f1
from gemma_scope_jax.probing.probing import PROTOCOLS, folds, make_task, probe, probe_task, rank
from gemma_scope_jax.probing.tables import Split
from probing_data import reference_fit, write_table

SAE_PROBES, SAEBENCH = PROTOCOLS["sae-probes"], PROTOCOLS["saebench"]


# -------------------------------------------------------------------------------------------------
# Logistic regression


def problem(n=90, k=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, k)) + 3.0
    y = (x[:, 0] - 0.5 * x[:, 1] + rng.standard_normal(n) > 1.5).astype(float)
    return x, y, rng


def test_probes_are_at_scipys_optimum_for_any_penalty_and_weights():
    x, y, rng = problem()
    weight = rng.integers(0, 3, (1, 3, len(y))).astype(float)
    strengths = [10.0, 0.01, 1.0]
    fitted = fit_logistic(x[None], y[None], strengths, weight)
    for p, c in enumerate(strengths):
        w, b = reference_fit(x, y, c, weight[0, p])
        np.testing.assert_allclose(fitted.w[0, p], w, atol=2e-5)
        np.testing.assert_allclose(fitted.b[0, p], b, atol=1e-4)


@pytest.mark.parametrize("k", [7, 200], ids=["fewer columns than rows", "more columns than rows"])
def test_the_gradient_vanishes_on_skewed_activations(k):
    """They are as large and as skewed as Gemma's."""
    x, y, rng = problem(k=k)
    x = x * np.exp(3 * rng.standard_normal(k)) * 100
    x[:, 0] += 15000
    strengths = np.logspace(5, -5, 5)
    fitted = fit_logistic(x[None].astype(np.float32), y[None], strengths)
    for c, w, scores in zip(strengths, fitted.w[0], fitted.scores(x[None].astype(np.float32))[0]):
        error = 1 / (1 + np.exp(-scores)) - y
        scale = 1 + c * np.abs(x.T) @ np.abs(error)
        assert (np.abs(w + c * x.T @ error) < 1e-4 * scale + 1e-6 * c * np.abs(x).sum(0)).all()
        assert abs(error.sum()) < 1e-5


def test_a_column_of_zeros_and_examples_of_weight_zero_change_nothing():
    x, y, _ = problem()
    alone = fit_logistic(x[None, :60], y[None, :60], 1.0)
    padded = np.concatenate([x, np.zeros((90, 2))], 1)
    weight = (np.arange(90) < 60).astype(float)
    both = fit_logistic(padded[None], y[None], 1.0, weight[None, None])
    np.testing.assert_allclose(both.w[0, 0, :6], alone.w[0, 0], atol=1e-8)
    assert (both.w[0, 0, 6:] == 0).all()


def test_one_class_is_refused():
    with pytest.raises(InputError, match="both classes"):
        fit_logistic(np.ones((1, 4, 2)), np.ones((1, 4)), 1.0)


def test_l1_probes_satisfy_their_optimality_conditions():
    rng = np.random.default_rng(3)
    x = np.maximum(rng.standard_normal((150, 30)) - 0.5, 0) * np.exp(rng.standard_normal(30))
    y = np.stack([x[:, 3] > 0.2, x[:, 5] + x[:, 6] > 0.8], 1).astype(float)
    weight = np.where(y > 0, 2.0, 1.0)
    w = np.asarray(l1_logistic(x, y, weight, 0.01, steps=20000), np.float64)
    for label in range(2):
        best = scipy.optimize.minimize_scalar(
            lambda b, m=x @ w[:, label], l=label: (
                weight[:, l] @ (np.logaddexp(0, m + b) - y[:, l] * (m + b))
            )
        )
        error = weight[:, label] * (1 / (1 + np.exp(-x @ w[:, label] - best.x)) - y[:, label])
        slope = x.T @ error / len(x)
        on = w[:, label] != 0
        assert 0 < on.sum() < 25
        np.testing.assert_allclose(slope[on], -0.01 * np.sign(w[on, label]), atol=4e-4)
        assert (np.abs(slope[~on]) < 0.0104).all()


def test_measures_equal_loops():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 60)
    scores = np.round(rng.standard_normal(60) + 0.5 * y, 1)  # with ties
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[y == 1] for b in scores[y == 0]
    ]
    assert auc(y, scores) == pytest.approx(np.mean(pairs))
    parts = []
    for label in (0, 1):
        found = (scores > 0) == label
        hits = sum(f and t == label for f, t in zip(found, y))
        precision, recall = hits / found.sum(), hits / (y == label).sum()
        parts.append(2 * precision * recall / (precision + recall))
    assert f1(y, scores) == pytest.approx(parts[1])
    assert weighted_f1(y, scores) == pytest.approx((1 - y.mean()) * parts[0] + y.mean() * parts[1])
    assert accuracy(y, scores) == np.mean([(s > 0) == t for s, t in zip(scores, y)])
    assert np.isnan(auc(np.ones(3), np.zeros(3))) and np.isnan(
        auc(np.arange(2), np.array([0, np.nan]))
    )


# -------------------------------------------------------------------------------------------------
# Pooling


def some_texts(count=40, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [1, 2, 5, 64, *rng.integers(3, 60, count - 4)]
    return [np.append(2, rng.integers(3, 300, n - 1)).astype(np.int32) for n in sizes]


POOLED = {
    "mean": lambda x: x.mean(0),
    "max": lambda f: f.max(0),
    "active": lambda f: (f != 0).mean(0),
}


@pytest.mark.parametrize("how", [*POOLED, -1])
def test_pooled_texts_are_those_of_each_text_alone(model, how):
    """The transcoder of an instruction-tuned model has `first` 4, so nobody counts less."""
    transcoder = random_coder(reads="mlp_in", writes="mlp_out", skip=True, first=4)
    coders = [random_coder(layer=2), transcoder]
    texts = some_texts()
    done = []
    alone = lambda x, how: x[-1] if how == -1 else POOLED[how](x[min(4, len(x) - 1) :])
    pooled = pooling.pool(
        model,
        coders,
        texts,
        how=how,
        first=4,
        lengths=(16, 64),
        tokens=128,
        report=lambda *at: done.append(at),
    )
    assert done[-1] == (sum(map(len, texts)),) * 2
    for i in (0, 1, 2, 3, 11, 25):
        ids = np.pad(texts[i], (0, 64 - len(texts[i])))[None]
        segments = (np.arange(64) < len(texts[i])).astype(np.int32)[None]
        reads = [capture(s, l) for s, l in pooled.raw]
        out = run(model, ids, reads, segments=segments).reads
        for place, pool in pooled.raw.items():
            x = np.asarray(out[place[0]], np.float64)[0, : len(texts[i])]
            np.testing.assert_allclose(pool[i], alone(x, -1 if how == -1 else "mean"), atol=2e-5)
            for coder, f in zip(coders, pooled.features):
                if place == (coder.reads, coder.layer):
                    each = np.asarray(coder.encode(x.astype(np.float32)), np.float64)
                    want = alone(each, how)
                    np.testing.assert_allclose(f.values[i], want[f.columns], atol=2e-5)
                    np.testing.assert_allclose(np.delete(want, f.columns), 0, atol=2e-5)


def test_only_columns_that_are_active_somewhere_are_kept(model):
    """None of the others but where fewer than 16 are left; numbers are the features' own."""
    coder, x = random_coder(layer=2), np.random.default_rng(3).standard_normal((50, 32))
    alive = np.arange(coder.width) % 2 == 1
    few = coder.replace(threshold=np.where(alive, coder.threshold, 1e9).astype(np.float32))
    found = pooling.encode_rows(few, x.astype(np.float32), batch=16)
    want = np.asarray(few.encode(x.astype(np.float32)))
    np.testing.assert_array_equal(found.columns, np.flatnonzero(want.any(0)))
    np.testing.assert_allclose(found.values, want[:, found.columns], atol=1e-5)
    silent = coder.replace(threshold=np.full_like(coder.threshold, 1e9))
    found = pooling.encode_rows(silent, x.astype(np.float32))
    assert found.columns.tolist() == list(range(16)) and not found.values.any()


@pytest.mark.parametrize("how", ["mean", "max", "active", -1, 0])
def test_chosen_tokens_alone_stand_for_a_text(model, how):
    coder, texts, rng = random_coder(layer=2), some_texts(12), np.random.default_rng(1)
    where = [rng.random(len(ids)) < 0.5 for ids in texts]
    for mask in where:
        mask[-1] = True
    options = {"first": 2, "lengths": (16, 64), "tokens": 128}
    pooled = pooling.pool(model, [coder], texts, how=how, where=where, **options)
    for i, (ids, mask) in enumerate(zip(texts, where)):
        x = np.asarray(run(model, ids[None], [capture("resid_post", 2)]).reads["resid_post"][0])
        f = np.asarray(coder.encode(x), np.float64)
        own = mask & (np.arange(len(ids)) >= 2) if (mask[2:]).any() else mask
        raw = x[mask][how] if isinstance(how, int) else x[own].mean(0)
        want = f[mask][how] if isinstance(how, int) else POOLED[how](f[own])
        np.testing.assert_allclose(pooled.raw["resid_post", 2][i], raw, atol=1e-4)
        got = np.zeros(coder.width)
        got[pooled.features[0].columns] = pooled.features[0].values[i]
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_other_texts_compile_nothing_new_and_rows_are_full(model):
    coders, texts = [random_coder(layer=2)], some_texts(60, 5)
    options = {"lengths": (16, 64), "tokens": 128}
    pooling.pool(model, coders, texts, **options)
    before = pooling._pool_step._cache_size()
    pooling.pool(model, coders, some_texts(80, 6), **options)
    assert pooling._pool_step._cache_size() == before
    rows = pooling.packed_rows([(i, n) for i, n in enumerate([9, 30, 5, 20, 34, 1])], 64, 4)
    assert sorted(sorted(row) for row in rows) == [[0, 2, 3, 5], [1, 4]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([np.arange(3, 80)], "context is 64"),
        ([np.array([2, 5]), np.array([2, 300])], "text 1: token id 300 is outside 0..299"),
    ],
)
def test_texts_that_cannot_be_pooled(model, texts, message):
    with pytest.raises(InputError, match=message):
        pooling.pool(model, [random_coder(layer=2)], texts)


def test_tokens_that_cannot_stand_for_a_text(model):
    texts, none = [np.array([2, 5, 7]), np.array([2, 6])], np.zeros(2, bool)
    for options, message in [
        (
            {"where": [np.ones(3, bool), none]},
            r"text 1: .* must be bool \[2\] with a token at least",
        ),
        ({"where": [np.ones(4, bool), ~none]}, "text 0: .* must be bool"),
        ({"how": 2}, "text 1 has 2 tokens, none at index 2"),
        ({"how": -2, "where": [np.ones(3, bool), np.arange(2) > 0]}, "text 1 has 1 tokens, none"),
    ]:
        with pytest.raises(InputError, match=message):
            pooling.pool(model, [random_coder(layer=2)], texts, **options)


# -------------------------------------------------------------------------------------------------
# Sparse probing


def planted(n=400, width=30, concept=7, seed=0):
    """Sparse features of which one is on exactly where the label is 1."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat([0, 1], n // 2))
    f = np.maximum(rng.standard_normal((n, width)) - 1, 0).astype(np.float32)
    f[:, concept] = y * (1 + rng.random(n))
    rows = np.arange(n)
    return f, Split(rows[:300], y[:300], rows[300:], y[300:])


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_a_feature_that_is_the_concept_is_found_and_perfect(protocol):
    f, split = planted()
    found = probe(f, split, (1, 3), protocol)
    assert found["1"].features == (7,) and found["3"].features[0] == 7
    assert found["1"].accuracy == found["1"].auc == found["1"].f1 == 1.0


def test_more_features_than_there_are_is_all_of_them():
    f, split = planted(width=8)
    found = probe(f, split, (99,), SAEBENCH, full=True)
    assert sorted(found["99"].features) == list(range(8))
    assert found["full"].features == () and found["full"].auc == 1.0


def test_noise_tells_nothing():
    f, split = planted()
    f = np.delete(f, 7, 1)
    found = probe(f, split, (1, 5), SAEBENCH)
    assert abs(found["1"].auc - 0.5) < 0.2 and abs(found["5"].accuracy - 0.5) < 0.2


@pytest.mark.parametrize("by_scale", [False, True])
def test_ranking_equals_loops(by_scale):
    f, split = planted(width=12)
    f = f * np.float32(np.exp(np.random.default_rng(1).standard_normal(12)))
    train, y = f[split.train], split.train_y
    apart = []
    for j in range(12):
        column = [float(v) for v in train[:, j]]
        if by_scale:
            on = [abs(v) for v in column if v != 0]
            size = sum(on) / (len(on) + 1e-6)
            column = [v / (size + 1e-6) for v in column]
        ones = [v for v, t in zip(column, y) if t == 1]
        zeros = [v for v, t in zip(column, y) if t == 0]
        apart.append(abs(sum(ones) / len(ones) - sum(zeros) / len(zeros)))
    assert rank(train, y, by_scale).tolist() == sorted(range(12), key=lambda j: -apart[j])


def test_a_sparse_probe_equals_a_float64_reference():
    """Everything of sae-probes again, written out with scipy's fits."""
    f, split = planted(seed=4)
    f[:, 7] += np.float32(1.5) * np.maximum(np.random.default_rng(9).standard_normal(400), 0)
    k = 3
    columns = rank(f[split.train], split.train_y, True)[:k]
    a, b = (f[rows][:, columns].astype(np.float64) for rows in (split.train, split.test))
    y, cut = split.train_y, 300 - 60
    tried = []
    for c in np.logspace(5, -5, 10):
        w, bias = reference_fit(a[:cut], y[:cut], c, np.ones(cut))
        tried.append(auc(y[cut:], a[cut:] @ w + bias))
    best = np.logspace(5, -5, 10)[int(np.argmax(tried))]
    w, bias = reference_fit(a, y, best, np.ones(300))
    got = probe(f, split, (k,), SAE_PROBES)["3"]
    assert got.c == best and got.features == tuple(columns)
    assert got.auc == pytest.approx(auc(split.test_y, b @ w + bias), abs=2e-3)
    assert got.accuracy == pytest.approx(accuracy(split.test_y, b @ w + bias), abs=0.011)


@pytest.mark.parametrize(("count", "parts", "size"), [(1024, 1, 100), (130, 1, 26), (60, 6, 10)])
def test_what_is_held_out_to_choose_a_penalty(count, parts, size):
    y = np.arange(count) % 2
    held = folds(y)
    assert [len(h) for h in held] == [size] * parts
    if parts == 1:
        assert held[0].tolist() == list(range(count - size, count))
    else:
        assert sorted(np.concatenate(held).tolist()) == list(range(count))
        assert all(y[h].mean() == 0.5 for h in held)


def test_a_task_of_three_classes_asks_three_questions(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(["x", "y", "z"], 40))
    table = write_table(tmp_path / "t.csv", [(f"text {i}", c) for i, c in enumerate(labels)])
    task = make_task(table, SAEBENCH)
    assert list(task.questions) == ["x", "y", "z"]
    f = np.stack([[c == n for n in "xyz"] for c in labels]).astype(np.float32)
    order = [table.texts.index(t) for t in task.texts]
    result = probe_task(task, {"sae": f[order]}, SAEBENCH)["sae"]
    assert result["1"]["accuracy"] == 1.0
    assert [result["questions"][c]["1"]["features"] for c in "xyz"] == [(0,), (1,), (2,)]
    with pytest.raises(InputError, match="3 different labels"):
        make_task(table, SAE_PROBES)


def test_a_task_keeps_only_the_texts_it_needs(tmp_path):
    rows = [(f"text {i}", i % 2) for i in range(500)]
    task = make_task(write_table(tmp_path / "t.csv", rows), SAE_PROBES, limit=300)
    (split,) = task.questions.values()
    assert len(task.texts) == 299 and max(split.train.max(), split.test.max()) == 298
    for rows_, y in ((split.train, split.train_y), (split.test, split.test_y)):
        assert [int(task.texts[i].split()[1]) % 2 for i in rows_] == y.tolist()


def test_columns_are_named_or_alone(tmp_path):
    table = write_table(tmp_path / "t.csv", [("a", 1, 2)], "text,first,second")
    with pytest.raises(InputError, match="no column target or label among first, second"):
        table.column("target", "label")
    assert write_table(tmp_path / "u.csv", [("a", 1)], "text,mood").column("target") == ["1"]


def test_strengths_without_a_fold_of_both_classes_are_one():
    assert probing.choose_strength(np.ones((3, 1)), np.array([0, 0, 1])) == 1.0
