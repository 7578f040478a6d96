"""One factory of random coders: of one layer, of several, with a skip, TopK."""

import jax.numpy as jnp
import numpy as np

from gemma_scope_jax.coders.multi_layer_coder import MultiLayerCoder
from gemma_scope_jax.coders.sparse_coder import SparseCoder


def random_coder(
    width=48,
    d=32,
    seed=0,
    *,
    layer=1,
    layers=None,
    threshold=None,
    d_out=None,
    skip=False,
    dead=(),
    dtype=jnp.float32,
    **more,
):
    """A SparseCoder at `layer`, or a MultiLayerCoder at `layers`; d is the tiny models'.

    Weights and biases are normal, of variance 1 / d; thresholds, unless one is given for all, the
    sizes of such numbers; features `dead` are never active. `more`: reads, writes, first, k, info.
    """
    rng = np.random.default_rng(seed)
    given = lambda x: np.asarray(x, np.float32).astype(dtype)  # by numpy, which compiles nothing
    draw = lambda *shape: given(rng.standard_normal(shape) / d**0.5)
    X = () if layers is None else (len(layers),)
    pairs = () if layers is None else (len(layers) * (len(layers) + 1) // 2,)
    out = d_out or d
    arrays = {
        "w_enc": draw(*X, d, width),
        "b_enc": draw(*X, width),
        "threshold": np.abs(draw(*X, width)),
        "w_dec": draw(*pairs, width, out),
        "b_dec": draw(*X, out),
        "w_skip": draw(*X, d, out) if skip else None,
    }
    if threshold is not None:
        arrays["threshold"][...] = threshold
    arrays["threshold"][..., list(dead)] = 1e9
    arrays = {name: a if a is None else jnp.asarray(a) for name, a in arrays.items()}
    if layers is None:
        return SparseCoder(**arrays, layer=layer, **more)
    return MultiLayerCoder(**arrays, layers=layers, **more)
