"""Attention scores by pairs of sources: they add up to the model's own, and equal brute force."""

import jax
import numpy as np
import pytest

import gemma_scope_jax as gs
from attribution import IDS, KINDS, coders_of, key, near
from gemma_scope_jax.circuits.head_scores import largest_products
from gemma_scope_jax.model.block import rope_tables, rotate
from gemma_scope_jax.model.config import PRESETS, Model
from tiny import tiny_model

EVERY = 10**6
ALL = {"most_pairs": EVERY}


def close(got, want, size):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * size)


def adds_up(found, most=EVERY, latest=None):
    """To the score: all pairs and what has a constant; each side's parts and its constant."""
    size = max(1, abs(found.score), np.abs(found.query_part).sum(), np.abs(found.key_part).sum())
    close(found.pairs_total + found.remainder, found.score, size)
    close(found.query_part.sum() + found.query_constant, found.score, size)
    close(found.key_part.sum() + found.key_constant, found.score, size)
    assert (np.diff(np.abs(found.pair_values)) <= 0).all()
    if len(found.pairs) < most:
        close(found.pair_values.sum(dtype=np.float64), found.pairs_total, size)
    for side, end in enumerate((found.query, latest or found.key)):
        nodes = found.sources[found.pairs[:, side]]
        assert (nodes.position <= end).all() and (nodes.layer < found.layer).all()


@pytest.mark.parametrize(("name", "kind"), list(zip(PRESETS, (*KINDS, "affine"))))
def test_pairs_add_up_to_the_score(name, kind):
    """Of the model itself; in local and global layers, and in layer 0, where tokens are all."""
    model, coders = tiny_model(PRESETS[name]), coders_of(kind, 8)
    reads = gs.run(model, IDS[None], [gs.capture(s) for s in ("q", "k", "attn_pattern")]).reads
    group = model.config.heads // model.config.kv_heads
    for layer, head, query, at in ((0, 0, 10, 6), (3, 2, 8, 5), (5, 3, 10, 0), (7, 1, -1, None)):
        found = gs.head_score(model, coders, IDS, layer, head, query=query, key=at, **ALL)
        adds_up(found)
        q = reads["q"][layer, 0, query, head]
        want = float(q @ reads["k"][layer, 0, found.key, head // group])
        close(found.score, want * model.config.query_scale, max(1, abs(want)))
        pattern = reads["attn_pattern"][layer, 0, head, query]
        close(found.attention, pattern[found.key], 1)
        if at is None:
            assert found.key == int(np.argmax(pattern)) and found.query == len(IDS) - 1
    first = gs.head_score(model, coders, IDS, 0, 0, query=9, key=4)
    assert key(first.sources) == [("token", -1, t, int(IDS[t])) for t in (4, 9)]
    assert first.pairs.tolist() == [[1, 0]] and first.remainder == 0


@pytest.mark.parametrize("kind", KINDS)
def test_equals_products_of_residual_parts(model, kind):
    """Each source's part of the residual stream, as `attribute` finds it, through W_q and W_k."""
    coders, c = coders_of(kind), model.config
    layer, head, query, at = 3, 2, 9, 5
    group, b = c.heads // c.kv_heads, model.params.blocks
    axes = np.eye(c.d_model, dtype=np.float32)
    wanted = [gs.Target.direction(a, layer - 1, p) for p in (query, at) for a in axes]
    graph = gs.attribute(model, coders, IDS, wanted)
    parts = graph.effects[graph.selected :].reshape(2, c.d_model, -1)
    sites = ("resid_pre", "pre_attn_scale")
    reads = gs.run(model, IDS[None], [gs.capture(site, layer) for site in sites]).reads
    x, scale = np.asarray(reads["resid_pre"][0]), np.asarray(reads["pre_attn_scale"][0])
    tables = rope_tables(
        np.arange(len(IDS), dtype=np.int32)[None], c.head_dim, c.local_rope_base, 1.0
    )
    gain = 1.0 + np.asarray(b.pre_attn_norm[layer])
    sides = []
    for part, token, w, norm in (
        (parts[0], query, b.w_q[layer, :, head], b.q_norm[layer]),
        (parts[1], at, b.w_k[layer, :, head // group], b.k_norm[layer]),
    ):
        whole, each = (scale[token] * r * gain @ np.asarray(w) for r in (x[token], part.T))
        rms = np.sqrt(np.mean(whole**2) + c.norm_epsilon)
        flat = each / rms * (1.0 + np.asarray(norm))
        cos, sin = (t[:, token : token + 1] for t in tables)
        sides.append(np.asarray(rotate(flat[None, None], cos, sin))[0, 0])
    want = c.query_scale * sides[0] @ sides[1].T
    found = gs.head_score(model, coders, IDS, layer, head, query=query, key=at, **ALL)
    place = {k: i for i, k in enumerate(key(graph.sources))}
    columns = np.array([place[k] for k in key(found.sources)])
    got = np.zeros_like(want)
    got[columns[found.pairs[:, 0]], columns[found.pairs[:, 1]]] = found.pair_values
    near(got, want)


def test_a_score_against_others(model):
    where = model, coders_of("affine"), IDS, 3, 2
    one = {k: gs.head_score(*where, query=7, key=k, **ALL) for k in range(8)}
    pattern = np.array([one[k].attention for k in range(8)])
    scores = np.array([one[k].score for k in range(8)])
    close(pattern.sum(), 1, 1)
    close(np.log(pattern[5] / pattern[2]), scores[5] - scores[2], 1)
    for against, want in (
        (2, scores[2]),
        ([1, 2, -8], scores[1:4].mean()),
        ("mean", pattern @ scores),
    ):
        found = gs.head_score(*where, query=7, key=5, against=against, **ALL)
        adds_up(found, latest=7)
        close(found.score, scores[5] - want, np.abs(scores).max())
    # and so is every pair
    found = gs.head_score(*where, query=7, key=5, against=2, **ALL)

    def pairs(of, sign):
        names = key(of.sources)
        return {
            (names[a], names[b]): sign * v
            for (a, b), v in zip(of.pairs.tolist(), of.pair_values.tolist())
        }

    left, right, both = pairs(one[5], 1.0), pairs(one[2], -1.0), pairs(found, 1.0)
    names = sorted({*left, *right, *both})
    want = [left.get(n, 0.0) + right.get(n, 0.0) for n in names]
    near(np.array([both.get(n, 0.0) for n in names]), np.array(want), 1e-4)


def test_fewer_candidates_leave_the_score_whole(model):
    where = model, coders_of("clt"), IDS, 3, 1
    every = gs.head_score(*where, query=10, key=4, **ALL)
    some = gs.head_score(*where, query=10, key=4, max_candidates=30, **ALL)
    adds_up(some)
    features = lambda found: {k for k in key(found.sources) if k[0] == "feature"}
    assert len(features(some)) <= 30 < len(features(every))
    assert features(some) < features(every)
    close(some.score, every.score, 1)


@pytest.mark.parametrize("most", [1, 7, 300, 10**6])
def test_largest_products(most, monkeypatch):
    monkeypatch.setattr("gemma_scope_jax.circuits.head_scores.PAIRS", 8)
    rng = np.random.default_rng(most)
    a, b = (rng.standard_normal((5, n)) * rng.lognormal(0, 2, n) for n in (37, 23))
    places, values = largest_products(*(x.astype(np.float32) for x in (a, b)), most)
    want = a.T @ b
    order = np.argsort(-np.abs(want).reshape(-1))[:most]
    np.testing.assert_allclose(values, want.reshape(-1)[order], rtol=1e-4, atol=1e-6)
    near(want[tuple(places.T)], values)
    nothing = largest_products(np.zeros((5, 0), np.float32), np.ones((5, 3), np.float32), most)
    assert [len(part) for part in nothing] == [0, 0]


def test_pairs_of_neurons_add_up(model):
    found = gs.head_score(model, None, IDS, 3, 2, query=9, key=5, max_candidates=200, **ALL)
    adds_up(found)
    assert "neuron" in found.sources.kind
    close(found.score, gs.head_score(model, coders_of("plain"), IDS, 3, 2, query=9, key=5).score, 1)


def test_a_mesh_gives_the_same(model):
    placed = jax.device_put(model.params, gs.param_shardings(model.config, gs.make_mesh(2, 2)))
    of = lambda m: gs.head_score(m, coders_of("clt"), IDS, 3, 2, query=9, key=5, **ALL)
    found, want = of(Model(placed, model.config)), of(model)
    assert key(found.sources) == key(want.sources)
    close([found.score, found.pairs_total], [want.score, want.pairs_total], 10)
    near(found.query_part, want.query_part)
    near(found.key_part, want.key_part)


def test_other_scores_compile_nothing(model, caplog):
    coders = coders_of("affine")
    gs.head_score(model, coders, IDS, 2, 1, query=7, key=3)
    with jax.log_compiles():
        caplog.clear()
        gs.head_score(model, coders, np.concatenate([IDS[:5], IDS[3:9]]), 3, 0, query=9, key=5)
    assert not [r for r in caplog.records if "Compiling" in r.message]


BAD = {
    "layer": (dict(layer=4), "layers 0 to 3"),
    "head": (dict(head=4), "heads 0 to 3"),
    "no head": (dict(head=-1), "heads 0 to 3"),
    "no number": (dict(layer=1.5), "whole number"),
    "query": (dict(query=11), "11 tokens"),
    "key": (dict(key=-12), "11 tokens"),
    "later key": (dict(query=4, key=5), "comes after query 4"),
    "out of reach": (dict(query=10, key=1), "layer 2 sees 8 tokens"),
    "against a later key": (dict(query=4, key=2, against=6), "comes after"),
    "against text": (dict(against="most"), "'mean'"),
    "against nothing": (dict(against=()), "no token"),
    "no pairs": (dict(most_pairs=0), "most_pairs"),
    "no candidates": (dict(max_candidates=0), "max_candidates"),
    "text": (dict(ids="hello"), "not text"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(model, what):
    changed, message = BAD[what]
    given = {"ids": IDS, "layer": 2, "head": 1} | changed
    with pytest.raises(gs.InputError, match=message) as error:
        gs.head_score(model, coders_of("plain"), **given)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_real_model():
    """The packaged transcoders on the real 270M."""
    model, tok = gs.load_model("gemma-3-270m", dtype="float32"), gs.load_tokenizer("gemma-3-270m")
    coders = gs.load_coders("gemma-3-270m-transcoder-*")
    ids = tok.encode("The capital of France is")
    reads = gs.run(model, ids[None], [gs.capture("q"), gs.capture("k")]).reads
    for layer, head, at in ((5, 1, None), (14, 3, 4)):
        found = gs.head_score(model, coders, ids, layer, head, key=at, tokenizer=tok)
        adds_up(found, 50)
        q, k = (np.asarray(reads[s][layer, 0]) for s in ("q", "k"))
        close(found.score, float(q[-1, head] @ k[found.key, 0]) / 16, max(1, abs(found.score)))
    assert len(found.pairs) == 50 and {"feature", "error", "token"} == set(found.sources.kind)


def test_a_score_reads_as_a_table(model):
    score = gs.head_score(model, coders_of("plain"), IDS, 2, 1)
    lines = str(score).splitlines()
    assert lines[0].startswith("head 2.1 from token 10 to ") and "remainder" in lines[0]
    assert len(lines) == 2 + min(12, len(score.pairs))
    assert lines[2].split()[-1] == f"{score.pair_values[0]:+.3g}"
