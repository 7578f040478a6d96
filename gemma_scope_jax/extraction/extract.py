"""Sparse features of a text, by the billion: model, coders and text in, a store of what fires out.

    store = extract(model, {"sae": sae}, tokenizer, TextData(("*.txt",)), "store", tokens=10**6)

The device runs a batch while the host writes the one before. Each shard is whole or not there, so
the same call goes on after a kill at any moment; several processes, on one machine or on many, make
every n-th shard each (`share`) and write side by side into one folder, local or gs://. Processes of
one JAX program share by themselves; with one mesh, too, they run in step, each on its own rows.
"""

import collections
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gemma_scope_jax.coders import active_features as on_device
from gemma_scope_jax.coders.coder import Coder, check_fits
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.data.prefetch import prefetch
from gemma_scope_jax.errors import InputError, no_space, reason
from gemma_scope_jax.extraction import hosts
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction.runner import Runner
from gemma_scope_jax.extraction.store.codec import VALUES
from gemma_scope_jax.extraction.store.shards import ShardWriter
from gemma_scope_jax.extraction.store.store import FeatureStore
from gemma_scope_jax.extraction.work import Ended, Packed, ShardPlan, open_text
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.profile import StepTrace
from gemma_scope_jax.model.sharding import mesh_of, own_mesh
from gemma_scope_jax.model.tokenizer import Tokenizer, fit_tokenizer
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.locks import in_turn
from gemma_scope_jax.storage.paths import check_writable, folder_path, is_remote

LOG = logging.getLogger(__name__)


@own_mesh
def extract(
    model: Model,
    coders: Mapping[str, Coder] | Sequence[Coder] | Coder,
    tokenizer: Tokenizer,
    source: Any,
    folder: str | os.PathLike,
    *,
    tokens: int | None = None,
    batch_size: int | None = None,
    context_size: int = 1024,
    seed: int | None = 0,
    values: str = "float16",
    slots: int | None = None,
    precision: str = "highest",
    shard_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
    profile: str | os.PathLike | None = None,
) -> FeatureStore:
    """Store the active features of `coders` on a text; returns the store.

    coders     by name; without names they are called by their addresses
    source     the trainer's: a `TextData`, a list of strings, a function returning an iterable, a
               `TokenBatch`
    folder     the same call continues what was begun there; more `tokens` extend it
    tokens     read by the model, `<bos>` included, about: whole documents, to one of them up to two
               million; None: all
    batch_size     sequences of a process's batch; None: 2,048 tokens on a CPU, 32,768 elsewhere
    context_size   tokens of a sequence
    seed       of the documents' order; None: as they lie
    values     "float16", as many bits of a float32 as float16 has, or "float32"
    slots      features a token has room for; more are right, too, but slower
    shard_tokens  of a shard, about; default: a 32nd of the job, between limits (`per_shard`)
    precision  of the encoders' products: "highest" is float32, "high" three passes of bfloat16 on
               TPUs and TF32 on GPUs, "default" one pass and TF32
    share      (i, n): this process makes every n-th shard, from the i-th on
    profile    an empty folder for a trace of a few batches

    Tokens before a coder's `first` of each piece have no features, nor have those that the data
    exclude. Raises `InputError` for what does not fit: a coder, another store in the folder, a full
    disk, activations that are not finite.
    """
    trace = StepTrace(profile)
    named = dict(CoderSet(coders).items())
    if share == (0, 1):
        share = (jax.process_index(), jax.process_count())
    job = job_of(
        model, named, tokenizer, source, batch_size=batch_size, context_size=context_size,
        seed=seed, values=values, slots=slots, precision=precision, shard_tokens=shard_tokens,
        share=share,
    )  # fmt: skip
    path = folder_path(folder)
    try:
        with in_turn(path):  # several processes fill the folder, and must agree on what with
            plan = manifests.agree(path, job, tokens)
            left = manifests.missing(path, plan)
            if left:
                (path / manifests.INDEX).unlink(missing_ok=True)
        mine = [shard for shard in left if shard % share[1] == share[0]]
        if mine or hosts.count_of(model) > 1:
            _check_room(path, named, plan, len(mine), values)
            with trace:
                _write(model, named, path, plan, mine, job, trace)
        hosts.wait(model)
        with in_turn(path):
            manifests.finish(path, plan)
    except InputError:
        raise
    except OSError as error:
        what = "no space left" if no_space(error) else error.strerror or error
        hint = "free some and run the same again: whole shards stay" if no_space(error) else ""
        raise InputError(f"{path}: {what}{'; ' * bool(hint)}{hint}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "the device's memory does not suffice: take a smaller batch_size, fewer coders at a "
            f"time, or a mesh ({reason(error)})"
        ) from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise InputError(f"{path}: {reason(error)}") from error  # the clients' own types
    return FeatureStore(path)


def check_extraction(
    config: GemmaConfig,
    coders: Mapping[str, Coder] | Sequence[Coder] | Coder,
    folder: str | os.PathLike | None = None,
    *,
    tokens: int | None = None,
    batch_size: int | None = None,
    context_size: int = 1024,
    seed: int | None = 0,
    values: str = "float16",
    slots: int | None = None,
    precision: str = "highest",
    share: tuple[int, int] = (0, 1),
) -> None:
    """Raise `InputError` for what `extract` would refuse and can be known before a model, of which
    `config` is the architecture, is loaded."""
    for name, coder in CoderSet(coders).items():
        try:
            check_fits(config, coder)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if values not in VALUES:
        raise InputError(f"values are stored as {' or '.join(VALUES)}, not {values!r}")
    if precision not in on_device.PRECISIONS:
        raise InputError(f"precision is {', '.join(on_device.PRECISIONS)}, not {precision!r}")
    if not 0 <= share[0] < share[1]:
        raise InputError(f"share {share}: must be (i, n) with 0 <= i < n")
    if not 2 <= context_size <= config.context:
        raise InputError(f"context_size {context_size}: {config.name} takes 2 to {config.context}")
    for name, value in {"batch_size": batch_size, "slots": slots, "tokens": tokens}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    if folder is not None:
        check_writable(folder)


def job_of(
    model: Model,
    named: Mapping[str, Coder],
    tokenizer: Tokenizer,
    source: Any,
    *,
    batch_size: int | None = None,
    context_size: int = 1024,
    seed: int | None = 0,
    values: str = "float16",
    slots: int | None = None,
    precision: str = "highest",
    shard_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> manifests.ExtractionJob:
    """The settings of an extraction, checked."""
    check_extraction(
        model.config, named, batch_size=batch_size, context_size=context_size, values=values,
        slots=slots, precision=precision, share=share,
    )  # fmt: skip
    batch_size = _batch_size_for(model, context_size) if batch_size is None else batch_size
    hosts.check(model, batch_size)
    widest = max(coder.width for coder in named.values())
    slots = on_device.slots_for(list(named.values())) if slots is None else slots
    return manifests.ExtractionJob(
        text=open_text(source, fit_tokenizer(tokenizer, model.config), seed),
        batch_size=batch_size, context_size=context_size, values=values,
        slots=min(slots, widest), precision=precision,
        shard_tokens=shard_tokens,
        model=model_identity(model), coders=[manifests.describe(n, c) for n, c in named.items()],
    )  # fmt: skip


def _batch_size_for(model: Model, context_size: int) -> int:
    """Sequences of a batch that keep a device busy."""
    size = max(1, (2048 if jax.default_backend() == "cpu" else 32768) // context_size)
    mesh = mesh_of(model.params.embed)
    own = 1 if mesh is None else mesh.shape["data"] // hosts.count_of(model)
    return -(-size // own) * own


def _check_room(path: Any, named: Mapping[str, Coder], plan: ShardPlan, shards: int, values: str):
    if is_remote(path):
        return
    free, needed = (
        shutil.disk_usage(path).free,
        shards * plan.per_shard * plan.mean * plan.share * token_bytes(named, values),
    )
    if needed > free:
        raise InputError(
            f"{path}: {shards} shards need about {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are "
            "free; free some, or extract fewer tokens"
        )


def token_bytes(coders: Mapping[str, Coder], values: str) -> float:
    """About how many bytes of the store a token that counts takes: its id, and of each active
    feature the token and the activation."""
    entry = {"float16": 3.2, "float32": 4.8}[values]
    l0 = sum(c.info.l0 or 64.0 for c in coders.values())
    return 3.0 + entry * l0


# -------------------------------------------------------------------------------------------------
# Running


def _write(
    model,
    coders,
    path,
    plan: ShardPlan,
    shards: list[int],
    job: "manifests.ExtractionJob",
    trace: StepTrace,
) -> None:
    """Make `shards`; the device computes a batch while the host stores the one before."""
    runner = Runner(model, coders, job.slots, job.precision)
    first = min(c.first for c in coders.values())  # a coder's own is heeded on the device
    progress, done = Progress(int(sum(map(plan.in_shard, shards)) * plan.mean)), 0
    threads = min(16, os.cpu_count() or 1)
    behind = max(1, threads // 2)  # batches that are turned into entries behind the device
    manifest = manifests.read_features_manifest(path)
    store, lists, closing = manifests.store_digest(manifest), manifests.lists(manifest), None
    ahead = max(1, min(4, threads // len(lists)))
    with (
        ThreadPoolExecutor(threads, "code") as pool,
        ThreadPoolExecutor(behind, "entries") as workers,
        ThreadPoolExecutor(1, "disk") as disk,
        prefetch(plan.batches(shards)) as batches,
    ):
        if runner.hosts > 1:
            results = _results_in_step(runner, batches, job)
        else:
            results = _results(runner, batches, workers, behind)
        for shard in shards:
            with ShardWriter(path, shard, lists, job.values, pool, ahead) as writer:
                for packed, entries in results:
                    if isinstance(packed, Ended):
                        break
                    tokens, counted = _rows(packed, first)
                    writer.add(tokens, counted, packed.pieces, entries)
                    done += len(tokens)
                    progress.at(done)
                    trace.done()
                else:
                    raise InputError(f"the text has changed: shard {shard} has no documents now")
                if closing is not None:
                    closing.result()
                about = {"store": store, "documents": packed.documents}
                closing = disk.submit(writer.close, **about)
        for _ in results:  # other hosts' batches, which all run
            pass
        if closing is not None:
            closing.result()
    if runner.again > 10:
        LOG.info(
            "%d batches had to run again: more slots than %d are faster", runner.again, job.slots
        )


def _results(
    runner: Runner, batches: Any, workers: ThreadPoolExecutor, most: int
) -> Iterator[tuple[Packed | Ended, Any]]:
    """(batch, its entries), and (`Ended`, None), in order.

    Up to `IN_FLIGHT` batches are on the device, and `most` behind it are turned into entries.
    """
    waiting: collections.deque = collections.deque()
    for event, _ in batches:
        if isinstance(event, Ended):
            waiting.append((event, None))
            continue
        batch = event.batch
        started = runner.start(batch)
        kept = np.flatnonzero(batch.segments)
        waiting.append((event, workers.submit(runner.finish, started, kept)))
        while len(waiting) > most + 1:
            packed, future = waiting.popleft()
            yield packed, None if future is None else future.result()
    while waiting:
        packed, future = waiting.popleft()
        yield packed, None if future is None else future.result()


def _results_in_step(
    runner: Runner, batches: Any, job: "manifests.ExtractionJob"
) -> Iterator[tuple[Packed | Ended, Any]]:
    """`_results` where all hosts run one program: each runs as many batches as the one with most.

    What is run again for want of slots is decided by all alike, so all start the same programs in
    the same order.
    """
    zeros = np.zeros((job.batch_size, job.context_size), np.int32)
    blank = TokenBatch(zeros, zeros, zeros > 0)
    waiting: collections.deque = collections.deque()
    for event in hosts.in_step(event for event, _ in batches):
        if isinstance(event, Ended):
            waiting.append((event, None))
            continue
        batch = blank if event is None else event.batch
        started = runner.start(batch), np.flatnonzero(batch.segments)
        while waiting:
            yield from _finished(runner, *waiting.popleft())
        waiting.append((event, started))
    while waiting:
        yield from _finished(runner, *waiting.popleft())


def _finished(runner: Runner, event: Packed | Ended | None, started: Any) -> Iterator[tuple]:
    entries = None if started is None else runner.finish(*started)
    if event is not None:
        yield event, entries


def _rows(packed: Packed, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] of a batch without its padding, and which count, bool [n]."""
    kept = np.flatnonzero(packed.batch.segments)
    positions = np.concatenate([np.arange(n) for n in packed.pieces[:, 2]])
    counted = packed.batch.mask.reshape(-1)[kept] & (positions >= first)
    return packed.batch.tokens.reshape(-1)[kept], counted
