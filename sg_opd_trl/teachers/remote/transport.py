"""One HTTP exchange with a hard end, over connections that are kept alive.

The time left bounds name resolution by the operating system's own limit only; everything after it is bounded by the
deadline as a whole, also a server that sends a byte now and then.
"""

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from .settings import Address

_CONNECT_TIMEOUT = 10.0
_SHORTEST_WAIT = 0.001
# Of an answer, and what is read of it at once (our choice); log-probs of a long sequence are some tens of MiB.
_LARGEST, _PIECE = 2**30, 2**20
# A peer whose machine is gone is noticed after about two minutes: first probe, time between probes, number of probes.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Outage(Exception):
    """A failure that another try, or another replica, may not have. Its text is ours, not the server's.

    Args:
        reason: what happened, as the end of a sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Reply(NamedTuple):
    """Status and body of a response that came in full."""

    status: int
    body: bytes


class Stop:
    """Ends the exchanges of one batch of requests, whichever threads they run in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._busy: set[_Connection] = set()

    def now(self) -> None:
        """Have every exchange that is under way end now, with an `Outage`, and no other begin."""
        self._stopped.set()
        with self._lock:
            for connection in self._busy:
                connection.interrupt()

    def is_set(self) -> bool:
        """Whether the batch has been ended."""
        return self._stopped.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the batch."""
        self._stopped.wait(seconds)

    def add(self, connection: "_Connection") -> None:
        """An exchange begins.

        Raises:
            Outage: the batch has been ended.
        """
        with self._lock:
            self._busy.add(connection)
        if self.is_set():
            self.discard(connection)
            raise Outage("the request was given up")

    def discard(self, connection: "_Connection") -> None:
        """An exchange has ended."""
        with self._lock:
            self._busy.discard(connection)


class Connections:
    """Connections to one server, used by several threads, each by one at a time.

    Args:
        address: of the server.
        headers: of every request.
    """

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self.address = address
        self.headers = dict(headers)
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []

    def exchange(self, method: str, path: str, payload: bytes | None, seconds: float, stop: Stop) -> Reply:
        """Send a request and read the whole response.

        Args:
            method: of HTTP.
            path: below the server's address.
            payload: JSON, or None.
            seconds: until it must have come.
            stop: may end it before.

        Raises:
            Outage: no connection, a response that is not HTTP, ends early or is far too large, or no time left.
        """
        deadline = time.monotonic() + seconds
        connection = self._take()
        if connection is not None:
            try:
                return self._send(connection, method, path, payload, deadline, stop)
            except (http.client.RemoteDisconnected, ConnectionError):
                # The server closed it while it was idle: that is no failure.
                pass
            except (OSError, http.client.HTTPException) as error:
                raise Outage(_reason(error)) from None
        try:
            connection = _Connection(self.address, deadline)
            return self._send(connection, method, path, payload, deadline, stop)
        except (OSError, http.client.HTTPException) as error:
            raise Outage(_reason(error)) from None

    def close(self) -> None:
        """Close the idle connections; later exchanges open new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.end()

    def _take(self) -> "_Connection | None":
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _send(
        self, connection: "_Connection", method: str, path: str, payload: bytes | None, deadline: float, stop: Stop
    ) -> Reply:
        keep = False
        try:
            stop.add(connection)
            connection.set_deadline(deadline)
            body_headers = {} if payload is None else {"Content-Type": "application/json"}
            connection.request(method, self.address.path + path, payload, self.headers | body_headers)
            response = connection.getresponse()
            reply = Reply(response.status, _whole(response))
            keep = not response.will_close
            return reply
        finally:
            stop.discard(connection)
            if keep:
                with self._lock:
                    self._idle.append(connection)
            else:
                connection.end()


class _Connection(http.client.HTTPConnection):
    """A connection whose every wait ends at one deadline.

    Raises:
        OSError: it cannot be opened in time.
    """

    def __init__(self, address: Address, deadline: float) -> None:
        super().__init__(address.host, address.port)
        opened = socket.create_connection(
            (address.host, address.port), timeout=min(_CONNECT_TIMEOUT, _time_left(deadline))
        )
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for name, value in _KEEP_ALIVE.items():
                if hasattr(socket, name):
                    opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            if address.scheme == "https":
                opened.settimeout(_time_left(deadline))
                opened = ssl.create_default_context().wrap_socket(opened, server_hostname=address.host)
        except OSError:
            opened.close()
            raise
        self._socket = _TimedSocket(opened)
        self.sock: Any = self._socket

    def set_deadline(self, deadline: float) -> None:
        """From now on nothing waits longer than until then."""
        self._socket.deadline = deadline

    def connect(self) -> None:
        """Never open another connection in place of this one."""
        raise http.client.NotConnected("the connection was closed")

    def interrupt(self) -> None:
        """Wake up whoever waits for the server."""
        try:
            self._socket.inner.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It is closed already.
            return

    def end(self) -> None:
        """Close it for good."""
        self.close()
        self._socket.inner.close()


class _TimedSocket:
    """The part of a socket that `http.client` uses, with one deadline for all waits."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner = inner
        self.deadline = 0.0

    def sendall(self, data: Any) -> None:
        self.inner.settimeout(_time_left(self.deadline))
        self.inner.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self))

    def close(self) -> None:
        # `http.client` closes the socket before it has read a response that ends with the connection.
        pass


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._timed.inner.settimeout(_time_left(self._timed.deadline))
        return self._timed.inner.recv_into(buffer)


def _time_left(deadline: float) -> float:
    """Seconds until the deadline.

    Raises:
        TimeoutError: it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return max(left, _SHORTEST_WAIT)


def _whole(response: http.client.HTTPResponse) -> bytes:
    """The body, unless it is larger than an answer can be.

    Raises:
        Outage: it is.
        IncompleteRead: it ended early.
    """
    body = bytearray()
    while piece := response.read(_PIECE):
        body += piece
        if len(body) > _LARGEST:
            raise Outage(f"its answer is larger than {_LARGEST / 2**20:g} MiB")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(body)


def _reason(error: Exception) -> str:
    """Words for a failure; the error's own may quote what the server sent."""
    kinds: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (TimeoutError, "no answer in time"),
        (ConnectionRefusedError, "the connection was refused"),
        (socket.gaierror, "the host name is not known"),
        (ssl.SSLCertVerificationError, "its certificate cannot be verified"),
        (ssl.SSLError, "no TLS connection"),
        ((http.client.RemoteDisconnected, ConnectionError), "the connection was closed"),
        (http.client.IncompleteRead, "the answer ended early"),
        (http.client.HTTPException, "the answer is not HTTP"),
    ]
    words = next((words for kind, words in kinds if isinstance(error, kind)), None)
    return words or f"the network failed ({type(error).__name__})"


def status_text(status: int) -> str:
    """`HTTP 404 (Not Found)`, with the standard's words and not the server's."""
    known = {int(entry): entry.phrase for entry in HTTPStatus}
    return f"HTTP {status} ({known[status]})" if status in known else f"HTTP {status}"
