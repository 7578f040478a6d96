"""Compiled kernels on disk: damaged ones are made again, others' are not run."""

import os

import pytest

from gemma_scope_jax.kernels import cpu


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that notes its calls and writes a word; the kernels' folder is the test's."""
    script, calls = tmp_path / "c++", tmp_path / "calls"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n'
        f'for last; do :; done; printf program > "$last"; echo >> {calls}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda: len(calls.read_text().splitlines())


def test_kernels_that_are_damaged_are_made_again(compiler):
    file = cpu._library()
    whole = file.read_bytes()
    assert whole.startswith(b"program") and (cpu._library(), compiler()) == (file, 1)
    damaged = (whole[:20], b"", whole[:3] + b"G" + whole[4:])
    for count, content in enumerate(damaged, 2):
        file.write_bytes(content)
        assert cpu._library() == file and file.read_bytes() == whole
        assert compiler() == count
    file.unlink()
    file.symlink_to(file.parent.parent / "c++")
    assert cpu._library().read_bytes() == whole and not file.is_symlink()


def test_kernels_are_the_users_own(compiler, monkeypatch, caplog):
    folder = cpu._library().parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert cpu._library() and folder.stat().st_mode & 0o777 == 0o700
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    cpu.available.cache_clear()
    try:
        assert not cpu.available()
    finally:
        cpu.available.cache_clear()
    said = caplog.text
    assert "belongs to another user" in said and "set XDG_CACHE_HOME" in said
