"""Probing, absorption, TPP and SCR beside the functions of SAEBench, SAE-Probes and scikit-learn.

Their models and SAEs are stubs that hold our activations and weights, so that what is compared is
the arithmetic; probes are handed over where the peers train theirs by Adam.
"""

import importlib
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.probing import scr_tpp
from gemma_scope_jax.probing.absorption import absorbed
from gemma_scope_jax.probing.logistic import fit_logistic, weighted_f1
from gemma_scope_jax.probing.probing import PROTOCOLS, probe, rank
from gemma_scope_jax.probing.tables import Split, Task

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),  # what the peers warn about is not ours to mend
]
N, T, D, F = 120, 6, 16, 40


def peer(name):
    return importlib.import_module(name)  # `make peers` installs it: missing, it is a failure


@pytest.fixture(scope="module")
def coder():
    rng = np.random.default_rng(0)
    normal = lambda *shape: (rng.standard_normal(shape) / D**0.5).astype(np.float32)
    return SparseCoder(
        normal(D, F), normal(F), np.abs(normal(F)), normal(F, D), normal(D), layer=0, first=0
    )


@pytest.fixture(scope="module")
def sae(coder):
    """What SAEBench asks of an SAE, in torch."""
    torch = peer("torch")
    weights = {
        k: torch.tensor(np.array(getattr(coder, k)))
        for k in ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")
    }

    def encode(x):
        z = x @ weights["w_enc"] + weights["b_enc"]
        return z * (z > weights["threshold"])

    return SimpleNamespace(
        encode=encode,
        decode=lambda f: f @ weights["w_dec"] + weights["b_dec"],
        W_dec=torch.nn.Parameter(weights["w_dec"]),
        device="cpu",
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def tokens():
    """Token activations of four classes, float32 [N, T, D], and the classes [N]."""
    rng = np.random.default_rng(1)
    classes = np.tile(np.arange(4), N // 4)
    x = rng.standard_normal((N, T, D)) + 0.7 * rng.standard_normal((4, D))[classes][:, None, :]
    return x.astype(np.float32), classes


# -------------------------------------------------------------------------------------------------


def test_absorption_of_each_word_is_saebenchs(coder, sae):
    module = peer("sae_bench.evals.absorption.feature_absorption_calculator")
    import torch

    rng = np.random.default_rng(2)
    words = [f"word{i}" for i in range(200)]
    direction = rng.standard_normal(D)
    x = rng.standard_normal((len(words), D)).astype(np.float32) * 1.5
    x += (direction / np.linalg.norm(direction)).astype(np.float32)
    after = iter(range(0, len(words), 10))

    def run_with_cache(prompts, names_filter):
        start = next(after)
        acts = torch.tensor(x[start : start + len(prompts)])[:, None, :].repeat(1, 6, 1)
        return None, {names_filter[0]: acts}

    model = SimpleNamespace(
        run_with_cache=run_with_cache, to_tokens=lambda text: torch.zeros((1, 20))
    )
    calculator = module.FeatureAbsorptionCalculator(
        model,
        icl_word_list=[f"other{i}" for i in range(20)],
        max_icl_examples=3,
        base_template="{word} has the first letter:",
        word_token_pos=-6,
    )
    w_dec = np.asarray(coder.w_dec, np.float64)
    cosine = w_dec @ direction / np.linalg.norm(w_dec, axis=1) / np.linalg.norm(direction)
    f = np.asarray(coder.encode(x))
    projection = x @ direction / np.linalg.norm(direction)
    seen = set()
    for main in ([int(np.argmax(cosine))], [3, 7]):
        after = iter(range(0, len(words), 10))
        theirs = calculator.calculate_absorption(
            sae, words, torch.tensor(direction, dtype=torch.float32), main, 0, show_progress=False
        ).word_results
        fraction, full = absorbed(f, projection, cosine, main)
        np.testing.assert_allclose(
            fraction, [float(r.absorption_fraction) for r in theirs], atol=1e-5
        )
        assert full.tolist() == [bool(r.is_full_absorption) for r in theirs]
        seen |= {"full"} if full.any() else set()
        seen |= {"some"} if ((fraction > 0) & (fraction < 1)).any() else set()
    assert seen == {"full", "some"}


def concept_probe(x, y, seed):
    rng = np.random.default_rng(seed)
    noise = 0.3 * rng.standard_normal(x.shape[1])
    w = x[y > 0].mean(0) - x[y == 0].mean(0) + noise
    return scr_tpp.Probe(w.astype(np.float64), float(-w @ x.mean(0)))


def theirs_probe(module, ours):
    import torch

    made = module.Probe(D, torch.float32)
    made.net.weight.data = torch.tensor(ours.w, dtype=torch.float32)[None]
    made.net.bias.data = torch.tensor([ours.b], dtype=torch.float32)
    return made


def test_tpp_is_saebenchs(coder, sae, tokens, monkeypatch):
    main = peer("sae_bench.evals.scr_and_tpp.main")
    training = peer("sae_bench.evals.sparse_probing.probe_training")
    import torch

    x, classes = tokens
    names, ns = ["0", "1", "2", "3"], (1, 2, 3)
    mean, f = x.mean(1), np.asarray(coder.encode(x)).mean(1)
    rows = np.arange(N)
    questions = {}
    for c in range(4):
        y = (classes == c).astype(int)
        questions[str(c)] = Split(rows[:80], y[:80], rows[80:], y[80:])
    task = Task("four", [""] * N, questions)
    probes = {n: concept_probe(mean[:80], s.train_y, int(n)) for n, s in questions.items()}
    theirs = {n: theirs_probe(training, p) for n, p in probes.items()}

    def prepare(acts, name, perform_scr=False):
        """All rows, in their order, instead of a random balanced choice."""
        where = slice(0, 80) if len(acts["x"]) == 80 else slice(80, N)
        return acts["x"], torch.tensor((classes[where] == int(name)).astype(np.int32))

    monkeypatch.setattr(training, "prepare_probe_data", prepare)
    train, test = torch.tensor(x[:80]), torch.tensor(x[80:])
    with torch.no_grad():
        effects = main.get_all_node_effects_for_one_sae(sae, theirs, names, False, {"x": train}, 7)
        clean = main.get_probe_test_accuracy(theirs, names, {"x": test.mean(1)}, 7, False)
        ablated = main.perform_feature_ablations(
            theirs, sae, 7, {"x": test}, effects, list(ns), names, 7, False
        )
        want, _ = main.create_tpp_plotting_dict(ablated, clean)[:2]
    for name in names:
        products = np.asarray(coder.w_dec, np.float64) @ probes[name].w
        np.testing.assert_allclose(
            scr_tpp.effects(f, questions[name], products, both_ways=False),
            effects[name].numpy(),
            atol=1e-5,
        )
    got = scr_tpp.tpp(task, probes, coder.w_dec, mean, f, ns)
    assert got["clean"] == pytest.approx(clean)
    for n in ns:
        for ours, key in (("tpp", "total_metric"), ("intended", "intended_diff_only")):
            assert got["by_n"][str(n)][ours] == pytest.approx(want[f"tpp_threshold_{n}_{key}"])
    assert max(abs(got["by_n"][str(n)]["tpp"]) for n in ns) > 0.01


def test_scr_is_saebenchs(coder, sae, tokens, monkeypatch):
    main = peer("sae_bench.evals.scr_and_tpp.main")
    training = peer("sae_bench.evals.sparse_probing.probe_training")
    import torch

    x, quadrant = tokens
    job, sex = quadrant // 2, quadrant % 2
    mean, f, rows = x.mean(1), np.asarray(coder.encode(x)).mean(1), np.arange(N)
    y = {"job": job, "sex": sex}
    questions = {k: Split(rows[:80], v[:80], rows[80:], v[80:]) for k, v in y.items()}
    task = Task("people", [""] * N, questions)
    agree = np.flatnonzero(job[:80] == sex[:80])
    probes = {k: concept_probe(mean[:80], v[:80], 3) for k, v in y.items()}
    probes["biased"] = concept_probe(mean[agree], job[agree], 4)
    named = {
        "professor / nurse": "job",
        "male / female": "sex",
        "male_professor / female_nurse": "biased",
    }
    theirs = {name: theirs_probe(training, probes[ours]) for name, ours in named.items()}

    def prepare(acts, name, perform_scr=False):
        where = slice(0, 80) if len(acts["x"]) == 80 else slice(80, N)
        labels = y["sex" if named[name] == "sex" else "job"][where]
        return acts["x"], torch.tensor(labels.astype(np.int32))

    monkeypatch.setattr(training, "prepare_probe_data", prepare)
    train, test = torch.tensor(x[:80]), torch.tensor(x[80:])
    names, ns = list(named), (1, 3)
    with torch.no_grad():
        effects = main.get_all_node_effects_for_one_sae(sae, theirs, names, True, {"x": train}, 9)
        clean = main.get_probe_test_accuracy(theirs, names, {"x": test.mean(1)}, 9, True)
        ablated = main.perform_feature_ablations(
            theirs, sae, 9, {"x": test}, effects, list(ns), names, 9, True
        )
        want = main.get_scr_plotting_dict(ablated, clean)
    got = scr_tpp.scr(task, probes, coder.w_dec, mean, f, ns)
    for n in ns:
        for direction, key in (("first", "dir1"), ("second", "dir2")):
            assert got["directions"][direction]["by_n"][str(n)] == pytest.approx(
                want[f"scr_{key}_threshold_{n}"], rel=1e-4
            )
        if f"scr_metric_threshold_{n}" in want:  # it gives none where both are equally low
            assert got["by_n"][str(n)] == pytest.approx(want[f"scr_metric_threshold_{n}"], rel=1e-4)
    assert any(got["directions"][d]["by_n"]["3"] for d in ("first", "second"))


# -------------------------------------------------------------------------------------------------


def features(n=420, width=30, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    f = np.maximum(rng.standard_normal((n, width)) - 1, 0) * np.exp(rng.standard_normal(width))
    f[:, :4] += y[:, None] * np.maximum(rng.standard_normal((n, 4)), 0)
    rows = np.arange(n)
    return f.astype(np.float32), Split(rows[:300], y[:300], rows[300:], y[300:])


def test_saebenchs_sparse_probe(sae):
    training = peer("sae_bench.evals.sparse_probing.probe_training")
    import torch

    f, split = features()
    train, y = torch.tensor(f[:300]), torch.tensor(split.train_y, dtype=torch.int32)
    test, test_y = torch.tensor(f[300:]), torch.tensor(split.test_y, dtype=torch.int32)
    got = probe(f, split, (1, 2, 5), PROTOCOLS["saebench"])
    for k in (1, 2, 5):
        masked = training.get_top_k_mean_diff_mask(train, y, k).numpy()
        assert sorted(got[str(k)].features) == np.flatnonzero(~masked).tolist()
        _, accuracy = training.train_sklearn_probe(train[:, ~masked], y, test[:, ~masked], test_y)
        assert got[str(k)].accuracy == pytest.approx(accuracy)


def test_sae_probes_sparse_probe(sae, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", types.ModuleType("xgboost"))
    training = peer("sae_probes.utils_training")
    evals = peer("sae_probes.run_sae_evals")
    import torch

    f, split = features(seed=3)
    order = evals.get_sorted_indices(
        torch.tensor(f[:300]), split.train_y, evals.mean_act_normalization
    )
    order = order.numpy()
    assert rank(f[:300], split.train_y, True).tolist() == order.tolist()
    got = probe(f, split, (1, 4, 16), PROTOCOLS["sae-probes"])
    for k in (1, 4, 16):
        a, b = f[:300, order[:k]].astype(float), f[300:, order[:k]].astype(float)
        want = training.find_best_reg(a, split.train_y, b, split.test_y, seed=42)
        assert got[str(k)].c == want.classifier.C
        assert got[str(k)].auc == pytest.approx(want.metrics.test_auc, abs=2e-3)
        assert got[str(k)].accuracy == pytest.approx(want.metrics.test_acc, abs=0.01)
        assert got[str(k)].f1 == pytest.approx(want.metrics.test_f1, abs=0.01)


def test_scikit_learns_optimum_and_measures():
    linear = peer("sklearn.linear_model")
    metrics = peer("sklearn.metrics")
    f, split = features(seed=5)
    x, y = f[:300].astype(float), split.train_y
    strengths = [100.0, 1.0, 0.01]
    fitted = fit_logistic(x[None], y[None], strengths)
    for c, w, b in zip(strengths, fitted.w[0], fitted.b[0]):
        theirs = linear.LogisticRegression(C=c, max_iter=10**5, tol=1e-10).fit(x, y)
        np.testing.assert_allclose(w, theirs.coef_[0], atol=1e-4 * np.abs(w).max())
        assert b == pytest.approx(theirs.intercept_[0], abs=1e-4)
    scores = np.round(f[300:, 0] - 0.5, 1)
    assert auc(split.test_y, scores) == pytest.approx(metrics.roc_auc_score(split.test_y, scores))
    assert weighted_f1(split.test_y, scores) == pytest.approx(
        metrics.f1_score(split.test_y, scores > 0, average="weighted")
    )
