"""One type for all coders: what callers of either class may rely on, against the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coders import random_coder
from gemma_scope_jax.coders.coder import Coder, CoderInfo
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError

CODERS = {
    "sae": random_coder(7, 5, layer=3),
    "topk": random_coder(7, 5, layer=3, k=2, threshold=0.0),
    "skip_transcoder": random_coder(7, 5, skip=True, reads="mlp_in", writes="mlp_out", d_out=4),
    "crosscoder": random_coder(7, 5, layers=(1, 4)),
    "clt": random_coder(7, 5, layers=(0, 1, 2), reads="mlp_in", writes="mlp_out", skip=True),
}


@pytest.mark.parametrize("kind", CODERS)
def test_layers_first_runs_on_every_coder(kind):
    """x [X, n, D] through any coder is, layer by layer, what its own parts compute in float64."""
    c = CODERS[kind]
    X = len(c.layers)
    x = np.random.default_rng(0).standard_normal((X, 6, c.d_in)).astype(np.float32)
    f, y = np.asarray(c.encode(x)), np.asarray(c.decode(c.encode(x), x))
    assert isinstance(c, Coder) and f.shape == (X, 6, c.width) and y.shape == (X, 6, c.d_out)
    for i in range(X):
        w, b, t = (np.asarray(a, np.float64) for a in c.encoder(i))
        z = x[i] @ w + b
        want = z * (z > t)
        if c.k is not None:
            want = np.where(want >= np.sort(want, -1)[:, -c.k][:, None], want, 0)
        np.testing.assert_allclose(f[i], want, atol=1e-5)
        if c.k is None:
            np.testing.assert_allclose(c.encode_layer(i, x[i]), want, atol=1e-5)
    for j in range(X):
        want = sum(f[i] @ np.asarray(c.decoder(i, j), np.float64) for i in range(j + 1))
        stacked = lambda a: np.asarray(a).reshape(X, *np.shape(a)[c.multi_layer :])
        want = want + stacked(c.b_dec)[j]
        if c.w_skip is not None:
            want = want + x[j] @ stacked(c.w_skip)[j]
        np.testing.assert_allclose(y[j], want, atol=1e-5)


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_a_coder_that_is_nowhere_shares_its_program(kind):
    c, traced = CODERS[kind], []

    @jax.jit
    def width(coder):
        traced.append(1)
        return coder.encode(jnp.zeros((len(coder.layers), 2, 5))).sum()

    moved = {"layer": 9} if kind == "sae" else {"layers": (4, 6, 9)}
    for coder in (c, c.replace(**moved, first=4)):
        width(coder.unplaced())
    assert len(traced) == 1 and c.unplaced().first == 0
    assert c.unplaced().layers == tuple(range(len(c.layers)))


def test_own_layers_are_checked():
    sae, clt = CODERS["sae"], CODERS["clt"]
    assert sae.source(3) == sae.source(None) == 0 and clt.source(2) == 2
    for call, words in (
        (lambda: sae.source(4), "layer 4: this coder has features of 3"),
        (lambda: clt.source(None), "features of 0, 1, 2"),
        (lambda: sae.decoder(0, 1), "layers 0 to 0, not 1"),
        (lambda: sae.encoder(1), "layers 0 to 0, not 1"),
        (lambda: clt.decoder(2, 1), "do not write to the earlier layer 1"),
        (lambda: clt.encoder(3), "layers 0 to 2, not 3"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_reprs_are_one_line_without_arrays():
    assert repr(CODERS["sae"]) == "SparseCoder(sae, resid_post, layer 3, 7 features)"
    about = CODERS["skip_transcoder"].replace(info=CoderInfo(l0=20.0))
    said = "SparseCoder(skip_transcoder, mlp_in -> mlp_out, layer 1, 7 features, L0 20)"
    assert repr(about) == said
    assert repr(CODERS["topk"]).endswith("7 features, k 2)")
    assert (
        repr(CODERS["clt"]) == "MultiLayerCoder(clt, mlp_in -> mlp_out, layers 0-2, 3 x 7 features)"
    )
    assert "layers 1, 4" in repr(CODERS["crosscoder"])
    both = CoderSet([CODERS["sae"], CODERS["clt"]])
    assert repr(both) == (
        "CoderSet(2 coders: sae and clt, resid_post and mlp_in -> mlp_out, layers 0-3)"
    )
    jax.tree.map(lambda _: None, CODERS["sae"]).__repr__()  # of what holds no arrays, too


def test_a_set_is_ordered_and_looked_up_by_number_name_and_layer():
    one, two = random_coder(layer=2), random_coder(layer=0, seed=1)
    known = one.replace(info=CoderInfo(path="/somewhere/mine"))
    coders = CoderSet([one, two, known, known])
    assert coders.names == ("resid_post-2", "resid_post-0", "mine-2", "mine-3")
    assert list(coders) == [one, two, known, known] and len(coders) == 4
    assert coders[1] is two and coders["resid_post-0"] is two and coders[-1] is known
    assert coders.layers == (0, 2) and coders.at(0) is two
    some = coders[:2]
    assert isinstance(some, CoderSet) and some.names == coders.names[:2] and some.at(2) is one
    named = CoderSet({"a": one, "b": CODERS["clt"]})
    assert CoderSet(named).names == ("a", "b") and named.at(1) is CODERS["clt"]
    assert CoderSet(one)[0] is one
    for call, words in (
        (lambda: coders.at(2), r"layer 2: 3 coders \(resid_post-2, mine-2, mine-3\)"),
        (lambda: coders.at(1), "layer 1: no coder here, of layers 0, 2"),
        (lambda: coders["c"], "no coder 'c' in this set; it has resid_post-2"),
        (lambda: CoderSet([]), "at least one"),
        (lambda: CoderSet(["address"]), "expected coders .*got str"),
    ):
        with pytest.raises(InputError, match=words):
            call()
