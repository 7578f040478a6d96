"""Programs compiled by the real TPU compiler: how they are started, and what is read of them.

libtpu brings that compiler to any x86 Linux machine; no TPU is needed. Each program is compiled in
a process of its own, since libtpu takes hold of the process that loads it.
"""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-[a-z]+"

no_libtpu = not (sys.platform == "linux" and platform.machine() == "x86_64")


def figures(compiled) -> dict:
    """Bytes of HBM a chip, the compiler's estimate of the time, collectives with their shapes.

    A loop's body, such as a layer of the model, counts once in the estimates.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    # Donated arguments are the outputs, too.
    names = ("argument", "temp", "generated_code", "output", "alias")
    return {
        "hbm": {name: getattr(memory, f"{name}_size_in_bytes") for name in names},
        "flops": cost["flops"],
        "optimal_seconds": cost.get("optimal_seconds"),
        "collectives": collectives(compiled.as_text()),
    }


def collectives(text: str) -> list[list]:
    """[[operation, arrays in and out as [dtype, dimensions], how often it is written], ...]."""
    shape_of = dict(re.findall(r"(%[\w.-]+) = (\(.*?\)|\S+) [\w-]+\(", text))
    found = Counter()
    for line in re.finditer(rf"= (\(.*?\)|\S+) ({COLLECTIVES})(?:-start)?\((.*?)\)", text):
        result, operation, operands = line.groups()
        inputs = " ".join(shape_of.get(name, name) for name in re.findall(r"%[\w.-]+", operands))
        arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", f"{result} {inputs}")
        found[operation, tuple(sorted(set(arrays)))] += 1
    return [[name, arrays, count] for (name, arrays), count in sorted(found.items())]


def used(hbm: dict) -> int:
    """Bytes a chip needs: outputs that lie where arguments were count once."""
    return sum(hbm.values()) - 2 * hbm["alias"]


@functools.cache
def compiled(name: str, program: str) -> dict:
    """What `program NAME` prints, in a process that may load the TPU compiler."""
    run = subprocess.run(
        [sys.executable, program, name],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])
