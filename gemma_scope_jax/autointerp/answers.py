"""Keeps answers on disk by request, so that nothing is asked, or paid for, twice.

The file holds JSON lines, `{"key": hash of the request, "answer": ...}`. It is only appended to,
one line per write, so a killed process leaves at most one torn line. Torn and damaged lines are
ignored and their requests are sent again. Only the position of each answer is in memory. The file
is created with the first answer.
"""

import errno
import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from gemma_scope_jax.errors import InputError, disk_error, reason
from gemma_scope_jax.storage.strict_json import field, parse_json

BEGINS = b'{"key": "'  # the start of every line
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


def request_key(request: Any) -> str:
    """A hash of a request (JSON data), the same in every process."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class AnswerFile:
    """A file of answers. `get` and `put` may be called from any thread.

    damaged: the number of damaged lines, other than those that a killed process left torn.
    Raises `InputError` for a file that cannot be written or that holds something else.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}  # offset and length of each line, in bytes
        self._file, self.damaged = -1, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read()
            elif not os.access(path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            self.close()
            raise disk_error(path, error) from error

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def _read(self) -> None:
        end, at, first = b"\n", 0, BEGINS
        with open(self.path, "rb") as file:
            for line in file:
                end, start, at = line[-1:], at, at + len(line)
                first = line if not start else first
                try:
                    self._places[_entry(line, self.path)[0]] = start, len(line)
                except InputError:
                    self.damaged += line != b"\n" and not _is_torn(line)
        if not self._places and not BEGINS.startswith(first.strip()[: len(BEGINS)]):
            raise InputError(f"{self.path}: holds something other than answers; name another file")
        self._open()
        if end != b"\n":
            os.write(self._file, b"\n")

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Any:
        """The answer to the request with this key, read from the file; None if there is none."""
        if (place := self._places.get(key)) is None:
            return None
        try:
            return _entry(os.pread(self._file, place[1], place[0]), "a line")[1]
        except (OSError, InputError) as error:
            why = reason(error)
            raise InputError(f"{self.path}: cannot be read ({why}); was it changed?") from None

    def put(self, key: str, answer: Any) -> None:
        """Append an answer (JSON data)."""
        entry = {"key": key, "answer": answer}
        line = (json.dumps(entry, ensure_ascii=True, allow_nan=False) + "\n").encode()
        with self._lock:
            try:
                if self._file < 0:
                    self._open()
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                end = os.lseek(self._file, 0, os.SEEK_CUR)  # appending moves there
            except OSError as error:
                raise disk_error(self.path, error) from error
            self._places[key] = end - len(line), len(line)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _entry(line: bytes, where: str | os.PathLike) -> tuple[str, Any]:
    """Key and answer of a line. Raises `InputError`."""
    entry = parse_json(line, where)
    key = field(entry, "key", str, where)
    if "answer" not in entry:
        raise InputError(f"{where}: lacks 'answer'")
    return key, entry["answer"]


def _is_torn(line: bytes) -> bool:
    """Whether a line is the start of one: a string or a bracket is still open."""
    text = line.rstrip(b"\n")
    left = _STRING.sub(b"", text)
    depth = sum(map(left.count, (b"{", b"["))) - sum(map(left.count, (b"}", b"]")))
    return BEGINS.startswith(text[: len(BEGINS)]) and (depth > 0 or b'"' in left)
