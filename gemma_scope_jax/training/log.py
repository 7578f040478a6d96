"""What a run shows while it runs: its progress, log.jsonl, TensorBoard and wandb."""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError, disk_error
from gemma_scope_jax.progress import Progress
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.paths import is_remote
from gemma_scope_jax.storage.strict_json import field, parse_json
from gemma_scope_jax.training.objective import Parts
from gemma_scope_jax.training.recipe import TrainConfig, as_json
from gemma_scope_jax.training.weights import CoderGroup

_NOT_FINITE = re.compile(r"(?<=: )-?(NaN|Infinity)(?=[,}])")
FIRST, EVERY = 2.0, 10.0  # seconds between reports, at the start and after 1,000 seconds


class TrainLog:
    """Reports at most every few seconds; reading a number waits for the device."""

    def __init__(self, config: TrainConfig, out: epath.Path, done: int):
        self.config, self.log, self.begun = config, out / "log.jsonl", done
        self.began = self.written = time.monotonic()
        self.logged, self.text, self.trackers = -math.inf, "", []
        each = config.tokens_a_pass
        self.progress = Progress(config.passes * each, begun=done * each, every=0.0)
        if not jax.process_index():
            self.text = self._until(done * each)
            self.trackers = [_tracker(name, config, out) for name in config.track]

    def _until(self, tokens: int) -> str:
        """The log up to the checkpoint that the run continues from."""
        if not self.log.exists():
            return ""
        kept = "".join(line for line, row in read_log(self.log) if row["tokens"] <= tokens)
        if len(kept.encode()) != self.log.stat().length:
            write_text(self.log, kept)
        return kept if is_remote(self.log) else ""

    def due(self) -> bool:
        """Whether to report: more often at first, so that even a short run has a curve."""
        now = time.monotonic()
        return now - self.logged > min(EVERY, max(FIRST, 0.01 * (now - self.began)))

    def report(
        self, done: int, update: int, parts: list[Parts] | None, groups: Sequence[CoderGroup]
    ) -> None:
        """One line: tokens, rate and time left, then the parts of each coder's loss, if known."""
        config, each = self.config, self.config.tokens_a_pass
        seconds = max(time.monotonic() - self.began, 1e-9)
        if jax.process_index():  # the first host reports for all
            self.logged = time.monotonic()
            return
        row: dict[str, Any] = {"tokens": done * each, "update": update}
        row["tokens_per_s"] = round((done - self.begun) * each / seconds, 1)
        row["coders"] = _by_coder(config, parts, groups) if parts else {}
        self._write(json.dumps(finite(row), allow_nan=False) + "\n")
        for track in self.trackers:
            track(row)
        self.progress.at(row["tokens"], _summary(row["coders"]))
        self.logged = time.monotonic()

    def _write(self, line: str) -> None:
        """Append to the log; in a bucket, which cannot append, rewrite it now and then."""
        if not is_remote(self.log):
            try:
                with self.log.open("a") as file:
                    file.write(line)
            except OSError as error:
                raise disk_error(self.log, error) from error
            return
        self.text += line
        if time.monotonic() - self.written > max(60.0, len(self.text) / 1e5):
            self.flush()

    def flush(self) -> None:
        """Write the lines that a bucket's log still lacks."""
        if self.text:
            write_text(self.log, self.text)
            self.written = time.monotonic()


def finite(value: Any) -> Any:
    """The value with JSON's null for numbers that are not finite, such as an overflowed loss."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(log: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log.jsonl with their contents, null as NaN; an unfinished last line is left
    out. Raises `InputError` with the number of any other line that cannot be used.
    """
    try:
        text = log.read_bytes().decode(errors="replace")
    except OSError as error:
        raise InputError(f"{log}: cannot be read ({error.strerror or error})") from error
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("}\n"):
            continue
        where = f"{log}, line {number}"  # older versions wrote NaN and Infinity
        row = parse_json(_NOT_FINITE.sub("null", line), where)
        field(row, "tokens", int, where, least=0)
        for name, parts in field(row, "coders", dict, where).items():
            keys = field(row["coders"], name, dict, where)
            row["coders"][name] = {k: field(parts, k, float, where, default=math.nan) for k in keys}
        found.append((line, row))
    return found


def _by_coder(
    config: TrainConfig, parts: list[Parts], groups: Sequence[CoderGroup]
) -> dict[str, dict[str, float]]:
    found = {}
    for group, part in zip(groups, parts):
        values = {k: np.asarray(v) for k, v in part.items()}
        for n, c in enumerate(group.coders):
            found[c.folder] = {k: round(float(v[n]), 6) for k, v in values.items()}
    return {c.folder: found[c.folder] for c in config.coders}


def _summary(coders: dict[str, dict[str, float]]) -> str:
    """ "  FVU 0.21  L0 50.3  dead 0.0 %"; for several coders, the range."""
    text = ""
    for name, key, scale, form in (
        ("loss", "loss", 1, ".4f"),
        ("FVU", "fvu", 1, ".3f"),
        ("L0", "l0", 1, ".1f"),
        ("dead %", "dead", 100, ".1f"),
    ):
        values = [scale * c[key] for c in coders.values() if math.isfinite(c[key])]
        if len(values) < len(coders):
            text += f"  {name} NOT FINITE"
        if values:
            low, high = f"{min(values):{form}}", f"{max(values):{form}}"
            text += f"  {name} {low if low == high else f'{low}-{high}'}"
    return text


def _tracker(name: str, config: TrainConfig, out: epath.Path) -> Callable[[dict[str, Any]], None]:
    """A function that takes a row of the log. Raises `InputError` if the package is missing."""
    try:
        if name == "tensorboard":
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(out / "tensorboard"))
            return lambda row: _to_tensorboard(writer, row)
        import wandb

        run = wandb.init(project="gemma_scope_jax", dir=str(out), config=as_json(config))
        return lambda row: run.log(_flat(row), step=row["update"])
    except ImportError as error:
        raise InputError(f"track {name!r} needs: pip install 'gemma-scope-jax[track]'") from error


def _flat(row: dict[str, Any]) -> dict[str, float]:
    named = {f"{c}/{k}": v for c, parts in row["coders"].items() for k, v in parts.items()}
    return {"tokens_per_s": row["tokens_per_s"]} | named


def _to_tensorboard(writer: Any, row: dict[str, Any]) -> None:
    for key, value in _flat(row).items():
        writer.add_scalar(key, value, row["update"])
    writer.flush()
