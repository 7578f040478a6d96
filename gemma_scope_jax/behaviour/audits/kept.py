"""The folder of an audit: what it is of, the stages that are done, and the report.

manifest.json   suite, model, coder, judge and settings; another audit is refused
answers.jsonl   log-probabilities and answers, chunk by chunk
<stage>.json    the result of a stage
audit.json      the audit, compact JSON for programs; report.html for people
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_scope_jax.behaviour.audits.report import audit_page
from gemma_scope_jax.behaviour.audits.results import Audit
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.evaluation.results import plain
from gemma_scope_jax.storage.atomic import check_replaceable, write_text
from gemma_scope_jax.storage.locks import only_writer
from gemma_scope_jax.storage.manifest import Format, digest
from gemma_scope_jax.storage.paths import expanded, is_remote
from gemma_scope_jax.storage.strict_json import field, finite, legible, parse_json

MANIFEST, RESULT, REPORT = "manifest.json", "audit.json", "report.html"
_ADVICE = "choose another folder for this audit, or delete this one"


def _check_stage(content: dict[str, Any], path: Any) -> None:
    field(content, "identity", str, path)
    field(content, "content", dict, path)


def _check_manifest(content: dict[str, Any], path: Any) -> None:
    field(content, "about", dict, path)


_MANIFEST = Format(
    "the manifest of an audit", {"format": "gemma-scope-jax audit", "version": 1},
    _check_manifest, _ADVICE,
)  # fmt: skip
_STAGE = Format(
    "a stage of an audit", {"format": "gemma-scope-jax audit stage", "version": 1},
    _check_stage, "delete it to make the stage again",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kept:
    """An audit's folder, held by this process. about: what identifies the audit."""

    folder: Path
    about: Mapping[str, Any]

    @staticmethod
    @contextlib.contextmanager
    def opened(out: str | os.PathLike, about: Mapping[str, Any]) -> "Iterator[Kept]":
        """The folder for an audit, new or begun. Raises `InputError` if it holds another one."""
        if is_remote(out):
            raise InputError(f"{out}: audits are kept in a local folder; copy it afterwards")
        folder, about = expanded(out), _as_json(about)
        check_replaceable(folder, MANIFEST)
        with only_writer(folder):
            path = folder / MANIFEST
            if path.exists():
                _refuse_others(_MANIFEST.read(path)["about"], about, folder)
            else:
                write_text(path, json.dumps({**_MANIFEST.marks, "about": about}, indent=1) + "\n")
            yield Kept(folder, about)

    def stage(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The stage's result as JSON data: as kept, or made now and kept."""
        path, identity = self.folder / f"{name}.json", digest(self.about)
        if path.exists():
            found = _STAGE.read(path)
            if found["identity"] != identity:
                raise InputError(f"{path}: is of another audit; {_STAGE.advice}")
            return found["content"]
        content = _as_json(make())
        document = {**_STAGE.marks, "identity": identity, "content": content}
        write_text(path, json.dumps(document, ensure_ascii=False) + "\n")
        return content

    def finish(self, done: Audit) -> None:
        """Write the compact JSON and the report."""
        content = done.as_dict()
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        write_text(self.folder / RESULT, text + "\n")
        write_text(self.folder / REPORT, audit_page(done))


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as it is read back: a resumed audit must not differ by what JSON changes."""
    text = json.dumps(legible(finite(plain(dict(content)))), allow_nan=False)
    return parse_json(text, "a stage")


def _refuse_others(kept: Mapping[str, Any], about: Mapping[str, Any], folder: Path) -> None:
    what = {"suite_identity": "another suite", "asked": "other items", "settings": "other settings"}
    for key in about:
        old, new = kept.get(key), about[key]
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differ = [name for name in new if old.get(name) != new[name]]
            old, new = ({name: d.get(name) for name in differ} for d in (old, new))
        said = f"{json.dumps(old)[:80]}, not {json.dumps(new)[:80]}"
        raise InputError(
            f"{folder}: holds an audit with {what.get(key, f'another {key}')} ({said}); {_ADVICE}"
        )
