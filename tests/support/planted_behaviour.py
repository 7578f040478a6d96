"""Texts that show a planted behaviour, texts that do not, and an SAE that sees why.

The model of `planted_circuit`, whose logit of B is raised by the token A through a message in the
residual stream. Of the SAE after layer 2, feature `CAUSE` is that message; `SIGN` fires on token C,
which accompanies A and does nothing; `FORMAT` fires on the first token of every text, as of a
template; the others fire on a token each, and what they write nothing reads.
"""

import jax.numpy as jnp
import numpy as np

import gemma_scope_jax as gs
from gemma_scope_jax.behaviour.contrasts.arms import Arms
from gemma_scope_jax.coders.sparse_coder import SparseCoder
from planted_circuit import CONFIG, MESSAGE, UNREAD, A, B, C, planted_model

OPENING = 200  # the token at the start of every text
CAUSE, SIGN, FORMAT = 0, 1, 2
TOKENS = range(OPENING, OPENING + 60)  # of the features FORMAT and on
LAYER = 2


def behaviour_model():
    return planted_model()


def behaviour_coder(model, **changes) -> SparseCoder:
    """Decoder rows have norm 1, and features the size of what they stand for."""
    embed = np.asarray(model.params.embed)[list(TOKENS)].copy()
    embed[:, :8] = 0
    rows = np.concatenate([np.eye(CONFIG.d_model)[[MESSAGE, UNREAD]], embed])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    threshold = np.full(len(rows), 2.2)
    threshold[:2] = 0.3
    arrays = {
        "w_enc": rows.T,
        "b_enc": np.zeros(len(rows)),
        "threshold": threshold,
        "w_dec": rows,
        "b_dec": np.zeros(CONFIG.d_model),
    }
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
    return SparseCoder(**arrays, layer=LAYER, **changes)


def text(rng, cause=False, sign=False, length=9):
    """<bos>, the opening, and random tokens; A and C early on if asked for."""
    ids = np.append([2, OPENING], rng.integers(OPENING + 1, OPENING + 60, length - 2))
    if cause:
        ids[2] = A
    if sign:
        ids[3] = C
    return ids.astype(np.int32)


def texts(rng, count, cause=0.0, sign=None):
    """`count` texts; the share `cause` of them has A, and so many have C (default: these)."""
    found = []
    for _ in range(count):
        has = rng.random() < cause
        has_sign = has if sign is None else rng.random() < sign
        found.append(text(rng, has, has_sign, int(rng.integers(7, 10))))
    return found


def behaviour_arms(seed=0, count=30, **more) -> Arms:
    """Arm a shows the behaviour, arm b hardly ever does."""
    rng = np.random.default_rng(seed)
    return Arms(texts(rng, count, 0.9), texts(rng, count, 0.1), **more)


def paired_arms(seed=0, count=30) -> Arms:
    """Pairs that differ in A and C alone."""
    rng = np.random.default_rng(seed)
    b = texts(rng, count)
    a = [ids.copy() for ids in b]
    for ids in a:
        ids[2:4] = A, C
    return Arms(a, b, paired=True, name="pairs")


def outcome(model, prompts):
    """The logit of B after each of `prompts`, as a function of intercepts."""
    batch = gs.TokenBatch(np.stack(prompts), np.ones((len(prompts), len(prompts[0])), np.int32))

    def measure(intercepts):
        return np.asarray(gs.run(model, batch, intercepts).logits[:, -1, B], np.float64)

    return measure
