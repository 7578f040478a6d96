"""Files and folders that are complete under their names or absent, written by one writer at a time.

A local file is written under a temporary name, synced and renamed; on any failure nothing of it
remains and what it would replace is unchanged. In a bucket an object appears only when it is
complete, so nothing needs a temporary name, and nothing can be locked.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from gemma_scope_jax.errors import InputError, disk_error, no_space, reason
from gemma_scope_jax.storage.locks import (
    is_held,
    make_folders,
    only_writer,
    remove_made,
    temporary_name,
)
from gemma_scope_jax.storage.paths import AnyPath, expanded, is_remote
from gemma_scope_jax.storage.strict_json import legible

_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_ZEROS = bytes(1 << 20)
PART = ".part"  # within a folder, its content while it is written


class WholeFile:
    """A file being written: `file` is open, `commit` gives it its name, `discard` removes it. Until
    then a local file is at `temporary`.

    As a context manager it gives `file`, and commits if the block ends well. Lets `OSError` (and
    the exceptions of a bucket's client) through.
    """

    def __init__(self, path: AnyPath):
        self.path: Any = path if is_remote(path) else Path(path)
        self.temporary: Any = self.path
        if not is_remote(path):
            self.temporary = self.path.with_name(temporary_name(self.path.name))
        self.file: Any = self.temporary.open("wb")

    def commit(self) -> None:
        try:
            if self.temporary is not self.path:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
            if self.temporary is not self.path:
                os.replace(self.temporary, self.path)
                _sync_folder(self.path.parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        file = self.file
        with contextlib.suppress(Exception):
            if hasattr(file, "discard"):  # a bucket's: closing would make an object of the part
                file.discard()
                file.closed = True  # or it is made when the file is garbage
                return
            file.close()
            self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def _sync_folder(folder: AnyPath) -> None:
    """Make a rename survive a power cut, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: AnyPath, write: Callable[[BinaryIO], Any]) -> None:
    """Create a file by a function that writes to it, in a folder that is made if missing; the file
    appears only when it is complete.

    Raises `InputError` that names the file if it cannot be written; an old one is unchanged then.
    """
    if is_remote(path):
        remote = epath.Path(path)
        write_folder(remote.parent, {remote.name: write})
        return
    path = expanded(path)
    made: list[Path] = []
    try:
        make_folders(path.parent, made)
        with WholeFile(path) as file:
            write(file)
    except OSError as error:
        remove_made(made)
        raise disk_error(path, error) from error


def write_bytes(path: AnyPath, data: bytes) -> None:
    """`write_file` of bytes."""
    write_file(path, lambda file: file.write(data))


def write_text(path: AnyPath, text: str) -> None:
    """`write_bytes` of a text as UTF-8; names in it that are not UTF-8 are made legible."""
    write_bytes(path, legible(text).encode())


def reserve(file: BinaryIO, size: int) -> None:
    """Extend an open file by `size` zero bytes on the disk: writing to a memory map of a sparse
    file on a full disk kills the process. Lets `OSError` through."""
    start = file.tell()
    try:
        file.flush()
        os.posix_fallocate(file.fileno(), start, size)
    except (AttributeError, OSError) as error:  # macOS, and file systems that cannot
        if isinstance(error, OSError) and (no_space(error) or error.errno not in _CANNOT):
            raise
        for at in range(0, size, len(_ZEROS)):
            file.write(_ZEROS[: size - at])
        file.flush()


def write_folder(folder: AnyPath, writers: Mapping[str, Callable[[BinaryIO], Any]]) -> None:
    """Create files in a folder (made if missing), each by its writer, and rename them at the end.

    They get temporary names and are renamed, in the order given, when all are complete. If anything
    fails, the folder is unchanged; an error of the system (a full disk, no permission) and another
    process that holds the folder raise `InputError`. In a bucket the files are written one by one.
    """
    if is_remote(folder):
        for name, write in writers.items():
            path = epath.Path(folder) / name
            try:
                with WholeFile(path) as file:
                    write(file)
            except (TypeError, InputError):
                raise
            except Exception as error:  # a bucket's clients raise types of their own
                raise InputError(f"{path}: cannot be written ({reason(error)})") from error
        return
    folder = expanded(folder)
    temporary = {name: folder / temporary_name(name) for name in writers}
    with contextlib.nullcontext() if is_held(folder) else only_writer(folder):
        try:
            for name, write in writers.items():
                with open(temporary[name], "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            _rename_all(folder, temporary)
        except OSError as error:
            raise disk_error(folder, error) from error
        finally:
            for path in temporary.values():
                _remove(path)


def _rename_all(folder: Path, temporary: Mapping[str, Path]) -> None:
    """Give all files their names, or none: the files that they replace are kept until all have."""
    kept, done = {}, []
    try:
        for name in temporary:
            old = folder / temporary_name(f"{name}.old")
            with contextlib.suppress(OSError):  # no such file, or the system has no links
                os.link(folder / name, old)
                kept[name] = old
        for name, path in temporary.items():
            os.replace(path, folder / name)
            done.append(name)
        _sync_folder(folder)
    except BaseException:
        for name in done:
            if name in kept:
                with contextlib.suppress(OSError):
                    os.replace(kept[name], folder / name)
            else:
                _remove(folder / name)
        raise
    finally:
        for path in kept.values():
            _remove(path)


@contextlib.contextmanager
def new_folder(folder: Path, *marks: str) -> Iterator[Path]:
    """A folder to write into that gets its name, replacing an old one, if the block ends well.

    marks: glob patterns of files, one of which the old folder must have. An existing empty folder,
    such as a mount point, is kept and filled. Raises `InputError` if the old one was not made here,
    another process is writing it, or the system refuses to write.
    """
    folder = folder.absolute()
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    if filled := _is_empty(folder):
        part = folder / PART
    try:
        with only_writer(part, folder):
            if old.is_dir() and not folder.exists():  # of a process killed between two renames
                os.replace(old, folder)
            check_replaceable(folder, *marks)
            try:
                for path in part.iterdir():
                    _remove(path)
                yield part
                if filled:
                    _rename_all(folder, {path.name: path for path in sorted(part.iterdir())})
                    with contextlib.suppress(OSError):  # empty: the next writer removes it, too
                        part.rmdir()
                else:
                    _swap(part, folder, old)
            except BaseException as error:
                _remove(part)
                if isinstance(error, InputError):  # it may name a file of the new folder
                    said = str(error).replace(os.fspath(part), os.fspath(folder))
                    raise InputError(said) from error
                raise
    except OSError as error:
        raise disk_error(folder, error) from error


def check_replaceable(folder: Path, *marks: str) -> None:
    """Raise `InputError` unless the folder is missing, empty, or has a file of one of the glob
    patterns `marks`: only such a folder does `new_folder` replace."""
    is_ours = any(True for mark in marks for _ in folder.glob(mark))
    if folder.exists() and not (is_ours or _is_empty(folder)):
        advice = "move it, or choose another folder"
        raise InputError(f"{folder}: is in the way, and was not made here; {advice}")


def _is_empty(folder: Path) -> bool:
    """Whether a folder exists and is empty, except for what a killed process may have left."""
    return folder.is_dir() and all(path.name == PART for path in folder.iterdir())


def _swap(part: Path, folder: Path, old: Path) -> None:
    """Rename `part` to `folder`; an old `folder` is removed, or restored if that fails."""
    _remove(old)
    if existed := folder.exists():
        os.replace(folder, old)
    try:
        os.replace(part, folder)
    except BaseException:
        if existed:
            os.replace(old, folder)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_json(file: BinaryIO, value: Any) -> None:
    """Write a JSON document to an open file."""
    file.write(json.dumps(value).encode())
