"""Answers kept on disk by what was asked, so that nothing is asked, or paid, twice.

A file of JSON lines, `{"key": hash of the request, "answer": ...}`, only ever appended to, a line
in one write: a process killed at any moment leaves at most one torn line, at the end, which is
ignored.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from gemma_scope_jax.coders.atomic_files import disk_error


def request_key(request: Any) -> str:
    """A name for a request (plain data), the same in every process."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AnswerFile:
    """`get` and `put`, from any thread. Raises `InputError` for a file that cannot be written."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._known: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._read()
        except OSError as error:
            raise disk_error(path, error) from error

    def _read(self) -> None:
        end = b"\n"
        with open(self.path, "rb") as file:
            for line in file:
                end = line[-1:]
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # torn
        if end != b"\n":
            os.write(self._file, b"\n")

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any:
        """The answer kept under a key, or None."""
        return self._known.get(key)

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer (plain data) for good."""
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=True) + "\n"
        with self._lock:
            try:
                os.write(self._file, line.encode())
            except OSError as error:
                raise disk_error(self.path, error) from error
            self._known[key] = answer

    def close(self) -> None:
        os.close(self._file)
