"""Interventions on MLP neurons: edges of their graph, and what hand-written hooks give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from circuit_sets import IDS, features_of
from gemma_scope_jax.circuits.edit_neurons import neuron_edits
from gemma_scope_jax.circuits.interventions import as_arrays
from gemma_scope_jax.circuits.validate import total_ablation
from gemma_scope_jax.coders.coder import float32, matmul
from gemma_scope_jax.errors import InputError

SCALES = ("pre_attn_scale", "post_attn_scale", "pre_mlp_scale", "post_mlp_scale")
ONE = [(1, 3, 5, 2.0), gs.Intervention(2, 6, 7, -2.5, relative=True), (1, 5, 40, 0.0)]


@pytest.fixture(scope="module")
def graph(model):
    """Of all neurons, 4 layers of 48 at 8 tokens; of logits, a neuron and a difference."""
    logits, neuron = [gs.Target.logit(token) for token in (3, 4, 7)], gs.Target.feature
    asked = [*logits, neuron(3, 5, position=6), neuron(3, 7) - neuron(2, 4)]
    return gs.attribute(model, None, IDS, asked)


def test_direct_interventions_are_the_edges_of_the_graph(model, graph):
    n, features = graph.selected, features_of(graph)
    which = np.arange(0, n, n // 30)
    factor = np.random.default_rng(1).uniform(-1, 3, len(which)).astype(np.float32)
    values = graph.sources.activation[which] * factor
    sets = [[(*features[s].tolist(), float(v))] for s, v in zip(which, values)]
    more = [(3, 6, 5), (3, 8, 7), (2, 8, 4)]
    options = {"read": [*features.tolist(), *more], "logits": "none", "tokens": [[8, 3]]}
    found = gs.intervene(model, None, IDS, sets, freeze="direct", **options)
    wanted = (graph.effects[: n + 1, which] * (factor - 1)).T
    assert np.abs(wanted).max() > 0.05
    pre = (found.pre_activations - found.clean.pre_activations)[:, :n]
    logits = found.token_logits - found.clean.token_logits
    np.testing.assert_allclose(np.concatenate([pre, logits], 1), wanted, rtol=1e-4, atol=5e-6)
    np.testing.assert_allclose(found.clean.pre_activations[0, :n], graph.value[:n], atol=1e-5)


# ---- by hand -------------------------------------------------------------------------------------


def by_hand(act, ctx, model, gates, linear):
    """ONE written into mlp_act; where `linear`, neurons first follow their inputs with `gates`."""
    if linear:
        up = jax.lax.dynamic_index_in_dim(model.params.blocks.w_up, ctx.layer, keepdims=False)
        act = gates * matmul(ctx.seen["mlp_in"], up)
    here = lambda layer, new: jnp.where(ctx.layer == layer, new, act)
    act = here(1, act.at[:, 3, 5].set(2.0).at[:, 5, 40].set(0.0))
    return here(2, act.at[:, 6, 7].multiply(-2.5))


@pytest.mark.parametrize("freeze", ["nothing", "attention", "replacement"])
def test_every_mode_equals_the_model_with_hooks(model, freeze):
    sites = ["attn_pattern", *SCALES, "final_scale", "mlp_in"]
    clean = gs.run(model, IDS[None], [gs.capture(site) for site in sites], pad=False).reads
    gates = jnp.einsum("lbtd,ldm->lbtm", clean["mlp_in"], model.params.blocks.w_gate)
    gates = gs.per_layer(jax.nn.gelu(gates))
    items = []
    if freeze != "nothing":
        items += [gs.patch("attn_pattern", None, gs.per_layer(clean["attn_pattern"]))]
    if freeze == "replacement":
        items += [gs.patch(site, None, gs.per_layer(clean[site])) for site in SCALES]
        items += [gs.patch("final_scale", None, clean["final_scale"])]
    linear = freeze == "replacement"
    items += [gs.write("mlp_act", None, by_hand, model, gates, linear=linear)]
    items += [gs.capture("mlp_act")]
    wanted = gs.run(model, IDS[None], items, pad=False)
    read = [(2, 6, 8), (3, 8, 4), (1, 4, 2)]
    found = gs.intervene(model, None, IDS, [ONE, []], freeze=freeze, logits="all", read=read)
    np.testing.assert_allclose(found.logits[0], wanted.logits[0], atol=2e-5)
    assert np.abs(found.logits[0] - found.clean.logits[0]).max() > 1e-2
    np.testing.assert_allclose(found.logits[1], found.clean.logits[0], atol=1e-5)
    acts = [wanted.reads["mlp_act"][l, 0, t, m] for l, t, m in read]
    np.testing.assert_allclose(found.pre_activations[0], acts, atol=1e-5)


def test_layers_whose_mlps_are_frozen(model):
    """The other MLPs are the model's own, and so are their neurons' gates."""
    sites = ["attn_pattern", *SCALES, "final_scale", "mlp_act"]
    clean = gs.run(model, IDS[None], [gs.capture(site) for site in sites], pad=False).reads
    items = [gs.patch(site, None, gs.per_layer(clean[site])) for site in ("attn_pattern", *SCALES)]
    held = gs.per_layer(clean["mlp_act"][np.array([1, 3])])
    items += [gs.patch("final_scale", None, clean["final_scale"])]
    items += [gs.patch("mlp_act", (1, 3), held), gs.capture("mlp_act", 2)]
    one = [(0, 3, 5, 4.0)]
    wanted = gs.run(
        model, IDS[None], [*items, *gs.edit_features(gs.mlp_neurons(model), one)], pad=False
    )
    read = [(2, 6, 8), (2, 3, 1)]
    found = gs.intervene(model, None, IDS, [one], freeze="direct", layers=(1, 3), read=read)
    np.testing.assert_allclose(found.logits[0], wanted.logits[0, -1], atol=2e-5)
    acts = [wanted.reads["mlp_act"][0, t, m] for _, t, m in read]
    np.testing.assert_allclose(found.pre_activations[0], acts, atol=1e-5)


def test_the_control_writes_what_another_neuron_writes_of_the_same_norm(model):
    neurons, numbers = gs.mlp_neurons(model), np.arange(-1, 1, dtype=np.int32)
    edits = as_arrays([{}, {(1, 3, 5): (4.0, False)}], 2, 1)
    made = neuron_edits(neurons, edits, (np.bool_(True), np.uint32(3), numbers))
    other = int(made.to[1, 0])
    assert other != 5
    rows = np.asarray(neurons.w_dec[1] * (1 + neurons.norm[1])[None])
    norms = np.linalg.norm(rows[[5, other]], axis=-1)
    np.testing.assert_allclose(made.size[1, 0], norms[0] / norms[1], rtol=1e-5)
    act = gs.run(model, IDS[None], [gs.capture("mlp_act", 1)]).reads["mlp_act"][0, 3]
    value = float(act[other] + (4.0 - act[5]) * made.size[1, 0])
    found = gs.intervene(model, None, IDS, [[(1, 3, 5, 4.0)]], control=3)
    wanted = gs.intervene(model, None, IDS, [[(1, 3, other, value)]])
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)


# ---- a graph against the model -------------------------------------------------------------------


def test_a_graph_of_neurons_is_validated(model, graph):
    """Without thresholds the whole graph's total effects are the replacement model's, exactly."""
    found = graph.validate(model, None, top=12, modes=("direct", "replacement", "nothing"))
    figures = {(a.freeze, a.targets, a.control): a for a in found.agreements}
    assert len(figures) == 12 and (found.ablated.kind == "neuron").all()
    assert found.final.kind.tolist() == [*["logit"] * 3, "neuron", "direction"]
    for mode in ("direct", "replacement"):
        predicted, measured, control = found.changes[mode]
        np.testing.assert_allclose(measured, predicted, atol=5e-6)
        assert np.abs(control - predicted).max() > 0.02
        for targets in ("final", "features"):
            exact, random = (figures[mode, targets, c] for c in (False, True))
            assert exact.r2 > 0.99999 and exact.spearman > 0.999 and random.r2 < 0.3
            assert figures["nothing", targets, False].spearman > max(0.2, random.spearman)


def test_a_neuron_at_zero_has_no_effects(model, graph):
    quiet, effects = graph.sources.activation.copy(), graph.effects.copy()
    quiet[:3], effects[:, :3] = 0, 0
    sources = dataclasses.replace(graph.sources, activation=quiet)
    some = dataclasses.replace(graph, sources=sources, effects=effects)
    assert np.isfinite(total_ablation(some, np.arange(5))).all()


# ---- elsewhere -----------------------------------------------------------------------------------


def test_edits_hold_while_generating(model):
    neurons = gs.mlp_neurons(model)
    one = [(1, 3, 5, 2.0), (2, slice(6, None), 7, 3.0), gs.Intervention(0, None, 4, 3.0, True)]
    made = gs.generate(model, IDS[None], 5, gs.edit_features(neurons, one), logits=True)
    whole = made.sequences[0]
    rest = gs.intervene(model, None, whole, [one], logits="all").logits[0]
    np.testing.assert_allclose(made.logits[0], rest[8:13], atol=2e-5)
    assert np.abs(np.asarray(gs.run(model, whole[None]).logits[0]) - rest).max() > 0.02


def test_a_mesh_and_bfloat16(model):
    options = {"freeze": "direct", "read": [(3, 8, 4)]}
    wanted = gs.intervene(model, None, IDS, [ONE], **options)
    mesh = gs.make_mesh(2, 2)
    params = jax.device_put(model.params, gs.param_shardings(model.config, mesh))
    found = gs.intervene(gs.Model(params, model.config), None, IDS, [ONE], **options)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=2e-5)
    np.testing.assert_allclose(found.pre_activations, wanted.pre_activations, atol=2e-5)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 2 else a, model.params)
    half = gs.Model(half.replace(embed=model.params.embed.astype(jnp.bfloat16)), model.config)
    np.testing.assert_allclose(
        gs.intervene(half, None, IDS, [ONE], **options).logits, wanted.logits, atol=0.2
    )
    edits = gs.edit_features(gs.mlp_neurons(half), [(1, 3, 5, 1e3), (1, 3, 6, 1e-3)])
    edits += gs.edit_features(gs.mlp_neurons(half), [(1, 3, 5, 0.3)])  # exact after a large value
    act = gs.run(half, IDS[None], [*edits, gs.capture("mlp_act", 1)]).reads["mlp_act"]
    np.testing.assert_allclose(float32(act)[0, 3, 5:7], [0.3, 1e-3], rtol=1e-2)


WRONG = {
    "the first token": ([[(1, 0, 5, 0.0)]], r"position 0: .* position 1: mlp_neurons.*first=0"),
    "tokens before the first": ([[(1, slice(0, 1), 5, 0.0)]], r"the slice .* position 1: mlp_neu"),
    "no such neuron": ([[(1, 3, 48, 0.0)]], "feature 48: .* 0 to 47"),
    "no such layer": ([[(4, 3, 5, 0.0)]], "layer 4: no coder"),
    "twice": ([[(1, 3, 5, 0.0), (1, None, 5, 1.0)]], "is set twice"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_interventions_are_one_line(model, what):
    sets, words = WRONG[what]
    with pytest.raises(InputError, match=words) as error:
        gs.intervene(model, None, IDS, sets)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=words) as same:
        gs.edit_features(gs.mlp_neurons(model), sets[0])
    assert str(same.value) == str(error.value) or what == "twice"


def test_the_first_token_by_choice(model):
    everywhere = gs.mlp_neurons(model, first=0)
    found = gs.intervene(model, everywhere, IDS, [[(1, 0, 5, 3.0)]])
    assert np.abs(found.logits - found.clean.logits).max() > 1e-3


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model():
    """Edges of the real 270M's neurons against finite interventions."""
    model, tok = gs.load_model("gemma-3-270m", dtype="float32"), gs.load_tokenizer("gemma-3-270m")
    ids = tok.encode("The capital of France is")
    graph = gs.attribute(model, None, ids, max_n_logits=5, max_feature_nodes=200)
    found = graph.validate(model, None, top=16, modes=("direct", "nothing"), batch=9)
    assert found.agreements[0].r2 > 0.9999 and found.agreements[0].spearman > 0.999
    predicted, measured, _ = found.changes["direct"]
    np.testing.assert_allclose(measured, predicted, atol=1e-3 * np.abs(predicted).max())
    real, control = found.changes["nothing"][1:]
    assert np.abs(real).max() > 0.1 and np.abs(real - control).max() > 0.1
    assert all(a.n >= 80 and np.isfinite(a.spearman) for a in found.agreements)
