"""Monitors: what they read, what they claim about themselves, and where they stop a generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

import gemma_scope_jax as gs
from coders import random_coder
from gemma_scope_jax.behaviour.contrasts.arms import arms
from gemma_scope_jax.behaviour.monitors.fit import _platt
from gemma_scope_jax.behaviour.monitors.monitor import largest, token_scores
from gemma_scope_jax.behaviour.monitors.quality import calibration, roc_curve
from gemma_scope_jax.data.ranks import auc
from gemma_scope_jax.errors import InputError
from letters import Letters

WORD = [77, 78]  # what the positives have


def texts(seed, with_word, count=60):
    """Random ids of 6 to 20 tokens; positives have the word somewhere."""
    rng, found = np.random.default_rng([seed, with_word]), []
    for n in rng.integers(6, 21, count):
        ids = np.append(2, rng.integers(100, 300, n)).astype(np.int32)
        if with_word:
            at = int(rng.integers(1, n - 1))
            ids[at : at + 2] = WORD
        found.append(ids)
    return found


POSITIVES, NEGATIVES = texts(0, True), texts(0, False)


@pytest.fixture(scope="module")
def coder():
    return random_coder(layer=1, seed=3)


@pytest.fixture(scope="module")
def monitors(model, coder):
    """One of each kind, by name."""
    fit = lambda **more: gs.fit_monitor(model, Letters(), POSITIVES, NEGATIVES, **more)
    return {"probe": fit(layer=2, how="mean"), "features": fit(coder=coder, features=6)}


def by_hand(monitor, coder, x):
    """The score of each token from its activation, in numpy."""
    x = np.asarray(x, np.float64)
    if monitor.features:
        x = np.asarray(coder.encode(x.astype(np.float32)), np.float64)[..., list(monitor.features)]
    return x @ np.asarray(monitor.w, np.float64) + monitor.b


def test_a_single_feature_is_one_that_rises(model, coder):
    """Both ways round: what falls with one behaviour rises with the other."""
    for sides in ((POSITIVES, NEGATIVES), (NEGATIVES, POSITIVES)):
        one = gs.fit_monitor(model, Letters(), *sides, coder=coder, features=1)
        assert one.w[0] > 0 and len(one.features) == 1
        several = gs.fit_monitor(model, Letters(), *sides, coder=coder, features=4)
        assert several.features[0] == one.features[0] and len(set(several.features)) == 4


@pytest.mark.parametrize("kind", ["probe", "features"])
def test_scores_and_alarms_are_the_formula(kind, model, coder, monitors):
    monitor = monitors[kind]
    ids = POSITIVES[0][None]
    here = gs.capture(monitor.site, monitor.layer)
    reads = gs.run(model, ids, [here, monitor.read(), monitor.alarm()]).reads
    wanted = by_hand(monitor, coder, reads[monitor.site])
    np.testing.assert_allclose(reads["monitor"], wanted, atol=1e-4 * np.abs(wanted).max())
    fires = np.asarray(reads["monitor"]) > monitor.threshold
    fires[:, : monitor.first] = False
    np.testing.assert_array_equal(reads["alarm"], fires)


@pytest.mark.parametrize("kind", ["probe", "features"])
def test_scores_of_a_batch_are_those_of_each_text_alone(kind, model, monitors):
    monitor, some = monitors[kind], POSITIVES[:5] + [NEGATIVES[0][:2]]
    for ids, got in zip(some, token_scores(monitor, model, some), strict=True):
        alone = np.asarray(gs.run(model, ids[None], monitor.read()).reads["monitor"])[0]
        np.testing.assert_allclose(got, alone[monitor.first :], atol=1e-4)


def test_a_word_is_detected_and_nothing_is_not(model, monitors):
    quality = monitors["probe"].quality
    assert quality.auc.low > 0.6 and quality.false_alarms.value < 0.3
    nothing = gs.fit_monitor(model, Letters(), texts(5, False), texts(6, False), layer=2)
    assert nothing.quality.auc.low < 0.5 < nothing.quality.auc.high
    elsewhere = gs.measure_monitor(
        monitors["probe"], model, Letters(), texts(7, True, 30), texts(7, False, 30)
    )
    assert elsewhere.auc.low > 0.6 and elsewhere.detected.n == 30


@pytest.mark.parametrize("false_alarms", [0.0, 0.2])
def test_the_threshold_keeps_to_the_false_alarms_asked_for(false_alarms, model):
    options = {"layer": 2, "false_alarms": false_alarms}
    monitor = gs.fit_monitor(model, Letters(), POSITIVES, NEGATIVES, **options)
    rest = arms(Letters(), POSITIVES, NEGATIVES, paired=False).halves(0)[1].halves(0)[0]
    low = largest(token_scores(monitor, model, rest.b))
    share = (low > monitor.threshold).mean()
    assert share <= false_alarms < share + 1.5 / len(low)


def test_figures_are_those_of_their_definitions(monitors, model):
    rng = np.random.default_rng(0)
    y, scores = rng.integers(0, 2, 300), np.round(rng.standard_normal(300), 1)
    curve = roc_curve(y, scores)
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(auc(y, scores))
    for down, up in curve[1:-1:7]:
        above = lambda t, c: (scores[y == c] > t).mean()
        assert any((above(t, 0), above(t, 1)) == (down, up) for t in np.unique(scores))
    p = rng.uniform(0.02, 0.98, 20_000)
    p = np.concatenate([p, 1 - p])  # both classes equally frequent
    y = rng.uniform(size=len(p)) < p
    assert calibration(y, p)[0] < 0.02
    error, rows = calibration(y, np.clip(p + 0.3, 0, 1))
    assert error == pytest.approx(0.3 - (np.maximum(p + 0.3, 1) - 1).mean(), abs=0.02)
    assert sum(n for *_, n in rows) == len(p)


def test_calibration_is_platts():
    rng = np.random.default_rng(1)
    high, low = rng.normal(3, 2, 40), rng.normal(1, 2, 25)
    soft = np.r_[np.full(40, 41 / 42), np.full(25, 1 / 27)]
    weight = np.r_[np.full(40, 1 / 40), np.full(25, 1 / 25)]
    x = np.r_[high, low]

    def loss(ab):
        p = expit(ab[0] * x + ab[1])
        return -(weight * (soft * np.log(p) + (1 - soft) * np.log(1 - p))).sum()

    np.testing.assert_allclose(
        _platt(high, low), minimize(loss, [1.0, 0.0]).x, rtol=1e-3, atol=1e-3
    )


@pytest.mark.law
@pytest.mark.parametrize("kind", ["probe", "features"])
def test_generation_stops_where_a_teacher_forced_pass_fires(kind, model, monitors):
    monitor, prompts = monitors[kind], [ids[:8] for ids in NEGATIVES[:4]]
    free = gs.generate(model, prompts, 16, stop_tokens=())
    scores = token_scores(monitor, model, free.sequences)
    new = [s[len(p) - monitor.first :] for s, p in zip(scores, prompts)]
    values = np.sort(np.concatenate(new))
    at = next(
        i for i in range(len(values) * 3 // 4, len(values)) if values[i] - values[i - 1] > 1e-3
    )
    monitor = monitor.at((values[at - 1] + values[at]) / 2)
    wanted = [int(np.argmax(s > monitor.threshold)) + 1 if (s > monitor.threshold).any() else 16
              for s in new]  # fmt: skip
    reads = [monitor.read(), monitor.alarm()]
    halted = gs.generate(model, prompts, 16, reads, halt="alarm", stop_tokens=())
    np.testing.assert_array_equal(halted.lengths, wanted)
    assert min(wanted) < 16
    for n, (prompt, row) in enumerate(zip(prompts, scores)):
        got = np.asarray(halted.reads["monitor"])[n, monitor.first : len(prompt) + wanted[n]]
        np.testing.assert_allclose(got, row[: len(got)], atol=2e-4)


@pytest.mark.parametrize("kind", ["probe", "features"])
def test_a_file_holds_all_of_it(kind, model, monitors, tmp_path):
    monitor = monitors[kind]
    gs.save_monitor(monitor, tmp_path / "m.safetensors")
    back = gs.load_monitor(tmp_path / "m.safetensors", model)
    for name in ("site", "layer", "b", "threshold", "features", "first", "calibration", "made"):
        assert getattr(back, name) == getattr(monitor, name), name
    np.testing.assert_array_equal(back.w, monitor.w)
    assert back.quality.as_dict() == monitor.quality.as_dict()
    assert back.quality.tables() == monitor.quality.tables()
    scores = [token_scores(m, model, POSITIVES[:2]) for m in (monitor, back)]
    jax.tree.map(np.testing.assert_array_equal, *scores)


def test_a_file_of_another_model_or_kind_is_refused(model, monitors, tmp_path):
    path = tmp_path / "m.safetensors"
    gs.save_monitor(monitors["probe"], path)
    other = model.replace(params=model.params.replace(final_norm=model.params.final_norm + 1.0))
    with pytest.raises(InputError, match="fitted on another model"):
        gs.load_monitor(path, other)
    lower = model.replace(params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params))
    with pytest.raises(InputError, match=r"in float32, not .* load the model with dtype='float32'"):
        gs.load_monitor(path, lower)
    gs.save_monitor(dataclasses.replace(monitors["probe"], w=jnp.ones(31)), path)
    with pytest.raises(InputError, match="not those of a monitor"):
        gs.load_monitor(path, model)
    for change, message in [
        ({"site": "nowhere"}, "site is 'nowhere'"),
        ({"layer": -1}, "layer is -1"),
        ({"calibration": (1.0,)}, "calibration"),
        ({"made": {}}, "lacks 'model'"),
        ({"features": (1.5,)}, "not whole numbers"),
    ]:
        gs.save_monitor(dataclasses.replace(monitors["probe"], **change), path)
        with pytest.raises(InputError) as error:
            gs.load_monitor(path, model)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        gs.load_monitor(tmp_path / "none", model)


def test_a_condition_of_steering_is_the_alarm(monitors):
    where, when = monitors["probe"].direction(), monitors["probe"].when()
    assert when.reading.layer == where.layer and when.above == where.threshold
    np.testing.assert_array_equal(when.reading.vector, where.w)
    with pytest.raises(InputError, match="not linear"):
        monitors["features"].when()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give the layer of a probe, or a coder"),
        ({"layer": 9}, "layer"),
        ({"layer": 1, "site": "nowhere"}, "nowhere"),
        ({"layer": 1, "false_alarms": 1.0}, "false_alarms"),
        ({"layer": 1, "how": "max"}, "mean or last"),
        ({"layer": 1, "positives": POSITIVES[:10]}, "needs 20 texts on each side"),
        ({"coder": "coder", "features": 0}, "features is 0"),
        ({"coder": "coder", "features": [48]}, "numbers below 48"),
    ],
)
def test_bad_input_says_what_to_do(options, message, model, coder):
    options = {"positives": POSITIVES, "negatives": NEGATIVES, **options}
    if "coder" in options:
        options["coder"] = coder
    with pytest.raises(InputError) as error:
        gs.fit_monitor(model, Letters(), **options)
    assert message in str(error.value) and "\n" not in str(error.value)
