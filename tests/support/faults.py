"""A disk that fails: the n-th call that changes (or reads) files of a folder raises `OSError`.

    with Faults(folder, n) as faults:
        write(folder)
    faults.happened  # or there were fewer than n calls

Counted: opening, writing, flushing and closing files, making, renaming and syncing them, reserving
room for them, of everything under the folder alone: all that Python code does to files goes through
the functions patched here. A write by the system call that fails has written half, as on a full
disk.
"""

import builtins
import errno
import io
import os
from pathlib import Path

import pytest


class Faults:
    def __init__(self, folder, number, code=errno.ENOSPC, *, reading=False):
        self.folder, self.left, self.code = Path(folder), number, code
        self.reading, self.happened, self._patch = reading, False, pytest.MonkeyPatch()

    def tick(self, path):
        """A call on a path, or on an open file, by its descriptor."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        parents = (self.folder, self.folder.with_name(f".{self.folder.name}.part"))
        path = Path(os.fspath(path))
        if not any(path.is_relative_to(parent) for parent in parents):
            return
        self.left -= 1
        if self.left == 0:
            self.happened = True
            raise OSError(self.code, os.strerror(self.code), str(path))

    def __enter__(self):
        real_open = builtins.open

        def opened(path, mode="r", *args, **options):
            if isinstance(path, int):
                return real_open(path, mode, *args, **options)
            if bool(set(mode) & set("wax+")) == self.reading:
                return real_open(path, mode, *args, **options)
            self.tick(path)
            return _File(real_open(path, mode, *args, **options), path, self)

        for module in (builtins, io):
            self._patch.setattr(module, "open", opened)
        names = () if self.reading else ("mkdir", "replace", "rename", "fsync", "posix_fallocate")
        for name in names:
            self._patch.setattr(os, name, self._failing(getattr(os, name)))
        if not self.reading:
            self._patch_calls()
        return self

    def _patch_calls(self):
        """`os.open` of what is to be written, and `os.write`."""
        real_open, real_write = os.open, os.write

        def opened(path, flags, *args, **options):
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.tick(path)
            return real_open(path, flags, *args, **options)

        def written(file, data):
            try:
                self.tick(file)
            except OSError:
                real_write(file, data[: len(data) // 2])
                raise
            return real_write(file, data)

        self._patch.setattr(os, "open", opened)
        self._patch.setattr(os, "write", written)

    def __exit__(self, *_):
        self._patch.undo()

    def _failing(self, real):
        def call(path, *args, **options):
            self.tick(path)
            return real(path, *args, **options)

        return call


class _File:
    """An open file whose reads, or whose writes, flushes and closing, are counted."""

    def __init__(self, file, path, faults):
        self._file, self._path, self._faults = file, path, faults

    def __getattr__(self, name):
        found = getattr(self._file, name)
        reading = ("read", "readinto", "readline", "readlines")
        counted = reading if self._faults.reading else ("write", "writelines", "flush")
        if name not in counted:
            return found

        def call(*args):
            self._faults.tick(self._path)
            return found(*args)

        return call

    def close(self):
        closed = self._file.closed
        self._file.close()
        if not closed and not self._faults.reading:
            self._faults.tick(self._path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        return iter(self.readlines())
