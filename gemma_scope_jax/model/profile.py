"""A trace of a few steps of a long run, for XProf, TensorBoard or Perfetto.

The steps of the model have names there, see `named_scope` in `block.py`.
"""

import logging
import os
from typing import Any

import jax

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.paths import expanded

LOG = logging.getLogger(__name__)
WARM_UP = 3  # steps before the trace begins: they compile and fill prefetch queues
STEPS = 5  # steps in the trace


class StepTrace:
    """Traces steps `WARM_UP` to `WARM_UP` + `STEPS` - 1 into `folder`; None: traces nothing.

    Use it in `with`, and call `done(result)` after each step. Only the first of several processes
    traces. Raises `InputError` for a folder that is not empty or cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.steps, self.tracing = 0, False
        self.folder = expanded(folder) if folder and not jax.process_index() else None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                raise InputError(f"{self.folder}: not empty; give a new folder for the profile")
            (self.folder / "plugins").mkdir()  # the profiler writes there
        except OSError as error:
            raise InputError(f"{self.folder}: cannot hold a profile ({reason(error)})") from error

    def done(self, result: Any = None) -> None:
        """A step is over; `result` is its output."""
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
            message = "%s: no profile: the run had %d steps, and the first %d are not traced"
            LOG.warning(message, self.folder, self.steps, WARM_UP)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.tracing = False
        message = "%s: the profile of %d steps; view it with `xprof --logdir %s`"
        LOG.warning(message, self.folder, self.steps - WARM_UP, self.folder)
