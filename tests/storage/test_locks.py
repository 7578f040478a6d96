"""Folders that one process fills: the second is refused in one line, whoever died before."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from card_folders import make_cards
from coders import random_coder
from gemma_scope_jax.cards.card_files import CardFiles
from gemma_scope_jax.coders.release.files import save_coder
from gemma_scope_jax.errors import InputError
from gemma_scope_jax.storage.atomic import WholeFile, new_folder, write_text
from gemma_scope_jax.storage.locks import in_turn, only_writer, temporary_name

HOLDER = """
import sys
from pathlib import Path
from gemma_scope_jax.storage.locks import only_writer
with only_writer(Path(sys.argv[1])):
    Path(sys.argv[1], sys.argv[2]).write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / "a" / "b"
    name = temporary_name("x").replace(str(os.getpid()), "{pid}")
    run = [sys.executable, "-c", HOLDER, str(folder), "mine"]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield folder, holder, name.format(pid=holder.pid)
        holder.kill()


WRITERS = {
    "coder": lambda folder: save_coder(random_coder(), folder),
    "cards": CardFiles,
    "run": lambda folder: _enter(only_writer(folder)),
}


def _enter(context):
    with context:
        pass


def test_the_second_is_refused_until_the_first_is_dead(held):
    folder, holder, leftover = held
    (folder / leftover).write_text("half")
    for write in WRITERS.values():
        with pytest.raises(InputError, match="another process is writing here") as error:
            write(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert {path.name for path in folder.iterdir()} == {"mine", leftover}
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    _enter(only_writer(folder))
    assert {path.name for path in folder.iterdir()} == {"mine"}  # and no lock
    for write in WRITERS.values():
        write(folder)


def test_a_folder_that_stays_empty_goes_and_another_in_its_place_is_locked(tmp_path):
    folder = tmp_path / "deep" / "new"
    with only_writer(folder):
        assert folder.is_dir()
        with pytest.raises(InputError, match="another process"), only_writer(folder):
            raise AssertionError("held twice")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(InputError, match="new: cannot be written .Not a directory"):
        (tmp_path / "deep").mkdir()
        folder.write_text("a file")
        _enter(only_writer(folder))
    _enter(only_writer("gs://bucket/folder"))  # where nothing is held


def test_cards_of_two_runs_are_of_one(tmp_path):
    def write(stage):
        counts = stage.create("histogram", (4,), np.int64, 0)
        with pytest.raises(InputError, match="another process"):
            CardFiles(tmp_path, "same")
        counts += 1

    with CardFiles(tmp_path, "same") as files:
        files.make("examples", 1, write)
    assert np.load(tmp_path / "histogram.npy").tolist() == [1] * 4
    with CardFiles(tmp_path, "same") as files:
        files.make("examples", 1, lambda stage: pytest.fail("made again"))


def test_what_a_stage_no_longer_makes_goes(tmp_path):
    make_cards(tmp_path, 1)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".old.npy.{os.uname().nodename}.{dead.pid}.tmp").write_bytes(b"of a killed run")
    with CardFiles(tmp_path) as files:
        files.make("more", 2, lambda stage: stage.put("listed_2", np.zeros(4)))
        files.drop("examples")
    assert {path.name for path in tmp_path.iterdir()} == {"cards.json", "listed_2.npy"}


def test_two_exports_do_not_meet_and_a_killed_one_leaves_the_old(tmp_path):
    folder = tmp_path / "site"
    with new_folder(folder, "x") as new:
        (new / "x").write_text("old")
        with pytest.raises(InputError, match="site: another process"), new_folder(folder, "x"):
            raise AssertionError("held twice")
    folder.rename(tmp_path / ".site.old")  # killed between its two renames
    (tmp_path / ".site.part").mkdir()
    (tmp_path / ".site.part" / "half").write_text("new")
    with pytest.raises(KeyError), new_folder(folder, "x"):
        raise KeyError
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"x": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_shared_folders_are_taken_in_turn(tmp_path, caplog):
    order, waits = [], threading.Event()

    def second():
        waits.set()
        with in_turn(tmp_path):
            order.append("second")

    with in_turn(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert caplog.messages in ([], [f"{tmp_path}: waiting for another process that writes here"])


def test_file_systems_that_do_not_lock_folders(tmp_path, monkeypatch, caplog):
    """NFS: a file in the folder is locked, and goes; where nothing can be locked, that is said."""
    real, none = fcntl.flock, False

    def flock(handle, how):
        if none or stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "new"
    with only_writer(folder):
        with pytest.raises(InputError, match="new: another process"), only_writer(folder):
            raise AssertionError("held twice")
        (folder / "x").write_text("kept")
    assert [path.name for path in folder.iterdir()] == ["x"]
    _enter(only_writer(folder))
    _enter(only_writer(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists() and not caplog.messages
    none = True
    with only_writer(folder), only_writer(folder):
        pass
    said = caplog.messages
    assert said == [f"{folder}: this file system has no locks; let no other process write here"] * 2


def test_links_to_nowhere_and_folders_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "purged")
    with pytest.raises(InputError, match="link: is a link to a folder that does not exist"):
        _enter(only_writer(tmp_path / "link"))
    (tmp_path / "disk" / ".part").mkdir(parents=True)  # a mount point, after a killed run
    (tmp_path / "disk" / ".part" / "half").write_text("x")
    monkeypatch.chdir(tmp_path / "disk")
    with pytest.raises(KeyError), new_folder(Path(".")) as new:
        (new / "a").write_text("new")
        raise KeyError
    assert not list(Path.cwd().iterdir())
    before = os.stat(".").st_ino
    with new_folder(Path(".")) as new:
        (new / "a").write_text("new")
        (new / "b").mkdir()
    assert {path.name for path in Path.cwd().iterdir()} == {"a", "b"}
    assert os.stat(tmp_path / "disk").st_ino == before


def test_a_bucket_gets_no_half_of_a_file(monkeypatch):
    """fsspec's files are made when they are closed, also by the garbage collection."""

    class Half:
        closed, made = False, False

        def write(self, data):
            pass

        def discard(self):
            pass  # nothing was sent yet

        def close(self):
            self.made = not self.closed

    half = Half()

    class Place:
        __fspath__ = lambda self: "gs://bucket/x"
        open = lambda self, mode: half

    with pytest.raises(KeyError), WholeFile(Place()) as file:
        file.write(b"half")
        raise KeyError
    half.close()
    assert not half.made


def test_names_that_are_not_utf8_are_written(tmp_path):
    write_text(tmp_path / "x", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "x").read_text() == "caf\ufffd"
    with pytest.raises(KeyError), WholeFile(tmp_path / "y") as file:
        file.write(b"half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
