"""Reads and writes the explanations of a coder's features: `explanations.json` beside the coder.

    {"format": 1, "coder": "...", "explanations": {"17": {
        "text": "negations in English", "method": "endpoint", "model": "gpt-4o-mini",
        "examples": 15, "scores": {"detection": {"balanced_accuracy": 0.91, ...}, ...}}}}

`method` is what wrote the text: a chat "endpoint", a local "model", or token "statistics".
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from gemma_scope_jax.coders.coder import CoderInfo
from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.manifest import Format
from gemma_scope_jax.storage.paths import folder_path, is_remote
from gemma_scope_jax.storage.strict_json import field

FILE = "explanations.json"
FORMAT = 1
# The one figure of each score that is shown where there is little room.
SCORE_FIGURES = {
    "detection": "balanced_accuracy",
    "fuzzing": "balanced_accuracy",
    "intruder": "accuracy",
    "simulation": "correlation",
    "saebench": "score",
}

Explanation = dict[str, Any]  # text, method, model: str; scores: dict; examples: int; more allowed


def read_explanations(
    folder: str | os.PathLike, width: int | None = None
) -> dict[int, Explanation]:
    """The explanations in a folder, or a file named *.json, by feature; {} if there are none.

    folder: local or gs://. width: the coder's, to refuse another coder's file. Raises `InputError`
    for a file that cannot be used.
    """
    path = folder_path(folder)
    path = path if path.name.endswith(".json") else path / FILE
    try:
        found = path.read_bytes() if path.is_file() else None
    except Exception as error:  # the clients of buckets raise types of their own
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    if found is None and path.name != FILE:
        raise InputError(f"{path}: no such file")
    named = _FORMAT.parse(found, path)["explanations"] if found is not None else {}
    entries = {int(feature): entry for feature, entry in named.items()}
    if width is not None and (beyond := [f for f in entries if not 0 <= f < width]):
        raise InputError(f"{path}: explains feature {beyond[0]}, the coder has {width} features")
    return entries


def _is_explanation(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("text", "method", "model"))
        and isinstance(scores := entry.get("scores"), dict)
        and all(isinstance(score, dict) for score in scores.values())
    )


def _check(content: dict[str, Any], path: os.PathLike) -> None:
    named = field(content, "explanations", dict, path)
    if odd := [name for name in named if not re.fullmatch(r"0|[1-9][0-9]{0,9}", name)]:
        raise InputError(f"{path}: {odd[0][:40]!r} is not the number of a feature")
    if bad := [name for name, entry in named.items() if not _is_explanation(entry)]:
        raise InputError(f"{path}: feature {bad[0]} has no valid explanation; delete it")


_FORMAT = Format("explanations of features", {"format": FORMAT}, _check, "delete it")


def is_number(value: Any) -> bool:
    """Whether a figure of a score can be shown; an undefined figure is None."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def explained_folder(info: CoderInfo) -> str:
    """The folder of a coder's explanations, beside its files; "" for a coder without files."""
    return info.path if is_remote(info.path) else info.folder


def layer_folder(folder: str, layers: int, layer: int | None) -> str:
    """The folder of a layer's explanations: each of several layers has its own features."""
    return f"{folder.rstrip('/')}/layer_{layer}" if layers > 1 else folder


def explanation_note(entry: Explanation) -> str:
    """Who wrote an explanation and how good it is: "gpt-4o-mini, detection 0.91"."""
    figures = [
        f"{name} {value:.2f}"
        for name, figure in SCORE_FIGURES.items()
        if is_number(value := entry["scores"].get(name, {}).get(figure))
    ]
    return ", ".join([entry["model"], *figures])


def write_explanations(
    folder: str | os.PathLike, coder: str, entries: Mapping[int, Explanation]
) -> None:
    """Write explanations.json into a folder, local or gs://, atomically; one line per feature."""
    plain = lambda value: json.dumps(value, ensure_ascii=False, allow_nan=False)

    def line(feature: int) -> str:
        try:
            return f"{plain(str(feature))}: {plain(entries[feature])}"
        except ValueError as error:  # a number that is not finite
            raise InputError(f"feature {feature}: cannot be written ({reason(error)})") from None

    lines = ",\n".join(map(line, sorted(entries)))
    text = f'{{"format": {FORMAT}, "coder": {plain(coder)}, "explanations": {{\n{lines}\n}}}}\n'
    data = text.encode(errors="replace")  # a name may hold half a character
    write_bytes(folder_path(folder) / FILE, data)
