"""Several processes as one JAX program: they meet, and if one goes, the others say so and end.

JAX's own runtime aborts with a native stack when a process does not come, dies, or ends early. So
the processes meet here first: process 0 listens at the coordinator's address, and only when all are
there does JAX begin. Its traffic to process 0 goes through the same port, by a tunnel whose near
end stays open whatever happens to the far one; what has happened, each process hears on the
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
from typing import Any, NoReturn

from gemma_scope_jax.errors import InputError, reason, shown

LOG = logging.getLogger(__name__)
WAIT = 60  # seconds
_HELLO, _TUNNEL = "gemma_scope_jax", b"gemma_scope_jax tunnel\n"
_here: "_Process | None" = None


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes or hosts that do one job together; TPU pods and SLURM are recognised."""

    coordinator: str = ""
    """The address and port of the first of several processes that are one JAX program."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """The number of this one, from 0."""
    wait: float = 60.0
    """Seconds that processes with a coordinator wait for one another."""

    def join(self) -> None:
        """Become one JAX program with the others; see `join_processes`."""
        join_processes(self.coordinator, self.processes, self.process, self.wait)

    def share(self) -> tuple[int, int]:
        """(i, n): which part of the work is this process's, where each is a program of its own;
        (0, 1) where they are joined to one. Raises `InputError`."""
        check_share(self.processes, self.process)
        if self.coordinator or self.processes is None:
            self.join()
        elif self.processes > 1:
            if self.process is None:
                raise InputError(
                    f"of {self.processes} processes, which is this? give --process, from 0"
                )
            return self.process, self.processes
        return 0, 1


def join_processes(
    coordinator: str = "",
    processes: int | None = None,
    process: int | None = None,
    wait: float = WAIT,
) -> None:
    """Make the processes of a job one JAX program; call it before anything else of JAX.

    What is not given comes from the environment: TPU pods, SLURM and Open MPI are recognised. One
    process alone: nothing happens. Raises `InputError` if they have not come together after `wait`
    seconds. Where one dies later, each of the others says so in a line and ends with code 2; one
    whose machine is cut off counts as dead after `wait` seconds.
    """
    global _here
    check_share(processes, process)
    if not wait > 0:
        raise InputError(f"the seconds to wait must be positive, not {wait}")
    given = (coordinator, processes, process)
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")
    sizes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    several = workers or any(size.isdigit() and int(size) > 1 for size in sizes)
    if given == ("", None, None) and not several:
        return
    if _here is not None:
        raise InputError("the processes of this job have been joined before")
    import jax  # before they meet: it takes seconds, and not everywhere the same

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
    """Raise `InputError` unless `process` is one of 0 .. `processes` - 1; None is not given."""
    if processes is not None and processes < 1:
        raise InputError(f"processes must be at least 1, got {processes}")
    if process is not None and process < 0:
        raise InputError(f"process must be from 0, got {process}")
    if processes is not None and process is not None and process >= processes:
        raise InputError(f"process {process}: of {processes} processes the last is {processes - 1}")


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all of a JAX program."""
    import jax

    return jax.process_index() == 0


def abandon(code: int, why: str = "") -> None:
    """End now, telling the other processes why; nothing happens in a process by itself."""
    if _here is not None:
        _here.abandon(code, why)


def _detected(coordinator: str, processes: int | None, process: int | None, wait: float):
    """(address, processes, process, local devices) as given, the rest from the environment."""
    found: Any = (coordinator or None, processes, process, None)
    with contextlib.suppress(ImportError, AttributeError, TypeError, RuntimeError, OSError):
        from jax._src.clusters import ClusterEnv  # there is no public way to ask

        detect: Any = ClusterEnv.auto_detect_unset_distributed_params
        found = detect(*found, None, round(wait))
    address, count, index, local = found
    missing = [n for n, x in zip(("--coordinator", "--processes", "--process"), found) if x is None]
    if missing:
        raise InputError(
            "several processes as one program need --coordinator HOST:PORT, --processes and "
            f"--process; nothing here tells {', '.join(missing)}"
        )
    check_share(count, index)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"the coordinator {address!r} is no HOST:PORT, as in 10.0.0.1:8476")
    return address, count, index, local


class _Process:
    """This process among the others. Process 0 has a connection to each, the others one to it."""

    def __init__(self, address: str, count: int, index: int, wait: float):
        host, _, port = address.rpartition(":")
        self.at = (host.strip("[]"), int(port))
        self.address, self.count, self.index, self.wait = address, count, index, wait
        self.others: dict[int, socket.socket] = {}
        self.opened: list[socket.socket] = []
        self.left: set[int] = set()  # have ended as they should
        self.changed = threading.Condition()
        self.ending = threading.Event()  # one has died: this process is about to end
        self.near = ""  # of process 0: where JAX's own service listens

    # --- meeting ---------------------------------------------------------------------------------

    def meet(self) -> str:
        """Wait until all are here. Returns the address that JAX is to be given."""
        try:
            return self._join() if self.index else self._gather()
        except InputError:
            for opened in (*self.opened, *self.others.values()):
                _close(opened)
            raise

    def _gather(self) -> str:
        local = self.at[0] in ("localhost", "127.0.0.1")
        six = not local and socket.has_dualstack_ipv6()
        where = ("127.0.0.1" if local else "", self.at[1])
        try:
            family = socket.AF_INET6 if six else socket.AF_INET
            listener = socket.create_server(
                where, family=family, dualstack_ipv6=six, backlog=self.count + 8
            )
        except OSError as error:
            why = error.strerror or error
            raise InputError(
                f"process 0 cannot listen at {self.address} ({why}): choose another port"
            ) from error
        self.opened.append(listener)
        self.near = f"127.0.0.1:{_free_port()}"
        _thread(self._accept, listener)
        with self.changed:
            self.changed.wait_for(lambda: len(self.others) == self.count - 1, self.wait)
            missing = sorted(set(range(1, self.count)) - set(self.others))
            for connection in self.others.values():
                line = f"fail process {missing[0]} did not come" if missing else "go"
                _say(connection, line)
        if missing:
            names = ", ".join(map(str, missing[:8])) + ", .." * (len(missing) > 8)
            raise InputError(
                f"of {self.count} processes {names} did not come to {self.address} within "
                f"{self.wait:g} s: start them, or give a longer --wait"
            )
        for index, connection in self.others.items():
            _thread(self._hear, index, connection)
        return self.near

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                _thread(self._greet, connection)

    def _greet(self, connection: socket.socket) -> None:
        """Another process, the end of its tunnel, or a stranger."""
        connection.settimeout(self.wait)
        line = _line(connection)
        if line == _TUNNEL.decode().strip():
            host, _, port = self.near.rpartition(":")
            if (service := _connected((host, int(port)), self.wait)[0]) is not None:
                _tunnel(connection, service)
            else:
                _close(connection)
            return
        match line.split():
            case [hello, "join", count, index] if hello == _HELLO and index.isdigit():
                number = int(index)
            case _:
                _close(connection)
                return
        with self.changed:
            why = ""
            if count != str(self.count):
                why = f"process 0 is one of {self.count} processes, this one of {count}"
            elif number in self.others or not 0 < number < self.count:
                why = f"there is a process {number} already"
            if why:
                _say(connection, f"fail {why}")
                _close(connection)
                return
            self.others[number] = connection
            self.changed.notify_all()

    def _join(self) -> str:
        connection, why = _connected(self.at, self.wait)
        if connection is None:
            raise InputError(
                f"no process 0 at {self.address} within {self.wait:g} s ({why}): start it, or "
                "check --coordinator"
            )
        self.opened.append(connection)
        connection.settimeout(self.wait + 1)  # process 0 gives up first, and says who is missing
        _say(connection, f"{_HELLO} join {self.count} {self.index}")
        answer = _line(connection)
        if answer.startswith("fail "):
            raise InputError(f"the processes of this job could not be joined: {answer[5:]}")
        if answer != "go":
            raise InputError(f"what listens at {self.address} is no process 0 of this job")
        self.others[0] = connection
        _thread(self._hear, 0, connection)
        listener = socket.create_server(("127.0.0.1", 0))
        _thread(self._dig, listener)
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _dig(self, listener: socket.socket) -> None:
        """Lead JAX's connections to process 0."""
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self.at, self.wait)
                far.sendall(_TUNNEL)
                _tunnel(near, far)

    # --- afterwards ------------------------------------------------------------------------------

    def _hear(self, index: int, connection: socket.socket) -> None:
        """What another process says, until it goes."""
        _keep_alive(connection, self.wait)
        connection.settimeout(None)
        while line := _line(connection):
            what, _, rest = line.partition(" ")
            if what == "bye":
                with self.changed:
                    self.left.add(index)
                    self.changed.notify_all()
            elif what == "failed":
                self._end(f"process {index} has stopped{': ' * bool(rest)}{rest}")
            elif what == "stop":
                self._end(rest)
        if index not in self.left:
            self._end(f"process {index} has died")

    def _end(self, why: str) -> NoReturn:
        """One has gone: say so, to the others too, and end."""
        with self.changed:
            first = not self.ending.is_set()
            self.ending.set()
        if first:
            for connection in self.others.values():
                if not self.index:
                    _say(connection, f"stop {why}")
            LOG.error("%s; so this one ends", shown(why))
            os._exit(2)
        threading.Event().wait()
        raise AssertionError

    def abandon(self, code: int, why: str = "") -> NoReturn:
        """This process has failed."""
        if self.ending.is_set():
            threading.Event().wait()  # another has, and that is being said
        self.ending.set()
        text = f"process {self.index} has stopped{': ' * bool(why)}{why[:200]}"
        for connection in self.others.values():
            _say(connection, f"failed {why[:200]}" if self.index else f"stop {text}")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def leave(self) -> None:
        """At the end of the program: wait until all have come to theirs, however long one saves.

        Of one that dies meanwhile the connection tells.
        """
        failure = getattr(sys, "last_value", None)
        if failure is not None:  # printed already
            self.abandon(1, reason(failure))
        if not self.index:
            with self.changed:
                self.changed.wait_for(lambda: len(self.left) == self.count - 1)
            for connection in self.others.values():
                _say(connection, "bye")
        else:
            _say(self.others[0], "bye")
            with self.changed:
                self.changed.wait_for(lambda: bool(self.left))

    def watch_exceptions(self) -> None:
        """What a lost process makes JAX raise is left to the line that says which it was."""
        before = sys.excepthook

        def hook(kind, error, trace):
            if self.ending.wait(2):
                threading.Event().wait()
            before(kind, error, trace)

        sys.excepthook = hook


# -------------------------------------------------------------------------------------------------
# Connections


def _thread(function: Any, *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the shutdown wakes whoever waits for it
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _connected(at: tuple[str, int], wait: float) -> tuple[socket.socket | None, str]:
    """A connection as soon as somebody listens there; after `wait` seconds None, and why."""
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
    """The next line, of at most 1,000 bytes; "" if there is none. Takes nothing beyond it."""
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
    """Carry bytes both ways. Where one end closes, the other stays open: see `_Process._hear`."""
    for a, b in ((near, far), (far, near)):
        a.settimeout(None)
        _thread(_carry, a, b)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := source.recv(1 << 16):
            target.sendall(data)
