"""Folders in buckets (gs://, s3://) beside local ones: where the two differ; the local cache.

An object appears when it is complete, so nothing needs a temporary name; it cannot be appended to,
nor memory-mapped. `etils.epath` does the rest.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from gemma_scope_jax.errors import InputError, reason
from gemma_scope_jax.storage.strict_json import legible

_NEEDS = {"gs": ("gcsfs", "tensorflow"), "s3": ("s3fs",)}


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket: it has a scheme, as in gs://bucket/folder."""
    return "://" in os.fspath(path)


def folder_path(folder: str | os.PathLike) -> epath.Path:
    """The folder as an absolute path, `~` expanded; a bucket's as it is.

    Raises `InputError` for schemes that are not known and where the package for one is missing.
    """
    text = os.fspath(folder)
    if not is_remote(text):
        return epath.Path(text).expanduser().absolute()
    scheme = text.split("://")[0]
    if scheme not in _NEEDS:
        raise InputError(f"{text}: {scheme}:// is not known; buckets are gs:// and s3://")
    if not any(map(importlib.util.find_spec, _NEEDS[scheme])):
        raise InputError(f"{text}: {scheme}:// needs `pip install {_NEEDS[scheme][0]}`")
    return epath.Path(text)


def cache_folder() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME (or ~/.cache)/gemma_scope_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gemma_scope_jax")


def write_text(path: epath.Path, text: str) -> None:
    """Write a file that is complete whenever it is there under its name; names in the text that are
    not UTF-8 are made legible."""
    write_bytes(path, legible(text).encode())


def temporary_name(name: str) -> str:
    """Where a file is written before it is whole: each process its own copy, which tells the
    process, as that may die over it."""
    return f".{name}.{os.uname().nodename}.{os.getpid()}.tmp"


def write_bytes(path: epath.Path, data: bytes) -> None:
    """`write_text` of bytes."""
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(temporary_name(path.name))
    temporary.write_bytes(data)
    temporary.replace(path)


def local_copy(folder: str | os.PathLike) -> Path:
    """A local copy of the files of a bucket's folder, kept until they change.

    Raises `InputError` for a folder that is not there or cannot be read.
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
            os.replace(whole, copy)
    except InputError:
        raise
    except Exception as error:  # the clients raise types of their own
        raise InputError(f"{remote}: cannot be read ({reason(error)})") from error
    return copy
