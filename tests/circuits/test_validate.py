"""What a graph predicts against what the model does: exact where it must be, and told apart."""

import dataclasses
import json
import re

import numpy as np
import pytest

import gemma_scope_jax as gs
from circuit_sets import IDS, MLP, SETS, features_of
from coders import random_coder
from gemma_scope_jax.circuits.validate import FIGURES, LEGEND, agreement, total_ablation
from gemma_scope_jax.errors import InputError
from reference_graph import reference_graph

kinds = pytest.mark.parametrize("kind", ["affine", "clt"])


@kinds
def test_direct_effects_are_exact_and_random_directions_are_not(model, graphs, kind):
    graph = graphs(kind)
    modes = ("direct", "replacement", "attention", "nothing")
    found = graph.validate(model, SETS[kind], top=20, modes=modes, seed=0)
    figures = {(a.freeze, a.targets, a.control): a for a in found.agreements}
    assert len(figures) == 16 and all(a.n > 90 for a in found.agreements)
    for targets in ("final", "features"):
        direct, random = (figures["direct", targets, c] for c in (False, True))
        assert direct.spearman > 0.9999 and direct.r2 > 0.999999 and direct.sign > 0.999
        assert abs(direct.slope - 1) < 1e-4
        assert abs(random.spearman) < 0.4 and random.r2 < 0 and 0.3 < random.sign < 0.7
        assert 0.5 < random.size / direct.size < 2
        replaced, real = (figures[m, targets, False] for m in ("replacement", "nothing"))
        assert replaced.spearman > 0.9 and replaced.spearman > real.spearman > 0.2
    predicted, measured, control = found.changes["direct"]
    assert predicted.shape == (20, 5)
    np.testing.assert_allclose(measured, predicted, atol=5e-6)
    assert np.abs(control - predicted).max() > 0.1
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["frozen", "targets", "written", "n"]
    own, other = (figures["nothing", "final", c] for c in (False, True))
    assert lines[17:-1] == LEGEND.splitlines()
    assert f"correlation of {own.spearman:.2f} (control: {other.spearman:.2f})" in lines[-1]
    assert f"by {own.slope:.2f} times as much as predicted" in lines[-1]
    told = json.loads(json.dumps(found.as_dict()))
    assert told["ablated"] == 20 and told["figures"][0]["n"] == 100


@kinds
def test_total_effects_are_the_replacement_models_derivative(model, graphs, kind):
    """Features are made a hundredth smaller: few thresholds are crossed, and the rest is linear."""
    graph = graphs(kind)
    n, features = graph.selected, features_of(graph)
    which = np.argsort(-graph.influence()[:n])[:24]
    sets = [[gs.Intervention(*features[s].tolist(), 0.99, relative=True)] for s in which]
    options = {"read": features, "tokens": graph.targets.feature[n:], "freeze": "replacement"}
    found = gs.intervene(model, SETS[kind], IDS, sets, **options)
    logits = (found.token_logits - found.clean.token_logits) * 100
    pre = (found.pre_activations - found.clean.pre_activations) * 100
    wanted, direct = total_ablation(graph, which), -graph.effects[:, which].T
    close = np.abs(np.concatenate([pre, logits], 1) - wanted) < 2e-3
    assert close.mean() > 0.99 and np.abs(wanted - direct).max() > 0.1


@kinds
def test_what_attribute_was_asked_about(model, kind):
    """Logits after any token, features and differences are measured; a direction cannot be."""
    coders = SETS[kind]
    asked = [gs.Target.logit(7, position=4, weight=9.0), gs.Target.feature(3, 5, position=6)]
    asked += [gs.Target.logit(3) - gs.Target.logit(4), gs.Target.direction(np.ones(32), 2)]
    graph = gs.attribute(model, coders, IDS, asked, max_feature_nodes=60)
    found = graph.validate(model, coders, top=12, modes=("direct",))
    assert found.final.kind.tolist() == ["logit", "feature", "direction"]
    assert found.agreements[0].r2 > 0.99999 and found.agreements[1].r2 > 0.99999
    predicted, measured, _ = found.changes["direct"]
    np.testing.assert_allclose(measured, predicted, atol=5e-6)
    assert np.abs(predicted).max(0).min() > 1e-3
    only = gs.attribute(model, coders, IDS, asked[3:], max_feature_nodes=10)
    with pytest.raises(InputError, match="keeps no vectors of directions"):
        only.validate(model, coders)


def test_a_clt_with_its_decoder_on_disk(model, graphs, tmp_path):
    gs.save_coder(SETS["clt"][0], tmp_path / "clt")
    coders = gs.load_coder(tmp_path / "clt", decoder=False)
    options = {"top": 4, "modes": ("direct",)}
    found = graphs("clt").validate(model, coders, **options)
    wanted = graphs("clt").validate(model, SETS["clt"], **options)
    np.testing.assert_allclose(found.changes["direct"], wanted.changes["direct"], atol=1e-6)


def test_a_graph_of_viewers_knows_its_coders_by_activations(model, graphs, tmp_path):
    """The JSON holds no pre-activations; those of active features are their activations."""
    graphs("affine").save(tmp_path / "graph.json")
    graph = gs.load_graph(tmp_path / "graph.json")
    assert np.isnan(graph.value).all() and (graph.ids >= 0).all()
    options = {"top": 4, "modes": ("direct",)}
    assert graph.validate(model, SETS["affine"], **options).agreements[0].r2 > 0.9999
    others = [random_coder(24 + i, layer=i, seed=9 + i, first=2, **MLP) for i in range(4)]
    with pytest.raises(InputError, match="other pre-activations"):
        graph.validate(model, others, **options)
    active = graph.sources.activation.copy()
    active[3] = np.nan
    sources = dataclasses.replace(graph.sources, activation=active)
    with pytest.raises(InputError, match="1 of the graph's features have no activation"):
        dataclasses.replace(graph, sources=sources).validate(model, SETS["affine"], **options)


def test_rows_are_the_printed_table(model, graphs):
    found = graphs("affine").validate(model, SETS["affine"], top=2, modes=("direct",))
    rows = found.rows()
    assert rows[0] == ["frozen", "targets", "written", "n", *FIGURES] and len(rows) == 5
    assert rows[1][:4] == ["direct", "final", "its own", "10"] and rows[3][2] == "another"
    lines = str(found).splitlines()
    assert [re.split(r" {2,}", line.strip()) for line in lines[:5]] == rows
    assert lines[5:] == LEGEND.splitlines()  # the model without anything frozen was not measured


def test_figures_of_two_arrays():
    p = np.array([1.0, -2.0, 3.0, 0.0, 0.5])
    same = agreement(p, 2 * p, "direct", "final", False)
    assert (same.n, same.spearman, same.sign, same.slope) == (5, pytest.approx(1), 1.0, 2.0)
    assert same.r2 == pytest.approx(1 - np.square(p).sum() / np.square(2 * p - 1).sum(), abs=1e-6)
    assert agreement(p, -p, "direct", "final", False).sign == 0
    none = agreement(np.zeros(3), np.ones(3), "direct", "final", False)
    assert np.isnan([none.spearman, none.r2, none.sign, none.slope]).all() and none.size == 1
    empty = agreement(np.zeros(0), np.zeros(0), "direct", "final", False)
    assert empty.n == 0 and np.isnan(empty.size)


def test_a_graph_of_something_else_is_one_line(model, graphs):
    graph = graphs("clt")
    with pytest.raises(InputError, match="other pre-activations"):
        graph.validate(model, [random_coder(24, layers=(0, 1, 2, 3), seed=9, **MLP)])
    with pytest.raises(InputError, match="top must be at least 1"):
        graph.validate(model, SETS["clt"], top=0)
    bare = reference_graph(model, SETS["clt"], IDS, features=np.zeros((0, 3), np.int32))
    with pytest.raises(InputError, match="this one has none"):
        bare.validate(model, SETS["clt"])


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_and_the_packaged_transcoders():
    """Edges of the real 270M, of `attribute` and by brute force, against finite interventions."""
    model = gs.load_model("gemma-3-270m", dtype="float32")
    coders = gs.load_coders("gemma-3-270m-transcoder-*-width-1k-l0-20-affine")
    ids = gs.load_tokenizer("gemma-3-270m").encode("The capital of France is")
    graph = gs.attribute(model, coders, ids, max_n_logits=5, max_feature_nodes=200)
    slow = reference_graph(model, coders, ids, features=features_of(graph))
    for one in (graph, slow):
        found = one.validate(model, coders, top=16, batch=9)
        assert found.agreements[0].r2 > 0.9999 and found.agreements[0].spearman > 0.999
        predicted, measured, _ = found.changes["direct"]
        np.testing.assert_allclose(measured, predicted, atol=1e-4 * np.abs(predicted).max())
        assert all(a.n >= 80 for a in found.agreements)
