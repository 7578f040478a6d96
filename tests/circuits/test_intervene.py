"""Interventions: the graph's edges where the model is linear, else what the model's hooks give."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from circuit_sets import IDS, MLP, SETS, features_of
from coders import random_coder
from gemma_scope_jax.circuits.edit_rows import gathered, own_layers
from gemma_scope_jax.circuits.interventions import as_arrays
from gemma_scope_jax.errors import InputError
from golden.circuit_coders import DICTIONARIES, circuit_coders, circuit_model

GOLDEN = Path(__file__).parent.parent / "golden" / "circuit_tracer.npz"
SCALES = ("pre_attn_scale", "post_attn_scale", "pre_mlp_scale", "post_mlp_scale")
kinds = pytest.mark.parametrize("kind", SETS)


def changed(found):
    """The changes of pre-activations and of the chosen logits: [n, R + K]."""
    pre = found.pre_activations - found.clean.pre_activations
    return np.concatenate([pre, found.token_logits - found.clean.token_logits], 1)


def some_sets(coders, seed=0, count=3, size=2):
    """Sets of edits at random places, the second relative."""
    rng, places = np.random.default_rng(seed), [layer for c in coders for layer in c.layers]
    sets = []
    for _ in range(count):
        layers = rng.choice(places, size, replace=len(places) < size)
        one = [(int(l), int(rng.integers(2, 9)), int(rng.integers(20)), 3.0) for l in layers]
        sets.append([*one[:1], *(gs.Intervention(*e[:3], 2.5, relative=True) for e in one[1:])])
    return sets


# ---- frozen --------------------------------------------------------------------------------------


@pytest.mark.law
@kinds
def test_direct_interventions_are_the_edges_of_the_graph(model, graphs, kind):
    """At any size and sign, on every feature downstream and on the logits."""
    graph = graphs(kind)
    n, features = graph.selected, features_of(graph)
    which = np.arange(0, n, max(1, n // 30))
    factor = np.random.default_rng(1).uniform(-1, 3, len(which)).astype(np.float32)
    values = graph.sources.activation[which] * factor
    sets = [[(*features[s].tolist(), float(v))] for s, v in zip(which, values)]
    options = {"read": features, "tokens": graph.targets.feature[n:], "freeze": "direct"}
    found = gs.intervene(model, SETS[kind], IDS, sets, **options)
    wanted = (graph.effects[:, which] * (factor - 1)).T
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(changed(found), wanted, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(found.clean.pre_activations[0], graph.value[:n], atol=1e-5)
    np.testing.assert_allclose(found.clean.token_logits[0], graph.value[n:], atol=1e-5)
    assert found.logits.shape == (len(which), 300)


def test_direct_effects_of_several_edits_add_up(model, graphs):
    graph = graphs("clt")
    features = features_of(graph)
    one = [(*features[s].tolist(), 0.0) for s in (3, 40, 41, 90)]
    options = {"read": features, "tokens": [4], "freeze": "direct", "logits": "none"}
    found = gs.intervene(model, SETS["clt"], IDS, [[e] for e in one] + [one], **options)
    each = changed(found)
    np.testing.assert_allclose(each[4], each[:4].sum(0), atol=1e-5)
    assert found.logits is None and found.clean.logits is None


def clean_values(model):
    sites = ["attn_pattern", *SCALES, "final_scale", "mlp_in", "mlp_out"]
    return gs.run(model, IDS[None], [gs.capture(site) for site in sites], pad=False).reads


def patches(clean, sites):
    return [gs.patch(site, None, gs.per_layer(clean[site])) for site in sites]


MODES = ("nothing", "attention", "attention+norms", "replacement")


@pytest.mark.parametrize(
    ("kind", "freeze"),
    [*(("affine", mode) for mode in MODES), ("clt", "replacement"), ("mixed", "replacement")],
)
def test_every_mode_equals_the_model_with_hooks(model, kind, freeze):
    """By another route: one set at a time, what is frozen as patches, the coders as splices."""
    coders, clean, items = SETS[kind], clean_values(model), []
    if freeze != "nothing":
        items += patches(clean, ["attn_pattern"])
    if freeze in ("attention+norms", "replacement"):
        items += [*patches(clean, SCALES), gs.patch("final_scale", None, clean["final_scale"])]
    if freeze == "replacement":
        layers = sorted(layer for coder in coders for layer in coder.layers)
        plain = [gs.splice(coder, error=False) for coder in coders]
        pinned = [gs.patch("mlp_in", None, gs.per_layer(clean["mlp_in"])), gs.capture("mlp_out")]
        made = gs.run(model, IDS[None], [*plain, *pinned], pad=False).reads["mlp_out"]
        error = gs.per_layer((clean["mlp_out"] - made)[np.array(layers)])
        rest = [layer for layer in range(4) if layer not in layers]
        constant = gs.per_layer(clean["mlp_out"][np.array(rest)]) if rest else None
        items += [*plain, gs.steer("mlp_out", layers, error, first=0)]
        items += [gs.patch("mlp_out", rest, constant)] if rest else []
    sets = some_sets(coders)
    found = gs.intervene(model, coders, IDS, sets, freeze=freeze, logits="all")
    for one, logits in zip(sets, found.logits):
        edits = gs.edit_features(coders, one)
        wanted = gs.run(model, IDS[None], [*items, *edits], pad=False).logits[0]
        np.testing.assert_allclose(logits, wanted, atol=2e-5)
        assert np.abs(logits - found.clean.logits[0]).max() > 1e-2


def test_layers_whose_mlps_are_frozen(model):
    """As circuit-tracer's `constrained_layers`: the other MLPs are the model's own."""
    coders, clean = SETS["plain"], clean_values(model)
    one = [(0, 3, 5, 4.0)]
    run = lambda **more: gs.intervene(model, coders, IDS, [one], freeze="direct", **more).logits
    np.testing.assert_array_equal(run(layers=range(4)), run())
    items = [*patches(clean, ["attn_pattern", *SCALES])]
    items += [gs.patch("final_scale", None, clean["final_scale"])]
    items += [gs.patch("mlp_out", (1, 3), gs.per_layer(clean["mlp_out"][np.array([1, 3])]))]
    wanted = gs.run(model, IDS[None], [*items, *gs.edit_features(coders, one)], pad=False)
    np.testing.assert_allclose(run(layers=(1, 3))[0], wanted.logits[0, -1], atol=2e-5)
    assert np.abs(run(layers=(1, 3)) - run()).max() > 1e-2


def test_the_control_writes_directions_of_others_of_the_same_norm(model):
    coders = gs.CoderSet(SETS["mixed"])
    edits = as_arrays([{(0, 3, 5): (1.0, False), (1, 4, 2): (1.0, False)}] * 2, 2, 2)
    own = own_layers(tuple(coders), 4)
    numbers = np.arange(2, dtype=np.int32)
    plain, noisy = (
        gathered(tuple(coders), own, edits, (np.bool_(on), np.uint32(3), numbers))
        for on in (False, True)
    )
    norm = lambda a: np.linalg.norm(np.asarray(a.rows), axis=-1)
    np.testing.assert_allclose(norm(plain), norm(noisy), rtol=1e-5)
    np.testing.assert_allclose(plain.rows[0, 0, 1], coders[0].decoder(0, 1)[5], rtol=1e-6)
    assert np.abs(noisy.rows[0] - noisy.rows[1]).max() > 0.1  # each set has its own
    others = np.asarray(coders[0].decoder(0, 1)) @ np.asarray(noisy.rows[0, 0, 1])
    norms = np.linalg.norm(coders[0].decoder(0, 1), axis=-1) * norm(noisy)[0, 0, 1]
    assert np.isclose(others / norms, 1, atol=1e-5).sum() == 1
    run = lambda seed: gs.intervene(model, coders, IDS, [[(0, 3, 5, 4.0)]], control=seed).logits
    np.testing.assert_array_equal(run(0), run(0))
    assert len({float(run(seed)[0, 0]) for seed in (None, 0, 1)}) == 3


# ---- batches and programs ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "mixed"])
def test_no_edits_leave_the_prompt_as_it_is(model, kind):
    wanted = np.asarray(gs.run(model, IDS[None]).logits[0])
    for freeze in ("nothing", "direct"):
        found = gs.intervene(model, SETS[kind], IDS, [[]], freeze=freeze, logits="all")
        np.testing.assert_allclose(found.logits[0], wanted, atol=1e-5)
        np.testing.assert_allclose(found.clean.logits[0], wanted, atol=1e-5)
        assert found.pre_activations is None and found.token_logits is None


@pytest.mark.parametrize("freeze", ["replacement"])
def test_batched_equals_one_by_one(model, freeze):
    coders = SETS["affine"]
    sets = [*some_sets(coders, count=4), [], *some_sets(coders, seed=5, count=2, size=1)]
    options = {"freeze": freeze, "tokens": [7, 8, 9], "read": [(3, 8, 1), (1, 4, 2), (3, 7, 5)]}
    whole = gs.intervene(model, coders, IDS, sets, **options)
    parts = gs.intervene(model, coders, IDS, sets, batch=4, **options)
    singles = [gs.intervene(model, coders, IDS, [one], **options) for one in sets]
    for name in ("logits", "pre_activations", "token_logits"):
        rows = np.concatenate([getattr(single, name) for single in singles])
        np.testing.assert_allclose(getattr(whole, name), rows, atol=1e-5)
        np.testing.assert_allclose(getattr(parts, name), rows, atol=1e-5)
        assert np.isfinite(rows).all()
    last = whole.logits - whole.logits.mean(-1, keepdims=True)
    np.testing.assert_allclose(whole.token_logits, last[:, 7:10], atol=1e-5)
    options |= {"tokens": [(8, 7), (4, 2)], "logits": "all"}
    every = gs.intervene(model, coders, IDS, sets, **options)
    wanted = every.logits[:, 4, 2] - every.logits[:, 4].mean(-1)
    np.testing.assert_allclose(every.token_logits[:, 0], last[:, 7], atol=1e-5)
    np.testing.assert_allclose(every.token_logits[:, 1], wanted, atol=1e-5)


def test_other_edits_compile_nothing(model):
    compiled = []

    def watch(event, seconds, fun_name="", **_):
        if "backend_compile" in event:
            compiled.append(fun_name)

    coders = SETS["affine"]
    run = lambda sets, read, tokens, n: gs.intervene(
        model, coders, IDS[:n], sets, freeze="direct", read=read, tokens=tokens
    )
    run(some_sets(coders, count=3), [(3, 6, 1), (1, 4, 2), (1, 5, 2)], [7, 8, 9], 9)
    jax.monitoring.register_event_duration_secs_listener(watch)
    try:
        run(some_sets(coders, seed=1, count=4), [(2, 3, 1), (2, 4, 2)], [1, 5, 4], 9)
        run(some_sets(coders, seed=2, count=40), [(0, 3, 23)] * 2, [2, 5, 4, 8], 9)
    finally:
        jax.monitoring.unregister_event_duration_listener(watch)
    assert compiled == ["jit(_intervene)"]  # the 40: 15 in a batch, not 4


def test_a_mesh_and_bfloat16(model):
    coders, sets = SETS["clt"], some_sets(SETS["clt"])
    wanted = gs.intervene(model, coders, IDS, sets, freeze="direct").logits
    mesh = gs.make_mesh(2, 2)
    params = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    found = gs.intervene(gs.Model(params, model.config), coders, IDS, sets, freeze="direct").logits
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 2 else a, model.params)
    half = half.replace(embed=model.params.embed.astype(jnp.bfloat16))
    found = gs.intervene(gs.Model(half, model.config), coders, IDS, sets, freeze="direct").logits
    np.testing.assert_allclose(found, wanted, atol=0.2)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """CLTs of all layers, and of two between two transcoders, with their decoders on disk."""
    folders = tmp_path_factory.mktemp("clts")

    def left(coder, name):
        if not coder.multi_layer:
            return coder
        gs.save_coder(coder, folders / name)
        return gs.load_coder(folders / name, decoder=False)

    return {kind: [left(coder, kind) for coder in SETS[kind]] for kind in ("clt", "mixed")}


@pytest.mark.parametrize("control", [None, 3])
@pytest.mark.parametrize("kind", ["clt", "mixed"])
def test_a_decoder_on_disk_gives_the_same(model, on_disk, kind, control):
    """The rows of the edited features are read, and those of the control."""
    sets = [*some_sets(SETS[kind], count=5), [(0, 3, 5, 2.0), (0, 4, 5, 1.0), (2, 3, 0, 4.0)]]
    options = {"freeze": "direct", "read": [(3, 8, 1)] if kind == "clt" else None}
    options |= {"control": control, "batch": 4}
    assert any(coder.w_dec is None for coder in on_disk[kind])
    found, wanted = (
        gs.intervene(model, coders, IDS, sets, **options) for coders in (on_disk[kind], SETS[kind])
    )
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-6)
    assert np.abs(found.logits - found.clean.logits).max() > 1e-2


def test_the_replacement_model_needs_the_whole_decoder(model, on_disk):
    with pytest.raises(InputError, match="left on disk.* load_decoder") as error:
        gs.intervene(model, on_disk["clt"], IDS, [[(1, 3, 5, 0.0)]], freeze="replacement")
    assert "\n" not in str(error.value)


def test_a_prompt_may_be_a_batch_of_one(model):
    one = [[(1, 3, 5, 2.0)]]
    wanted = gs.intervene(model, SETS["affine"], IDS, one).logits
    np.testing.assert_array_equal(
        gs.intervene(model, SETS["affine"], IDS[None], one).logits, wanted
    )


# ---- while a text is generated -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "clt"])
def test_edits_equal_clamps_and_hold_while_generating(model, kind):
    """One feature at a token of the prompt, one from a token on, another multiplied at all."""
    coders = gs.CoderSet(SETS[kind])
    one = [(1, 3, 5, 2.0), (2, slice(6, None), 7, 3.0), gs.Intervention(0, None, 4, 3.0, True)]
    made = gs.generate(model, IDS[None], 5, gs.edit_features(coders, one), logits=True)
    whole = made.sequences[0]
    assert len(whole) == 14
    expected = gs.run(model, whole[None], gs.edit_features(coders, one)).logits[0]
    np.testing.assert_allclose(made.logits[0], expected[8:13], atol=2e-5)
    rest = gs.intervene(model, coders, whole, [one], logits="all").logits[0]
    np.testing.assert_allclose(rest, expected, atol=2e-5)
    assert np.abs(np.asarray(gs.run(model, whole[None]).logits[0]) - rest).max() > 0.05

    clamps = [
        gs.edit(coders.at(layer), gs.clamp, feature, value, layer, positions=positions)
        for layer, feature, value, positions in ((1, 5, 2.0, 3), (2, 7, 3.0, np.arange(6, 14)))
    ]
    by_clamp = gs.run(model, whole[None], clamps).logits[0]
    ours = gs.run(model, whole[None], gs.edit_features(coders, one[:2])).logits[0]
    np.testing.assert_allclose(ours, by_clamp, atol=2e-5)


# ---- bad input -----------------------------------------------------------------------------------

ONE = [[(1, 3, 5, 0.0)]]
WRONG = {
    "no sets": ([], {}, "give at least one set"),
    "one set as sets": (ONE[0], {}, r"of one set: \[\[...\]\]"),
    "not a list": ("1,2", {}, "a list of sets"),
    "three numbers": ([[(1, 2, 3)]], {}, "an intervention is"),
    "no such layer": ([[(7, 3, 5, 0.0)]], {}, "layer 7: no coder"),
    "a fraction of a layer": ([[(1.5, 3, 5, 0.0)]], {}, "layer must be a whole number"),
    "no such feature": ([[(1, 3, 25, 0.0)]], {}, "feature 25: .* features 0 to 24"),
    "a negative feature": ([[(1, 3, -1, 0.0)]], {}, "feature -1"),
    "beyond the prompt": ([[(1, 9, 5, 0.0)]], {}, "position 9: .* 0 to 8"),
    "a negative position": ([[(1, -1, 5, 0.0)]], {}, "position must be at least 0"),
    "the first token": ([[(1, 0, 5, 0.0)]], {}, "position 0: .* from position 2 on"),
    "an empty slice": ([[(1, slice(4, 4), 5, 0.0)]], {}, "holds no positions"),
    "a slice beyond": ([[(1, slice(9, 12), 5, 0.0)]], {}, "the prompt has no such tokens"),
    "steps": ([[(1, slice(0, 9, 2), 5, 0.0)]], {}, "has steps"),
    "NaN": ([[(1, 3, 5, float("nan"))]], {}, "holds NaN"),
    "no number": ([[(1, 3, 5, "much")]], {}, "must be numbers"),
    "two numbers": ([[(1, 3, 5, [1.0, 2.0])]], {}, "is one number"),
    "twice": ([[(1, 3, 5, 0.0), (1, slice(2, 5), 5, 1.0)]], {}, "is set twice"),
    "an unknown mode": (ONE, {"freeze": "atention"}, "did you mean attention"),
    "layers without direct": (ONE, {"layers": (1,)}, "freezes none"),
    "an unknown frozen layer": (ONE, {"freeze": "direct", "layers": (9,)}, "layers 0 to 3"),
    "logits": (ONE, {"logits": "first"}, "logits is 'first'"),
    "a token": (ONE, {"tokens": [300]}, "tokens: "),
    "a token after none": (ONE, {"tokens": [(9, 3)]}, "tokens: .* 0 to 8"),
    "a read": (ONE, {"read": [(1, 3, 25)]}, "feature 25"),
    "a read beyond": (ONE, {"read": [(1, 9, 5)]}, "position 9"),
    "reads without a layer": (ONE, {"read": [(3, 5)]}, r"features \[R, 3\]"),
    "a batch of one": (ONE, {"batch": 1}, "batch must be at least 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_interventions_are_one_line(model, what):
    sets, options, words = WRONG[what]
    with pytest.raises(InputError, match=words):
        gs.intervene(model, SETS["affine"], IDS, sets, **options)


def test_wrong_coders_and_prompts_are_one_line(model):
    other = random_coder(24, d=16, layer=1, **MLP)
    for coders, ids, words in (
        ([other], IDS, "it is for another model"),
        ([random_coder(24, layer=9, **MLP)], IDS, "has layers 0 to 3"),
        ([random_coder(24, layer=1)], IDS, "circuits are of transcoders"),
        ([SETS["plain"][1], SETS["affine"][1]], IDS, "layer 1: 2 coders"),
        ([SETS["plain"][1].replace(k=4)], IDS, "convert it with as_jump_relu"),
        ([SETS["clt"][0].replace(w_dec=None)], IDS, "not loaded from a folder that has its dec"),
        (["a name"], IDS, "expected coders"),
        (SETS["plain"], "text", "text"),
        (SETS["plain"], np.stack([IDS, IDS]), "of one prompt"),
        (SETS["plain"], np.array([2, 2, *IDS]), "begins with two <bos>"),
        (SETS["plain"], IDS[:0], "of one prompt"),
        (SETS["plain"], IDS + 300, "outside 0..299"),
        (SETS["plain"], np.tile(IDS, 9), "context of 64"),
    ):
        with pytest.raises(InputError, match=words):
            gs.intervene(model, coders, ids, [[(1, 3, 5, 0.0)]])
    for wrong, words in (([], "not empty"), ([(1, 3, 5, 1), (1, None, 5, 2)], "set twice")):
        with pytest.raises(InputError, match=words):
            gs.edit_features(SETS["plain"], wrong)


# ---- circuit-tracer ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DICTIONARIES)
def test_logits_are_those_of_circuit_tracer(name):
    """Its own `feature_intervention`: attention frozen; and all MLPs and norms, too."""
    config, params, ids = circuit_model()
    with np.load(GOLDEN) as file:
        layer, position, feature, value = file[f"{name}/feature"].tolist()
        wanted = file[f"{name}/intervened"]
    place = int(layer), int(position), int(feature)
    sets = [[(*place, factor * value)] for factor in (0.0, 2.0)]
    for freeze, logits in zip(("attention", "direct"), wanted):
        model, coders = gs.Model(params, config), circuit_coders(name)
        found = gs.intervene(model, coders, ids[0], sets, freeze=freeze)
        np.testing.assert_allclose(found.logits, logits, atol=2e-5)
        assert np.abs(logits - found.clean.logits).max() > 1e-2
