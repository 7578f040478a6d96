"""Parity with google-deepmind/gemma: the official layout, written by its own code, read by ours."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemma_scope_jax as gs
from tiny import tiny

pytestmark = [pytest.mark.official, pytest.mark.filterwarnings("ignore")]
SIZES = {"270m": "270M", "1b": "1B", "4b": "4B", "12b": "12B", "27b": "27B"}


def official_model(size: str, config: gs.GemmaConfig):
    """The package's model of this size, shrunk to `config`."""
    from gemma import gm
    from gemma.gm.nn import _config

    kind = getattr(gm.nn, f"Gemma3_{SIZES[size]}")
    types = _config.make_attention_layers_types(
        kind.config.attention_types[:6], num_layers=config.layers
    )
    shrunk = dataclasses.replace(
        kind.config,
        num_embed=config.vocab,
        embed_dim=config.d_model,
        hidden_dim=config.d_mlp,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        sliding_window_size=config.window,
        attention_types=types,
        vision_encoder=None,
    )
    return kind(config=shrunk, dtype=jnp.float32)


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_of_the_gemma_package_gives_its_logits(size, tmp_path):
    from gemma import gm

    config = tiny(gs.PRESETS[f"gemma-3-{size}"])
    if size == "27b":  # the package derives the scale of queries from the width
        config = dataclasses.replace(config, query_scale=(config.d_model // config.heads) ** -0.5)
    tokens = np.random.default_rng(0).integers(3, config.vocab, (2, 20)).astype(np.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = official_model(size, config)
        params = model.init(jax.random.key(0), tokens)["params"]
        noise = np.random.default_rng(1).standard_normal
        params = jax.tree.map(lambda w: w + jnp.asarray(0.1 * noise(w.shape), w.dtype), params)
        gm.ckpts.save_params(params, tmp_path / "checkpoint", wait_until_finished=True)
        theirs = np.asarray(jax.jit(partial(model.apply, {"params": params}))(tokens).logits)
    ours = gs.load_model(tmp_path / "checkpoint", dtype="float32", config=config)
    logits = np.asarray(gs.run(ours, tokens).logits)
    assert np.abs(logits - theirs).max() < 1e-4
