"""Which text this is: known by its bytes. What goes on from a text must notice that it was edited
in place, which name and size do not tell; and it may go on where the text has another name.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import write_bytes
from gemma_scope_jax.storage.manifest import digest
from gemma_scope_jax.storage.paths import cache_folder
from gemma_scope_jax.storage.strict_json import parse_json

PART = 1 << 26  # bytes that a thread hashes by itself
REMEMBERED = 1 << 24  # bytes from which on a file's digest is kept until the file changes
_READ = 1 << 18  # bytes in memory, of each thread
_SETTLED = 2.0  # seconds after which a change of a file shows in its times


def file_digests(paths: Sequence[Path]) -> list[str]:
    """`file_digest` of each, small files side by side."""
    small = [path for path in paths if _size(path) < REMEMBERED]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = dict(zip(small, pool.map(file_digest, small)))
    return [found[path] if path in found else file_digest(path) for path in paths]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # `file_digest` says what is wrong


def file_digest(path: Path) -> str:
    """32 hexadecimal digits of a file's bytes (BLAKE2b of the digests of its parts).

    Those of large files are kept in the cache, by path, size, times and inode. Raises `InputError`
    for files that cannot be read.
    """
    try:
        stat = path.stat()
        about = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        if stat.st_size < REMEMBERED:
            return _of_file(path, stat.st_size)
        name = digest(os.fsencode(path.absolute()), 16)
        kept = cache_folder() / "texts" / f"{name}.json"
        if (known := _remembered(kept, about)) is not None:
            return known
        found = _of_file(path, stat.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED:
        _remember(kept, {"file": about, "digest": found})
    return found


def _of_file(path: Path, size: int) -> str:
    threads = min(16, os.cpu_count() or 1, max(1, -(-size // PART)))
    with open(path, "rb") as file, ThreadPoolExecutor(threads) as pool:

        def part(start: int) -> bytes:
            found = hashlib.blake2b(digest_size=16)
            for at in range(start, min(start + PART, size), _READ):
                found.update(os.pread(file.fileno(), min(_READ, start + PART - at), at))
            return found.digest()

        parts = b"".join(pool.map(part, range(0, size, PART)))
    return digest(b"%d " % size + parts, 16)


def _remembered(kept: Path, about: list[int]) -> str | None:
    try:
        found = parse_json(kept.read_bytes(), kept)
        same = found["file"] == about and isinstance(found["digest"], str)
        return found["digest"] if same else None
    except (OSError, InputError, KeyError, TypeError):
        return None


def _remember(kept: Path, value: Any) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, json.dumps(value).encode())  # type: ignore[arg-type]
    except (OSError, InputError):
        pass  # a home that cannot be written to: the file is read again the next time


def strings_digest(strings: Iterable[Any]) -> str:
    """32 hexadecimal digits of strings in order; whatever is no string counts as its type."""
    found = hashlib.blake2b(digest_size=16)
    for string in strings:
        text = string if isinstance(string, str) else f"\0{type(string).__name__}"
        bytes_ = text.encode("utf-8", "surrogatepass")
        found.update(len(bytes_).to_bytes(8, "little"))
        found.update(bytes_)
    return found.hexdigest()
