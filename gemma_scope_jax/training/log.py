"""What a run shows while it lasts: a line on the terminal, log.jsonl, TensorBoard and wandb."""

import json
import math
import re
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from gemma_scope_jax.errors import InputError, disk_error
from gemma_scope_jax.storage.atomic import write_text
from gemma_scope_jax.storage.paths import is_remote
from gemma_scope_jax.storage.strict_json import field, parse_json
from gemma_scope_jax.training.recipe import TrainConfig, as_json

_NOT_FINITE = re.compile(r"(?<=: )-?(NaN|Infinity)(?=[,}])")
FIRST, EVERY = 2.0, 10.0  # seconds between reports, at the start and after 1,000 seconds


class TrainLog:
    """Reports at most every few seconds; reading a number waits for the device."""

    def __init__(self, config: TrainConfig, out: epath.Path, done: int):
        self.config, self.out, self.began, self.begun = config, out, time.monotonic(), done
        self.logged, self.log, self.written = -math.inf, out / "log.jsonl", time.monotonic()
        self.text = "" if jax.process_index() else self._until(done * config.tokens_a_pass)
        tracked = () if jax.process_index() else config.track
        self.trackers = [_tracker(name, config, out) for name in tracked]

    def _until(self, tokens: int) -> str:
        """The log so far, without what a killed run wrote beyond the checkpoint it goes on from."""
        if not self.log.exists():
            return ""
        kept = "".join(line for line, row in read_log(self.log) if row["tokens"] <= tokens)
        if len(kept.encode()) != self.log.stat().length:
            write_text(self.log, kept)
        return kept if is_remote(self.log) else ""

    def due(self) -> bool:
        """More often at first: a run of minutes should have a curve, one of days a small log."""
        now = time.monotonic()
        return now - self.logged > min(EVERY, max(FIRST, 0.01 * (now - self.began)))

    def report(self, done: int, update: int, parts: list | None, groups: Any) -> None:
        """One line: tokens, rate and time left, then each coder's loss parts (if any yet)."""
        config, each = self.config, self.config.tokens_a_pass
        seconds = max(time.monotonic() - self.began, 1e-9)
        if jax.process_index():  # one host speaks for all
            self.logged = time.monotonic()
            return
        rate = (done - self.begun) * each / seconds
        row: dict[str, Any] = {"tokens": done * each, "update": update}
        row["tokens_per_s"] = round(rate, 1)
        row["coders"] = _by_coder(config, parts, groups) if parts else {}
        self._write(json.dumps(finite(row), allow_nan=False) + "\n")
        for track in self.trackers:
            track(row)
        left = (config.passes - done) * each / max(rate, 1e-9) / 60
        shown = f"{100 * done / config.passes:5.1f} %  {row['tokens']:,} tokens  {rate:,.0f}/s"
        print(f"{shown}  {left:.0f} min left{_summary(row['coders'])}", file=sys.stderr, flush=True)
        self.logged = time.monotonic()

    def _write(self, line: str) -> None:
        """Append to the log; in a bucket, where nothing can be appended, write it anew at times."""
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
        """Write what a bucket's log still lacks."""
        if self.text:
            write_text(self.log, self.text)
            self.written = time.monotonic()


def finite(value: Any) -> Any:
    """JSON's null for what is no number: a loss that has overflowed."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(log: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log.jsonl and what they hold, null as NaN; without one that a killed process
    has not ended. Raises `InputError` that names a line of anything else.
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


def _by_coder(config: TrainConfig, parts: list, groups: Any) -> dict[str, dict[str, float]]:
    found = {}
    for group, part in zip(groups, parts):
        values = {k: np.asarray(v) for k, v in part.items()}
        for n, c in enumerate(group.coders):
            found[c.folder] = {k: round(float(v[n]), 6) for k, v in values.items()}
    return {c.folder: found[c.folder] for c in config.coders}


def _summary(coders: dict[str, dict[str, float]]) -> str:
    """ "  FVU 0.21  L0 50.3  dead 0.0 %", of many coders the range."""
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


def _tracker(name: str, config: TrainConfig, out: epath.Path) -> Any:
    """A function that takes a row of the log. Raises `InputError` if the package is missing."""
    try:
        if name == "tensorboard":
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(out / "tensorboard"))
            return lambda row: _to_tensorboard(writer, row)
        import wandb

        run = wandb.init(project="gemma_scope_jax", dir=str(out), config=as_json(config))
        return lambda row: run.log(dict(_flat(row)), step=row["update"])
    except ImportError as error:
        raise InputError(f"track {name!r} needs: pip install 'gemma-scope-jax[track]'") from error


def _flat(row: dict) -> Any:
    yield "tokens_per_s", row["tokens_per_s"]
    for coder, parts in row["coders"].items():
        for key, value in parts.items():
            if value is None:
                continue
            yield f"{coder}/{key}", value


def _to_tensorboard(writer: Any, row: dict) -> None:
    for key, value in _flat(row):
        writer.add_scalar(key, value, row["update"])
    writer.flush()
