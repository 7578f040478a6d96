"""How fast the gguf package undoes every type of block, and how much of a load that is.

    .venv/bin/python benchmarks/trials/gguf_blocks.py

Seconds are of the process's CPU time, medians of 5.
"""

import statistics
import time
from functools import partial

import numpy as np

from gemma_scope_jax.model.checkpoints.gguf import block_types, dequantize, open_gguf
from gemma_scope_jax.model.checkpoints.packaged import packaged_model

WEIGHTS = 1 << 22


def seconds(work, times=5) -> float:
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def main() -> None:
    rng = np.random.default_rng(0)
    print("| type | bits a weight | million weights a second |\n| --- | --- | --- |")
    for kind in block_types().values():
        blocks = rng.integers(0, 256, WEIGHTS // kind.weights * kind.bytes, dtype=np.uint8)
        try:
            rate = WEIGHTS / 1e6 / seconds(partial(dequantize, blocks, kind))
            print(f"| {kind.name} | {8 * kind.bytes / kind.weights:.3g} | {rate:.0f} |")
        except NotImplementedError:
            continue
    file = open_gguf(packaged_model())
    whole = seconds(lambda: [file.read(name) for name in file.tensors])
    print(f"\nall tensors of Gemma 3 270M, Q4_K_M: {whole:.2f} s")


if __name__ == "__main__":
    main()
