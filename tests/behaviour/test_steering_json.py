"""Specs of steering as JSON, requests to Neuronpedia, and bad input: one line each."""

import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.steering.spec import Reading, When
from steered import IDS, LAYER, LAYERS, PROMPTS, SAE, SPECS, VECTOR, D, F, after, clt, oracle, step
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-4b"], layers=LAYERS)


@pytest.mark.parametrize("steps", SPECS)
def test_a_spec_goes_to_json_and_back(tmp_path, model, steps):
    spec = gs.steer_spec(steps, name="one")
    spec.save(tmp_path / "spec.json")
    again = gs.steer_spec(tmp_path / "spec.json")
    assert again.as_dict() == spec.as_dict() and again.name == "one"
    items = [gs.steering(model, s, SAE, PROMPTS) for s in (spec, again)]
    one, two = (gs.generate(model, PROMPTS, 2, some).tokens for some in items)
    np.testing.assert_array_equal(one, two)


def test_a_condition_may_be_a_monitors():
    when = When(Reading(vector=np.ones(32, np.float32), layer=2), above=0.5)
    step = {"op": "ablate", "coder": "", "feature": 5, "when": when}
    assert gs.steer_spec([step]).steps[0].when is when


def test_requests_to_neuronpedia_are_understood(model):
    request = {
        "modelId": "gemma-3-270m",
        "features": [{"modelId": "gemma-3-270m", "layer": "2-res", "index": "5", "strength": 4}],
        "prompt": "hello",
        "strength_multiplier": 2.5,
    }
    ours = gs.steering(model, gs.steer_spec(request), {"2-res": SAE})
    theirs = gs.steer("resid_post", LAYER, 10.0 * SAE.w_dec[5])
    np.testing.assert_allclose(gs.run(model, IDS, ours).logits, gs.run(model, IDS, theirs).logits,
                               atol=3e-5)  # fmt: skip
    capped = {
        "steer_method": "PROJECTION_CAP",
        "vectors": [{"steering_vector": VECTOR.tolist(), "strength": -0.2,
                     "hook": "blocks.2.hook_resid_post"}],
    }  # fmt: skip
    x = np.asarray(gs.run(model, IDS, gs.capture("resid_post", LAYER)).reads["resid_post"])
    expected = oracle("cap", x.astype(np.float64), SAE, x, "vector")
    np.testing.assert_allclose(after(model, gs.steer_spec(capped)), expected, atol=2e-5)


ADD = step("add", "vector")
BAD = {
    "no steps": ([], "at least one"),
    "an unknown op": ([{**ADD, "op": "ad"}], "step 0: unknown op 'ad'; did you mean add"),
    "an unknown field": (
        [{**ADD, "strenght": 1}],
        "unknown field 'strenght'; did you mean strength",
    ),
    "no strength": ([{k: v for k, v in ADD.items() if k != "strength"}], "lacks 'strength'"),
    "a strength that is text": ([{**ADD, "strength": "4"}], "strength is '4', not a number"),
    "a strength for ablation": ([{**step("ablate"), "strength": 1.0}], "takes no strength"),
    "vector and feature": ([{**ADD, "feature": 1}], "either coder and feature, or a vector"),
    "neither": ([{"op": "add", "strength": 1.0}], "either coder and feature, or a vector"),
    "a vector of zeros": ([{**ADD, "vector": [0.0] * D}], "not all of them 0"),
    "a vector without layer": ([{k: v for k, v in ADD.items() if k != "layer"}], "needs the layer"),
    "an unknown site": ([{**ADD, "site": "resid_pst"}], "did you mean resid_post"),
    "a clamp of a vector": ([{**ADD, "op": "clamp"}], "give coder and feature, not a vector"),
    "a swap of one": ([{"op": "swap", "feature": 1}], "belongs to swap alone"),
    "a swap with itself": ([{"op": "swap", "feature": 1, "other": 1}], "cannot be swapped with"),
    "an unknown unit": ([{**ADD, "unit": "max"}], "the only one is 'norm'"),
    "an unknown place": ([{**ADD, "where": "prompts"}], "did you mean prompt"),
    "an unknown role": ([{**ADD, "where": {"roles": ["usr"]}}], "no role 'usr'"),
    "an empty range": ([{**ADD, "where": {"from": 5, "to": 5}}], "holds no positions"),
    "a negative position": ([{**ADD, "where": [-1]}], "at least 0"),
    "a condition without level": ([{**ADD, "when": {"feature": 1}}], "above or below"),
    "a bias of what is written": ([{**ADD, "bias": 1.0}], "unknown field 'bias'"),
    "another version": ({"version": 2, "steps": [ADD]}, "version is 2, not 1"),
    "a file that is missing": ("nowhere.json", "nowhere.json: no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_spec_gets_one_line(name):
    given, line = BAD[name]
    with pytest.raises(gs.InputError, match=line.replace("(", "\\(")) as caught:
        gs.steer_spec(given)
    assert "\n" not in str(caught.value)


MISFITS = {
    "another coder than the one given": (
        {**step("clamp"), "coder": "nowhere/else"}, {}, "nowhere/else",
    ),
    "a feature that does not exist": (step("clamp", feature=F), {}, "features 0 to|has 0 to 23"),
    "a vector of another width": ({**ADD, "vector": [1.0, 2.0]}, {}, "resid_post has 32 values"),
    "a layer that does not exist": ({**ADD, "layer": 4}, {}, "has layers 0 to 3"),
    "roles without a chat": (
        step("clamp", where={"roles": ["user"]}), {"prompts": PROMPTS}, "need a chat",
    ),
    "places without prompts": (step("clamp", where="generated"), {}, "need the prompts"),
    "a position before first": ({**ADD, "where": [0]}, {}, "position 0 comes before"),
    "an unknown coder": (
        {**step("clamp"), "coder": "nowhere/at/all"}, {"coders": {"a": SAE}}, "nowhere/at/all",
    ),
    "a later condition": (
        {**ADD, "when": {"vector": [1.0] * D, "layer": 3, "above": 0.0}}, {}, "comes after",
    ),
    "a rescaled CLT": (
        step("rescale", layer=1), {"coders": clt()}, "one of its decoder rows as a vector",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_the_model_or_the_coder_lacks_is_refused(model, name):
    given, more, line = MISFITS[name]
    with pytest.raises(gs.InputError, match=line):
        gs.steering(model, gs.steer_spec([given]), **{"coders": SAE, **more})
