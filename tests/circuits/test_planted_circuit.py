"""A circuit that is known since it was planted: which graphs find it, and what tells them apart.

The transcoders are the model's own neurons. The cross-layer transcoder gives the same outputs with
fewer features, and its graph leaves out a step that the model takes.
"""

import numpy as np
import pytest

import gemma_scope_jax as gs
from planted_circuit import (
    CONFIG,
    DECOY,
    F1,
    F2,
    IDS,
    LATE_DECOY,
    MESSAGE,
    A,
    B,
    cross_layer,
    planted,
    planted_model,
    transcoders,
)

LAST = len(IDS) - 1
CIRCUIT = planted(LAST)
CODERS = {"transcoders": transcoders(), "clt": gs.CoderSet([cross_layer()])}


@pytest.fixture(scope="module")
def toy():
    return planted_model()


@pytest.fixture(scope="module")
def found(toy):
    """The graphs of B's logit, by the coders' name."""
    return {name: gs.attribute(toy, coders, IDS, [B]) for name, coders in CODERS.items()}


def test_both_coders_write_what_the_mlps_write(toy):
    """On any prompt of the toy's tokens, A any number of times; the CLT with fewer features."""
    rng = np.random.default_rng(1)
    ids = rng.integers(100, CONFIG.vocab, (16, 6)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.3] = A
    ids[:, 0] = 2
    reads = gs.run(toy, ids, [gs.capture("mlp_in"), gs.capture("mlp_out")]).reads
    x, y = (np.asarray(reads[site])[:, :, 1:] for site in ("mlp_in", "mlp_out"))
    own = np.stack([np.asarray(c.encode(x[l])) for l, c in enumerate(CODERS["transcoders"])])
    across = np.asarray(cross_layer().encode(x))
    rows = [c.decode(own[l]) for l, c in enumerate(CODERS["transcoders"])]
    assert (np.abs(y).max((1, 2, 3)) > 1).tolist() == [False, True, False, True]
    for wrote in (np.stack(rows), np.asarray(cross_layer().decode(across))):
        np.testing.assert_allclose(wrote, y, rtol=0, atol=2e-5 * np.abs(y).max())
    assert not across[3].any() and (own[3] > 0).sum() == 2 * (own[1, ..., F1[1]] > 0).sum() > 0


def test_transcoders_find_both_hops_and_nothing_else(found):
    graph = found["transcoders"]
    one, two, decoy, late = (place(graph, node) for node in (F1, F2, DECOY, LATE_DECOY))
    assert graph.scores().replacement > 0.9999 and graph.scores().completeness > 0.9999
    assert np.abs(graph.effects[:, graph.sources.kind == "error"]).max() < 1e-5
    token = graph.selected + CONFIG.layers * len(IDS) + 2
    for row, column, effect in (
        (one, token, CIRCUIT["f1"]),
        (two, one, CIRCUIT["f2"]),
        (graph.selected, two, CIRCUIT["logit"]),
    ):
        assert graph.effects[row, column] == pytest.approx(effect, rel=1e-4)
    best, *others = gs.strongest_paths(graph, 5)
    assert steps(best) == [("token", A), F1, F2]
    assert best.effect == pytest.approx(CIRCUIT["logit"], rel=1e-4)
    assert best.share > 0.99 and sum(path.share for path in others) < 0.01

    # they fire, f1 drives one of them, and no part of the answer comes from either
    assert graph.sources.activation[[decoy, late]].min() > CIRCUIT["f1"]
    assert graph.effects[late, one] > CIRCUIT["f2"]
    assert graph.influence()[[decoy, late]].tolist() == [0, 0]
    kept = graph.prune()
    features = kept.sources[: kept.selected]
    assert list(zip(features.layer, features.feature)) == [F1, F2]
    assert features.position.tolist() == [LAST, LAST] and np.count_nonzero(kept.effects) == 3


def test_the_cross_layer_transcoder_has_one_hop(found):
    """As perfect by every score, as much from A to B, and one step of the model is not in it."""
    graph = found["clt"]
    assert graph.scores().replacement > 0.9999 and graph.scores().completeness > 0.9999
    assert np.abs(graph.effects[:, graph.sources.kind == "error"]).max() < 1e-5
    best, *_ = gs.strongest_paths(graph, 5)
    assert steps(best) == [("token", A), F1] and best.share > 0.99
    assert best.effect == pytest.approx(CIRCUIT["logit"], rel=1e-4)
    assert not (graph.sources.layer[: graph.selected] == 3).any()

    overlap = gs.graph_overlap(found["transcoders"], graph)
    np.testing.assert_allclose(*overlap.effects, rtol=1e-4, atol=1e-6)
    assert overlap.common_routes > 0.9999
    middle = overlap.places[:, F2[0], LAST]
    np.testing.assert_allclose(middle, [0.5, 0], atol=1e-3)


def test_edits_of_the_model_side_with_the_transcoders(toy, found):
    """Taken out of the residual stream between the layers, what f1 wrote no longer raises B: so
    the transcoders' graph, where f1 has no other way. In the CLT's graph it makes no difference,
    because f1 itself writes the answer."""
    message = np.zeros(CONFIG.d_model, np.float32)
    message[MESSAGE] = CIRCUIT["message"]
    unembed = np.asarray(toy.params.unembedding)
    logit = lambda row: row[B] - row.mean()
    edits = {
        "nothing": [],
        "message": [gs.steer("resid_pre", 2, -message, positions=[LAST])],
        "mlp": [gs.patch("mlp_out", 3, 0.0, positions=[LAST])],
    }
    runs = {k: np.asarray(gs.run(toy, IDS[None], e).logits[0, -1]) for k, e in edits.items()}
    changes = {k: logit(runs[k]) - logit(runs["nothing"]) for k in ("message", "mlp")}

    graph = found["transcoders"]
    one, two = place(graph, F1), place(graph, F2)
    through = graph.effects[two, one] / graph.value[two] * graph.effects[-1, two]
    assert graph.effects[-1, one] == pytest.approx(0, abs=1e-6)
    assert changes["message"] == pytest.approx(-through, rel=1e-4)
    assert changes["mlp"] == pytest.approx(-of_layer(graph, 3), rel=1e-4)

    graph = found["clt"]
    coder = CODERS["clt"].at(F1[0])
    own = CIRCUIT["f1"] * np.asarray(coder.decoder(1, 1))[F1[1]]
    np.testing.assert_allclose(own, message, rtol=1e-5)  # the same, by its own decoder
    assert own @ (unembed[B] - unembed.mean(0)) == pytest.approx(0, abs=1e-6)
    assert of_layer(graph, 3) == 0 and of_layer(graph, 1) == pytest.approx(-changes["mlp"], 1e-4)


def test_validation_tells_without_knowing_the_circuit(toy, found):
    """Ablated in the real model, the CLT's f1 takes the answer away twice: in layer 3, where it
    writes it, and in layer 1, from where the model's own f2 would have it."""
    slopes = {}
    for name, graph in found.items():
        figures = graph.validate(toy, CODERS[name], top=4, modes=("nothing",)).agreements
        (slopes[name],) = (a.slope for a in figures if a.targets == "final" and not a.control)
    assert slopes["transcoders"] == pytest.approx(1, abs=1e-3)
    assert slopes["clt"] == pytest.approx(2, abs=1e-3)


# --- Nodes ---------------------------------------------------------------------------------------


def place(graph, node):
    """The row of a feature (layer, number) at the last token, which is its column, too."""
    nodes = graph.sources[: graph.selected]
    mine = (nodes.layer == node[0]) & (nodes.feature == node[1]) & (nodes.position == LAST)
    return int(np.flatnonzero(mine)[0])


def of_layer(graph, layer):
    """The direct effect of a layer's features at the last token on B."""
    nodes = graph.sources[: graph.selected]
    mine = (nodes.layer == layer) & (nodes.position == LAST)
    return float(graph.effects[-1, : graph.selected][mine].sum())


def steps(path):
    """[("token", id), (layer, feature), ...]"""
    nodes = zip(path.nodes.kind, path.nodes.layer, path.nodes.feature)
    return [(str(k) if k == "token" else int(layer), int(f)) for k, layer, f in nodes]
