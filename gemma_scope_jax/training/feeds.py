"""The two sources of activations behind one interface: the model on text, or a store on disk.

A feed has `batches`, with the position after each (JSON, for checkpoints), and a compiled `step`
that takes one, `step(state, batch, started)` -> (state, parts of the loss, None before the start).
`ready`: the coders can start, from a `sample`; `made_with`: the model, by its weights; `readings`:
how often the data have been begun after `done` passes; `repeats`: how often a store holds its text.
Each host reads the same text and keeps its own rows: their number does not change results.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope_jax.data.activations.store import ActivationStore
from gemma_scope_jax.data.batches import TokenBatches, counting, readings
from gemma_scope_jax.data.prefetch import prefetch
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.batch import TokenBatch
from gemma_scope_jax.model.config import GemmaConfig, Model
from gemma_scope_jax.model.identity import model_identity
from gemma_scope_jax.model.tokenizer import fit_tokenizer, load_tokenizer
from gemma_scope_jax.training import buffer, end_to_end
from gemma_scope_jax.training import step as steps
from gemma_scope_jax.training.held_out import SplitBatches, held_rows, is_held_out
from gemma_scope_jax.training.objective import Parts
from gemma_scope_jax.training.recipe import TrainConfig
from gemma_scope_jax.training.state import Sites, TrainPlan, TrainState, placement

StepResult = tuple[TrainState, list[Parts] | None]


def fill_step(state: TrainState, model: Model, batch: TokenBatch, plan: TrainPlan) -> TrainState:
    """A model pass that only fills the buffer and the held-out activations."""
    x, mask = buffer.model_activations(model, batch, plan)
    held = is_held_out(batch).reshape(-1)
    return buffer.hold(buffer.fill(state, x, mask & ~held), x, mask & held)


def train_step(
    state: TrainState, model: Model, batch: TokenBatch, plan: TrainPlan
) -> tuple[TrainState, list[Parts]]:
    """A model pass and `updates` updates, one program: (state, means of the loss parts)."""
    state = fill_step(state, model, batch, plan)
    by_effect = [{}] * len(plan.groups)
    if any(group.template.loss.kl_weight for group in plan.groups):
        with steps.precision(plan.config):
            trained = dataclasses.replace(batch, mask=batch.counted(0) & ~is_held_out(batch))
            state, by_effect = end_to_end.update(state, model, trained, plan)

    def one(state, _):
        state, x = buffer.draw(state, plan)
        return steps.update(state, x, plan)

    state, parts = jax.lax.scan(one, state, None, length=plan.config.updates)
    parts = jax.tree.map(lambda p: jnp.mean(p, 0), parts)
    return state, [a | b for a, b in zip(parts, by_effect)]


def store_step(state: TrainState, x: Sites, plan: TrainPlan) -> tuple[TrainState, list[Parts]]:
    """`updates` updates on stored activations x {site: [L, updates * batch, D]}."""
    cut = lambda a: jnp.moveaxis(a.reshape(a.shape[0], plan.config.updates, -1, a.shape[-1]), 1, 0)
    state, parts = jax.lax.scan(lambda s, x: steps.update(s, x, plan), state, jax.tree.map(cut, x))
    return state, jax.tree.map(lambda p: jnp.mean(p, 0), parts)


def token_batches(
    config: TrainConfig,
    model: GemmaConfig,
    data: Any = None,
    position: dict[str, Any] | None = None,
    *,
    split: bool = False,
) -> TokenBatches:
    """The token batches of a run from a position on; `data` replaces the config's text.

    split: label the tokens that are held out, see `SplitBatches`.
    """
    kind = partial(SplitBatches, share=config.held_share) if split else TokenBatches
    return kind(
        config.data if data is None else data,
        fit_tokenizer(load_tokenizer(config.model), model),
        batch_size=config.batch_size,
        context_size=config.context_size,
        seed=config.seed,
        position=position,
    )


class TextFeed:
    """Text through the model into the buffer on the device; `data` replaces the config's text."""

    repeats = 1

    def __init__(self, plan: TrainPlan, model: Model, data: Any = None):
        self.plan, self.model, self.data = plan, model, data
        self.made_with = model_identity(model)
        places = placement(plan, model.config)
        self.fill = jax.jit(partial(fill_step, plan=plan), donate_argnums=0, out_shardings=places)
        self.train = _compiled(train_step, plan, places)

    @contextmanager
    def batches(self, position: Any, done: int) -> Iterator[Iterator[tuple[TokenBatch, Any]]]:
        """Token batches from a position of the text on; `done` is not needed."""
        mesh, c = self.plan.mesh, self.plan.config
        source = token_batches(c, self.model.config, self.data, position, split=True)
        begin = source.position
        with prefetch(source) as batches:
            place = partial(jax.tree.map, lambda a: put(mesh, a, "data"))
            yield ((place(batch), after) for batch, after in counting(batches, c.first, begin))

    def step(self, state: TrainState, batch: Any, started: bool) -> StepResult:
        if not started:
            return self.fill(state, self.model, batch), None
        return self.train(state, self.model, batch)

    def readings(self, position: Any, done: int) -> int:
        return readings(position) if position else 0

    def ready(self, state: TrainState) -> bool:
        """Whether the buffer is full."""
        return int(state.filled) == self.plan.config.buffer

    def sample(self, state: TrainState) -> Sites:
        """The buffer {site: [L, B, D]}."""
        return state.buffer

    def held_out(self, state: TrainState) -> Sites:
        """The latest held-out activations {site: [L, n, D]}."""
        return {site: rows[:, : int(state.held_filled)] for site, rows in state.held.items()}


class StoreFeed:
    """Stored activations in a global random order; the model does not run."""

    def __init__(self, plan: TrainPlan, model: Model):
        self.plan, self.store = plan, ActivationStore(plan.config.store, dict(plan.sites))
        _check_store(self.store, plan.config, model)
        self.rows = len(self.store) - held_rows(len(self.store), plan.config.held_share)
        self.made_with = self.store.manifest["model"]
        self.repeats = readings(self.store.manifest["position"])
        self.train = _compiled(store_step, plan, placement(plan, model.config))

    @contextmanager
    def batches(self, position: Any, done: int) -> Iterator[Iterator[tuple[Sites, Any]]]:
        """The batches from number `done` on: a function of the seed and that number.

        Raises `InputError` if the store has changed, which would change the order.
        """
        c, here = self.plan.config, {"store": self.store.fingerprint}
        if position is not None and position != here:
            raise InputError(
                f"{c.store}: has grown or changed since this run began, which would change the "
                "order: restore its contents, or train into another folder"
            )
        stored = self.store.batches(c.tokens_a_pass, c.seed, start=done, rows=self.rows)
        with prefetch(stored) as batches:
            yield ((self._on_device(x), here) for x, _ in batches)

    def step(self, state: TrainState, batch: Any, started: bool) -> StepResult:
        return self.train(state, batch)

    def readings(self, position: Any, done: int) -> int:
        return -(-done * self.plan.config.tokens_a_pass // self.rows)

    def ready(self, state: TrainState) -> bool:
        return True

    def sample(self, state: TrainState) -> Sites:
        """Activations {site: [L, B, D]}, evenly spaced over the store."""
        count = min(self.rows, self.plan.config.buffer)
        rows = np.linspace(0, self.rows - 1, count, dtype=np.int64)
        return self._on_device(self.store.read(rows))

    def held_out(self, state: TrainState) -> Sites:
        """The last rows of the store {site: [L, n, D]}, which were not trained on."""
        held = self.store.read(np.arange(self.rows, len(self.store)))
        return {site: put(self.plan.mesh, rows) for site, rows in held.items()}

    def _on_device(self, x: dict[str, np.ndarray]) -> Sites:
        return {site: put(self.plan.mesh, rows, None, "data") for site, rows in x.items()}


def _check_store(store: ActivationStore, config: TrainConfig, model: Model) -> None:
    """Raise `InputError` unless the store holds what the config needs."""
    held = store.manifest
    if not len(store):
        raise InputError(f"{config.store}: holds no activations yet")
    if held["model"]["name"] != model.config.name:
        raise InputError(
            f"{config.store}: holds activations of {held['model']['name']}, not of {config.model}"
        )
    if held["first"] != config.first:
        raise InputError(
            f"{config.store}: leaves out positions before {held['first']}, the config those before "
            f"{config.first}: set first={held['first']}"
        )


def _compiled(step: Callable[..., Any], plan: TrainPlan, places: Any) -> Callable[..., Any]:
    return jax.jit(partial(step, plan=plan), donate_argnums=0, out_shardings=(places, None))


def put(mesh: Mesh | None, array: np.ndarray, *axes: str | None) -> jax.Array:
    """An array that every host has, split over the mesh, if there is one."""
    if mesh is None:
        return jnp.asarray(array)
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
