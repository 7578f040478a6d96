"""Checkpoints of a run: everything that continuing bit for bit needs, in Orbax's format.

They are written in the background, appear under their final name only when complete, and the oldest
go. The state is one item, the positions of the data (one a host) another.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints under `folder`, local or gs://, the newest `keep` of them."""

    def __init__(self, folder: epath.Path, keep: int):
        import orbax.checkpoint as ocp

        self.folder, self.args = folder, ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder, options=options)

    def restore(self, like: TrainState) -> tuple[TrainState, int, Any]:
        """(state, passes done, data positions): the newest that can be read; else (like, 0, None).

        `like` gives shapes, dtypes and shardings. A damaged checkpoint is named, set aside and the
        one before it taken; if none is left whole, raises `InputError`.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            try:
                both = self.manager.restore(
                    step,
                    args=self.args.Composite(
                        state=self.args.StandardRestore(_raw(like)), data=self.args.JsonRestore()
                    ),
                )
                return _keyed(both["state"]), step, both["data"]["positions"]
            except Exception as error:  # whatever Orbax and the file system raise for bad files
                why = " ".join(str(error).split())[:200]
                aside = self.folder.parent / f"damaged-checkpoint-{step}"
                (self.folder / str(step)).rename(aside)
                print(f"{aside}: damaged, set aside ({why})", file=sys.stderr)
                self.manager.reload()
        if steps:
            raise InputError(
                f"{self.folder}: none of its {len(steps)} checkpoints can be read; all were set "
                "aside: run the same command again to start from the beginning"
            )
        return like, 0, None

    def save(self, step: int, state: TrainState, positions: Any, wait: bool = False) -> None:
        """Save in the background what the state is now; it may be donated right afterwards.

        Raises `InputError` when it cannot be written, a full disk say; earlier ones are kept.
        """
        if jax.default_backend() == "cpu":  # where a host copy would be the same memory
            state = jax.tree.map(jnp.copy, state)
        try:
            if step not in self.manager.all_steps():
                both = self.args.Composite(
                    state=self.args.StandardSave(_raw(state)),
                    data=self.args.JsonSave({"positions": positions}),
                )
                self.manager.save(step, args=both, force=True)
            if wait:
                self.manager.wait_until_finished()
        except Exception as error:  # Orbax wraps what the file system says in several types
            raise InputError(
                f"{self.folder}: the checkpoint of pass {step} could not be written "
                f"({' '.join(str(error).split())[:200]}); those before it are whole, so make room "
                "and run the same command again"
            ) from error

    def close(self) -> None:
        self.manager.close()


def _raw(state: TrainState) -> TrainState:
    """Typed keys as their data, which checkpoints can hold."""
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def _keyed(state: TrainState) -> TrainState:
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
