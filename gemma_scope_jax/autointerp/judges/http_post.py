"""One POST that is over by one deadline, whatever the server does.

By the standard library, whose time-outs are for one read, so that bytes that drip never reach them:
here the connection itself is shut at the deadline. Nothing is decompressed, no redirect followed,
and no more read than asked for. Proxies of the environment are used.

The `openai` client was tried in its place (3.57): with a time-out of 1 s it took 10 s to receive an
answer of 100 bytes that dripped; it decompressed 126 MB before it gave up on a bomb, logged the key
that a Location header repeated, and sent OPENAI_ORG_ID to every host. It tries neither broken JSON
nor empty choices again, and Retry-After holds one request, not all. It would replace this file by
more code than this.
"""

import contextlib
import dataclasses
import http.client
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

_STREAM = socket.SOCK_STREAM


@dataclasses.dataclass(frozen=True)
class Response:
    status: int
    phrase: str
    headers: Mapping[str, str]  # by name, in whatever case
    body: bytes


class Poster:
    """Sends requests, from any number of threads."""

    def __init__(self):
        self._opener = urllib.request.OpenerDirector()  # nothing that redirects or judges statuses
        for handler in (urllib.request.ProxyHandler(), _Plain(), _Encrypted()):
            self._opener.add_handler(handler)

    def post(
        self, url: str, data: bytes, headers: Mapping[str, str], seconds: float, most: int
    ) -> Response:
        """What the server answers, of whatever status. The headers go to no other host.

        Raises `TimeoutError` after `seconds`, and `OSError` or `http.client.HTTPException` for
        connections that fail, replies that are cut short and those of more than `most` bytes.
        """
        request = urllib.request.Request(url, data, method="POST")
        for name, value in headers.items():
            request.add_unredirected_header(name, value)
        request.deadline = deadline = _Deadline(seconds)  # type: ignore[attr-defined]
        try:
            with self._opener.open(request, timeout=seconds) as reply:
                body = reply.read(most + 1)
                if len(body) > most:
                    raise OSError(f"the reply is longer than {most:,} bytes")
                if reply.length:  # bytes that were announced and did not come
                    raise http.client.IncompleteRead(body, reply.length)
                found = Response(reply.status, reply.reason, reply.headers, body)
        except (OSError, http.client.HTTPException):
            if deadline.is_over:
                raise TimeoutError from None
            raise
        finally:
            deadline.close()
        if deadline.is_over:  # a connection that is shut looks like the end of a reply
            raise TimeoutError
        return found


class _Deadline:
    """Shuts a connection when its time is over, be it in TLS, headers or body."""

    def __init__(self, seconds: float):
        self._end, self._lock = time.monotonic() + seconds, threading.Lock()
        self._socket: socket.socket | None = None
        self.is_over = False
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True
        self._timer.start()

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """In the place of `socket.create_connection`, which takes its time for every address."""
        error = OSError("the host has no address")
        places: list[Any] = [found[4][:2] for found in socket.getaddrinfo(*address, type=_STREAM)]
        for place in places:
            try:
                made = socket.create_connection(place, max(1e-3, self._end - time.monotonic()))
            except OSError as this:
                error = this
                continue
            with self._lock:
                self._socket = made.dup()  # TLS takes the first one over
            if self.is_over:
                self._shut()
            return made
        raise error

    def _shut(self) -> None:
        with self._lock:
            self.is_over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_timed(http.client.HTTPConnection, req), req)  # type: ignore[arg-type]


class _Encrypted(urllib.request.HTTPSHandler):
    def __init__(self):
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        super().__init__(context=context)
        self.trust = context

    def https_open(self, req: Any) -> Any:
        made = _timed(http.client.HTTPSConnection, req)
        return self.do_open(made, req, context=self.trust)  # type: ignore[arg-type]


def _timed(kind: Any, request: Any) -> Any:
    """Connections of a `kind` that are made, and end, by a request's deadline."""

    def connection(*args: Any, **options: Any) -> Any:
        made = kind(*args, **options)
        made._create_connection = request.deadline.connect
        return made

    return connection
