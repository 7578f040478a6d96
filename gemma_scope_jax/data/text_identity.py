"""The identity of a text: a digest of its bytes.

A run that continues must notice that its text was edited in place, which name and size do not show,
and may continue if the text was only renamed.
"""

import contextlib
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

PART = 1 << 26  # bytes that one thread hashes
REMEMBERED = 1 << 24  # bytes from which a file's digest is cached until the file changes
_READ = 1 << 18  # bytes in memory, per thread
_SETTLED = 2.0  # seconds after which a change of a file is visible in its times


def file_digests(paths: Sequence[Path]) -> list[str]:
    """`file_digest` of each file; small files are read in parallel."""
    large = {p for p in paths if os.path.isfile(p) and os.path.getsize(p) >= REMEMBERED}
    small = [path for path in paths if path not in large]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = dict(zip(small, pool.map(file_digest, small)))
    return [file_digest(path) if path in large else found[path] for path in paths]


def file_digest(path: Path) -> str:
    """32 hexadecimal digits of a file's bytes (BLAKE2b of the digests of its parts).

    Those of large files are cached, by path, size, times and inode. Raises `InputError`.
    """
    try:
        stat = path.stat()
        about = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        if stat.st_size < REMEMBERED:
            return _of_file(path, stat.st_size)
        kept = cache_folder() / "texts" / f"{digest(os.fsencode(path.absolute()), 16)}.json"
        if (known := _remembered(kept, about)) is not None:
            return known
        found = _of_file(path, stat.st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED:
        with contextlib.suppress(InputError):  # without a cache the file is read again next time
            write_bytes(kept, json.dumps({"file": about, "digest": found}).encode())
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


def strings_digest(strings: Iterable[Any]) -> str:
    """32 hexadecimal digits of strings in order; for other objects the type is hashed."""
    found = hashlib.blake2b(digest_size=16)
    for string in strings:
        text = string if isinstance(string, str) else f"\0{type(string).__name__}"
        bytes_ = text.encode("utf-8", "surrogatepass")
        found.update(len(bytes_).to_bytes(8, "little"))
        found.update(bytes_)
    return found.hexdigest()
