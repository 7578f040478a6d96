"""Checkpoints of a run: everything that continuing bit for bit needs, in Orbax's format.

They are written in the background, appear under their final name only when complete, and the oldest
go. The state is one item, the position in the data another.
"""

import dataclasses
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError, disk_error, reason
from gemma_scope_jax.training.state import TrainState

LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints under `folder`, local or gs://, the newest `keep` of them."""

    def __init__(self, folder: epath.Path, keep: int):
        import orbax.checkpoint as ocp

        self.folder, self.args = folder, ocp.args
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            # else, when a folder cannot be made, threads wait for it that nobody tells: 10 minutes
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self.manager = ocp.CheckpointManager(folder, options=options)
        except OSError as error:
            raise disk_error(folder, error) from error

    def restore(self, template: TrainState) -> tuple[TrainState, int, Any, Any] | None:
        """(state, passes done, position in the data, `made_with`): the newest that can be read;
        None: none yet.

        `template` gives shapes, dtypes and shardings (`jax.ShapeDtypeStruct`). A damaged checkpoint
        is named and set aside, and the one before it is taken. Raises `InputError` if none is left,
        and when something other than the files is at fault: memory, permissions, the network.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            found, why = None, ""
            try:
                both = self.manager.restore(
                    step,
                    args=self.args.Composite(
                        state=self.args.StandardRestore(_raw(template)),
                        data=self.args.JsonRestore(),
                    ),
                )
                data = both["data"]
                found = _keyed(both["state"]), step, data["positions"], data.get("made_with")
            except Exception as error:  # whatever Orbax and the file system raise for bad files
                why = reason(error)
                if "tree structures do not match" in why:
                    raise InputError(
                        f"{self.folder / str(step)}: holds another state than this run's, made by "
                        "another version of gemma_scope_jax: continue it with that one, or start "
                        "in a new folder"
                    ) from error
                if _is_no_damage(error):
                    raise InputError(
                        f"{self.folder / str(step)}: cannot be read now ({why}); nothing was lost, "
                        "run the same command again once that is mended"
                    ) from error
            if everywhere(found is not None):
                return found
            if jax.process_index() == 0:
                aside = _free(self.folder.parent / f"damaged-checkpoint-{step}")
                (self.folder / str(step)).rename(aside)
                LOG.warning("%s: damaged, set aside (%s)", aside, why)
            everywhere(True)  # wait for it
            self.manager.reload()
        if steps:
            raise InputError(
                f"{self.folder}: none of its {len(steps)} checkpoints can be read; all were set "
                "aside: run the same command again to start from the beginning"
            )
        return None

    def save(
        self, step: int, state: TrainState, positions: Any, made_with: Any, wait: bool = False
    ) -> None:
        """Save in the background what the state is now; it may be donated right afterwards.

        positions, made_with: JSON that `restore` gives back. Raises `InputError` when it cannot be
        written, a full disk say; earlier ones are kept.
        """
        if jax.default_backend() == "cpu":  # where a host copy would be the same memory
            state = jax.tree.map(jnp.copy, state)
        try:
            if step not in self.manager.all_steps():
                both = self.args.Composite(
                    state=self.args.StandardSave(_raw(state)),
                    data=self.args.JsonSave({"positions": positions, "made_with": made_with}),
                )
                self.manager.save(step, args=both, force=True)
            if wait:
                self.manager.wait_until_finished()
        except Exception as error:  # Orbax wraps what the file system says in several types
            raise InputError(
                f"{self.folder}: the checkpoint of pass {step} could not be written "
                f"({reason(error)}); those before it are whole, so make room "
                "and run the same command again"
            ) from error

    def close(self) -> None:
        self.manager.close()


def _is_no_damage(error: BaseException) -> bool:
    """Whether the trouble lies elsewhere than in the files: the same may be read another time."""
    kinds = (MemoryError, PermissionError, ConnectionError, TimeoutError)
    words = (
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
    )
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def everywhere(flag: bool) -> bool:
    """Whether the flag is set on every host; all wait for all."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def _free(path: epath.Path) -> epath.Path:
    """The path, or where that is taken one with a number behind it."""
    paths = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], paths) if not p.exists())


def _raw(state: TrainState) -> TrainState:
    """Typed keys as their data, which checkpoints can hold."""
    if isinstance(state.key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.key.sharding)
        return dataclasses.replace(state, key=data)
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def _keyed(state: TrainState) -> TrainState:
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
