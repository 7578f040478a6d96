"""Steering: every operation against a NumPy formula, and one law for prefill, decoding and text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.steering.spec import OPS
from steered import (
    ACTIVE,
    IDS,
    LAYER,
    LAYERS,
    OTHER,
    PROMPTS,
    SAE,
    SPECS,
    STRENGTHS,
    TRANSCODER,
    VECTOR,
    D,
    activation,
    after,
    clt,
    coder,
    oracle,
    step,
)
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(gs.PRESETS["gemma-3-4b"], layers=LAYERS)


@pytest.fixture(scope="module")
def clean(model):
    """resid_post, mlp_in and mlp_out of the layer, float64."""
    sites = [gs.capture(s, LAYER) for s in ("resid_post", "mlp_in", "mlp_out")]
    reads = gs.run(model, IDS, sites).reads
    return {site: np.asarray(x, np.float64) for site, x in reads.items()}


CASES = [(op, "feature") for op in OPS]
CASES += [(op, "vector") for op in ("add", "rescale", "cap", "floor", "project_out")]


@pytest.mark.parametrize("op,kind", CASES)
def test_an_operation_equals_its_formula(model, clean, op, kind):
    x = clean["resid_post"]
    found = after(model, gs.steer_spec([step(op, kind)]))
    expected = oracle(op, x, SAE, x, kind)
    assert np.abs(expected - x).max() > 0.05  # it does something
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("op", ["add", "cap", "floor"])
def test_strength_in_norms_follows_the_norm_of_each_token(model, clean, op):
    x = clean["resid_post"]
    found = after(model, gs.steer_spec([step(op, "vector", unit="norm")]))
    np.testing.assert_allclose(found, oracle(op, x, SAE, x, "vector", True), atol=1e-4)


@pytest.mark.parametrize("op", ["add", "clamp", "clamp_min", "scale", "ablate", "swap"])
def test_a_transcoders_feature_is_read_and_written_at_its_own_sites(model, clean, op):
    found = after(model, gs.steer_spec([step(op)]), "mlp_out", TRANSCODER)
    expected = oracle(op, clean["mlp_out"], TRANSCODER, clean["mlp_in"], "feature")
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_steps_at_one_site_act_in_order(model, clean):
    x = clean["resid_post"]
    spec = gs.steer_spec([step("add", "vector"), step("clamp"), step("project_out", "vector")])
    x = oracle("add", x, SAE, x, "vector")
    x = oracle("clamp", x, SAE, x, "feature")
    x = oracle("project_out", x, SAE, x, "vector")
    found = after(model, spec)
    np.testing.assert_allclose(found, x, atol=5e-5)


@pytest.mark.parametrize("op", ["rescale", "cap", "project_out"])
def test_operations_along_a_transcoders_feature_act_where_it_writes(model, clean, op):
    x = clean["mlp_out"]
    found = after(model, gs.steer_spec([step(op)]), "mlp_out", TRANSCODER)
    np.testing.assert_allclose(found, oracle(op, x, TRANSCODER, x, "feature"), atol=2e-5)


def test_clamping_and_adding_equal_edit_and_steer(model):
    def same(a, b):
        one, two = (gs.run(model, IDS, items).logits for items in (a, b))
        np.testing.assert_allclose(one, two, atol=3e-5)

    clamp = gs.steer_spec([step("clamp")])
    same(gs.steering(model, clamp, SAE), gs.edit(SAE, gs.clamp, ACTIVE, STRENGTHS["clamp"]))
    same(gs.steering(model, clamp, TRANSCODER),
         gs.edit(TRANSCODER, gs.clamp, ACTIVE, STRENGTHS["clamp"]))  # fmt: skip
    add = gs.steer_spec([step("add", "vector")])
    same(gs.steering(model, add), gs.steer("resid_post", LAYER, 3.0 * VECTOR))


def test_a_clts_feature_writes_to_every_later_layer(model):
    spec = gs.steer_spec([step("clamp", layer=2), {**step("ablate", layer=1), "feature": 9}])
    ours = gs.run(model, IDS, gs.steering(model, spec, clt())).logits
    rows = [(2, None, ACTIVE, STRENGTHS["clamp"]), (1, None, 9, 0.0)]
    theirs = gs.run(model, IDS, gs.edit_features(clt(), rows)).logits
    np.testing.assert_allclose(ours, theirs, atol=3e-5)
    assert np.abs(np.asarray(ours - gs.run(model, IDS).logits)).max() > 0.01


IDENTITY = {"add": 0.0, "rescale": 1.0, "scale": 1.0, "cap": 1e30, "floor": -1e30}
IDENTITY |= {"clamp_min": 0.0, "clamp_max": 1e30}


@pytest.mark.parametrize("op", IDENTITY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_strength_that_changes_nothing_gives_the_same_bits(op, dtype):
    model = tiny_model(gs.PRESETS["gemma-3-270m"], dtype=dtype, layers=LAYERS)
    spec = gs.steer_spec([{**step(op), "strength": IDENTITY[op]}])
    one = gs.run(model, IDS, gs.steering(model, spec, SAE)).logits
    assert np.asarray(one).tobytes() == np.asarray(gs.run(model, IDS).logits).tobytes()


# --- Where and when ------------------------------------------------------------------------------

WHERE = {
    "all": ("all", lambda t, n: t >= 1),
    "prompt": ("prompt", lambda t, n: (t >= 1) & (t < n)),
    "last": ("last", lambda t, n: t == n - 1),
    "generated": ("generated", lambda t, n: t >= n),
    "positions": ([2, 11], lambda t, n: (t == 2) | (t == 11)),
    "range": ({"from": 3, "to": 10}, lambda t, n: (t >= 3) & (t < 10)),
    "open range": ({"from": 8}, lambda t, n: t >= 8),
}
NEW = 6


def changes(model, spec, run):
    """What the step changed at each token: captured after, less captured before."""
    before = gs.capture("resid_post", LAYER, name="before")
    behind = gs.capture("resid_post", LAYER, name="behind")
    reads = run([before, *gs.steering(model, spec, SAE, PROMPTS), behind])
    return np.asarray(reads["behind"]) - np.asarray(reads["before"]), np.asarray(reads["before"])


@pytest.mark.parametrize("name", WHERE)
def test_an_edit_acts_once_at_exactly_its_tokens_while_generating(model, name):
    where, holds = WHERE[name]
    spec = gs.steer_spec([step("add", "vector", where=where)])
    kept = {}

    def run(items):
        kept["out"] = gs.generate(model, PROMPTS, NEW, items, stop_tokens=())
        return kept["out"].reads

    change, _ = changes(model, spec, run)
    times = change @ VECTOR / (3.0 * VECTOR @ VECTOR)  # how often the vector was added
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt) + NEW
        expected = holds(np.arange(length), len(prompt)).astype(float)
        np.testing.assert_allclose(times[row, :length], expected, atol=1e-4)


@pytest.mark.parametrize("below", [False, True])
def test_a_conditional_step_fires_exactly_where_its_condition_holds(model, below):
    when = {"feature": OTHER, "below" if below else "above": 0.35}
    spec = gs.steer_spec([step("add", "vector", when=when)])
    change, x = changes(model, spec, lambda items: gs.run(model, IDS, items).reads)
    f = activation(SAE, x.astype(np.float64), OTHER)
    holds = (f < 0.35) if below else (f > 0.35)
    assert 0 < holds[:, 1:].sum() < holds[:, 1:].size
    fired = np.abs(change).max(-1) > 0
    np.testing.assert_array_equal(fired[:, 1:], holds[:, 1:])
    assert not fired[:, 0].any()


def test_a_condition_may_be_read_at_an_earlier_layer_and_on_a_direction(model):
    r = np.random.default_rng(5).normal(size=D).astype(np.float32)
    when = {"vector": r.tolist(), "bias": 0.1, "site": "mlp_out", "layer": 1, "above": 0.0}
    spec = gs.steer_spec([step("ablate", when=when), step("add", "vector", when=when)])
    change, _ = changes(model, spec, lambda items: gs.run(model, IDS, items).reads)
    value = np.asarray(gs.run(model, IDS, gs.capture("mlp_out", 1)).reads["mlp_out"]) @ r + 0.1
    fired = np.abs(change).max(-1) > 0
    np.testing.assert_array_equal(fired[:, 1:], value[:, 1:] > 0)
    assert fired.any()


@pytest.mark.parametrize(
    "number,temperature,seed",
    [*((n, 0.0, 0) for n in range(len(SPECS))), (1, 1.0, 3), (1, 1.0, 4), (4, 1.0, 3)],
)
def test_cached_equals_uncached_equals_teacher_forced(model, number, temperature, seed):
    spec = gs.steer_spec(SPECS[number])
    items = gs.steering(model, spec, SAE, PROMPTS)
    out = gs.generate(model, PROMPTS, NEW, [*items, gs.capture("resid_post", LAYER)],
                      temperature=temperature, key=seed, stop_tokens=(), logits=True)  # fmt: skip
    for row, whole in enumerate(out.sequences):
        n = len(PROMPTS[row])
        one = gs.steering(model, spec, SAE, [PROMPTS[row]])  # teacher-forced, all at once
        forced = gs.run(model, whole[None], [*one, gs.capture("resid_post", LAYER)])
        np.testing.assert_allclose(out.reads["resid_post"][row, : len(whole)],
                                   forced.reads["resid_post"][0], atol=2e-4)  # fmt: skip
        np.testing.assert_allclose(out.logits[row], forced.logits[0, n - 1 : -1], atol=2e-3)
        for t in range(n, len(whole) - 1):  # uncached: every prefix anew
            prefix = gs.run(model, whole[None, : t + 1], one, logits="last")
            np.testing.assert_allclose(prefix.logits[0, -1], forced.logits[0, t], atol=2e-3)
        if not temperature:
            np.testing.assert_array_equal(np.argmax(forced.logits[0, n - 1 : -1], -1), whole[n:])


def test_rows_of_a_batch_have_specs_of_their_own(model):
    specs = [gs.steer_spec(SPECS[n]) for n in (1, 4, 1)]
    together = gs.generate(model, PROMPTS, NEW, gs.steering(model, specs, SAE, PROMPTS))
    for row, spec in enumerate(specs):
        one = gs.generate(model, [PROMPTS[row]], NEW, gs.steering(model, spec, SAE, [PROMPTS[row]]))
        np.testing.assert_array_equal(one.sequences[0], together.sequences[row])


def test_other_features_strengths_operations_and_layers_compile_nothing(model):
    elsewhere = coder(2, layer=1)
    run = lambda spec, sae: gs.run(model, IDS, gs.steering(model, gs.steer_spec([spec]), sae))
    run(step("add"), SAE)
    size = steered_programs()
    run({**step("clamp"), "feature": 9, "strength": 0.1}, SAE)
    run(step("ablate"), elsewhere)
    run(step("cap", "vector"), None)
    run(step("swap", where=[3]), SAE)
    assert steered_programs() == size


def steered_programs():
    from gemma_scope_jax.model.run import _run

    return _run._cache_size()


def test_roles_of_a_chat_are_named():
    """Only the user's words are steered; what is generated belongs to the model."""
    tok = gs.load_tokenizer("gemma-3-270m")
    chat = [{"role": "user", "content": "Who are you?"}]
    batch = gs.tokens([chat], tok)
    wide = tiny_model(gs.PRESETS["gemma-3-270m"], layers=LAYERS)
    ids = np.asarray(batch.tokens) % 300
    roles = np.asarray(batch.labels["role"].numbers)
    spec = gs.steer_spec([step("add", "vector", where={"roles": ["user"]})])
    items = [gs.capture("resid_post", LAYER, name="before"), *gs.steering(wide, spec, None, batch)]
    reads = gs.run(wide, ids, [*items, gs.capture("resid_post", LAYER)]).reads
    fired = np.abs(np.asarray(reads["resid_post"] - reads["before"])).max(-1) > 0
    np.testing.assert_array_equal(fired, roles == 2)


def test_eight_devices_steer_as_one_does(model):
    specs = [gs.steer_spec(SPECS[n]) for n in (1, 2, 4)]
    mesh = gs.make_mesh(2, 4)
    placed = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    many = gs.Model(placed, model.config)
    reads = [gs.capture("resid_post", LAYER)]
    one, two = (
        gs.generate(m, PROMPTS, NEW, [*gs.steering(m, specs, SAE, PROMPTS), *reads])
        for m in (model, many)
    )
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_allclose(one.reads["resid_post"], two.reads["resid_post"], atol=1e-4)
