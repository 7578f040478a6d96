"""What an extraction would take, before it is begun: tokens, bytes on disk, memory, time."""

import dataclasses
import shutil
import time
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.extraction import hosts
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction.extract import job_of, token_bytes
from gemma_scope_jax.extraction.runner import IN_FLIGHT, Runner
from gemma_scope_jax.extraction.work import Packed, ShardPlan
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer
from gemma_scope_jax.storage.paths import existing_parent, folder_path, is_remote


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `plan_extraction` found; bytes and seconds are estimates, `memory` is the compiler's."""

    documents: int
    tokens: int
    shards: int
    shards_done: int
    batch: tuple[int, int]  # sequences, tokens of each
    bytes_per_token: float
    bytes: int
    bytes_free: int | None  # None: a bucket
    memory: int  # of a device: weights, one batch, temporaries
    memory_limit: int | None  # None: not known, as on CPUs
    tokens_per_second: float | None  # measured on one batch; None where the memory does not suffice
    seconds: float | None


def plan_extraction(
    model: Model, coders: Any, tokenizer: Tokenizer, source: Any, folder: Any, **settings: Any
) -> Estimate:
    """An `Estimate` for `extract` with the same arguments. Compiles the program, runs one batch.

    Nothing is written. Raises `InputError` as `extract` does.
    """
    named, path = dict(CoderSet(coders).items()), folder_path(folder)
    share, tokens = settings.get("share", (0, 1)), settings.pop("tokens", None)
    if hosts.count_of(model) > 1:
        raise InputError("a plan is made by one process: leave out --coordinator")
    job = job_of(model, named, tokenizer, source, **settings)
    plan = manifests.plan_of(manifests.settle(path, job, tokens)[0], job)
    documents, mean, there = plan.documents, plan.mean, set(manifests.shards_there(path))
    mine = [s for s in range(plan.shards) if s % share[1] == share[0]]
    left = [s for s in mine if s not in there]
    ahead = sum(map(plan.in_shard, left)) * mean
    size = token_bytes(named, job.values) * plan.share
    runner = Runner(model, named, job.slots, job.precision)
    memory, limit = _memory(runner, job.batch_size, job.context_size)
    rate = None if limit is not None and memory > limit else _rate(runner, plan)
    return Estimate(
        documents=documents,
        tokens=int(sum(map(plan.in_shard, mine)) * mean),
        shards=len(mine),
        shards_done=len(mine) - len(left),
        batch=(job.batch_size, job.context_size),
        bytes_per_token=size,
        bytes=int(size * ahead),
        bytes_free=None if is_remote(path) else shutil.disk_usage(existing_parent(path)).free,
        memory=memory,
        memory_limit=limit,
        tokens_per_second=rate,
        seconds=None if rate is None else ahead / rate,
    )


def _memory(runner: Runner, batch_size: int, context_size: int) -> tuple[int, int | None]:
    """Bytes of a device that the compiled program takes, and how many there are, if known."""
    ids = np.zeros((batch_size, context_size), np.int32)
    compiled = runner.compiled(TokenBatch(ids, ids, ids > 0))
    found = compiled.memory_analysis()
    names = ("argument", "output", "temp", "generated_code")
    sizes = {name: getattr(found, f"{name}_size_in_bytes") for name in names}
    size = sum(sizes.values()) + (IN_FLIGHT - 1) * sizes["output"]
    device = jax.tree.leaves(runner.weights)[0].devices().pop()
    return int(size), (device.memory_stats() or {}).get("bytes_limit")


def _rate(runner: Runner, plan: ShardPlan) -> float:
    """Tokens a second of the first batch, the second time it runs."""
    shards = range(plan.shards)
    packed: Any = next(p for p in plan.batches(shards) if isinstance(p, Packed))
    batch, kept = packed.batch, np.flatnonzero(packed.batch.segments)
    for _ in range(2):
        start = time.perf_counter()
        runner.finish(runner.start(batch), kept)
    return len(kept) / (time.perf_counter() - start)
