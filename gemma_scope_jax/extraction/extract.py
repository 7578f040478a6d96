"""Sparse features of a text, by the billion: model, coders and text in, a store of activations out.

    store = extract(model, {"sae": sae}, tokenizer, TextData(("*.txt",)), "store", tokens=10**6)

The device runs a batch while the host writes the previous one. Each shard is either complete or
absent, so after a kill the same call continues, and several processes can each make every n-th
shard (`share`) of one folder, local or gs://. Processes of one JAX program share the shards
automatically; if they also share a mesh, they run in step, each on its own rows.
"""

import collections
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from gemma_scope_jax.coders import active_features as on_device
from gemma_scope_jax.coders.coder import Coder, check_fits
from gemma_scope_jax.coders.coder_set import CoderSet
from gemma_scope_jax.data.documents import Source
from gemma_scope_jax.data.prefetch import prefetch
from gemma_scope_jax.errors import InputError, no_space, reason
from gemma_scope_jax.extraction import hosts
from gemma_scope_jax.extraction import manifest as manifests
from gemma_scope_jax.extraction.manifest import ExtractionJob, ExtractionSettings
from gemma_scope_jax.extraction.runner import Runner
from gemma_scope_jax.extraction.store.codec import VALUES, Entries
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
Coders = Mapping[str, Coder] | Sequence[Coder] | Coder
Result = tuple[Packed | Ended, list[Entries] | None]  # a batch and its entries, or a shard's end
Started = tuple[Packed | Ended | None, Callable[[], list[Entries]] | None]  # waits for the entries


@own_mesh
def extract(
    model: Model,
    coders: Coders,
    tokenizer: Tokenizer,
    source: Source,
    folder: str | os.PathLike,
    *,
    tokens: int | None = None,
    profile: str | os.PathLike | None = None,
    **settings: Any,
) -> FeatureStore:
    """Store the active features of `coders` on a text; returns the store.

    coders     by name; without names they are called by their addresses
    source     a `TextData`, a list of strings, a function returning an iterable, a `TokenBatch`
    folder     the same call continues a store begun there; more `tokens` extend it
    tokens     about how many tokens to read in whole documents, `<bos>` included; None: all
    profile    an empty folder for a trace of a few batches
    settings   fields of `ExtractionSettings`: batch_size, context_size, seed, values, slots, ...

    Tokens before a coder's `first` in each piece, and those that the data excludes, have no
    features. Raises `InputError` for what does not fit: a coder, another store in the folder, a
    full disk, activations that are not finite.
    """
    trace, named, wanted = StepTrace(profile), CoderSet(coders), ExtractionSettings(**settings)
    index, count = wanted.share
    if wanted.share == (0, 1):
        index, count = jax.process_index(), jax.process_count()
    job = job_of(model, named, tokenizer, source, wanted)
    path = folder_path(folder)
    try:
        with in_turn(path):  # several processes fill the folder, and must agree on its content
            plan = manifests.agree(path, job, tokens)
            left = manifests.missing(path, plan)
            if left:
                (path / manifests.INDEX).unlink(missing_ok=True)
        mine = [shard for shard in left if shard % count == index]
        if mine or hosts.count_of(model) > 1:
            _check_room(path, plan, len(mine), token_bytes(named, wanted.values))
            with trace:
                runner = Runner(model, dict(named.items()), job.slots, wanted.precision)
                _write(runner, path, plan, mine, trace)
        hosts.wait(model)
        with in_turn(path):
            manifests.finish(path, plan)
    except InputError:
        raise
    except OSError as error:
        if no_space(error):
            why = "no space left; free some and run the same again: whole shards stay"
            raise InputError(f"{path}: {why}") from error
        raise InputError(f"{path}: {error.strerror or error}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        hint = "take a smaller batch_size, fewer coders at a time, or a mesh"
        raise InputError(f"the device is out of memory: {hint} ({reason(error)})") from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise InputError(f"{path}: {reason(error)}") from error  # the cloud clients' own types
    return FeatureStore(path)


def check_extraction(
    config: GemmaConfig,
    coders: Coders,
    folder: str | os.PathLike | None = None,
    tokenizer: Tokenizer | None = None,
    source: Source | None = None,
    *,
    tokens: int | None = None,
    **settings: Any,
) -> None:
    """Raise the `InputError`s of `extract` that need no weights, only the model's architecture.

    With the tokenizer and the text, these include a store of another text or other coders.
    """
    given = ExtractionSettings(**settings)
    for name, coder in CoderSet(coders).items():
        try:
            check_fits(config, coder)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    if given.values not in VALUES:
        raise InputError(f"values are stored as {' or '.join(VALUES)}, not {given.values!r}")
    if given.precision not in on_device.PRECISIONS:
        known = ", ".join(on_device.PRECISIONS)
        raise InputError(f"precision must be one of {known}, not {given.precision!r}")
    if not 0 <= given.share[0] < given.share[1]:
        raise InputError(f"share {given.share}: must be (i, n) with 0 <= i < n")
    if not 2 <= given.context_size <= config.context:
        size = given.context_size
        raise InputError(f"context_size {size}: {config.name} takes 2 to {config.context}")
    limits = {"batch_size": given.batch_size, "slots": given.slots, "tokens": tokens}
    limits["shard_tokens"] = given.shard_tokens
    for name, value in limits.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    if folder is None:
        return
    check_writable(folder)
    path = folder_path(folder)
    try:
        if tokenizer is not None and source is not None and (path / manifests.MANIFEST).exists():
            text = open_text(source, fit_tokenizer(tokenizer, config), given.seed)
            named = [manifests.describe(name, coder) for name, coder in CoderSet(coders).items()]
            there = manifests.read_features_manifest(path)
            manifests.check_same(path, there, {"coders": named}, text)
    except Exception as error:
        if isinstance(error, InputError) or not is_remote(path):
            raise
        raise InputError(f"{path}: {reason(error)}") from error  # the cloud clients' own types


def job_of(
    model: Model,
    coders: CoderSet,
    tokenizer: Tokenizer,
    source: Source,
    settings: ExtractionSettings,
) -> ExtractionJob:
    """The extraction with all settings checked and decided."""
    check_extraction(model.config, coders, **dataclasses.asdict(settings))
    batch_size, slots = settings.batch_size, settings.slots
    if batch_size is None:  # as many sequences as keep a device busy
        size = (2048 if jax.default_backend() == "cpu" else 32768) // settings.context_size
        mesh = mesh_of(model.params.embed)
        rows = 1 if mesh is None else mesh.shape["data"] // hosts.count_of(model)
        batch_size = -(-max(1, size) // rows) * rows
    hosts.check(model, batch_size)
    slots = on_device.slots_for(list(coders)) if slots is None else slots
    return ExtractionJob(
        text=open_text(source, fit_tokenizer(tokenizer, model.config), settings.seed),
        settings=settings,
        batch_size=batch_size,
        slots=min(slots, max(coder.width for coder in coders)),
        model=model_identity(model),
        coders=[manifests.describe(name, coder) for name, coder in coders.items()],
    )


def _check_room(path: epath.Path, plan: ShardPlan, shards: int, each: float) -> None:
    """Raise `InputError` unless the disk has room for so many shards, `each` bytes per token."""
    if is_remote(path):
        return
    free = shutil.disk_usage(path).free
    needed = shards * plan.per_shard * plan.mean * plan.share * each
    if needed > free:
        raise InputError(
            f"{path}: {shards} shards need about {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are "
            "free; free some, or extract fewer tokens"
        )


def token_bytes(coders: Iterable[Coder], values: str) -> float:
    """The approximate bytes per token in the store: its id, and a token number and an activation
    for each active feature."""
    entry = {"float16": 3.2, "float32": 4.8}[values]
    return 3.0 + entry * sum(coder.info.l0 or 64.0 for coder in coders)


# --- Running -------------------------------------------------------------------------------------


def _write(
    runner: Runner, path: epath.Path, plan: ShardPlan, shards: list[int], trace: StepTrace
) -> None:
    """Make `shards`; the device computes a batch while the host stores the previous one."""
    manifest = manifests.read_features_manifest(path)
    first = min(coder["first"] for coder in manifest["coders"])  # the device applies each coder's
    progress, done = Progress(int(sum(map(plan.in_shard, shards)) * plan.mean)), 0
    threads = min(16, os.cpu_count() or 1)
    behind = max(1, threads // 2)  # batches behind the device that are turned into entries
    store, lists, closing = manifests.store_digest(manifest), manifests.lists(manifest), None
    ahead = max(1, min(4, threads // len(lists)))
    with (
        ThreadPoolExecutor(threads, "code") as pool,
        ThreadPoolExecutor(behind, "entries") as workers,
        ThreadPoolExecutor(1, "disk") as disk,
        prefetch(plan.batches(shards)) as batches,
    ):
        events = (event for event, _ in batches)
        if runner.hosts > 1:
            results = _results(_started(runner, hosts.in_step(events), plan, None), 1)
        else:
            results = _results(_started(runner, events, plan, workers), behind + 1)
        for shard in shards:
            with ShardWriter(path, shard, lists, manifest["values"], pool, ahead) as writer:
                for packed, entries in results:
                    if isinstance(packed, Ended):
                        break
                    tokens, counted = _rows(packed, first)
                    writer.add(tokens, counted, packed.pieces, entries or [])
                    done += len(tokens)
                    progress.at(done)
                    trace.done()
                else:
                    raise InputError(f"the text has changed: shard {shard} has no documents now")
                if closing is not None:
                    closing.result()
                closing = disk.submit(writer.close, store=store, documents=packed.documents)
        for _ in results:  # the other hosts' batches, which all processes run
            pass
        if closing is not None:
            closing.result()
    if runner.again > 10:
        hint = "%d batches had to run again: more than %d slots would be faster"
        LOG.info(hint, runner.again, runner.slots)


def _started(
    runner: Runner,
    events: Iterable[Packed | Ended | None],
    plan: ShardPlan,
    workers: ThreadPoolExecutor | None,
) -> Iterator[Started]:
    """Start each batch (None: one of padding). Its entries are made by `workers`, or when asked."""
    zeros = np.zeros((plan.batch_size, plan.context_size), np.int32)
    for event in events:
        if isinstance(event, Ended):
            yield event, None
            continue
        batch = TokenBatch(zeros, zeros, zeros > 0) if event is None else event.batch
        finish = partial(runner.finish, runner.start(batch), np.flatnonzero(batch.segments))
        yield event, finish if workers is None else workers.submit(finish).result


def _results(started: Iterable[Started], most: int) -> Iterator[Result]:
    """The batches and their entries, in order, with up to `most` batches behind the device.

    Batches are finished only after another has started: so hosts in step, which decide alike which
    batches run again with more slots, start the same programs in the same order.
    """
    waiting: collections.deque[Started] = collections.deque()

    def finished(left: int) -> Iterator[Result]:
        while len(waiting) > left:
            event, entries = waiting.popleft()
            found = None if entries is None else entries()
            if event is not None:
                yield event, found

    for event, entries in started:
        waiting.append((event, entries))
        if entries is not None:
            yield from finished(most)
    yield from finished(0)


def _rows(packed: Packed, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n] of a batch without its padding, and which have features, bool [n]."""
    kept = np.flatnonzero(packed.batch.segments)
    positions = np.concatenate([np.arange(n) for n in packed.pieces[:, 2]])
    counted = packed.batch.mask.reshape(-1)[kept] & (positions >= first)
    return packed.batch.tokens.reshape(-1)[kept], counted
