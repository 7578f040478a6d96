"""Write what transformers computes into transformers.npz: `make golden`.

So that `make test` checks parity with transformers' own numbers where torch is not installed. For
each size the architecture, shrunk (tests/tiny.py), is stored with the seed of its weights, the
token ids, the logits and the activations of the last tokens at four sites of every layer, and 64
greedily decoded tokens;
for the real 270M the same for one prompt, the activations of its last token and every 256th logit.
transformers reads the GGUF file of the 270M itself, with its own dequantisation.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support")]

from gemma_scope_jax.model.checkpoints.packaged import packaged_model  # noqa: E402
from gemma_scope_jax.model.config import PRESETS  # noqa: E402
from golden.peer import peer_forward, peer_generate, peer_model  # noqa: E402
from golden.weights import KEPT, SITES, checksum, random_ids, random_params, stored  # noqa: E402
from tiny import tiny  # noqa: E402

# "The capital of France is" and on: <bos> first.
PROMPT = [2, 818, 5279, 529, 7001, 563]


def shrunk(number: int, name: str) -> dict[str, np.ndarray]:
    """transformers' numbers for one size, shrunk; keys are prefixed with the size."""
    config = dataclasses.replace(tiny(PRESETS[name]), context=256)
    params = random_params(config, seed=number)
    ids = random_ids(config, seed=100 + number, length=24)
    model = peer_model(config, params)
    logits, sites = peer_forward(model, ids)
    about = {"seed": number, "checksum": checksum(params), "config": dataclasses.asdict(config)}
    return {
        f"{name}/about": np.array(json.dumps(about)),
        f"{name}/ids": ids,
        f"{name}/logits": logits[:, -KEPT:],
        f"{name}/generated": peer_generate(model, ids[:, :10], 64),
        **{f"{name}/{site}": stored(sites[site])[:, :, -KEPT:] for site in SITES},
    }


def real() -> dict[str, np.ndarray]:
    """transformers' numbers for the packaged 270M."""
    import torch
    from transformers import Gemma3ForCausalLM

    path = packaged_model()
    model = Gemma3ForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.array([PROMPT], np.int32)
    logits, sites = peer_forward(model, ids)
    return {
        "real/ids": ids,
        "real/logits": logits[..., ::256],
        "real/generated": peer_generate(model, ids, 64),
        **{f"real/{site}": stored(sites[site][:, :, -1]) for site in SITES},
    }


if __name__ == "__main__":
    arrays = real()
    for number, name in enumerate(PRESETS):
        arrays |= shrunk(number, name)
    np.savez_compressed(HERE / "transformers.npz", **arrays)
    print(f"{HERE / 'transformers.npz'}: {(HERE / 'transformers.npz').stat().st_size:,} bytes")
