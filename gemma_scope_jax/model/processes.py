"""Several processes as one JAX program: they meet, and if one dies, the others report it and end.

JAX's own runtime aborts with a native stack trace if a process does not come, dies, or ends early.
So the processes meet here first: process 0 listens at the coordinator's address, and JAX starts
only when all have come. JAX's traffic to process 0 goes through the same port, by a tunnel whose
near end stays open whatever happens to the far one; each process learns what has happened on the
connection by which it came.
"""

import atexit
import contextlib
import dataclasses
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from gemma_scope_jax.errors import InputError, reason, shown

LOG = logging.getLogger(__name__)
_HELLO, _TUNNEL = "gemma_scope_jax join", "gemma_scope_jax tunnel"
_here: "_Process | None" = None


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes or hosts that do one job together; TPU pods and SLURM are recognised."""

    coordinator: str = ""
    """The address and port of the first of several processes that are one JAX program."""
    processes: int | None = None
    """The number of processes."""
    process: int | None = None
    """The number of this process, from 0."""
    wait: float = 60.0
    """Seconds that processes with a coordinator wait for one another."""

    def join(self) -> None:
        """Become one JAX program with the others; see `join_processes`."""
        join_processes(self.coordinator, self.processes, self.process, self.wait)

    def share(self) -> tuple[int, int]:
        """(i, n): this process does part i of n, if each process is a program of its own; (0, 1) if
        they are joined into one. Raises `InputError`."""
        check_share(self.processes, self.process)
        if self.coordinator or self.processes is None:
            self.join()
        elif self.processes > 1:
            if self.process is None:
                raise InputError(
                    f"which of the {self.processes} processes is this? give --process, from 0"
                )
            return self.process, self.processes
        return 0, 1


def join_processes(
    coordinator: str = "", processes: int | None = None, process: int | None = None, wait=60.0
) -> None:
    """Make the processes of a job one JAX program; call it before anything else of JAX.

    Arguments left out come from the environment: TPU pods, SLURM and Open MPI are recognised. For a
    single process nothing happens. Raises `InputError` if the processes have not met after `wait`
    seconds. If one dies later, each of the others reports it in one line and ends with code 2; a
    process whose machine is cut off counts as dead after `wait` seconds.
    """
    global _here
    check_share(processes, process)
    if not wait > 0:
        raise InputError(f"the seconds to wait must be positive, not {wait}")
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    several = workers or any(size.isdigit() and int(size) > 1 for size in sizes)
    if (coordinator, processes, process) == ("", None, None) and not several:
        return
    if _here is not None:
        raise InputError("the processes of this job have been joined before")
    import jax  # before they meet: importing takes seconds, and not the same time everywhere

    address, count, index, local = _detected(coordinator, processes, process, wait)
    meeting = _Process(address, count, index, wait)
    near = meeting.meet()
    _here = meeting
    atexit.register(meeting.leave)
    meeting.watch_exceptions()
    options: dict[str, Any] = {} if index else {"coordinator_bind_address": near}
    options["heartbeat_timeout_seconds"] = max(100, round(2 * wait))  # later than ours
    try:
        jax.distributed.initialize(near, count, index, local, **options)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes of this job could not be joined ({error})") from error


def check_share(processes: int | None, process: int | None) -> None:
    """Raise `InputError` unless `process` is one of 0 .. `processes` - 1; None means not given."""
    if processes is not None and processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    if process is not None and process < 0:
        raise InputError(f"process must be from 0, got {process}")
    if processes is not None and process is not None and process >= processes:
        raise InputError(f"process {process}: of {processes} processes the last is {processes - 1}")


def is_first_process() -> bool:
    """Whether this process is the one that reports for all of a JAX program."""
    import jax

    return jax.process_index() == 0


def abandon(code: int, why: str = "") -> None:
    """End now and tell the other processes why; without other processes, do nothing."""
    if _here is not None:
        _here.abandon(code, why)


def _detected(coordinator: str, processes: int | None, process: int | None, wait: float):
    """(address, processes, process, local devices) as given, the rest from the environment."""
    found: Any = (coordinator or None, processes, process, None)
    with contextlib.suppress(ImportError, AttributeError, TypeError, RuntimeError, OSError):
        from jax._src.clusters import ClusterEnv  # JAX has no public equivalent

        detect: Any = ClusterEnv.auto_detect_unset_distributed_params
        found = detect(*found, None, round(wait))
    address, count, index, local = found
    names = ("coordinator", "processes", "process")
    if missing := [name for name, value in zip(names, found) if value is None]:
        raise InputError(
            f"one program of several processes: the environment does not set {', '.join(missing)}; "
            "give --coordinator HOST:PORT, --processes and --process (in Python: arguments of "
            "join_processes)"
        )
    check_share(count, index)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"the coordinator {address!r} is not HOST:PORT, as in 10.0.0.1:8476")
    return address, count, index, local


class _Process:
    """This process among the others. Process 0 has a connection to each, the others one to it."""

    def __init__(self, address: str, count: int, index: int, wait: float):
        host, _, port = address.rpartition(":")
        self.at = (host.strip("[]"), int(port))
        self.address, self.count, self.index, self.wait = address, count, index, wait
        self.others: dict[int, socket.socket] = {}
        self.opened: list[socket.socket] = []
        self.left: set[int] = set()  # processes that have ended properly
        self.changed = threading.Condition()
        self.ending = threading.Event()  # a process has died: this one is about to end
        self.near = ("127.0.0.1", 0)  # in process 0, where JAX's own service listens

    def meet(self) -> str:
        """Wait until all have come. Returns the address to give to JAX."""
        try:
            host, port = self._join() if self.index else self._gather()
            return f"{host}:{port}"
        except InputError:
            for opened in (*self.opened, *self.others.values()):
                _close(opened)
            raise

    def _gather(self) -> tuple[str, int]:
        local = self.at[0] in ("localhost", "127.0.0.1")
        six = not local and socket.has_dualstack_ipv6()
        family, where = socket.AF_INET6 if six else socket.AF_INET, "127.0.0.1" if local else ""
        try:
            listener = socket.create_server(
                (where, self.at[1]), family=family, dualstack_ipv6=six, backlog=self.count + 8
            )
        except OSError as error:
            why = f"({error.strerror or error}): choose another port"
            raise InputError(f"process 0 cannot listen at {self.address} {why}") from error
        self.opened.append(listener)
        with socket.socket() as free:
            free.bind(self.near)
            self.near = free.getsockname()
        _serve(listener, lambda connection: _thread(self._greet, connection))
        with self.changed:
            self.changed.wait_for(lambda: len(self.others) == self.count - 1, self.wait)
            missing = sorted(set(range(1, self.count)) - set(self.others))
            self._tell(f"fail process {missing[0]} did not come" if missing else "go")
        if missing:
            names = ", ".join(map(str, missing[:8])) + ", .." * (len(missing) > 8)
            within = f"within {self.wait:g} s: start them, or wait longer"
            gone = f"of {self.count} processes {names} did not come to {self.address}"
            raise InputError(f"{gone} {within}")
        for index, connection in self.others.items():
            _thread(self._hear, index, connection)
        return self.near

    def _greet(self, connection: socket.socket) -> None:
        """Another process, the end of its tunnel, or a stranger."""
        connection.settimeout(self.wait)
        line, why = _line(connection), ""
        if line == _TUNNEL and (service := _connected(self.near, self.wait)[0]) is not None:
            _tunnel(connection, service)
            return
        match line.removeprefix(_HELLO).split():
            case [count, index] if line.startswith(_HELLO) and index.isdigit():
                number = int(index)
            case _:
                _close(connection)
                return
        with self.changed:
            if count != str(self.count):
                why = f"process 0 is one of {self.count} processes, this one of {count}"
            elif number in self.others or not 0 < number < self.count:
                why = f"there is a process {number} already"
            else:
                self.others[number] = connection
                self.changed.notify_all()
        if why:
            _say(connection, f"fail {why}")
            _close(connection)

    def _join(self) -> tuple[str, int]:
        connection, why = _connected(self.at, self.wait)
        if connection is None:
            within = f"within {self.wait:g} s ({why}): start it, or check the address"
            raise InputError(f"no process 0 at {self.address} {within}")
        self.opened.append(connection)
        connection.settimeout(self.wait + 1)  # process 0 gives up first and names who is missing
        _say(connection, f"{_HELLO} {self.count} {self.index}")
        answer = _line(connection)
        if answer.startswith("fail "):
            raise InputError(f"the processes of this job could not be joined: {answer[5:]}")
        if answer != "go":
            raise InputError(f"the listener at {self.address} is not process 0 of this job")
        self.others[0] = connection
        _thread(self._hear, 0, connection)
        listener = socket.create_server(("127.0.0.1", 0))
        _serve(listener, self._dig)
        return listener.getsockname()

    def _dig(self, near: socket.socket) -> None:
        """Lead one of JAX's connections to process 0."""
        far = socket.create_connection(self.at, self.wait)
        _say(far, _TUNNEL)
        _tunnel(near, far)

    def _tell(self, line: str) -> None:
        for connection in self.others.values():
            _say(connection, line)

    def _hear(self, index: int, connection: socket.socket) -> None:
        """Follow another process until it ends."""
        _keep_alive(connection, self.wait)
        connection.settimeout(None)
        while line := _line(connection):
            what, _, rest = line.partition(" ")
            if what == "bye":
                with self.changed:
                    self.left.add(index)
                    self.changed.notify_all()
            elif what == "failed":
                self._end(_stopped(index, rest))
            elif what == "stop":
                self._end(rest)
        if index not in self.left:
            self._end(f"process {index} has died")

    def _end(self, why: str) -> NoReturn:
        """A process is lost: report it, to the others too, and end."""
        with self.changed:
            first = not self.ending.is_set()
            self.ending.set()
        if first:
            if not self.index:
                self._tell(f"stop {why}")
            LOG.error("%s; so this one ends", shown(why))
            os._exit(2)
        _wait_forever()

    def abandon(self, code: int, why: str = "") -> NoReturn:
        """End this process, which has failed."""
        if self.ending.is_set():
            _wait_forever()  # another has failed, and `_end` is reporting it
        self.ending.set()
        why = why[:200]
        self._tell(f"failed {why}" if self.index else f"stop {_stopped(0, why)}")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def leave(self) -> None:
        """At the end of the program: wait until all others end, however long one takes to save.

        `_hear` reports one that dies meanwhile.
        """
        failure = getattr(sys, "last_value", None)
        if failure is not None:  # printed already
            self.abandon(1, reason(failure))
        if self.index:
            self._tell("bye")
        with self.changed:
            self.changed.wait_for(lambda: len(self.left) == len(self.others))
        if not self.index:
            self._tell("bye")

    def watch_exceptions(self) -> None:
        """Leave exceptions that a lost process causes in JAX to the line that names the process."""
        before = sys.excepthook

        def hook(kind, error, trace):
            if self.ending.wait(2):
                _wait_forever()
            before(kind, error, trace)

        sys.excepthook = hook


def _stopped(index: int, why: str) -> str:
    return f"process {index} has stopped{': ' * bool(why)}{why}"


def _thread(function: Callable, *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _wait_forever() -> NoReturn:
    """While another thread ends the process."""
    threading.Event().wait()
    raise AssertionError


def _serve(listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
    """`take` each connection, in a thread, until the listener or a connection fails."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                take(listener.accept()[0])

    _thread(accept)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the shutdown wakes whoever waits for it
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _connected(at: tuple[str, int], wait: float) -> tuple[socket.socket | None, str]:
    """A connection as soon as a process listens there; after `wait` seconds None, and why."""
    end, why = time.monotonic() + wait, ""
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection(at, left), ""
        except OSError as error:
            why = str(error.strerror or error)
            time.sleep(min(0.1, left))
    return None, why


def _say(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(f"{' '.join(shown(line).split())}\n".encode())


def _line(connection: socket.socket) -> str:
    """The next line, of at most 1,000 bytes; "" if there is none. Reads nothing beyond it."""
    line = b""
    with contextlib.suppress(OSError):
        while len(line) < 1000 and (byte := connection.recv(1)):
            if byte == b"\n":
                return line.decode(errors="replace")
            line += byte
    return ""


def _keep_alive(connection: socket.socket, wait: float) -> None:
    """Let the system notice within `wait` seconds that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, round(wait / 6))
    for name, value in {"TCP_KEEPIDLE": every, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tunnel(near: socket.socket, far: socket.socket) -> None:
    """Carry bytes both ways. If one end closes, the other stays open: see `_Process._hear`."""

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := source.recv(1 << 16):
                target.sendall(data)

    for a, b in ((near, far), (far, near)):
        a.settimeout(None)
        _thread(carry, a, b)
