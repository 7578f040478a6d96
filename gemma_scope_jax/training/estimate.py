"""What a training run would take, before it starts: tokens, updates, memory, disk."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch, TokenLabels
from gemma_scope_jax.model.checkpoints.load import model_config
from gemma_scope_jax.model.config import GemmaConfig, Model, abstract_params
from gemma_scope_jax.model.gemma import site_width
from gemma_scope_jax.progress import byte_size
from gemma_scope_jax.storage.paths import existing_parent, folder_path, is_remote
from gemma_scope_jax.training.feeds import store_step, train_step
from gemma_scope_jax.training.held_out import SIDES
from gemma_scope_jax.training.recipe import TrainConfig
from gemma_scope_jax.training.state import TrainPlan, TrainState, abstract_state, make_plan
from gemma_scope_jax.training.train import check_inputs, run_mesh


@dataclasses.dataclass(frozen=True)
class TrainEstimate:
    """The result of `plan_training`; sizes in bytes, `memory` from the compiler. As text, a few
    lines."""

    coders: int
    tokens: int  # read by the model; with a store, activations drawn
    passes: int  # calls of the compiled step
    updates: int  # of the optimizer
    memory: int  # of a device: the model's weights, the run's state, temporaries
    memory_limit: int | None  # None: unknown, as on CPUs
    checkpoint: int  # one checkpoint
    checkpoints: int  # how many are kept
    saved: int  # all coders, as written at the end
    free: int | None  # on the disk; None: a bucket
    doubts: tuple[str, ...]  # what makes the run of little use, a sentence each

    def __str__(self) -> str:
        disk = byte_size(self.checkpoints * self.checkpoint + self.saved)
        free = "" if self.free is None else f" ({byte_size(self.free)} free)"
        limit = "" if self.memory_limit is None else f" of {byte_size(self.memory_limit)}"
        lines = [
            f"coders   {self.coders}, {byte_size(self.saved)} as they are saved",
            f"tokens   {self.tokens:,} in {self.passes:,} passes, {self.updates:,} updates",
            f"memory   {byte_size(self.memory)}{limit} on a device",
            f"disk     {disk}{free}, including {self.checkpoints} checkpoints",
            *(f"warning  {doubt}" for doubt in self.doubts),
            "time     shown as soon as the run is under way; the same command continues it",
        ]
        return "\n".join(lines)


def plan_training(config: TrainConfig, out: str | os.PathLike = ".") -> TrainEstimate:
    """Estimate `train(config, out)`: compiles its step, loads and writes nothing.

    Raises `InputError` as `train` does before it loads the model.
    """
    config = config.resolved
    check_inputs(config)
    path, mesh, shape = folder_path(out), run_mesh(config), model_config(config.model)
    plan = make_plan(config, shape, mesh)
    state = abstract_state(plan, shape)
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    device = jax.devices()[0]
    return TrainEstimate(
        coders=len(config.coders),
        tokens=config.passes * config.tokens_a_pass,
        passes=config.passes,
        updates=config.all_updates,
        memory=_memory(plan, state, shape),
        memory_limit=(device.memory_stats() or {}).get("bytes_limit"),
        checkpoint=size(state),
        checkpoints=config.keep,
        saved=size([group.weights for group in state.groups]),
        free=None if is_remote(path) else shutil.disk_usage(existing_parent(path)).free,
        doubts=tuple(_doubts(config)),
    )


def _doubts(config: TrainConfig) -> Iterator[str]:
    """A sentence for each length of a warm-up that does not end within the run."""
    warmups: dict[float, list[str]] = {config.optimizer.warmup: ["optimizer.warmup"]}
    for number, coder in enumerate(config.coders):
        if coder.activation == "jumprelu" and coder.loss.l0_weight:
            names = warmups.setdefault(coder.loss.l0_warmup, [])
            names.append(f"coders.{number}.loss.l0_warmup")
    for warmup, (name, *others) in warmups.items():
        if warmup >= max(config.all_updates, 1):
            more = f" (and of {len(others)} more)" if others else ""
            rest = f"a run of {config.all_updates} updates ends before it: lower it"
            yield f"{name} is {warmup}{more}: {rest}"


def _memory(plan: TrainPlan, state: TrainState, shape: GemmaConfig) -> int:
    """Bytes that the compiled step takes on a device, with all inputs and outputs."""
    c = plan.config
    if c.store:
        rows = c.updates * c.train_batch_size
        x = {
            site: jax.ShapeDtypeStruct((len(layers), rows, site_width(shape, site)), jnp.float32)
            for site, layers in plan.sites
        }
        step, inputs = partial(store_step, plan=plan), (x,)
    else:
        ids = jax.ShapeDtypeStruct((c.batch_size, c.context_size), jnp.int32)
        mask = jax.ShapeDtypeStruct(ids.shape, bool)
        batch = TokenBatch(ids, ids, mask, {"split": TokenLabels(ids, SIDES)})
        model = Model(abstract_params(shape, c.model_dtype), shape)
        step, inputs = partial(train_step, plan=plan), (model, batch)
    compiled = jax.jit(step, donate_argnums=0).lower(state, *inputs).compile()
    found = compiled.memory_analysis()
    if found is None:
        raise InputError("this backend does not report how much memory a program takes")
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return int(sum(sizes) - found.alias_size_in_bytes + found.generated_code_size_in_bytes)
