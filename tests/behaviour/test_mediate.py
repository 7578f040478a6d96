"""A planted cause mediates and its companion does not; controls are like what they control for."""

import json

import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.contrasts.activity import (
    FeatureActivity,
    feature_activity,
    matched_sets,
)
from gemma_scope_jax.behaviour.contrasts.contrast import contrast
from gemma_scope_jax.behaviour.contrasts.mediate import mediate
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model import run as running
from planted_behaviour import (
    CAUSE,
    SIGN,
    behaviour_arms,
    behaviour_coder,
    behaviour_model,
    outcome,
    text,
)
from planted_circuit import ANSWER, MESSAGE, UNEMBED_B, transcoders


@pytest.fixture(scope="module")
def planted():
    """The model, its coder, prompts that show the behaviour, and the coder's activity on them."""
    model, rng = behaviour_model(), np.random.default_rng(0)
    coder = behaviour_coder(model)
    prompts = [text(rng, cause=True, sign=True) for _ in range(24)]
    return model, coder, prompts, feature_activity(model, coder, prompts)


@pytest.fixture(scope="module")
def clean(planted):
    model, _, prompts, _ = planted
    return outcome(model, prompts)([])


def test_the_cause_mediates_and_its_sign_does_not(planted, clean):
    model, coder, prompts, activity = planted
    measure = outcome(model, prompts)
    before = running._run._cache_size()
    cause = mediate(measure, coder, [CAUSE], activity=activity)
    compiled = running._run._cache_size() - before
    assert cause.mediates and cause.rank_p == pytest.approx(1 / 21)
    assert cause.removed.value == pytest.approx(1.0, abs=0.02) and cause.removed.n == 24
    assert cause.behaviour.before.value == pytest.approx(clean.mean())
    assert cause.behaviour.after.value == pytest.approx(0, abs=0.02)
    assert np.abs(cause.controls).max() < 1e-3 and len(cause.controls) == 20
    assert cause.beyond.high < 0 and "100% of it is gone" in cause.verdict()
    sign = mediate(measure, coder, [SIGN], activity=activity)
    assert not sign.mediates and "not shown to be more than chance" in sign.verdict()
    assert abs(sign.removed.value) < 0.02
    assert compiled <= 2 and running._run._cache_size() - before <= 2  # 44 runs


def test_what_a_contrast_found_is_mediated_with_its_own_activity(planted):
    model, coder, prompts, _ = planted
    found = contrast(model, coder, behaviour_arms(), k=2)
    result = mediate(outcome(model, prompts), coder, found)
    assert result.mediates and sorted(result.features) == [CAUSE, SIGN]


def test_a_clamp_sets_what_the_feature_writes(planted):
    """The logit is linear in the message: f2 reads three times of it and writes 0.7 of that."""
    model, coder, prompts, activity = planted
    at = mediate(
        outcome(model, prompts), coder, [CAUSE], how="clamp", value=2.0, activity=activity
    )  # fmt: skip
    written = 2.0 * 3.0 * 0.7 * UNEMBED_B
    assert at.behaviour.after.value == pytest.approx(written, rel=1e-3)
    values = [2.0, 5.0]
    both = mediate(
        outcome(model, prompts), coder, [CAUSE, SIGN], how="clamp", value=values, controls=0
    )  # fmt: skip
    assert both.behaviour.after.value == pytest.approx(written, rel=1e-3)
    assert np.isnan(both.rank_p) and not both.mediates and "says little" in both.verdict()


def test_a_direction_is_projected_out(planted):
    model, coder, prompts, activity = planted
    measure = outcome(model, prompts)
    options = {"how": "project", "activity": activity}
    named = mediate(measure, coder, [CAUSE], **options)
    given = mediate(measure, coder, directions=5 * np.eye(32)[[MESSAGE, 20]], **options)
    other = mediate(measure, coder, directions=np.eye(32)[20], **options)
    assert named.mediates and given.mediates and not other.mediates
    assert named.removed.value == pytest.approx(1.0, abs=1e-3)
    assert given.removed.value == pytest.approx(1.0, abs=1e-3)
    # the answer itself is written later, and stays
    late = mediate(measure, coder, directions=np.eye(32)[ANSWER], **options)
    assert abs(late.removed.value) < 1e-3


def test_features_of_several_layers_are_changed_together(planted):
    """A supernode of the circuit: f1 of layer 1, or f2 of layer 3 and a decoy."""
    model, _, prompts, _ = planted
    coders = transcoders()
    measure = outcome(model, prompts)
    for group in ([(1, 0)], [(3, 1), (1, 2)]):
        found = mediate(measure, coders, group, controls=0)
        assert found.removed.value == pytest.approx(1.0, abs=0.02)
        assert found.features == tuple(group)
    decoys = mediate(measure, coders, [(1, 2), (3, 0)], controls=0)
    assert abs(decoys.removed.value) < 1e-3


def test_controls_of_several_layers_are_drawn_layer_by_layer(planted):
    model, coder, prompts, activity = planted
    other = coder.replace(layer=1)
    drawn = []

    def measure(items):
        drawn.append([i.args[1:] for i in items])
        return np.arange(6.0)

    both = CoderSet([other, coder])
    again = feature_activity(model, other, prompts)
    pairs = [(2, CAUSE), (1, SIGN), (1, 7)]
    mediate(measure, both, pairs, controls=3, activity={1: again, 2: activity})
    assert len(drawn) == 5 and all(len(items) == 2 for items in drawn[1:])


def test_side_effects_are_measured_as_the_behaviour_is(planted):
    model, coder, prompts, activity = planted
    rng = np.random.default_rng(1)
    harmless = outcome(model, [text(rng) for _ in range(24)])
    found = mediate(
        outcome(model, prompts), coder, [CAUSE], activity=activity, controls=3,
        side_effects={"other prompts": harmless, "the same": outcome(model, prompts)},
    )  # fmt: skip
    nothing, same = found.side_effects["other prompts"], found.side_effects["the same"]
    assert not nothing.change.high and not nothing.change.low and nothing.change.n == 24
    assert same.change.value == pytest.approx(found.behaviour.change.value)
    assert set(found.tables()) == {"Mediation", "Side effects"} and "other prompts" in str(found)
    content = json.loads(json.dumps(found.as_dict()))
    assert content["rank_p"] == 0.25 and content["mediates"] is False
    assert content["can_tell"] is False and "too few to tell" in found.verdict()
    assert "\n" not in repr(found)


def test_where_there_is_no_behaviour_no_share_of_it_is_removed(planted):
    model, coder, _, activity = planted
    rng = np.random.default_rng(2)
    found = mediate(
        outcome(model, [text(rng) for _ in range(24)]), coder, [CAUSE], activity=activity
    )  # fmt: skip
    assert np.isnan(found.removed.value) and not found.mediates
    assert found.as_dict()["removed"]["value"] is None


def test_below_where_it_begins_a_share_would_mean_nothing(planted):
    """A behaviour that was absent and grows has no share that is gone."""
    model, coder, prompts = planted[:3]
    measure = outcome(model, prompts)
    negative = lambda items: -np.abs(measure(items)) - 1.0
    found = mediate(negative, coder, [CAUSE], controls=0)
    assert np.isnan(found.removed.value) and "%" not in found.verdict()


def test_without_is_where_the_share_begins(planted, clean):
    model, coder, prompts, _ = planted
    half = clean.mean() / 2
    found = mediate(outcome(model, prompts), coder, [CAUSE], controls=0, without=half)
    assert found.removed.value == pytest.approx(2.0, abs=0.05)


def test_activity_is_that_of_the_texts_alone(planted):
    model, coder, prompts, activity = planted
    f = np.concatenate([
        np.asarray(gs.run(model, ids[None], [gs.features(coder)]).reads["features"])[0, 1:]
        for ids in prompts
    ]).astype(np.float64)  # fmt: skip
    assert activity.counted == len(f)
    assert np.allclose(activity.rate, (f > 0).mean(0), atol=1e-6)
    on = (f > 0).any(0)
    norms = np.linalg.norm(np.asarray(coder.w_dec), axis=1)
    size = norms * f.sum(0) / np.maximum((f > 0).sum(0), 1)
    assert on.sum() > 20 and np.allclose(activity.size, size, atol=1e-4)


def test_matched_features_are_active_as_often_and_write_as_much():
    rng = np.random.default_rng(3)
    rate, size = np.exp(rng.normal(-4, 2, 4000)).clip(0, 1), np.exp(rng.normal(3, 1, 4000))
    rate[:50] = 0  # dead
    activity = FeatureActivity(rate, size, 10_000)
    own = np.argsort(rate)[[500, 2000, 3600]]
    sets = matched_sets(activity, own, 20, seed=1)
    assert sets.shape == (20, 3) and (rate[sets] > 0).all()
    assert all(len({*row, *own}) == 6 for row in sets.tolist())
    assert len({tuple(row) for row in sets.tolist()}) == 20
    for i, f in enumerate(own):
        for values in (rate, size):
            assert np.abs(np.log(values[sets[:, i]] / values[f])).max() < 0.7
    assert (matched_sets(activity, own, 20, seed=1) == sets).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "give activity=gs.feature_activity"),
        ({"features": [99], "controls": 0}, "has features 0 to 61"),
        ({"features": [1, 1], "controls": 0}, "named twice"),
        ({"features": [], "controls": 0}, "needs features, or directions"),
        ({"how": "remove"}, "known are ablate, clamp, project"),
        ({"how": "clamp"}, "clamp needs a value"),
        ({"value": 1.0}, "ablate takes no value"),
        ({"how": "clamp", "value": [1.0, 2.0]}, "one for each of 1"),
        ({"how": "clamp", "value": float("nan")}, "NaN"),
        ({"directions": np.eye(32)[:1]}, "for how='project'"),
        ({"how": "project", "directions": np.ones((2, 32))}, "none of them a sum"),
        ({"outcome": lambda items: np.arange(3.0), "controls": 0}, "at least 5 finite numbers"),
        ({"outcome": lambda items: np.full(6, np.nan), "controls": 0}, "finite"),
        ({"outcome": lambda items: np.arange(6.0 + len(items)), "controls": 0}, "with the edit"),
        ({"controls": -1}, "at least 0"),
        ({"activity": FeatureActivity(np.ones(3), np.ones(3), 9)}, "of another coder"),
        ({"activity": FeatureActivity(np.eye(62)[0], np.ones(62), 9)}, "need 2 other active ones"),
    ],
)
def test_bad_input_is_refused(planted, changes, said):
    _, coder, _, _ = planted
    given = {"outcome": lambda items: np.arange(6.0), "coder": coder, "features": [0], **changes}
    with pytest.raises(InputError) as error:
        mediate(**given)
    assert said in str(error.value) and "\n" not in str(error.value)
