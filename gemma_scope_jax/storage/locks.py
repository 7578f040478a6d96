"""One writer of a local folder at a time: others are refused with one line, or wait their turn.

The system releases a lock when its process ends, however it ends. Buckets are not locked.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_scope_jax.errors import InputError, disk_error
from gemma_scope_jax.storage.paths import AnyPath, is_remote

LOG = logging.getLogger(__name__)
LOCK = ".lock"  # the file to lock where a folder cannot be locked
_held: set[tuple[int, int]] = set()  # folders (device, inode) that this process holds


@contextlib.contextmanager
def only_writer(folder: AnyPath, name: AnyPath | None = None) -> Iterator[None]:
    """Hold a local folder, made if missing, against other writers; remove it if it stays empty.

    Buckets and file systems without locks are not held. name: what errors call the folder. Raises
    `InputError` if another process holds it, or it cannot be made.
    """
    with _locked(folder, folder if name is None else name) as handle:
        key = None if handle is None else _key(handle)
        if key is not None:
            _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)  # type: ignore[arg-type]


@contextlib.contextmanager
def in_turn(folder: AnyPath) -> Iterator[None]:
    """`only_writer` for short work in a folder that several processes share: waits its turn."""
    with _locked(folder, None):
        yield


@contextlib.contextmanager
def _locked(folder: AnyPath, name: AnyPath | None) -> Iterator[int | None]:
    """A handle of a locked local folder, made if missing and removed if empty; None for a bucket.

    name: what errors call a folder that another process holds; None: wait for it.
    """
    if is_remote(folder):
        yield None
        return
    path, made = Path(folder), []
    try:
        handle, release = _acquired(path, name, made)
    except BaseException as error:
        remove_made(made)
        if isinstance(error, OSError):
            raise disk_error(path if name is None else name, error) from error
        raise
    try:
        remove_leftovers(path)
        yield handle
    finally:
        release()
        remove_made(made)
        os.close(handle)


def _acquired(path: Path, name: AnyPath | None, made: list[Path]) -> tuple[int, Callable[[], None]]:
    """A handle of the folder, and a function that releases it; `made` gets the folders made."""
    while True:
        make_folders(path, made)
        with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            undo.callback(os.close, handle)
            if release := _lock(handle, path, name):
                undo.callback(release)
                if _key(handle) == _key(path):
                    undo.pop_all()
                    return handle, release
        # the folder was removed or replaced in between, or is a link to nothing
        if path.is_symlink() and not path.exists():
            advice = "make that folder, or remove the link"
            raise InputError(f"{path}: is a link to a folder that does not exist; {advice}")


def _lock(handle: int, path: Path, name: AnyPath | None) -> Callable[[], None] | None:
    """Lock a folder by its handle; returns what must be called before the handle is closed.

    NFS locks only files open for writing, which a folder cannot be: there, a file in it is locked.
    None: that file was removed meanwhile, try again.
    """
    nothing = lambda: None
    if _flock(handle, path, name):
        return nothing
    lock = path / LOCK
    try:
        inner = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return nothing  # the next write raises the error
    try:
        if not _flock(inner, path, name):
            LOG.warning("%s: this file system has no locks; let no other process write here", path)
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


def _flock(handle: int, path: Path, name: AnyPath | None) -> bool:
    """Lock an open file; False if that is impossible. Raises `InputError` if it is locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if name is not None:
            wait = "wait for it, or choose another folder"
            raise InputError(f"{name}: another process is writing here; {wait}") from None
        LOG.warning("%s: waiting for another process that writes here", path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            return False
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


def temporary_name(name: str) -> str:
    """The name of an unfinished file, unique to host and process: leftovers can be recognised."""
    return f".{name}.{os.uname().nodename}.{os.getpid()}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Delete the unfinished files of dead processes of this machine in a local folder."""
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
        pass  # of another user
    return True


def make_folders(path: Path, made: list[Path]) -> None:
    """Make a folder with its parents; those that were missing are put in front of `made`."""
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            made.insert(0, folder)


def remove_made(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()
