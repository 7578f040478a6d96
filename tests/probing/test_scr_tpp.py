"""TPP and SCR against ablation done token by token, and planted concepts whose answer is known."""

import numpy as np
import pytest

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.probing import scr_tpp
from gemma_scope_jax.probing.scr_tpp import (
    effects,
    fit_probes,
    scr,
    scr_task,
    strongest,
    tpp,
    tpp_task,
)
from probing_data import reference_fit, write_table

D, F, T = 12, 20, 5


def dictionary(seed=0, error=0.0):
    """A coder whose feature i is the i-th direction, of F in D dimensions; b_dec 0."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((F, D)).astype(np.float32)
    directions[:D] = np.linalg.qr(rng.standard_normal((D, D)))[0]
    directions[D:] *= 0.01
    zeros = np.zeros(F, np.float32)
    return SparseCoder(
        directions.T * (1 - error), zeros, zeros + np.float32(0.3), directions, np.zeros(D), layer=0
    )


def tokens_of(coder, on, seed=0, noise=0.05):
    """Token activations [N, T, D] of texts in which the features of `on` [N] are active."""
    rng = np.random.default_rng(seed)
    f = rng.random((len(on), T, F)) * (rng.random((len(on), T, F)) < 0.1)
    f[..., :6] = 0
    f[..., D:] = 0
    for n, features in enumerate(on):
        f[n, :, list(features)] = 1 + rng.random((len(features), T))
    x = f @ np.asarray(coder.w_dec, np.float64)
    return (x + noise * rng.standard_normal(x.shape)).astype(np.float32)


def pooled(coder, x):
    return x.mean(1), np.asarray(coder.encode(x)).mean(1)


def accuracy_of(probe, x, split):
    scores = [float(v @ probe.w + probe.b) for v in x[split.test]]
    return np.mean([(s > 0) == bool(t) for s, t in zip(scores, split.test_y)])


def ablated_tokens(coder, x, chosen):
    """x [N, T, D] without the chosen features' contributions, one token after the other."""
    out, f = np.array(x, np.float64), np.asarray(coder.encode(x), np.float64)
    w_dec = np.asarray(coder.w_dec, np.float64)
    for n in range(len(x)):
        for t in range(T):
            for i in chosen:
                out[n, t] -= f[n, t, i] * w_dec[i]
    return out


def effect_loop(coder, f, split, w, both_ways):
    found, w_dec = [], np.asarray(coder.w_dec)
    for i in range(F):
        ones = [float(f[r, i]) for r, y in zip(split.train, split.train_y) if y == 1]
        zeros = [float(f[r, i]) for r, y in zip(split.train, split.train_y) if y == 0]
        apart = sum(ones) / len(ones) - sum(zeros) / len(zeros)
        along = sum(float(a) * float(b) for a, b in zip(w, w_dec[i]))
        found.append(abs(apart * along) if both_ways else max(apart, 0) * along)
    return found


def top(effect, n):
    return [i for i in sorted(range(F), key=lambda i: -effect[i])[:n] if effect[i] > 0]


# -------------------------------------------------------------------------------------------------
# TPP


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(["a", "b", "c", "d"], 30))
    rows = [(f"text {i}", c) for i, c in enumerate(labels)]
    return write_table(tmp_path_factory.mktemp("tpp") / "news.csv", rows), labels


def test_tpp_equals_ablation_token_by_token(news):
    """Two features a class, one of them shared with the next class, and an inexact encoder."""
    table, labels = news
    coder, task = dictionary(error=0.2), tpp_task(table)
    place = {c: i for i, c in enumerate("abcd")}
    x = tokens_of(coder, [(place[c], (place[c] + 1) % 4) for c in labels], noise=0.3)
    mean, f = pooled(coder, x)
    probes = fit_probes(task, mean)
    got = tpp(task, probes, coder.w_dec, mean, f, ns=(1, 2, 5))
    totals = {1: [], 2: [], 5: []}
    for c, split in task.questions.items():
        scale = D**0.5 / np.median(np.linalg.norm(mean[split.train], axis=1))
        w, b = reference_fit(
            mean[split.train] * scale, split.train_y, 1.0, np.ones(len(split.train))
        )
        np.testing.assert_allclose(probes[c].w, w * scale, rtol=1e-3, atol=1e-4)
        assert probes[c].b == pytest.approx(b, abs=1e-3)
        effect = effect_loop(coder, f, split, probes[c].w, both_ways=False)
        np.testing.assert_allclose(
            effects(f, split, np.asarray(coder.w_dec) @ probes[c].w, both_ways=False),
            effect,
            atol=1e-5,
        )
        for n in totals:
            without = ablated_tokens(coder, x, top(effect, n)).mean(1)
            drops = {
                o: accuracy_of(probes[o], mean, s) - accuracy_of(probes[o], without, s)
                for o, s in task.questions.items()
            }
            intended = drops.pop(c)
            want = intended - np.mean(list(drops.values()))
            assert got["by_class"][c][str(n)]["tpp"] == pytest.approx(want, abs=1e-6)
            assert got["by_class"][c][str(n)]["intended"] == pytest.approx(intended, abs=1e-6)
            totals[n].append(want)
    for n, each in totals.items():
        assert got["by_n"][str(n)]["tpp"] == pytest.approx(np.mean(each), abs=1e-6)


def test_features_that_are_the_classes_make_tpp_what_a_probe_can_lose(news):
    """Balanced probes fall from 1 to 1/2, and no other probe is touched."""
    table, labels = news
    coder, task = dictionary(), tpp_task(table)
    x = tokens_of(coder, [("abcd".index(c),) for c in labels])
    mean, f = pooled(coder, x)
    got = tpp(task, fit_probes(task, mean), coder.w_dec, mean, f, ns=(1,))
    assert set(got["clean"].values()) == {1.0}
    assert got["by_n"]["1"] == {"tpp": 0.5, "intended": 0.5, "unintended": 0.0}


def test_features_that_know_nothing_have_a_tpp_of_zero(news):
    table, labels = news
    coder, task = dictionary(), tpp_task(table)
    x = tokens_of(coder, [("abcd".index(c),) for c in labels])
    mean, f = pooled(coder, x)
    f[:, :4] = 0
    got = tpp(task, fit_probes(task, mean), coder.w_dec, mean, f, ns=(2,))
    assert abs(got["by_n"]["2"]["tpp"]) < 0.05


def test_only_features_with_an_effect_are_ablated():
    assert strongest(np.array([0.0, 3, -1, 2]), 4).tolist() == [1, 3]
    assert strongest(np.array([0.0, 3, -1, 2]), 1).tolist() == [1]


# -------------------------------------------------------------------------------------------------
# SCR


def attributes(tmp_path, sizes=(30, 30, 30, 30)):
    rng = np.random.default_rng(2)
    quadrants = rng.permutation(np.repeat(range(4), sizes))
    rows = [(f"text {i}", f"job{q // 2}", f"sex{q % 2}") for i, q in enumerate(quadrants)]
    return write_table(tmp_path / "people.csv", rows, "text,job,sex"), quadrants


@pytest.mark.parametrize("share", [1.0, 0.7], ids=["clean", "mixed"])
def test_scr_equals_ablation_token_by_token(tmp_path, share):
    """Feature 0 is the job, feature 1 (and 2, more or less) the sex."""
    table, quadrants = attributes(tmp_path)
    coder, task = dictionary(error=0.1), scr_task(table)
    rng = np.random.default_rng(4)
    on = [(0,) * (q // 2) + ((1, 2) if q % 2 and rng.random() < share else ()) for q in quadrants]
    x = tokens_of(coder, on, noise=0.2)
    mean, f = pooled(coder, x)
    probes = fit_probes(task, mean)
    got = scr(task, probes, coder.w_dec, mean, f, ns=(1, 3))
    lower = {}
    for kept, removed, name in (("job", "sex", "first"), ("sex", "job", "second")):
        split, source = task.questions[kept], task.questions[removed]
        before = accuracy_of(probes["biased"], mean, split)
        clean = accuracy_of(probes[kept], mean, split)
        effect = effect_loop(coder, f, source, probes[removed].w, both_ways=True)
        lower[name] = before
        for n in (1, 3):
            without = ablated_tokens(coder, x, top(effect, n)).mean(1)
            after = accuracy_of(probes["biased"], without, split)
            want = (after - before) / (clean - before) if clean - before >= 0.001 else 0.0
            assert got["directions"][name]["by_n"][str(n)] == pytest.approx(want, abs=1e-6)
    assert got["direction"] == min(lower, key=lower.__getitem__)
    assert got["by_n"] == got["directions"][got["direction"]]["by_n"]


def test_features_that_are_the_attribute_remove_it_entirely(tmp_path):
    """A feature for each job, a louder one for each sex: the biased probe goes by the sex."""
    table, quadrants = attributes(tmp_path)
    coder, task = dictionary(), scr_task(table)
    x = tokens_of(coder, [(q // 2, 2 + q % 2) for q in quadrants])
    x = x + 2 * np.asarray(coder.w_dec)[2 + np.array(quadrants) % 2][:, None, :]
    mean, f = pooled(coder, x)
    got = scr(task, fit_probes(task, mean), coder.w_dec, mean, f, ns=(2,))
    assert got["direction"] == "first" and got["by_n"]["2"] == 1.0
    first = got["directions"]["first"]
    assert (first["kept"], first["removed"], first["clean"]) == ("job", "sex", 1.0)
    assert first["biased"] < 0.8


def test_no_room_for_improvement_scores_zero(tmp_path, monkeypatch):
    table, quadrants = attributes(tmp_path)
    coder, task = dictionary(), scr_task(table)
    mean, f = pooled(coder, tokens_of(coder, [(0,) * (q // 2) for q in quadrants]))
    probes = fit_probes(task, mean)
    got = scr(task, probes | {"biased": probes["job"]}, coder.w_dec, mean, f, ns=(1,))
    assert got["directions"]["first"]["by_n"]["1"] == 0.0


def test_the_sets_of_scr_are_balanced_and_held_apart(tmp_path):
    table, _ = attributes(tmp_path, (30, 50, 20, 60))
    task = scr_task(table)
    words = [(table.columns["job"][i], table.columns["sex"][i]) for i in range(160)]
    for kept in ("job", "sex"):
        split = task.questions[kept]
        for rows in (split.train, split.test):
            counts = [[words[i] for i in rows].count(w) for w in set(words)]
            assert len(set(counts)) == 1
    biased = task.questions["biased"]
    assert {words[i] for i in biased.train} == {("job0", "sex0"), ("job1", "sex1")}
    assert not set(biased.train) & set(task.questions["job"].test)


# -------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("make", "header", "rows", "message"),
    [
        (tpp_task, "text,target", [("a", 1), ("b", 2)], "at least 3 classes, not 2"),
        (tpp_task, "text,target", [("a", i) for i in range(30)], "30 different labels"),
        (tpp_task, "text,mood,tone", [("a", 1, 2)], "no column target or label or class"),
        (tpp_task, "text,target", [("a", i % 3) for i in range(7)], "too small"),
        (scr_task, "text,job", [("a", 1), ("b", 2)], "two attributes"),
        (scr_task, "text,job,sex", [("a", i % 3, i % 2) for i in range(99)], "job has 3 values"),
        (
            scr_task,
            "text,job,sex",
            [("a", i % 2, i % 2) for i in range(99)],
            "has 0 texts; SCR needs 10",
        ),
    ],
)
def test_tables_that_do_not_serve(tmp_path, make, header, rows, message):
    with pytest.raises(InputError, match=message) as error:
        make(write_table(tmp_path / "bad.csv", rows, header))
    assert "bad.csv" in str(error.value)


def test_numbers_ablated_are_saebenchs():
    assert scr_tpp.ABLATED == (2, 5, 10, 20, 50, 100, 500)
