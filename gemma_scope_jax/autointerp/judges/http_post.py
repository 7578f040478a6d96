"""Sends one POST that ends by one deadline, whatever the server does.

The time-outs of the standard library are for one read, so bytes that drip in never reach them: here
the connection itself is shut at the deadline. Nothing is decompressed, no redirect is followed, and
no more is read than asked for. Proxies from the environment are used.

The `openai` client (3.57) has no such deadline or limits: with a time-out of 1 s it waited 10 s for
100 bytes that dripped in, decompressed 126 MB of a bomb, and logged a key that a Location header
repeated.
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
from functools import cache, partial
from typing import Any


@dataclasses.dataclass(frozen=True)
class Response:
    status: int
    phrase: str
    headers: Mapping[str, str]  # names in any case
    body: bytes


def post(url: str, data: bytes, headers: Mapping[str, str], seconds: float, most: int) -> Response:
    """The server's response, whatever its status. The headers are sent to no other host. Raises
    `TimeoutError` after `seconds`, and `OSError` or `http.client.HTTPException` for failed
    connections, truncated responses and responses of more than `most` bytes."""
    request = urllib.request.Request(url, data, method="POST")
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    opener = urllib.request.OpenerDirector()  # has no handlers for redirects and error statuses
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(connections := _Connections(seconds))
    try:
        with opener.open(request, timeout=seconds) as reply:
            body = reply.read(most + 1)
            if len(body) > most:
                raise OSError(f"the reply is longer than {most:,} bytes")
            if reply.length:  # fewer bytes came than were announced
                raise http.client.IncompleteRead(body, reply.length)
            found = Response(reply.status, reply.reason, reply.headers, body)
    except (OSError, http.client.HTTPException):
        if connections.is_over:
            raise TimeoutError from None
        raise
    finally:
        connections.release()
    if connections.is_over:  # a shut connection looks like the end of a reply
        raise TimeoutError
    return found


class _Connections(urllib.request.AbstractHTTPHandler):
    """Opens a connection, and shuts it when the time is over, be it in TLS, headers or body."""

    def __init__(self, seconds: float):
        super().__init__()
        self._end, self._lock = time.monotonic() + seconds, threading.Lock()
        self._socket: socket.socket | None = None
        self.is_over = False
        self._timer = threading.Timer(seconds, self._shut)
        self._timer.daemon = True
        self._timer.start()

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(self._timed, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        connection = partial(self._timed, http.client.HTTPSConnection)
        return self.do_open(connection, req, context=_context())

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _timed(self, kind: Any, *args: Any, **options: Any) -> Any:
        made = kind(*args, **options)
        made._create_connection = self._connect
        return made

    def _connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """Like `socket.create_connection`, which would take the full time for every address."""
        error = OSError("the host has no address")
        for found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            left, place = max(1e-3, self._end - time.monotonic()), found[4]
            try:
                made = socket.create_connection((str(place[0]), int(place[1])), left)
            except OSError as this:
                error = this
                continue
            with self._lock:
                self._socket = made.dup()  # TLS detaches the first one
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

    def release(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


@cache
def _context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
