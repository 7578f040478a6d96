"""Explanations of a coder's features: `explanations.json` beside the coder, read wherever one
shows.

    {"format": 1, "coder": "...", "explanations": {"17": {
        "text": "negations in English", "method": "endpoint", "model": "gpt-4o-mini",
        "examples": 15, "scores": {"detection": {"balanced_accuracy": 0.91, ...}, ...}}}}

`method` says what wrote the text: a chat "endpoint", a "model" on this machine, or token
"statistics".
"""

import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

from gemma_scope_jax.buckets import folder_path, is_remote
from gemma_scope_jax.coders.atomic_files import write_folder
from gemma_scope_jax.coders.sparse_coder import CoderInfo
from gemma_scope_jax.errors import InputError, reason

FILE = "explanations.json"
FORMAT = 1
# The one figure of each score that stands for it where there is little room.
FIGURES = {
    "detection": "balanced_accuracy", "fuzzing": "balanced_accuracy", "intruder": "accuracy",
    "simulation": "correlation", "saebench": "score",
}  # fmt: skip

Explanation = dict[str, Any]  # text, method, model: str; scores: dict; examples: int; more allowed


def read_explanations(
    folder: str | os.PathLike, width: int | None = None
) -> dict[int, Explanation]:
    """The explanations in a folder (or a file named *.json) by feature, local or gs://; {} if there
    are none.

    width: of the coder, to refuse another coder's file. Raises `InputError` for a file that cannot
    be understood.
    """
    path = folder_path(folder)
    path = path if path.name.endswith(".json") else path / FILE
    try:
        found = path.read_bytes() if path.is_file() else None
    except Exception as error:  # the clients of buckets raise types of their own
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    if found is None:
        if path.name != FILE:
            raise InputError(f"{path}: no such file")
        return {}
    try:
        content = json.loads(found)
        entries = {int(feature): entry for feature, entry in content["explanations"].items()}
        version = content["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it or write it anew") from None
    if version != FORMAT:
        raise InputError(f"{path}: format {version!r} is not known (this reads {FORMAT})")
    if bad := [f for f, entry in entries.items() if not _is_explanation(entry)]:
        raise InputError(f"{path}: feature {bad[0]} has no explanation as written here; delete it")
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


def explained_folder(info: CoderInfo) -> str:
    """Where a coder's explanations lie: beside its files, of one in a bucket in the bucket. "" for
    a coder without files."""
    return info.path if is_remote(info.path) else info.folder


def layer_folder(folder: str, layers: int, layer: int | None) -> str:
    """Where the explanations of a coder's features lie, given its folder or another one.

    Numbers of features are those of a source layer, so coders of several `layers` have a folder
    for each of them.
    """
    return f"{folder.rstrip('/')}/layer_{layer}" if layers > 1 else folder


def explanation_note(entry: Explanation) -> str:
    """Where an explanation comes from and how good it is: "gpt-4o-mini, detection 0.91"."""
    figures = [
        f"{name} {value:.2f}"
        for name, figure in FIGURES.items()
        if isinstance(value := entry["scores"].get(name, {}).get(figure), (int, float))
    ]
    return ", ".join([entry["model"], *figures])


def write_explanations(folder: Any, coder: str, entries: Mapping[int, Explanation]) -> None:
    """Write explanations.json into a folder, local or gs://: the old file or the new, whole. A line
    holds a feature."""
    plain = lambda value: json.dumps(value, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join(f"{plain(str(f))}: {plain(entries[f])}" for f in sorted(entries))
    text = f'{{"format": {FORMAT}, "coder": {plain(coder)}, "explanations": {{\n{lines}\n}}}}\n'

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_folder(folder_path(folder), {FILE: write})
