"""One writer of a local folder at a time: others are refused in one line, or wait their turn.

The system lets go of a lock when its process ends, however that is. In buckets nothing is held.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_scope_jax.errors import InputError, disk_error
from gemma_scope_jax.storage.paths import is_remote

LOCK = ".lock"  # the file that is locked where a folder cannot be
_held: set[tuple[int, int]] = set()  # folders (device, inode) that this process holds


@contextlib.contextmanager
def only_writer(folder: Any, name: Any = None) -> Iterator[None]:
    """Hold a local folder, made if missing, against other writers; one that stays empty goes.

    The system lets go of it when the process ends, however that is. In a bucket, and on the file
    systems without locks, nothing is held. name: what the folder is called in errors. Raises
    `InputError` if somebody else holds it, or it cannot be made.
    """
    if is_remote(folder):
        yield
        return
    path, made = Path(folder), []
    name = path if name is None else name
    try:
        handle, release = _locked(path, name, made)
    except OSError as error:
        remove_made(made)
        raise disk_error(name, error) from error
    except BaseException:
        remove_made(made)
        raise
    key = _key(handle)
    _held.add(key)
    try:
        remove_leftovers(path)
        yield
    finally:
        _held.discard(key)
        release()
        remove_made(made)
        os.close(handle)


@contextlib.contextmanager
def in_turn(folder: Any) -> Iterator[None]:
    """`only_writer` for what is short, in a folder that several processes share: it waits."""
    if is_remote(folder):
        yield
        return
    path, made = Path(folder), []
    try:
        handle, release = _locked(path, None, made)
    except OSError as error:
        remove_made(made)
        raise disk_error(path, error) from error
    try:
        remove_leftovers(path)
        yield
    finally:
        release()
        remove_made(made)
        os.close(handle)


def _locked(path: Path, name: Any, made: list[Path]) -> tuple[int, Callable[[], None]]:
    """A handle of the folder, and what lets go of it; `made` gets those that were made for it, the
    inner first.

    name: what errors call a folder that somebody else holds; None: wait for it.
    """
    while True:
        make_folders(path, made)
        handle = None
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            release = _lock(handle, path, name)
            if release and _key(handle) == _key(path):
                return handle, release
            if release:
                release()
        except FileNotFoundError:  # it was removed, or replaced, in between
            if path.is_symlink():
                raise InputError(
                    f"{path}: is a link to a folder that is not there; make it, or remove the link"
                ) from None
        except BaseException:
            if handle is not None:
                os.close(handle)
            raise
        if handle is not None:
            os.close(handle)


def _lock(handle: int, path: Path, name: Any) -> Callable[[], None] | None:
    """Lock a folder, of which there is a handle; gives what lets go, besides closing the handle.

    NFS locks files that are open for writing only, which a folder cannot be: there a file in it is
    locked. None: that file was removed meanwhile, try again.
    """
    if _flock(handle, path, name):
        return lambda: None
    lock = path / LOCK
    try:
        inner = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return lambda: None  # what is written next says why
    try:
        if not _flock(inner, path, name):
            print(
                f"warning: {path}: this file system has no locks; see that nobody else writes here",
                file=sys.stderr,
            )
        if not lock.exists() or _key(inner) != _key(lock):
            os.close(inner)
            return None
    except BaseException:
        os.close(inner)
        raise

    def release() -> None:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(inner)

    return release


def _flock(handle: int, path: Path, name: Any) -> bool:
    """Lock what is open; whether that is possible. Raises `InputError` if it is locked already."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if name is not None:
                raise InputError(
                    f"{name}: another process is writing here; wait for it, or choose another "
                    "folder"
                ) from None
            print(f"{path}: waiting for another process, which writes here", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _key(file: int | Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def is_held(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return _key(folder) in _held
    return False


# ---- folders, and what dead writers leave in them ----------------------------------------------


def temporary_name(name: str) -> str:
    """A name for a file until it is whole, unique to the host and process, so that the leftovers of
    dead processes can be found."""
    return f".{name}.{os.uname().nodename}.{os.getpid()}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Delete what processes of this machine that have died were writing in a local folder."""
    for path in folder.glob(f".*.{os.uname().nodename}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def make_folders(path: Path, made: list[Path]) -> None:
    """Make a folder with those above it; those that were missing are put in front of `made`."""
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.insert(0, folder)


def remove_made(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()
