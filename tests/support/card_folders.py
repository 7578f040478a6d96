"""Folders of cards written without a model, coders for cards, and files of published examples."""

import json
import re
from functools import partial

import numpy as np
from safetensors.numpy import save_file

from coders import random_coder
from gemma_scope_jax.cards.card_files import CardFiles
from gemma_scope_jax.coders.coder import CoderInfo

# The features of which cards are made: one of them is never active.
card_coder = partial(random_coder, threshold=1.0, dead=(5,), info=CoderInfo(l0=10.0))


def arrays(stage, seed, F=4):
    """The arrays of cards of one example a feature, around "a"."""
    rng = np.random.default_rng(seed)
    for name in ("density", "largest", "mean"):
        stage.put(name, rng.uniform(0.1, 1, F).astype(np.float32))
    stage.put("histogram", np.full((F, 2), 3))
    for name in ("rows", "documents", "positions", "sources"):
        stage.put(f"example_{name}", np.zeros((F, 1), np.int64))
    stage.create("example_tokens", (F, 1, 3), np.int32, 100)
    stage.put("example_values", rng.uniform(0.1, 1, (F, 1, 3)).astype(np.float32))
    stage.facts |= {
        "coder": "one", "model": "acme/tiny", "kind": "sae", "layer": 0, "reads": "mlp_in",
        "writes": "mlp_out", "width": F, "first": 1, "gain": "exact", "tokens": 9, "sources": ["a"],
        "text": "a", "prompts": 1, "prompt_tokens": 9,
        "settings": {"top": 1, "groups": 1, "each": 0, "before": 1, "after": 1, "bins": 2,
                     "seed": 0, "listed": 1},
    }  # fmt: skip


def make_cards(folder, seed=0, belongs=None, F=4):
    """Of F features, in stages "examples" and "more"."""
    with CardFiles(folder, belongs) as files:
        files.make("examples", seed, lambda stage: arrays(stage, seed, F))
        files.make("more", seed, lambda stage: stage.put(f"listed_{seed}", np.zeros(F)))


def data_of(path):
    """The call in a data file: its name and its value."""
    text = path.read_text(encoding="utf-8")
    name, value = re.fullmatch(r'cards\("([a-z0-9-]+)",(.*)\)\n', text, re.S).groups()
    assert name == path.stem and not set("<>&\u2028\u2029") & set(text)
    return json.loads(value)


def publish_examples(folder, rng, width=48, examples=12, sequences=9, length=20):
    """A file of the release's layout, and the dense activations that it was made from."""
    dense = np.round(rng.random((width, sequences, length)) ** 4 * 1000, 1).astype(np.float32)
    dense[rng.random(dense.shape) < 0.9] = 0
    dense[5] = 0
    flat = dense.reshape(width, -1)
    order = np.argsort(-flat, axis=-1, kind="stable")[:, :examples]
    found = np.take_along_axis(flat, order, -1)
    seq, pos = np.where(found > 0, order // length, 0), np.where(found > 0, order % length, 0)
    tensors = {
        "tokens": rng.integers(3, 300, (sequences, length)).astype(np.int32),
        "activations": found, "seq_ids": seq.astype(np.int32), "positions": pos.astype(np.int32),
        "logit_effects": np.zeros_like(found),
        "feature_frequencies": (flat > 0).mean(-1).astype(np.float32),
        "top_tokens": rng.integers(3, 300, (width, 10)).astype(np.int32),
        "top_logits": rng.random((width, 10)).astype(np.float32),
        "bottom_tokens": rng.integers(3, 300, (width, 10)).astype(np.int32),
        "bottom_logits": -rng.random((width, 10)).astype(np.float32),
    }  # fmt: skip
    save_file(tensors, folder / "examples.safetensors")
    return tensors


F, LAYER = 48, 1


HOSTILE = '</script><script>alert("x")</script><!--&amp;\u2028 plums and pears'


EXPLAINED = {
    3: {
        "text": "zebra <b>crossings</b>",
        "method": "endpoint",
        "model": "m",
        "scores": {
            "detection": {"balanced_accuracy": True},
            "fuzzing": {"balanced_accuracy": 0.875},
        },
    }
}
