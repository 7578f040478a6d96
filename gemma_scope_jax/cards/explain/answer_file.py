"""Answers kept on disk by what was asked, so that nothing is asked, or paid, twice.

A file of JSON lines, `{"key": hash of the request, "answer": ...}`, only ever appended to, a line
in one write: a process killed at any moment leaves at most one torn line, at the end, which is
ignored. In memory is only where each answer begins.
"""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from gemma_scope_jax.coders.atomic_files import disk_error
from gemma_scope_jax.errors import InputError, reason


def request_key(request: Any) -> str:
    """A name for a request (plain data), the same in every process."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AnswerFile:
    """`get` and `put`, from any thread. Raises `InputError` for a file that cannot be written."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}  # of each line: where it begins, its bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._read()
        except OSError as error:
            raise disk_error(path, error) from error

    def _read(self) -> None:
        end, at = b"\n", 0
        with open(self.path, "rb") as file:
            for line in file:
                end, start, at = line[-1:], at, at + len(line)
                try:
                    entry = json.loads(line)
                    _, self._places[entry["key"]] = entry["answer"], (start, len(line))
                except (ValueError, KeyError, TypeError):
                    continue  # torn
        if end != b"\n":
            os.write(self._file, b"\n")

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Any:
        """The answer kept under a key, or None. It is read from the file."""
        if (place := self._places.get(key)) is None:
            return None
        try:
            return json.loads(os.pread(self._file, place[1], place[0]))["answer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({reason(error)}); was it changed?"
            ) from None

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer (plain data) for good."""
        line = (json.dumps({"key": key, "answer": answer}, ensure_ascii=True) + "\n").encode()
        with self._lock:
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                end = os.lseek(self._file, 0, os.SEEK_CUR)  # appending moves there
            except OSError as error:
                raise disk_error(self.path, error) from error
            self._places[key] = end - len(line), len(line)

    def close(self) -> None:
        os.close(self._file)
