"""Checkpoints of a run, in Orbax's format: all that is needed to continue bit for bit.

They are written in the background and get their final name only when complete; only the newest are
kept. The state is one item, the position in the data another.
"""

import dataclasses
import itertools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

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
            # else threads wait 10 minutes for a folder that cannot be made
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self.manager = ocp.CheckpointManager(folder, options=options)
        except OSError as error:
            raise disk_error(folder, error) from error

    def restore(self, template: TrainState) -> tuple[TrainState, int, Any, Any] | None:
        """(state, passes done, position in the data, `made_with`) of the newest checkpoint that can
        be read; None if there is no checkpoint.

        `template` gives shapes, dtypes and shardings (`jax.ShapeDtypeStruct`). A damaged checkpoint
        is renamed, with a warning, and the one before it is used. Raises `InputError` if all are
        damaged, and if the fault is not in the files: memory, permissions, the network.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        state, data = self.args.StandardRestore(_raw(template)), self.args.JsonRestore()
        for step in steps:
            place, found, why = self.folder / str(step), None, ""
            try:
                both = self.manager.restore(step, args=self.args.Composite(state=state, data=data))
                about = both["data"]
                found = _keyed(both["state"]), step, about["positions"], about.get("made_with")
            except Exception as error:  # whatever Orbax and the file system raise for bad files
                why = reason(error)
                if "tree structures do not match" in why:
                    raise InputError(
                        f"{place}: holds the state of another version of gemma_scope_jax: continue "
                        "the run with that version, or start in a new folder"
                    ) from error
                if _is_no_damage(error):
                    raise InputError(
                        f"{place}: cannot be read now ({why}); nothing was lost: run the same "
                        "command again once this is fixed"
                    ) from error
            if everywhere(found is not None):
                return found
            if jax.process_index() == 0:
                aside = _free(self.folder.parent / f"damaged-checkpoint-{step}")
                place.rename(aside)
                LOG.warning("%s: damaged, set aside (%s)", aside, why)
            everywhere(True)  # wait for the first host
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
        """Save the state in the background; it may be donated right afterwards.

        positions, made_with: JSON that `restore` returns. Raises `InputError` if it cannot be
        written, to a full disk for example; earlier checkpoints are kept.
        """
        if jax.default_backend() == "cpu":  # where a host copy would share the memory
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
        except Exception as error:  # Orbax wraps errors of the file system in several types
            raise InputError(
                f"{self.folder}: the checkpoint of pass {step} could not be written "
                f"({reason(error)}); earlier ones are whole: make room, and run the same command "
                "again"
            ) from error

    def close(self) -> None:
        self.manager.close()


def _is_no_damage(error: BaseException) -> bool:
    """Whether the fault is not in the files, so that they may be read another time."""
    kinds = (MemoryError, PermissionError, ConnectionError, TimeoutError)
    codes = "RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED"
    return isinstance(error, kinds) or bool(re.search(codes, str(error)))


def everywhere(flag: bool) -> bool:
    """Whether the flag is set on every host; waits for all hosts."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def _free(path: epath.Path) -> epath.Path:
    """The path or, if it exists, the path with the first free number appended."""
    paths = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain([path], paths) if not p.exists())


def _raw(state: TrainState) -> TrainState:
    """The state with the data of its key, as checkpoints cannot hold typed keys."""
    if not isinstance(state.key, jax.ShapeDtypeStruct):
        return dataclasses.replace(state, key=jax.random.key_data(state.key))
    data = jax.eval_shape(jax.random.key_data, state.key)
    data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.key.sharding)
    return dataclasses.replace(state, key=data)


def _keyed(state: TrainState) -> TrainState:
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key))
