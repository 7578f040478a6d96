"""What an extraction would take, before it begins: tokens, bytes on disk, memory, time."""

import dataclasses
import os
import shutil
import time
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.data.documents import Source
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import hosts
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction.extract import Coders, job_of, token_bytes
from gemma_scope_jax.extraction.manifest import ExtractionSettings
from gemma_scope_jax.extraction.runner import IN_FLIGHT, Runner
from gemma_scope_jax.extraction.work import Packed, ShardPlan
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.progress import byte_size
from gemma_scope_jax.storage.paths import existing_parent, folder_path, is_remote


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The result of `plan_extraction`; as text, a few lines."""

    documents: int
    tokens: int
    shards: int
    shards_done: int
    batch: tuple[int, int]  # sequences, tokens per sequence
    bytes_per_token: float
    bytes: int
    bytes_free: int | None  # None: a bucket
    memory: int  # per device, from the compiler: weights, one batch, temporaries
    memory_limit: int | None  # None: unknown, as on CPUs
    tokens_per_second: float | None  # measured on one batch; None if the memory is too small
    seconds: float | None

    def __str__(self) -> str:
        done = f", {self.shards_done} of them there" if self.shards_done else ""
        free = "" if self.bytes_free is None else f" ({byte_size(self.bytes_free)} free)"
        limit = "" if self.memory_limit is None else f" of {byte_size(self.memory_limit)}"
        text = f"{self.tokens:,} tokens in {self.documents:,} documents, {self.shards} shards{done}"
        per_token = self.bytes_per_token
        time = "unknown: there is too little memory; use a smaller batch size, or a mesh"
        if self.tokens_per_second is not None and self.seconds is not None:
            units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
            each, unit = next((n, unit) for n, unit in units if self.seconds >= 1.5 * n or n == 1)
            speed = f"{self.tokens_per_second:,.0f} tokens/s on one batch"
            time = f"about {self.seconds / each:.3g} {unit}, at {speed}"
        return (
            f"text     {text}; batches of {self.batch[0]} x {self.batch[1]}\n"
            f"disk     about {byte_size(self.bytes)}{free}, {per_token:.0f} bytes a token\n"
            f"memory   {byte_size(self.memory)}{limit} on a device\n"
            f"time     {time}"
        )


def plan_extraction(
    model: Model,
    coders: Coders,
    tokenizer: Tokenizer,
    source: Source,
    folder: str | os.PathLike,
    *,
    tokens: int | None = None,
    **settings: Any,
) -> Estimate:
    """An `Estimate` for `extract` with the same arguments. Compiles the program, runs one batch.

    Nothing is written. Raises `InputError` as `extract` does.
    """
    named, path, wanted = CoderSet(coders), folder_path(folder), ExtractionSettings(**settings)
    index, count = wanted.share
    if hosts.count_of(model) > 1:
        raise InputError("plan in a single process: the model's mesh spans several")
    job = job_of(model, named, tokenizer, source, wanted)
    plan = manifests.plan_of(manifests.settle(path, job, tokens)[0], job)
    there = set(manifests.shards_there(path))
    mine = [shard for shard in range(plan.shards) if shard % count == index]
    left = [shard for shard in mine if shard not in there]
    ahead = sum(map(plan.in_shard, left)) * plan.mean
    size = token_bytes(named, wanted.values) * plan.share
    runner = Runner(model, dict(named.items()), job.slots, wanted.precision)
    memory, limit = _memory(runner, plan)
    rate = None if limit is not None and memory > limit else _rate(runner, plan)
    return Estimate(
        documents=plan.documents,
        tokens=int(sum(map(plan.in_shard, mine)) * plan.mean),
        shards=len(mine),
        shards_done=len(mine) - len(left),
        batch=(plan.batch_size, plan.context_size),
        bytes_per_token=size,
        bytes=int(size * ahead),
        bytes_free=None if is_remote(path) else shutil.disk_usage(existing_parent(path)).free,
        memory=memory,
        memory_limit=limit,
        tokens_per_second=rate,
        seconds=None if rate is None else ahead / rate,
    )


def _memory(runner: Runner, plan: ShardPlan) -> tuple[int, int | None]:
    """Bytes per device that the compiled program takes, and that the device has, if known."""
    ids = np.zeros((plan.batch_size, plan.context_size), np.int32)
    found: Any = runner.compiled(TokenBatch(ids, ids, ids > 0)).memory_analysis()
    names = ("argument", "output", "temp", "generated_code")
    sizes = {name: getattr(found, f"{name}_size_in_bytes") for name in names}
    size = sum(sizes.values()) + (IN_FLIGHT - 1) * sizes["output"]
    device = jax.tree.leaves(runner.weights)[0].devices().pop()
    return int(size), (device.memory_stats() or {}).get("bytes_limit")


def _rate(runner: Runner, plan: ShardPlan) -> float:
    """Tokens per second of the first batch, the second time it runs."""
    packed = next(p for p in plan.batches(range(plan.shards)) if isinstance(p, Packed))
    batch, kept = packed.batch, np.flatnonzero(packed.batch.segments)
    for _ in range(2):
        start = time.perf_counter()
        runner.finish(runner.start(batch), kept)
    return len(kept) / (time.perf_counter() - start)
