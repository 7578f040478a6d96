"""A tiny Gemma 3 with a circuit of two hops whose every weight is known, and coders of it.

    token A, position 2 --head of layer 1--> f1 (layer 1) --residual--> f2 (layer 3) --> logit of B

The architecture is the real one, norms included. Gemma normalises what attention and MLPs read and
what they write, so a small output would be blown up and a sum of outputs could not be linear. As in
the trained model, one direction of the residual stream (`CONSTANT`) is much larger than all others:
every norm divides by it and multiplies by its gain, which leaves the other directions as they are
to some parts in a million. Attention is uniform: queries and keys are zero.

A neuron gelu(20 x) * (0.05 c x) is c x where x > 0.5 and 0 where x is 0, exactly; so a feature with
encoder c x and the neuron's output row is the neuron itself. Two more fire as strongly and write
where nothing reads: one on the token C, one of layer 3 on what f1 writes.
"""

import jax.numpy as jnp
import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder, triangle
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from gemma_scope_jax.model.config import PRESETS, Model, abstract_params
from tiny import tiny

CONFIG = tiny(PRESETS["gemma-3-270m"], layers=4)
A, B, C = 40, 41, 42
IDS = np.array([2, 100, A, 101, 102, C], np.int32)
CONSTANT, OF_A, MOVED, MESSAGE, ANSWER, OF_C, UNREAD, UNREAD_TOO = range(8)  # directions
LARGE = 10_000.0
WIDTH = 3

TOKEN_A, HEAD, UNEMBED_B = 1.5, 4.0, 1.2
# layer, number: what it reads, how strongly, what it writes, how strongly
F1, F2 = (1, 0), (3, 1)
DECOY, LATE_DECOY = (1, 2), (3, 0)
NEURONS = {
    F1: (MOVED, 2.0, MESSAGE, 0.5),
    F2: (MESSAGE, 3.0, ANSWER, 0.7),
    DECOY: (OF_C, 2.5, UNREAD, 3.0),
    LATE_DECOY: (MESSAGE, 4.0, UNREAD_TOO, 2.0),
}


def planted(position):
    """What the circuit gives, step by step, at a position that sees the one A: a dict."""
    moved = TOKEN_A * HEAD / (position + 1)
    f1 = 2.0 * moved
    message = 0.5 * f1
    f2 = 3.0 * message
    logit = 0.7 * f2 * UNEMBED_B * (1 - 1 / CONFIG.vocab)  # less the mean of all logits
    return {"f1": f1, "message": message, "f2": f2, "logit": logit}


def planted_model() -> Model:
    c = CONFIG
    D, root, rng = c.d_model, c.d_model**0.5, np.random.default_rng(0)
    p = abstract_params(c, jnp.float32)
    w = {name: np.zeros(leaf.shape, np.float32) for name, leaf in vars(p.blocks).items()}
    before = np.full(D, LARGE / root - 1)  # the constant becomes 1, all else stays
    before[CONSTANT] = 1 / root - 1
    after = np.full(D, LARGE / root - 1)
    after[CONSTANT] = -1
    for name in ("pre_attn_norm", "pre_mlp_norm"):
        w[name][:] = before
    for name in ("post_attn_norm", "post_mlp_norm"):
        w[name][:] = after

    # what norms divide by, in all outputs; after them nothing of it is left
    w["w_v"][:, CONSTANT, 0, 0] = LARGE
    w["w_o"][:, 0, 0, CONSTANT] = 1
    w["w_gate"][:, CONSTANT, -1] = 20
    w["w_up"][:, CONSTANT, -1] = LARGE / 20
    w["w_down"][:, -1, CONSTANT] = 1

    w["w_v"][1, OF_A, 0, 1] = 1
    w["w_o"][1, 0, 1, MOVED] = HEAD
    for (layer, m), (reads, strength, writes, size) in NEURONS.items():
        w["w_gate"][layer, reads, m] = 20
        w["w_up"][layer, CONSTANT, m] = strength / 20
        w["w_down"][layer, m, writes] = size

    embed = np.zeros((c.vocab, D), np.float32)
    embed[:, 8:] = 0.1 * rng.standard_normal((c.vocab, D - 8))
    embed[B, 8:] = 0
    embed[:, CONSTANT] = LARGE / root
    embed[A, OF_A] = TOKEN_A / root
    embed[C, OF_C] = 1 / root
    embed[B, ANSWER] = UNEMBED_B
    blocks = type(p.blocks)(**{name: jnp.asarray(a) for name, a in w.items()})
    return Model(type(p)(jnp.asarray(embed), blocks, jnp.asarray(after, jnp.float32)), c)


def _encoders():
    """w_enc [L, D, F], b_enc and threshold [L, F]: of neurons that there are."""
    L, D = CONFIG.layers, CONFIG.d_model
    w, threshold = np.zeros((L, D, WIDTH), np.float32), np.full((L, WIDTH), 0.5, np.float32)
    for (layer, m), (reads, strength, *_) in NEURONS.items():
        w[layer, reads, m] = strength
    return w, np.zeros((L, WIDTH), np.float32), threshold


def transcoders() -> gs.CoderSet:
    """The neurons themselves, layer by layer."""
    w_enc, b_enc, threshold = map(jnp.asarray, _encoders())
    L, D = CONFIG.layers, CONFIG.d_model
    w_dec = np.zeros((L, WIDTH, D), np.float32)
    for (layer, m), (*_, writes, size) in NEURONS.items():
        w_dec[layer, m, writes] = size
    arrays = lambda l: (w_enc[l], b_enc[l], threshold[l], jnp.asarray(w_dec[l]), jnp.zeros(D))
    own = lambda l: dict(zip(("w_enc", "b_enc", "threshold", "w_dec", "b_dec"), arrays(l)))
    return gs.CoderSet(
        SparseCoder(**own(l), layer=l, reads="mlp_in", writes="mlp_out") for l in range(L)
    )


def cross_layer() -> MultiLayerCoder:
    """The same outputs from fewer features: f1 also writes what the neurons of layer 3, which
    read nothing but f1, write there. No feature of layer 3 is left."""
    w_enc, b_enc, threshold = _encoders()
    L, D = CONFIG.layers, CONFIG.d_model
    w_dec = np.zeros((L, L, WIDTH, D), np.float32)
    for (layer, m), (reads, strength, writes, size) in NEURONS.items():
        if reads == MESSAGE:
            source, feature = F1
            w_dec[source, layer, feature, writes] = NEURONS[F1][3] * strength * size
            w_enc[layer, :, m] = 0
        else:
            w_dec[layer, layer, m, writes] = size
    arrays = (w_enc, b_enc, threshold, w_dec[triangle(L)], np.zeros((L, D), np.float32))
    return MultiLayerCoder(
        *map(jnp.asarray, arrays), layers=tuple(range(L)), reads="mlp_in", writes="mlp_out"
    )
