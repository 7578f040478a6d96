"""What a model shows of itself in a notebook: one line, whatever it holds."""

import jax

from gemma_scope_jax.model.config import PRESETS, abstract_params
from tiny import tiny_model


def test_models_weights_and_configs_are_one_line():
    model = tiny_model(PRESETS["gemma-3-270m"])
    count = sum(x.size for x in jax.tree.leaves(model))
    assert repr(model) == f"Model(tiny-gemma-3-270m: 8 layers, {count:,} weights, float32)"
    assert repr(model.params) == f"Params({count:,} weights, float32)"
    config = repr(model.config)
    assert config.startswith("GemmaConfig(tiny-gemma-3-270m: 8 layers") and len(config) < 100
    whole = repr(abstract_params(PRESETS["gemma-3-270m"]))
    assert whole == "Params(268,098,176 weights, bfloat16)"
    nothing = jax.tree.map(lambda x: None, model.params)  # a tree of specs, say
    assert "\n" not in repr(nothing) and repr(jax.tree.map(str, model)).endswith("no arrays)")
