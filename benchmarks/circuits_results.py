"""The results file of benchmarks/circuits.py: a line of JSON a prompt, compressed."""

import gzip
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS = ("nodes", "top", "cap", "most", "modes")


def key(line: dict) -> tuple:
    """What a line is the result of: a prompt and the settings."""
    return tuple(str(line.get(name)) for name in ("text", "answer", "foil", *SETTINGS))


def lines_of(file: Path) -> list[dict]:
    """The lines of a results file; none if it does not exist."""
    if not file.exists():
        return []
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    """Write the file anew, whole or not at all: a killed run leaves the lines before."""
    text = "".join(
        json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    unfinished.replace(file)


def rounded(value: Any) -> Any:
    """JSON data with three significant digits, and None for what is not defined."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    return value
