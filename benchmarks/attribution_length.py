"""Attribution graphs of long prompts: their time and memory, and what was planned.

    .venv/bin/python benchmarks/attribution_length.py [400 1024 2300] [--features 4096]

The model is the real Gemma 3 270M in float32 with the packaged transcoders, the prompt the start of
the packaged sample text. Each length is a process of its own and prints one JSON line: seconds,
compilation included; CPU seconds of all threads; the largest resident size of the process; TFLOP as
`plan_attribution` counts them; and, of all targets, by how much the effects of their sources miss
their value, relative to the largest value.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np


def measured(length: int, features: int) -> dict:
    """The JSON line of a length."""
    import gemma_scope_jax as gs
    from gemma_scope_jax.data.documents import sample_documents

    model = gs.load_model("gemma-3-270m", dtype="float32")
    coders = gs.load_coders("gemma-3-270m-transcoder-*")
    ids = gs.load_tokenizer("gemma-3-270m").encode("\n".join(sample_documents()))[:length]
    assert len(ids) == length, f"the sample has only {len(ids)} tokens"
    plan = gs.plan_attribution(model.config, coders, length, max_feature_nodes=features)
    used = lambda: resource.getrusage(resource.RUSAGE_SELF)
    before, start = used(), time.perf_counter()
    graph = gs.attribute(model, coders, ids, max_feature_nodes=features)
    seconds, after = time.perf_counter() - start, used()
    missed = graph.effects.sum(1, dtype=float) + graph.bias + graph.rest - graph.value
    return {
        "tokens": length,
        "nodes": graph.selected,
        "sources": len(graph.sources),
        "seconds": round(seconds, 1),
        "CPU_seconds": round(sum(after[:2]) - sum(before[:2]), 1),
        "peak_GB": round(after.ru_maxrss / 2**20, 2),
        "planned_TFLOP": round(plan.flops / 1e12, 1),
        "missed": float(np.abs(missed).max() / np.abs(graph.value).max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", type=int, nargs="*", default=[400, 1024, 2300])
    parser.add_argument("--features", type=int, default=4096)
    args = parser.parse_args()
    if len(args.lengths) == 1:
        print(json.dumps(measured(args.lengths[0], args.features)), flush=True)
    else:
        for length in args.lengths:
            command = [sys.executable, __file__, str(length), "--features", str(args.features)]
            subprocess.run(command, check=True)
