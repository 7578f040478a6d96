"""Processes that find no other, lose one, or are told nonsense: one line, in the time stated."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from gemma_scope_jax.errors import InputError
from gemma_scope_jax.model.processes import _Process, check_share, join_processes


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    "given, message",
    [
        (("127.0.0.1:80", 0, 0), "processes must be at least 1, got 0"),
        (("127.0.0.1:80", -2, 0), "processes must be at least 1"),
        (("127.0.0.1:80", 2, 2), "process 2: of 2 processes the last is 1"),
        (("127.0.0.1:80", 2, -1), "process must be from 0"),
        (("127.0.0.1:80", 2, 1, 0), "seconds to wait must be positive"),
        (("localhost", 2, 1), "'localhost' is not HOST:PORT"),
        (("host:99999", 2, 1), "not HOST:PORT"),
        (("", 2, 1), "does not set coordinator"),
        (("", None, 1), "does not set coordinator, processes"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        join_processes(*given)


def test_the_share_of_a_command_is_whole(capsys):
    from gemma_scope_jax import cli

    check_share(2, 1)
    for options, message in {
        ("--processes", "0"): "processes must be at least 1, got 0",
        ("--processes", "2"): "give --process",
        ("--processes", "2", "--process", "2"): "the last is 1",
        ("--processes", "2", "--process", "-1"): "from 0",
    }.items():
        assert cli.main(["extract", "some/coder", "--out", "x", *options]) == 2
        assert message in capsys.readouterr().err


def test_a_coordinator_that_is_not_there(address):
    with pytest.raises(InputError, match=f"no process 0 at {address} within 0.2 s .*refused"):
        join_processes(address, 2, 1, 0.2)


def test_a_port_that_is_taken(address):
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))):
        with pytest.raises(InputError, match=f"cannot listen at {address} .*another port"):
            join_processes(address, 2, 0, 0.2)
        with pytest.raises(InputError, match="is not process 0 of this job"):
            join_processes(address, 2, 1, 0.2)  # it takes the connection and never answers


def test_all_hear_who_did_not_come(address):
    """Of four 0 and 1 come, 2 comes twice, one believes to be of three; a stranger is nobody."""
    said: dict[str, str] = {}

    def meet(name, count, index, wait=5.0):
        try:
            _Process(address, count, index, wait).meet()
        except InputError as error:
            said[name] = str(error)

    zero = threading.Thread(target=meet, args=("zero", 4, 0, 1.0))
    zero.start()
    others = [("one", 4, 1), ("two", 4, 2), ("also two", 4, 2), ("of three", 3, 1)]
    threads = [threading.Thread(target=meet, args=other) for other in others]
    for thread in threads:
        thread.start()
    while zero.is_alive():
        try:
            with socket.create_connection(("127.0.0.1", int(address.split(":")[1])), 1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\n")
                assert stranger.recv(10) == b""
            break
        except OSError:
            continue
    for thread in (zero, *threads):
        thread.join(10)
    assert "of 4 processes 3 did not come" in said["zero"]
    assert "process 3 did not come" in said["one"]
    twos = sorted((said["two"], said["also two"]))
    assert "process 3 did not come" in twos[0] and "a process 2 already" in twos[1]
    assert "process 0 is one of 4 processes, this one of 3" in said["of three"]


def run(address, count, how):
    """Exit codes and what is said on stderr, by process."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(count), str(process), how],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    errors = [process.communicate(timeout=200)[1].splitlines() for process in started]
    said = [[line for line in lines if "[Gloo]" not in line] for lines in errors]
    return [process.returncode for process in started], said


@pytest.mark.parametrize(
    "how, codes, line",
    [
        ("1 dies", [2, 3, 2], "process 1 has died"),
        ("0 dies", [3, 2, 2], "process 0 has died"),
        ("2 fails", [2, 2, 1], "process 2 has stopped: its own reason"),
        ("all end", [0, 0, 0], ""),
    ],
)
def test_where_one_goes_the_others_say_so_and_end(address, how, codes, line):
    got, said = run(address, 3, how)
    assert got == codes, said
    for code, lines in zip(codes, said):
        assert code != 2 or lines == [f"{line}; so this one ends"]


def test_jax_does_not_abort_when_its_coordinator_dies(address):
    codes, said = run(address, 2, "0 dies in jax")
    assert codes == [3, 2], said
    assert said[1] == ["process 0 has died; so this one ends"]


if __name__ == "__main__":
    address, count, process, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if "jax" in how:
        import numpy as np
        from jax.experimental import multihost_utils

        join_processes(address, count, process)
        meet = lambda: multihost_utils.process_allgather(np.array(process))
        meet()
    else:
        here = _Process(address, count, process, 60)
        here.meet()
        meet = threading.Event().wait
    if how.startswith(f"{process} dies"):
        os._exit(3)
    if how.startswith(f"{process} fails"):
        here.abandon(1, "its own reason")
    while how != "all end":
        meet()
    here.leave()
