"""What writers of local folders share: what a failing disk means, and names that are not final."""

import contextlib
import errno
import os
from pathlib import Path

from gemma_scope_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket: it has a scheme, as in gs://bucket/folder."""
    return "://" in os.fspath(path)


def no_space(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_error(path: str | os.PathLike, error: OSError) -> InputError:
    """What to tell the user when the system refuses to write."""
    where = os.fspath(path)
    if no_space(error):
        return InputError(
            f"{where}: no space left on the disk; free some, or choose another folder"
        )
    return InputError(f"{where}: cannot be written ({error.strerror or error})")


def temporary_name(name: str) -> str:
    """Where a file is written before it is whole: each process its own copy, which tells the
    process, as that may die over it."""
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
