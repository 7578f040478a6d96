"""The training loop: activations in, coders in the published layout out; a run can be killed and
resumed at any point.

A run folder holds `config.json` (the resolved recipe), `log.jsonl` (a line every few seconds),
`checkpoints/` (Orbax) and, once finished, `coders/`: a folder with a model card for each coder.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gemma_scope_jax.coders.coder import Coder
from gemma_scope_jax.data.activations.files import DTYPES, local_folder
from gemma_scope_jax.data.activations.store import write_activations
from gemma_scope_jax.data.document_files import text_files
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.load import load_model, model_config
from gemma_scope_jax.model.config import GemmaConfig, Model, abstract_params
from gemma_scope_jax.model.profile import StepTrace
from gemma_scope_jax.model.sharding import make_mesh, own_mesh
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.paths import folder_path
from gemma_scope_jax.storage.strict_json import read_json
from gemma_scope_jax.training import ends
from gemma_scope_jax.training.card import write_card
from gemma_scope_jax.training.checkpoints import Checkpoints, everywhere
from gemma_scope_jax.training.feeds import StoreFeed, TextFeed, token_batches
from gemma_scope_jax.training.log import TrainLog
from gemma_scope_jax.training.measure import log_saved, save_measured
from gemma_scope_jax.training.recipe import CoderConfig, TrainConfig, as_json
from gemma_scope_jax.training.state import (
    TrainPlan,
    TrainState,
    abstract_state,
    first_state,
    make_plan,
)

LOG = logging.getLogger(__name__)
STOPPED = 143  # exit status after SIGTERM or Ctrl-C, as of a process ended by SIGTERM
AGREE_EVERY = 8  # passes after which hosts agree whether to save or stop


@own_mesh
def train(
    config: TrainConfig,
    out: str | os.PathLike,
    model: Model | None = None,
    data: Any = None,
    profile: str | os.PathLike | None = None,
) -> dict[str, Coder]:
    """Train all coders of `config`; continue if `out` holds a run of it. Returns them by folder.

    The coders are also written to `out`/coders in the published layout. `data` may be any iterable
    of strings, or a function that returns one, in place of `config.data`. `profile` is an empty
    folder for a trace of a few passes. SIGTERM and Ctrl-C save a checkpoint and exit with status
    143. Raises `InputError` for data, models and folders that do not fit.
    """
    out, config = folder_path(out), config.resolved
    with _only_run(out), StepTrace(profile) as trace:
        _check_folder(config, out)
        mesh = run_mesh(config)
        starts = check_inputs(config, model and model.config, data)
        if model is None and config.store:  # shapes are enough
            shape = model_config(config.model)
            model = Model(abstract_params(shape, config.model_dtype), shape)
        elif model is None:
            model = load_model(config.model, dtype=config.model_dtype, mesh=mesh)
        plan = make_plan(config, model.config, mesh)
        feed = StoreFeed(plan, model) if config.store else TextFeed(plan, model, data)
        run = _TrainRun(config, out, plan, model.config, feed, starts, trace)
        try:
            return run.finish(*run.loop())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError(
                f"{out}: no room left on the disk ({error}); checkpoints written before are whole, "
                "so make room and run the same command again"
            ) from error


@contextlib.contextmanager
def _only_run(out: epath.Path) -> Iterator[None]:
    """Hold the lock of the run's folder: the first host takes it, and tells the others."""
    with contextlib.ExitStack() as held:
        refused = None
        if jax.process_index() == 0:
            try:
                held.enter_context(only_writer(out))
            except InputError as error:
                refused = error
        if not everywhere(refused is None):
            raise refused or InputError(f"{out}: the first host cannot write there")
        yield


@own_mesh
def store_activations(
    config: TrainConfig,
    folder: str | os.PathLike,
    tokens: int | None = None,
    dtype: str = "bfloat16",
    model: Model | None = None,
    data: Any = None,
) -> None:
    """Write the activations that the coders of `config` read and write to a store; resumable.

    `tokens` is the number of activations; default: the config's. See `data.activations.store`.
    """
    if dtype not in DTYPES:
        raise InputError(f"activations are stored as {' or '.join(DTYPES)}, not {dtype!r}")
    if (count := config.tokens if tokens is None else tokens) < 1:
        raise InputError(f"tokens {count}: must be at least 1")
    folder = local_folder(folder)
    check_inputs(config, model and model.config, data, reads_text=True)
    model = model or load_model(config.model, dtype=config.model_dtype)
    sites = dict(make_plan(config, model.config).sites)
    batches = token_batches(config, model.config, data)
    write_activations(model, batches, sites, folder, tokens=count, dtype=dtype, first=config.first)


def run_mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of a run; None for one device."""
    if config.mesh is not None:
        for name in ("train_batch_size",) if config.store else ("train_batch_size", "batch_size"):
            if (size := getattr(config.resolved, name)) % (count := config.mesh[0]):
                raise InputError(
                    f"{name} {size} must be a multiple of the {count} devices of its mesh axis"
                )
        return make_mesh(*config.mesh) if config.mesh != (1, 1) else None
    devices = jax.devices()
    alone = len(devices) == 1 or (devices[0].platform == "cpu" and jax.process_count() == 1)
    return None if alone else make_mesh(1, len(devices))


def check_inputs(
    config: TrainConfig,
    shape: GemmaConfig | None = None,
    data: Any = None,
    *,
    reads_text: bool | None = None,
) -> dict[str, Any]:
    """Raise `InputError` for what is known to be wrong before a model is loaded: layers, sites,
    missing text, coders to start from that do not fit. Returns the latter, from `load_starts`.

    shape: the model's; default: that of `config.model`. data: text in place of the config's.
    reads_text: whether text is read at all; default: unless the config has a `store`.
    """
    shape = shape or model_config(config.model)
    for coder in config.coders:
        for layer in coder.layer_tuple:
            if not 0 <= layer < shape.layers:
                raise InputError(f"layer {layer}: the model has 0..{shape.layers - 1}")
    make_plan(config, shape)  # raises for unknown sites
    reads_text = not config.store if reads_text is None else reads_text
    if reads_text and data is None and not config.data.tfds:
        if not config.data.files:
            raise InputError("no text given: name files or a TFDS dataset")
        text_files(config.data.files)
    return ends.load_starts(config)


# Fields that do not affect results, or whose content is compared instead (`_TrainRun.check_same`).
FREE = ("checkpoint_every", "keep", "track", "mesh", "model", "store")
WHERE = ("files", "tfds_folder")  # in `data`: where the text is


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The fields in which two configs in JSON lead to different results; a field that the older one
    lacks has its default there."""
    default = TrainConfig((CoderConfig(0),), store="any", tokens=here["tokens"]).resolved
    default = json.loads(json.dumps(as_json(default)))
    for config in (there, here):  # checkpoints identify the text by its content
        if isinstance(config.get("data"), dict):
            config["data"] = {k: v for k, v in config["data"].items() if k not in WHERE}

    def whole(given: Any, default: Any) -> Any:
        if isinstance(default, dict) and isinstance(given, dict):
            return given | {k: whole(given.get(k, v), v) for k, v in default.items()}
        if isinstance(default, list) and default and isinstance(default[0], dict):
            return [whole(one, default[0]) for one in given]
        return given

    there, here = whole(there, default), whole(here, default)
    other = [k for k in there if k not in FREE and there[k] != here.get(k)]
    return other + ["store"] * (bool(there["store"]) != bool(here["store"]))


def _check_folder(config: TrainConfig, out: epath.Path) -> None:
    """Raise `InputError` if the folder holds a run of another config."""
    file = out / "config.json"
    if not file.exists():
        return
    try:
        there = read_json(file)
        other = _differences(dict(there), json.loads(json.dumps(as_json(config))))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{file}: damaged; choose another folder") from error
    if other:
        fields = ", ".join(other)
        raise InputError(
            f"{out} holds a run of another config ({fields} differ): choose another folder"
        )


def _remember_config(config: TrainConfig, out: epath.Path, fresh: bool) -> None:
    if jax.process_index() or ((out / "config.json").exists() and not fresh):
        return
    write_text(out / "config.json", json.dumps(as_json(config), indent=1) + "\n")


@dataclasses.dataclass
class _TrainRun:
    """One run: all that the loop needs, except for the state."""

    config: TrainConfig
    out: epath.Path
    plan: TrainPlan
    shape: GemmaConfig
    feed: TextFeed | StoreFeed
    starts: dict[str, Any]
    trace: StepTrace
    stop: bool = False
    readings: int = 1

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.out / "checkpoints", self.config.keep)

    def check_same(self, made_with: dict[str, Any] | None) -> None:
        """Refuse to continue with another model than the run began with; `batches` checks the data.

        Older checkpoints do not identify the weights: there, the model's name must be the same.
        """
        there, here = made_with, self.feed.made_with
        if there is None:
            there = {"name": read_json(self.out / "config.json").get("model")}
            here = {"name": self.config.model}
        if there != here:
            said = (", ".join(map(str, model.values())) for model in (there, here))
            raise InputError(
                f"{self.out}: the run began with another model ({next(said)}; this is "
                f"{next(said)}); give it that one, or train into another folder"
            )

    def loop(self) -> tuple[TrainState, int]:
        """(the last state, passes done)."""
        config, feed = self.config, self.feed
        if found := self.checkpoints.restore(abstract_state(self.plan, self.shape)):
            state, done, position, made_with = found
            self.check_same(made_with)
        else:
            state, done, position = first_state(self.plan, self.shape), 0, None
        parts, self.saved, started = None, time.monotonic(), int(state.total) > 0
        self.said_again = position is not None and feed.readings(position, done) > 1
        with _signals(self._stop), feed.batches(position, done) as data:
            _remember_config(config, self.out, fresh=found is None)
            progress = TrainLog(config, self.out, done)
            while done < config.passes:
                if not started and feed.ready(state):
                    state, started = self.start(state, done), True
                batch, position = next(data, (None, position))
                self._say_again(done, position)
                if batch is None:  # the text was given as an iterator, and has ended
                    read = f"{done * config.tokens_a_pass:,} of {config.tokens:,} tokens"
                    decays = bool(config.optimizer.decay)
                    more = "; the learning rate had not come down" if decays else ""
                    LOG.warning("the text ended at %s%s", read, more)
                    break
                state, new = feed.step(state, batch, started)
                jax.block_until_ready(parts)  # the host is never more than one pass ahead
                parts, done = new or parts, done + 1
                if started:
                    self.trace.done(parts)
                if progress.due() or done == config.passes:
                    progress.report(done, int(state.update), parts, self.plan.groups)
                stop, save = self._due(done)
                if stop or save:
                    self.checkpoints.save(done, state, position, feed.made_with, wait=stop)
                if stop and done < config.passes:
                    progress.flush()
                    self.checkpoints.close()
                    LOG.warning("stopped at pass %d; run the same command to continue", done)
                    raise SystemExit(STOPPED)
            progress.flush()
        if not started:
            raise InputError(
                f"the text filled {int(state.filled)} of the buffer's {config.buffer} slots, so "
                "nothing was trained: give more text or a smaller buffer"
            )
        self.checkpoints.save(done, state, position, feed.made_with, wait=True)
        self.checkpoints.close()
        self.readings = feed.readings(position, done)
        return state, done

    def _say_again(self, done: int, position: Any) -> None:
        """Warn once when the data, which are fewer than the run asks for, are read again."""
        if self.said_again or self.feed.readings(position, done + 1) < 2:
            return
        self.said_again = True
        if jax.process_index() == 0:
            read, what = f"{done * self.config.tokens_a_pass:,}", self.config.store or "the text"
            LOG.warning("%s has been read once, at %s tokens, and is read again", what, read)

    def start(self, state: TrainState, done: int) -> TrainState:
        state = ends.start(self.plan, state, self.feed.sample(state), self.starts)
        self.starts = {}
        total = (self.config.passes - done) * self.config.updates
        return dataclasses.replace(state, total=jnp.full_like(state.total, total))

    def _stop(self, *_: Any) -> None:
        self.stop = True

    def _due(self, done: int) -> tuple[bool, bool]:
        """(whether to stop, whether to save) now, the same on every host."""
        save = time.monotonic() - self.saved > self.config.checkpoint_every
        if jax.process_count() > 1:
            if done % AGREE_EVERY:
                return False, False
            flags = multihost_utils.process_allgather(np.array([self.stop, save]))
            self.stop, save = (bool(f) for f in flags.any(0))
        if save:
            self.saved = time.monotonic()
        return self.stop, save

    def finish(self, state: TrainState, done: int) -> dict[str, Coder]:
        """Write every coder and its card; returns them by folder."""
        tokens, log = done * self.config.tokens_a_pass, self.out / "log.jsonl"
        sample = self.feed.held_out(state)
        apart = next(iter(sample.values())).shape[1] > 1
        if not apart:  # of so little text, none was held out
            sample = ends.some(self.feed.sample(state), ends.SAMPLE)
        apart &= self.feed.repeats < 2  # the last rows of a store may be copies of the first
        # Every other token sets thresholds, the others give the figures.
        found = ends.coders(self.plan, state, {site: rows[:, ::2] for site, rows in sample.items()})
        both = found, {site: rows[:, 1::2] for site, rows in sample.items()}
        if jax.process_count() > 1:  # each array whole on every host
            whole = partial(multihost_utils.process_allgather, tiled=True)
            both = jax.tree.map(whole, both)
        found, sample = both
        if jax.process_index() == 0:
            sites = dict(self.plan.sites)
            saved, refused = save_measured(found, self.out / "coders", sample, sites, apart)
            log_saved(log, tokens, saved)
            for name in saved:
                times = (self.readings, self.feed.repeats)
                write_card(self.out / "coders" / name, name, self.config, log, tokens, times)
            if refused:
                raise InputError(
                    f"not saved after {tokens:,} tokens: {'; '.join(refused)}; train into another "
                    "folder, with a lower learning rate"
                )
        return found


@contextlib.contextmanager
def _signals(handler: Callable[..., None]) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C end the run after the current step, a second one at once."""

    def interrupted(*args):
        handler(*args)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = [signal.signal(signal.SIGTERM, handler), signal.signal(signal.SIGINT, interrupted)]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old[0])
        signal.signal(signal.SIGINT, old[1])
