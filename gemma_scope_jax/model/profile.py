"""A trace of a few steps of a long run, to look at in XProf, TensorBoard or Perfetto.

The steps of the model have names there, see `named_scope` in `block.py`.
"""

import logging
import os
from pathlib import Path
from typing import Any

import jax

from gemma_scope_jax.errors import InputError, reason

WARM_UP = 3  # steps before the trace begins: they compile, and fill what runs ahead
STEPS = 5  # steps in the trace


class StepTrace:
    """Traces steps `WARM_UP` to `WARM_UP` + `STEPS` - 1 into `folder`; None: traces nothing.

    `with` it, call `done(result)` after each step. The first process of several traces. Raises
    `InputError` for a folder that is not empty or cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.steps, self.tracing = 0, False
        self.folder = Path(folder) if folder and not jax.process_index() else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise InputError(f"{self.folder}: not empty; give a new folder for the profile")
            (self.folder / "plugins").mkdir()  # where the trace will be
        except OSError as error:
            raise InputError(f"{self.folder}: cannot hold a profile ({reason(error)})") from error

    def done(self, result: Any = None) -> None:
        """A step is over, and `result` is what it makes."""
        if self.folder is None:
            return
        self.steps += 1
        if self.steps in (WARM_UP, WARM_UP + STEPS):
            jax.block_until_ready(result)
        if self.steps == WARM_UP:
            jax.profiler.start_trace(self.folder)
            self.tracing = True
        elif self.steps == WARM_UP + STEPS:
            self._stop()

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.tracing:
            self._stop()
        elif self.folder is not None and self.steps < WARM_UP:
            logging.getLogger(__name__).warning(
                "%s: no profile: the run had %d steps, and the first %d are not traced",
                self.folder, self.steps, WARM_UP,
            )  # fmt: skip

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.tracing = False
        logging.getLogger(__name__).warning(
            "%s: the profile of %d steps; look at it with `xprof --logdir %s`",
            self.folder, self.steps - WARM_UP, self.folder,
        )  # fmt: skip
