"""Names of files and folders: local ones, globs of them, buckets (gs://, s3://), the local cache.

In a bucket an object appears when it is complete; it cannot be appended to or memory-mapped.
`etils.epath` does the rest. `storage/atomic.py` writes files.
"""

import glob
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

from etils import epath

from gemma_scope_jax.errors import InputError, reason

LOG = logging.getLogger(__name__)
AnyPath = str | os.PathLike
_Path = TypeVar("_Path", Path, epath.Path)
_NEEDS = {"gs": ("gcsfs", "tensorflow"), "s3": ("s3fs",)}


def is_remote(path: AnyPath) -> bool:
    """Whether a path is in a bucket: it has a scheme, as in gs://bucket/folder."""
    return "://" in os.fspath(path)


def named_paths(pattern: str) -> list[str]:
    """The files and folders that a name or a glob stands for, sorted; `~` is the home folder.

    `[` and `*` may be part of a name (data[1].txt, a folder run [3]): an existing path of exactly
    this name takes precedence over a pattern.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    start = os.path.dirname(pattern)  # the longest parent that exists as spelled
    while start and not os.path.isdir(start):
        start = os.path.dirname(start)
    return sorted(glob.glob(glob.escape(start) + pattern[len(start) :], recursive=True))


def expanded(path: AnyPath) -> Path:
    """The path with `~` as the home folder; `~name` without such a user stays a name."""
    return Path(os.path.expanduser(path))


def folder_path(folder: AnyPath) -> epath.Path:
    """The folder as an absolute path, `~` expanded; a bucket's is unchanged.

    Raises `InputError` for unknown schemes and if the package for one is missing.
    """
    text = os.fspath(folder)
    if not is_remote(text):
        return epath.Path(expanded(text)).absolute()
    scheme = text.split("://")[0]
    if scheme not in _NEEDS:
        raise InputError(f"{text}: {scheme}:// is not supported; buckets are gs:// and s3://")
    if not any(map(importlib.util.find_spec, _NEEDS[scheme])):
        raise InputError(f"{text}: {scheme}:// needs `pip install {_NEEDS[scheme][0]}`")
    return epath.Path(text)


def existing_parent(path: _Path) -> _Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next(p for p in (path, *path.parents) if p.exists())


def check_writable(path: AnyPath) -> None:
    """Raise `InputError` if no file or folder can be made at `path`: a file is in its way, or the
    folder above is not writable. Buckets are not checked: only writing shows what they allow."""
    if is_remote(path):
        folder_path(path)
        return
    place = expanded(path).absolute()
    above = existing_parent(place.parent)
    if not above.is_dir():
        raise InputError(f"{path}: {above} is not a folder")
    if not os.access(place if place.is_dir() else above, os.W_OK):
        raise InputError(f"{path}: {above} is not writable")


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second run compiles nothing."""
    import jax

    # JAX before 0.11 has no types for its settings.
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        try:
            jax.config.update("jax_compilation_cache_dir", str(private_cache("compiled")))
        except InputError as error:
            LOG.warning("compiled programs are not cached: %s", error)
            return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> Path:
    """The folder for what can be made again: $XDG_CACHE_HOME (or ~/.cache)/gemma_scope_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gemma_scope_jax")


def private_cache(name: str) -> Path:
    """A folder of the cache for files that are executed; this user's only, mode 0700.

    Raises `InputError` if it belongs to another user or cannot be made.
    """
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            found = part.stat()
            if found.st_uid != os.getuid():
                raise InputError(
                    f"{part}: belongs to another user (id {found.st_uid}), whose programs would be "
                    "run; set XDG_CACHE_HOME to a folder of your own"
                )
            if found.st_mode & 0o077 and (part == folder or found.st_mode & 0o022):
                part.chmod(0o700)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}") from error
    return folder


def local_copy(folder: AnyPath) -> Path:
    """A local copy of the files of a bucket's folder, kept until they change.

    Raises `InputError` for a folder that does not exist or cannot be read.
    """
    remote = folder_path(folder)
    try:
        if not remote.is_dir():
            raise InputError(f"{remote}: no such folder")
        files = sorted((p for p in remote.iterdir() if p.is_file()), key=str)
        what = [(p.name, (s := p.stat()).length, s.mtime) for p in files]
        name = hashlib.sha256(repr((str(remote), what)).encode()).hexdigest()[:24]
        copy = cache_folder() / "buckets" / name / remote.name
        if copy.is_dir():
            return copy
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as temporary:
            whole = Path(temporary) / copy.name
            whole.mkdir()
            for file in files:
                with file.open("rb") as source, open(whole / file.name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 24)
            try:
                os.replace(whole, copy)
            except OSError:
                if not copy.is_dir():  # or another process was faster
                    raise
    except InputError:
        raise
    except Exception as error:  # a bucket's clients raise types of their own
        raise InputError(f"{remote}: cannot be read ({reason(error)})") from error
    return copy
