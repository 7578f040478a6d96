"""`attribute`: the linear model adds up, equals brute force, and equals circuit-tracer."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, KINDS, coders_of, key, near, sums
from coders import random_coder
from gemma_scope_jax.circuits import attribute as attribution_module
from gemma_scope_jax.circuits import linear
from gemma_scope_jax.circuits.linear import chunk_of, room_for
from gemma_scope_jax.model.config import PRESETS, Model
from golden.circuit_coders import DICTIONARIES, TARGETS, circuit_coders, circuit_model
from reference_graph import FROZEN, clean, reference_graph, target_values
from tiny import tiny, tiny_model

GOLDEN = Path(__file__).parent.parent / "golden" / "circuit_tracer.npz"


@pytest.mark.parametrize(("name", "kind"), list(zip(PRESETS, (*KINDS, "affine"))))
def test_sources_add_up(name, kind):
    """To the logits of the model itself, and to the activations of the features."""
    model = tiny_model(PRESETS[name])
    graph = gs.attribute(model, coders_of(kind, 8), IDS)
    n, logits = graph.selected, np.asarray(gs.run(model, IDS[None]).logits)[0, -1]
    assert n > 500 and (graph.rest == 0).all()
    near(sums(graph)[n:], logits[graph.targets.feature[n:]] - logits.mean())
    near(sums(graph)[:n], graph.sources.activation[:n])
    near(graph.value, sums(graph))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_differentiating_the_model(model, kind):
    coders = coders_of(kind)
    want = reference_graph(model, coders, IDS)
    got = gs.attribute(model, coders, IDS, max_n_logits=5, desired_logit_prob=1.0)
    assert key(got.targets) == key(want.targets)
    order = {k: i for i, k in enumerate(key(got.sources))}
    columns = [order[k] for k in key(want.sources)]
    near(got.effects[:, columns], want.effects)
    others = np.delete(got.effects, columns, 1)  # errors where coders do not act
    assert others.shape[1] == model.config.layers and (others == 0).all()
    near(got.bias, want.bias)
    near(got.value, want.value)
    near(got.weights, want.weights)


@pytest.mark.usefixtures("cut_short")
def test_rows_that_end_early_run_without_later_tokens(model, monkeypatch):
    given = model, coders_of("affine"), IDS
    got = gs.attribute(*given, max_candidates=60)
    monkeypatch.setattr(linear, "prefixes", lambda size: (size,))
    want = gs.attribute(*given, max_candidates=60)
    near(got.effects, want.effects, 1e-6)
    near(got.bias, want.bias, 1e-6)
    near(got.rest, want.rest, 1e-6)
    assert np.abs(got.rest).max() > 1e-3


@pytest.mark.parametrize("name", DICTIONARIES)
def test_equals_circuit_tracer(name):
    with np.load(GOLDEN) as file:
        want = {k.removeprefix(f"{name}/"): file[k] for k in file.files if k.startswith(f"{name}/")}
    config, params, ids = circuit_model()
    model, coders = Model(params, config), circuit_coders(name)
    graph = gs.attribute(model, coders, ids)
    n, k, T = graph.selected, len(want["logits"]), ids.shape[1]
    columns = (graph.sources.layer, graph.sources.position, graph.sources.feature)
    assert np.array_equal(np.stack(columns, 1)[:n], want["active"])
    near(graph.sources.activation[:n], want["activations"])
    assert graph.targets.feature[n:].tolist() == want["logits"].tolist()
    near(graph.weights[n:], want["probabilities"])
    nodes = len(graph.sources)
    peer = want["adjacency"][np.r_[:n, nodes : nodes + k]][:, :nodes]
    peer[:, -T:] *= config.d_model**0.5  # it forgets the factor of Gemma's embedding
    near(graph.effects, peer)

    some = gs.attribute(
        model, coders, ids, max_feature_nodes=n // 3, batch_size=4, update_interval=2
    )
    chosen = [graph.sources[i] for i in want["scaled/selected"]]
    assert key(some.sources, some.selected) == [key(node)[0] for node in chosen]
    near(sums(some), some.value)
    rows = np.r_[want["scaled/selected"], n:nodes]
    near(some.effects, graph.effects[np.r_[want["scaled/selected"], n : n + k]][:, rows])

    named = gs.attribute(model, coders, ids, list(TARGETS))
    assert named.targets.feature[n:].tolist() == want["named"].tolist()
    near(named.weights[n:], want["named_probabilities"])


def test_second_derivatives_vanish(model):
    """The freezes leave a linear model: its targets have no curvature in embeddings and outputs."""
    coders, T = coders_of("affine"), len(IDS)
    c = clean(model, coders, IDS)
    tokens, features = np.array([7, 9], np.int32), np.array([[3, 5, 2], [2, 9, 1]], np.int32)
    leaves = {"features": c.features, "errors": c.errors, "embed": c.embed}
    rng = np.random.default_rng(0)
    push = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), leaves)

    def total(leaves):
        return (target_values(model, coders, IDS, c, leaves, features, tokens)).sum()

    derivatives = lambda leaves, push: jax.jvp(jax.grad(total), (leaves,), (push,))
    slope, bend = jax.jit(derivatives)(leaves, push)
    size = lambda tree: max(np.abs(x).max() for x in jax.tree.leaves(tree))
    assert size(bend) <= 1e-5 * size(slope) and len(c.embed) == T
    c.frozen = {name: a for name, a in c.frozen.items() if name != FROZEN[0]}
    bend = jax.jit(lambda *given: derivatives(*given)[1])(leaves, push)
    assert size(bend) > 1e-3 * size(slope)


@pytest.mark.parametrize("length", [100])
def test_long_prompts_run_in_chunks(length):
    assert chunk_of(room_for(length)) < length
    config = dataclasses.replace(tiny(PRESETS["gemma-3-4b"]), context=256)
    model = Model(tiny_model(PRESETS["gemma-3-4b"]).params, config)
    coders, rng = coders_of("affine", 8, 6), np.random.default_rng(1)
    ids = np.concatenate([[2], rng.integers(3, 300, length - 1)]).astype(np.int32)
    got = gs.attribute(model, coders, ids, max_feature_nodes=40, desired_logit_prob=0.1)
    features = np.stack([got.sources.layer, got.sources.position, got.sources.feature], 1)
    want = reference_graph(model, coders, ids, features=features[: got.selected], logits=10)
    order = {k: i for i, k in enumerate(key(want.sources))}
    rows = {k: i for i, k in enumerate(key(want.targets))}
    near(sums(got), got.value)
    columns = [i for i, k in enumerate(key(got.sources)) if k in order]
    some = want.effects[[rows[k] for k in key(got.targets)]]
    near(got.effects[:, columns], some[:, [order[key(got.sources)[i]] for i in columns]])


def test_targets_are_linear(model):
    coders, T = coders_of("affine"), gs.Target
    a, b, f = T.logit(7), T.logit(9, position=4), T.feature(2, 5, position=6)
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    given = [a, b, f, a - b, 0.5 * (b + f), sum([a, b, f]) / 3, T.direction(vector, 1, position=3)]
    graph = gs.attribute(model, coders, IDS, given, max_feature_nodes=1)
    n = graph.selected
    rows, values = graph.effects[n:], graph.value[n:]
    near(rows[3], rows[0] - rows[1])
    near(rows[4], (rows[1] + rows[2]) / 2)
    near(rows[5], rows[:3].mean(0))
    near(values[3:6], [values[0] - values[1], (values[1] + values[2]) / 2, values[:3].mean()])
    reads = gs.run(model, IDS[None], [gs.capture("resid_post", 1), gs.capture("mlp_in", 2)]).reads
    near(values[6], vector @ reads["resid_post"][0, 3])
    near(values[2], np.asarray(coders.at(2).pre_activations(reads["mlp_in"][0]))[6, 5])
    near(sums(graph)[n:], values)
    assert graph.targets.kind[n:].tolist() == ["logit", "logit", "feature"] + ["direction"] * 4
    assert graph.targets.label[-1] == "direction" and graph.weights[n + 3] == 1.0


def test_a_graph_of_numpy_numbers_can_be_saved(model, tmp_path):
    """Layers and features as a graph's own tables give them; labels say what is subtracted."""
    layer, feature = np.int32(2), np.int32(5)
    one, two = gs.Target.feature(layer, feature), gs.Target.logit(np.int32(7))
    target = two - (one - 2 * gs.Target.logit(9))
    assert target.label == "7 - (feature 2/5 - 2 9)"
    graph = gs.attribute(model, coders_of("plain"), IDS, target, max_feature_nodes=5)
    graph.save(tmp_path / "graph.npz")
    assert gs.load_graph(tmp_path / "graph.npz").about["targets"] == graph.about["targets"]


def test_more_rows_than_the_machine_holds_are_refused(model, monkeypatch):
    monkeypatch.setattr(attribution_module.os, "sysconf", lambda name: 1000)
    with pytest.raises(gs.InputError, match="give max_feature_nodes"):
        gs.attribute(model, coders_of("plain"), IDS)
    assert gs.attribute(model, coders_of("plain"), IDS, max_feature_nodes=5).selected == 5


@pytest.mark.usefixtures("cut_short")
def test_another_prompt_compiles_nothing(model, caplog):
    coders = coders_of("affine")
    gs.attribute(model, coders, IDS)
    with jax.log_compiles():
        caplog.clear()
        graph = gs.attribute(model, coders, np.concatenate([IDS[:5], IDS[3:10]]))
    assert graph.selected and not [r for r in caplog.records if "Compiling" in r.message]


def test_batches_and_ids_may_have_any_form(model):
    coders = coders_of("plain")
    one = gs.attribute(model, coders, IDS)
    for ids in (IDS.tolist(), IDS[None], jnp.asarray(IDS)):
        other = gs.attribute(model, list(coders), ids, batch_size=7)
        assert np.array_equal(one.effects, other.effects)


def test_start_of_a_chat_has_no_features(model):
    coders = gs.CoderSet(c.replace(first=4) for c in coders_of("affine"))
    graph = gs.attribute(model, coders, IDS)
    assert graph.sources.position[: graph.selected].min() == 4
    errors = graph.sources.kind == "error"
    assert (graph.effects[:, errors & (graph.sources.position < 4)] == 0).all()
    near(sums(graph), graph.value)


BAD = {
    "no <bos> twice": (lambda m, c: gs.attribute(m, c, [2, 2, 5]), "two <bos>"),
    "empty": (lambda m, c: gs.attribute(m, c, []), "one prompt"),
    "text": (lambda m, c: gs.attribute(m, c, "hello"), "not text"),
    "several prompts": (lambda m, c: gs.attribute(m, c, [[2, 3], [2, 4]]), "one prompt"),
    "outside": (lambda m, c: gs.attribute(m, c, [2, 300]), "outside"),
    "too long": (lambda m, c: gs.attribute(m, c, [2] + [5] * 64), "context"),
    "missing layer": (lambda m, c: gs.attribute(m, c[:3], IDS), "no transcoder for layer 3"),
    "two for a layer": (lambda m, c: gs.attribute(m, [*c, c[0]], IDS), "layer 0: 2 coders"),
    "another model": (
        lambda m, c: gs.attribute(m, coders_of("plain", d=16), IDS), "it is for another model",
    ),
    "an SAE": (lambda m, c: gs.attribute(m, random_coder(), IDS), "mlp_in"),
    "no budget": (lambda m, c: gs.attribute(m, c, IDS, max_feature_nodes=0), "max_feature_nodes"),
    "no logits": (lambda m, c: gs.attribute(m, c, IDS, max_n_logits=0), "max_n_logits"),
    "no share": (lambda m, c: gs.attribute(m, c, IDS, desired_logit_prob=1.5), "share"),
    "target": (lambda m, c: gs.attribute(m, c, IDS, [300]), "outside the vocabulary"),
    "a target less itself": (
        lambda m, c: gs.attribute(m, c, IDS, 2 * gs.Target.logit(7) - gs.Target.logit(7) / 0.5),
        "is always 0: its terms cancel",
    ),
    "a target twice": (lambda m, c: gs.attribute(m, c, IDS, [7, 7]), "7 is given twice"),
    "no targets": (lambda m, c: gs.attribute(m, c, IDS, []), "no targets"),
    "text target": (lambda m, c: gs.attribute(m, c, IDS, " Austin"), "tokenizer"),
    "position": (lambda m, c: gs.attribute(m, c, IDS, gs.Target.logit(3, 11)), "11 tokens"),
    "layer": (lambda m, c: gs.attribute(m, c, IDS, gs.Target.feature(4, 0)), "layers 0 to 3"),
    "feature": (lambda m, c: gs.attribute(m, c, IDS, gs.Target.feature(1, 24)), "0 to 23"),
    "direction": (
        lambda m, c: gs.attribute(m, c, IDS, gs.Target.direction([1.0], 1)), "32 numbers",
    ),
    "weight": (lambda m, c: gs.attribute(m, c, IDS, gs.Target.logit(3, weight=0)), "positive"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(model, what):
    call, message = BAD[what]
    with pytest.raises(gs.InputError, match=message) as error:
        call(model, coders_of("plain"))
    assert "\n" not in str(error.value)
