"""The training loop: batches in, a published-layout folder out; can be killed and resumed anywhere.

A run folder holds `config.json` (the resolved recipe), `log.jsonl` (a line every few seconds),
`checkpoints/` (Orbax, the last two) and, once finished, `coder/` in the published layout.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma_scope_jax.coders.gemma_scope_files import save_coder
from gemma_scope_jax.coders.sparse_coder import CoderInfo, SparseCoder
from gemma_scope_jax.data.text import TokenBatch, pack, read_documents, shuffled
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.checkpoints.load import load_model
from gemma_scope_jax.model.config import Model
from gemma_scope_jax.model.tokenizer import Tokenizer, load_tokenizer
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training.recipe import TrainConfig

LOG_EVERY = 10.0  # seconds


def load_config(path: str | os.PathLike) -> TrainConfig:
    """The `config` of a configs/*.py file. Raises `InputError` if there is none."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: must set `config` to a TrainConfig")
    return config


def batches(config: TrainConfig, tok: Tokenizer) -> Iterator[TokenBatch]:
    """The packed token batches of a run, without end: a function of the config alone."""
    documents = shuffled(read_documents(config.data), config.seed)
    encode = lambda text: tok.encode(text, bos=False)
    return pack(documents, encode, config.rows, config.length, tok.bos_id)


def train(config: TrainConfig, out: str | os.PathLike, model: Model | None = None) -> SparseCoder:
    """Train one SAE; continue if `out` holds a run of the same config. Returns it folded.

    The folded coder is also written to `out`/coder. SIGTERM and Ctrl-C save a checkpoint and leave.
    Raises `InputError` for data, models and folders that do not fit.
    """
    out = Path(out).expanduser().absolute()
    model = model or load_model(config.model, dtype=config.model_dtype)
    if not 0 <= config.layer < model.config.layers:
        raise InputError(f"layer {config.layer}: the model has 0..{model.config.layers - 1}")
    _remember_config(config, out)
    state = steps.init_state(config, model.config, jax.random.key(config.seed))
    run = _Run(config, out)
    state, done = run.restore(state)
    data = itertools.islice(batches(config, load_tokenizer(config.model)), done, config.passes)
    state = run.loop(model, state, data, done)
    sae = coder(config, state)
    save_coder(sae, out / "coder")
    print(f"{out / 'coder'}", flush=True)
    return sae


def coder(config: TrainConfig, state: steps.TrainState) -> SparseCoder:
    """The coder of a training state in the published form, with its published config."""
    sae = steps.fold(state.weights, state.scale, layer=config.layer, site=config.site)
    name = config.model if "/" in config.model else f"google/{config.model}"
    return dataclasses.replace(
        sae, info=CoderInfo(model_name=name, type="sae", l0=config.target_l0, width=config.width)
    )


def _remember_config(config: TrainConfig, out: Path) -> None:
    text = json.dumps(dataclasses.asdict(config), indent=1)
    file = out / "config.json"
    if file.exists() and json.loads(file.read_text()) != json.loads(text):
        raise InputError(f"{out} holds a run of another config: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


class _Run:
    """Checkpoints, log and progress of one run: what the loop needs beside the state."""

    def __init__(self, config: TrainConfig, out: Path):
        import orbax.checkpoint as ocp

        self.config, self.out, self.stop = config, out, False
        self.args = ocp.args
        self.manager = ocp.CheckpointManager(
            out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def restore(self, state: steps.TrainState) -> tuple[steps.TrainState, int]:
        """The newest checkpoint and how many passes it has seen, or the state given and 0."""
        done = self.manager.latest_step()
        if done is None:
            return state, 0
        restored: Any = self.manager.restore(done, args=self.args.StandardRestore(_raw(state)))
        return _keyed(restored), done

    def save(self, done: int, state: steps.TrainState) -> None:
        if self.manager.latest_step() != done:
            self.manager.save(done, args=self.args.StandardSave(_raw(state)))
            self.manager.wait_until_finished()

    def loop(self, model: Model, state, data: Iterator[TokenBatch], done: int):
        config = self.config
        fill = jax.jit(partial(steps.fill_step, config=config), donate_argnums=0)
        train_step = jax.jit(partial(steps.train_step, config=config), donate_argnums=0)
        start = jax.jit(partial(steps.start, config=config), donate_argnums=0)
        old = signal.signal(signal.SIGTERM, self._asked_to_stop)
        began, begun, saved, logged, parts = time.time(), done, time.time(), 0.0, {}
        try:
            for batch in data:
                tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segments)
                if done < config.fill_passes:
                    state = fill(state, model, tokens, segments)
                    if done == config.fill_passes - 1:
                        state = start(state)
                else:
                    state, parts = train_step(state, model, tokens, segments)
                done += 1
                now = time.time()
                if now - logged > LOG_EVERY or done == config.passes:
                    jax.block_until_ready(state.update)
                    self._log(done, begun, time.time() - began, state, parts)
                    logged = time.time()
                if self.stop or time.time() - saved > config.checkpoint_every:
                    self.save(done, state)
                    saved = time.time()
                if self.stop:
                    raise SystemExit(f"stopped at pass {done}; run the same command to go on")
        except KeyboardInterrupt:
            self.save(done, state)
            raise
        finally:
            signal.signal(signal.SIGTERM, old)
        self.save(done, state)
        return state

    def _asked_to_stop(self, *_) -> None:
        self.stop = True

    def _log(self, done: int, begun: int, seconds: float, state, parts) -> None:
        c, per_pass = self.config, self.config.rows * self.config.length
        rate = (done - begun) * per_pass / seconds
        row: dict[str, float] = {"tokens": done * per_pass, "update": int(state.update)}
        row |= {"tokens_per_s": round(rate, 1)}
        row |= {k: round(float(v), 5) for k, v in parts.items()}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        left = (c.passes - done) * per_pass / max(rate, 1e-9) / 60
        shown = " ".join(f"{k} {v}" for k, v in row.items())
        print(f"{100 * done / c.passes:5.1f} %  {shown}  {left:.0f} min left", file=sys.stderr)


def _raw(state: steps.TrainState) -> steps.TrainState:
    """Typed keys as their data, which checkpoints can hold."""
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def _keyed(state: steps.TrainState) -> steps.TrainState:
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
