"""Graphs of the model's own neurons: they add up and equal differentiating the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, coders_of, key, near, sums
from gemma_scope_jax.circuits.neurons import neuron_candidates
from gemma_scope_jax.circuits.sources import read_prompt
from gemma_scope_jax.circuits.targets import Resolver, checked_targets
from gemma_scope_jax.coders.coder import float32
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.model.config import PRESETS, Model
from letters import Letters
from reference_graph import FROZEN
from tiny import tiny_model


@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-27b"])
def test_neurons_add_up(name, model):
    """To the model's own logits and activations, without an error, whatever is left out."""
    model = model if model.config.name.endswith(name) else tiny_model(PRESETS[name])
    out = gs.run(model, IDS[None], [gs.capture("mlp_act")])
    logits, acts = np.asarray(out.logits)[0, -1], np.asarray(out.reads["mlp_act"])[:, 0]
    for options in ({}, {"max_candidates": 200, "max_feature_nodes": 50}):
        graph = gs.attribute(model, None, IDS, **options)
        n, nodes = graph.selected, graph.sources
        assert (nodes.kind[:n] == "neuron").all() and (graph.targets.kind[:n] == "neuron").all()
        near(sums(graph)[n:], logits[graph.targets.feature[n:]] - logits.mean())
        own = acts[nodes.layer[:n], nodes.position[:n], nodes.feature[:n]]
        near(sums(graph)[:n], own)
        near(nodes.activation[:n], own)
        assert (graph.effects[:, nodes.kind == "error"] == 0).all()
        assert graph.scores().replacement == 1
        assert graph.about["active_features"] == model.config.layers * (len(IDS) - 1) * 48
    assert np.abs(graph.rest).max() > 0


def linear_values(model, ids, neurons, tokens):
    """The leaves (activations [L, T, M] and embeddings), and the values of `neurons` [n, 3] and of
    logits less their mean as functions of them: gates, patterns and norms have their values."""
    frozen = (*FROZEN, "post_mlp_scale")
    sites = (*frozen, "embed", "final_scale", "mlp_in", "mlp_act")
    reads = gs.run(model, ids[None], [gs.capture(site) for site in sites], pad=False).reads
    layer, at, neuron = neurons.T
    b = model.params.blocks
    x = float32(reads["mlp_in"][:, 0])
    gate = jax.nn.gelu(jnp.einsum("ltd,ldm->ltm", x, float32(b.w_gate), precision="highest"))

    def values(leaves):
        acts, embed = leaves
        out = gs.forward(model, jnp.asarray(ids)[None], [
            gs.write("embed", None, put, embed[None]),
            *(gs.patch(site, None, gs.per_layer(reads[site])) for site in frozen),
            gs.patch("final_scale", None, reads["final_scale"]),
            gs.write("mlp_act", None, put, gs.per_layer(acts[:, None])),
            gs.capture("mlp_in"),
        ])  # fmt: skip
        x, last = float32(out.reads["mlp_in"][:, 0]), out.logits[0, -1]
        rows = float32(b.w_up[layer, :, neuron])
        up = jnp.einsum("nd,nd->n", x[layer, at], rows, precision="highest")
        return jnp.concatenate([up * gate[layer, at, neuron], last[tokens] - last.mean()])

    return (float32(reads["mlp_act"][:, 0]), float32(reads["embed"][0])), values


def put(x, ctx, value):
    return value.astype(x.dtype)


@pytest.mark.parametrize("first", [0, 4])
def test_equals_differentiating_the_model(model, first):
    graph = gs.attribute(model, gs.mlp_neurons(model, first=first), IDS, max_n_logits=3)
    n, nodes = graph.selected, graph.sources
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(n, 12, replace=False))
    neurons = np.stack([nodes.layer, nodes.position, nodes.feature], 1)[some]
    leaves, values = linear_values(model, IDS, neurons, graph.targets.feature[n:])
    rows = [*some, *range(n, len(graph.targets))]

    @jax.jit
    def value_and_gradients(leaves):
        value, backward = jax.vjp(values, leaves)
        return value, jax.vmap(backward)(jnp.eye(len(rows)))[0]

    value, gradients = value_and_gradients(leaves)
    near(value, graph.value[rows])
    acts, embed = (np.asarray(g * leaf[None]) for g, leaf in zip(gradients, leaves))
    got = graph.effects[rows]
    near(got[:, :n], acts[:, nodes.layer[:n], nodes.position[:n], nodes.feature[:n]])
    near(got[:, nodes.kind == "token"], embed.sum(2))
    size = np.abs(value).max()
    np.testing.assert_allclose(graph.bias[rows], acts[:, :, :first].sum((1, 2, 3)), 0, 1e-4 * size)


def test_candidates_have_the_largest_total_effects(model):
    """Along all paths through neurons, by the graph of all of them."""
    wanted = [7, 9]
    graph = gs.attribute(model, None, IDS, wanted)
    n = graph.selected
    total = graph.effects[n:, :n].astype(np.float64)
    for j in np.argsort(-graph.sources.layer[:n], kind="stable"):
        slope = total[:, j] / graph.sources.activation[j]
        total += slope[:, None] * graph.effects[j, :n][None]
    want = graph.weights[n:] @ np.abs(total)
    neurons, prompt = gs.mlp_neurons(model), read_prompt(model, IDS)
    resolver = Resolver(model, CoderSet(neurons), prompt, None)
    asked = checked_targets(wanted, model.config, CoderSet(neurons), len(IDS), None)
    active, count, written = neuron_candidates(
        model, neurons, prompt, resolver.resolve(asked), most=100
    )
    best = {key(graph.sources)[i][1:] for i in np.argsort(-want)[:100]}
    assert set(zip(*(c.tolist() for c in (active.layer, active.position, active.feature)))) == best
    near(written[:, 1 : len(IDS)], prompt.mlp_out[:, 1 : len(IDS)])
    assert count == n


def test_a_neuron_is_a_target(model):
    reads = gs.run(model, IDS[None], [gs.capture("mlp_act", 2)]).reads["mlp_act"]
    target = gs.Target.feature(2, 5, position=4)
    graph = gs.attribute(model, None, IDS, [target, target - gs.Target.feature(1, 3)])
    n = graph.selected
    assert graph.targets.kind[n:].tolist() == ["neuron", "direction"]
    near(graph.value[n], reads[0, 4, 5])
    near(sums(graph), graph.value)
    with pytest.raises(gs.InputError, match="0 to 47"):
        gs.attribute(model, None, IDS, gs.Target.feature(2, 48))


def test_graphs_of_neurons_are_shown_and_saved(model, tmp_path):
    graph = gs.attribute(model, None, IDS, max_feature_nodes=80).prune()
    graph.save(tmp_path / "graph.npz")
    assert (gs.load_graph(tmp_path / "graph.npz").sources.kind == graph.sources.kind).all()
    document = gs.graph_document(graph)
    assert sum(node.get("is_neuron", False) for node in document["nodes"]) == graph.selected
    assert document["metadata"]["transcoder_list"] == ["neurons"]
    found = gs.find_supernodes(graph, gs.mlp_neurons(model), similarity=0.2)
    assert len(found) < graph.selected
    assert gs.graph_page(graph, groups=found.columns()).startswith("<!")
    assert "neuron " in str(gs.strongest_paths(graph, 5, direct=False)[0])
    assert "neuron" in gs.graph_difference(graph, graph).table()


def test_labels_say_what_neurons_raise_on_this_prompt(model):
    """A negative neuron raises what its direction lowers."""
    tok = Letters()
    graph = gs.attribute(model, None, IDS, max_feature_nodes=80)
    details = gs.feature_details(model, None, tok, graph)
    labelled = gs.label_graph(graph, details)
    n, nodes, rows = graph.selected, graph.sources, model.params.blocks
    for i in range(n):
        layer, neuron = int(nodes.layer[i]), int(nodes.feature[i])
        known = details[layer, neuron]
        words = known.raises if nodes.activation[i] > 0 else known.lowers
        assert labelled.sources.label[i] == ", ".join(w.strip() or repr(w) for w in words[:3])
    direction = rows.w_down[layer, neuron] * (1 + rows.post_mlp_norm[layer])
    logits = model.params.unembedding @ (direction * (1 + model.params.final_norm))
    best = np.argsort(-np.asarray(logits))[:20]
    assert known.raises[0] in tok.decode_tokens(best.tolist())


def test_a_plan_counts_every_neuron(model):
    found = gs.plan_attribution(model.config, None, 11, timed=False, max_candidates=300)
    assert (found.active, found.candidates) == (4 * 48 * 10, 300)
    assert gs.check_attribution(model.config, None, IDS, 7)[0][0].kind == "neurons"


def test_bfloat16_leaves_its_rounding_to_the_bias(model):
    cast = lambda w: w.astype(jnp.bfloat16) if w.ndim > 2 or w.shape[0] > 100 else w
    half = Model(jax.tree.map(cast, model.params), model.config)
    graph = gs.attribute(half, None, IDS, max_candidates=300)
    near(sums(graph), graph.value)
    assert (graph.effects[:, graph.sources.kind == "error"] == 0).all()


def test_another_prompt_compiles_nothing(model, caplog):
    gs.attribute(model, None, IDS, max_candidates=200)
    with jax.log_compiles():
        caplog.clear()
        graph = gs.attribute(model, None, np.concatenate([IDS[:5], IDS[3:9]]), max_candidates=200)
    assert graph.selected and not [r for r in caplog.records if "Compiling" in r.message]


BAD = {
    "first": (lambda m: gs.mlp_neurons(m, first=-1), "first"),
    "encode": (lambda m: gs.mlp_neurons(m).encode(np.zeros((1, 32))), "mlp_act"),
    "decode": (lambda m: gs.mlp_neurons(m).decode(np.zeros((1, 48))), "mlp_act"),
    "both": (lambda m: gs.attribute(m, [gs.mlp_neurons(m), *coders_of("plain")], IDS), "layer 0"),
    "another model": (
        lambda m: gs.attribute(m, gs.mlp_neurons(tiny_model(PRESETS["gemma-3-270m"])), IDS),
        "layers 0 to 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(model, what):
    call, message = BAD[what]
    with pytest.raises(gs.InputError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_real_model():
    """The real 270M: sums, and the neurons of most influence."""
    model, tok = gs.load_model("gemma-3-270m", dtype="float32"), gs.load_tokenizer("gemma-3-270m")
    ids = tok.encode("The capital of France is")
    graph = gs.attribute(model, None, ids, tokenizer=tok, max_feature_nodes=200)
    near(sums(graph), graph.value)
    n, logits = graph.selected, np.asarray(gs.run(model, ids[None]).logits)[0, -1]
    near(graph.value[n:], logits[graph.targets.feature[n:]] - logits.mean())
    near(graph.value[:n], graph.sources.activation[:n])
    assert graph.about["active_features"] == 18 * (len(ids) - 1) * 2048
