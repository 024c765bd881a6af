"""Asking servers that may fail: so many requests at a time, tried again, moved to another replica, over in time."""

from __future__ import annotations

import http.client
import io
import logging
import queue
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

from ..errors import SGOPDConfigError, TeacherError
from .answers import Aborted
from .urls import API_KEY_VARIABLE, MAX_RETRIES, TIMEOUT, Address, limit_problems

logger = logging.getLogger(__name__)


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

    def add(self, connection: _Connection) -> None:
        """An exchange begins.

        Raises:
            Outage: the batch has been ended.
        """
        with self._lock:
            self._busy.add(connection)
        if self.is_set():
            self.discard(connection)
            raise Outage("the request was given up")

    def discard(self, connection: _Connection) -> None:
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

    def _take(self) -> _Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _send(
        self, connection: _Connection, method: str, path: str, payload: bytes | None, deadline: float, stop: Stop
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


TOO_MANY_LOGPROBS = "too many log-probs"

# A word in the body of HTTP 400 or 422 -> what it asks for.
_REASONS = (
    (
        ("max_logprobs", "max logprobs", "logprobs of", "requested sample logprobs", "requested prompt logprobs"),
        TOO_MANY_LOGPROBS,
        "It allows fewer log-probs at a position than asked for. Start it with --max-logprobs -1, or lower "
        "`distillation_topk`.",
    ),
    (
        ("context length", "max_model_len", "maximum model length", "longer than"),
        "too long",
        "The sequence and the one token that scoring adds are longer than it takes. Start it with a larger "
        "--max-model-len, or lower `max_completion_length`.",
    ),
    (
        ("out of vocabulary", "out-of-vocab"),
        "unknown ids",
        "It lacks some of the student's token ids. Serve a teacher of the student's family.",
    ),
)
_WAYS_OUT = {
    401: f"It asks for a key. Set the environment variable {API_KEY_VARIABLE}.",
    403: f"It does not take this key, or none. Set the environment variable {API_KEY_VARIABLE}.",
    404: "It has no such path or model. Point `teacher_model_server_url` at vLLM, without /v1/completions at its end.",
    405: "It does not take such requests. Point `teacher_model_server_url` at vLLM's own address.",
    413: "The request is too large for it or for a proxy before it. Raise that limit.",
}
_OTHERWISE = "It does not take the request. Serve the teacher with vLLM, as `sg-opd serve-teacher` does."
_REDIRECTED = "It sends the request elsewhere, which is not followed. Set the URL that it leads to."


class RefusedRequest(TeacherError):
    """A request that a server will not take another time either.

    Attributes:
        kind: why, where it is known.
    """

    kind: str | None = None


def refusal(where: str, reply: Reply) -> RefusedRequest:
    """The error for a response whose status is not 200."""
    kind, way_out = None, _WAYS_OUT.get(reply.status, _OTHERWISE)
    if 300 <= reply.status < 400:
        way_out = _REDIRECTED
    if reply.status in (400, 422):
        text = reply.body[:10_000].decode("utf-8", errors="replace").lower()
        for words, name, advice in _REASONS:
            if any(word in text for word in words):
                kind, way_out = name, advice
                break
    error = RefusedRequest(
        f"`teacher_model_server_url` must name a server that takes the teacher's requests, got "
        f"{status_text(reply.status)} from {where}. Nothing was updated. {way_out}"
    )
    error.kind = kind
    return error


class Places:
    """A semaphore that hands a place which becomes free to whoever has waited longest.

    With `threading.Semaphore` a thread that gives its place back and asks for another one takes it again before any
    that waits has woken up: those would wait for as long as there is work.

    Args:
        count: of the places.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def take(self, seconds: float) -> bool:
        """Wait for a place; False if none became free in time."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        if turn.acquire(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX)):
            return True
        with self._lock:
            if turn not in self._waiting:
                # It was handed over just now.
                return True
            self._waiting.remove(turn)
            return False

    def give_back(self) -> None:
        """Hand the place on."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


THREAD_NAME = "sg-opd teacher request"
"""Of the threads that ask, by which a debugger tells them from others."""

_GRACE_SECONDS = 1.0


class Question(NamedTuple):
    """A request, and what checks its answer. Two that are equal ask for the same, down to the seed."""

    request: Request
    read: Read[Any]


class Line:
    """Asks questions in the order in which they come, so many at a time.

    Its threads end with the work. They are daemons: an interrupted run does not wait for them.

    Args:
        replicas: of one model; the questions are dealt to them in turn.
        limits: of each request, whose time begins when its turn has come.
        width: questions at a time.
    """

    def __init__(self, replicas: Sequence[Replica], limits: RequestLimits, width: int) -> None:
        self.replicas, self._limits, self._width = replicas, limits, width
        self._waiting: deque[tuple[int, Question, Future]] = deque()
        self._count = self._threads = 0
        self._lock = threading.Lock()
        self._stop = Stop()

    def put(self, question: Question) -> Future:
        """Ask it as soon as its turn has come."""
        future: Future = Future()
        with self._lock:
            self._waiting.append((self._count, question, future))
            self._count += 1
            one_more = self._threads < self._width
            self._threads += one_more
        if one_more:
            threading.Thread(target=self._work, name=THREAD_NAME, daemon=True).start()
        return future

    def stop(self) -> None:
        """End what is under way, and begin nothing more."""
        self._stop.now()

    def _work(self) -> None:
        while (work := self._next()) is not None:
            number, question, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(ask(self.replicas, number, *question, self._limits, self._stop))
            except Exception as error:  # noqa: BLE001  # raised again by the thread that waits
                future.set_exception(error)

    def _next(self) -> tuple[int, Question, Future] | None:
        with self._lock:
            if self._waiting and not self._stop.is_set():
                return self._waiting.popleft()
            self._threads -= 1
            return None


class Ahead:
    """Questions that are asked before anybody waits for their answers.

    An answer is given to an equal question only, so that asking ahead changes when something is asked and never what.

    Args:
        replicas: of one model.
        limits: of each request.
        width: questions at a time.
    """

    def __init__(self, replicas: Sequence[Replica], limits: RequestLimits, width: int) -> None:
        self._settings = replicas, limits, width
        self._line = Line(*self._settings)
        self._pending: defaultdict[Question, deque[Future]] = defaultdict(deque)

    def __len__(self) -> int:
        return sum(map(len, self._pending.values()))

    def ask(self, questions: Iterable[Question]) -> None:
        """Begin; a question that is here twice is asked twice."""
        for question in questions:
            self._pending[question].append(self._line.put(question))

    def take(self, question: Question) -> Future | None:
        """The answer to come, or an error; None if the question is not under way."""
        if question not in self._pending:
            return None
        futures = self._pending[question]
        future = futures.popleft()
        if not futures:
            del self._pending[question]
        # One whose turn has not come yet is better asked by the caller, with all the places that there are.
        return None if future.cancel() else future

    def drop(self) -> None:
        """Stop what nobody has taken."""
        self._line.stop()
        self._line = Line(*self._settings)
        self._pending.clear()


def ask_all(
    replicas: Sequence[Replica], questions: Sequence[Question], limits: RequestLimits, ahead: Ahead | None = None
) -> list[Any]:
    """The answers to all questions, in their order; the first failure ends all of them.

    What failed although it was asked ahead is asked again: an outage that nobody has waited for ends no run.

    Args:
        replicas: of one model; the questions are dealt to them in turn.
        questions: what is asked.
        limits: of each request.
        ahead: answers are taken from there where they are under way.

    Raises:
        TeacherError: as in `ask`.
    """
    line = Line(replicas, limits, limits.concurrency * len(replicas))
    try:
        taken = [None if ahead is None else ahead.take(question) for question in questions]
        futures = [future or line.put(question) for future, question in zip(taken, questions, strict=True)]
        return _answers(futures, questions, {place for place, future in enumerate(taken) if future}, line, limits)
    finally:
        line.stop()


def _answers(
    futures: list[Future], questions: Sequence[Question], begun: set[int], line: Line, limits: RequestLimits
) -> list[Any]:
    """Results in order; those whose places are in `begun` are asked again in the line if they fail."""
    done: queue.SimpleQueue[int] = queue.SimpleQueue()

    def expect(place: int) -> None:
        futures[place].add_done_callback(lambda _: done.put(place))

    for place in range(len(futures)):
        expect(place)
    missing = len(futures)
    while missing:
        try:
            # Whichever comes next, so that a failure is known as soon as it is there.
            place = done.get(timeout=limits.timeout + _GRACE_SECONDS)
        except queue.Empty:
            # A thread hangs where the deadline does not reach: in the system's look-up of a host name.
            raise no_answer(line.replicas, {}, 1, limits.timeout, limits) from None
        if place in begun and futures[place].exception() is not None:
            begun.remove(place)
            futures[place] = line.put(questions[place])
            expect(place)
        else:
            futures[place].result()
            missing -= 1
    return [future.result() for future in futures]


Answer = TypeVar("Answer")
Read = Callable[[bytes, str], Answer]
"""`(body, address) -> what it says`."""

_FIRST_DELAY, _DELAY_FACTOR = 0.5, 4.0
# How long a replica that failed is asked only after the others: twice as long each time that it fails after its rest.
_REST_SECONDS, _LONGEST_REST = 30.0, 960.0
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Request(NamedTuple):
    """Method, path and JSON of a request."""

    method: str
    path: str
    payload: bytes | None = None


class RequestLimits(NamedTuple):
    """Limits of a request.

    Attributes:
        timeout: seconds that it may take, its retries included. With several replicas, the one that it is with has an
            equal share of the time that is left before it goes to the next.
        max_retries: how often it is sent again after it has failed everywhere; the waits are 0.5, 2, 8, 32, 128 s and
            so on, and never more than half of the time that is left.
        concurrency: requests of this process to a replica at a time; others wait for their turn, in their own time.
    """

    timeout: float = TIMEOUT
    max_retries: int = MAX_RETRIES
    concurrency: int = 64

    def check(self) -> None:
        """Refuse limits out of range.

        Raises:
            SGOPDConfigError: names each.
        """
        problems = list(limit_problems(self.timeout, self.max_retries))
        if self.concurrency < 1:
            problems.append(f"`concurrency` must be at least 1, got {self.concurrency}. It is a count. Set it to 64.")
        if problems:
            raise SGOPDConfigError("\n".join(problems))


class Replica:
    """One server, and until when it rests because it has failed.

    Args:
        connections: to it.
        concurrency: requests of this process to it at a time.
    """

    def __init__(self, connections: Connections, concurrency: int) -> None:
        self.connections = connections
        self.address = str(connections.address)
        self._places = Places(concurrency)
        self._failed_at = self._resting_until = 0.0
        self._rest_seconds = 0.0
        self._lock = threading.Lock()

    @property
    def resting(self) -> bool:
        """Whether the others are asked first."""
        return time.monotonic() < self._resting_until

    def ask(self, request: Request, read: Read[Answer], seconds: float, stop: Stop) -> Answer:
        """One try.

        Raises:
            Outage: it may go better another time.
            TeacherError: it will not.
        """
        deadline = time.monotonic() + seconds
        if not self._places.take(seconds):
            raise Outage("it had no free place in time")
        try:
            if stop.is_set():
                raise Outage("the request was given up")
            return self._ask(request, read, deadline - time.monotonic(), stop)
        finally:
            self._places.give_back()

    def _ask(self, request: Request, read: Read[Answer], seconds: float, stop: Stop) -> Answer:
        started = time.monotonic()
        try:
            reply = self.connections.exchange(*request, seconds, stop)
            if reply.status in _RETRIED:
                raise Outage(status_text(reply.status))
            if reply.status != 200:
                raise refusal(self.address, reply)
            answer = read(reply.body, self.address)
        except Aborted:
            self._rest("it gave up the request", started)
            raise Outage("it gave up the request") from None
        except Outage as outage:
            if not stop.is_set():
                self._rest(outage.reason, started)
            raise
        with self._lock:
            # An answer to what was asked before the failure does not say that it is back.
            if started > self._failed_at:
                self._resting_until = self._rest_seconds = 0.0
        return answer

    def _rest(self, reason: str, started: float) -> None:
        with self._lock:
            if started >= self._resting_until:
                # What fails during a rest, or began before it, is the failure that is known already.
                self._rest_seconds = min(max(2 * self._rest_seconds, _REST_SECONDS), _LONGEST_REST)
            known, self._failed_at = self.resting, time.monotonic()
            self._resting_until = self._failed_at + self._rest_seconds
        if not known:
            logger.warning("The teacher server %s failed: %s. Requests to it are tried again.", self.address, reason)


def ask(
    replicas: Sequence[Replica],
    home: int,
    request: Request,
    read: Read[Answer],
    limits: RequestLimits,
    stop: Stop | None = None,
) -> Answer:
    """Ask the replicas in turn until one answers.

    Args:
        replicas: of one model.
        home: number of the one that is asked first, unless it rests.
        request: what is sent.
        read: checks an answer.
        limits: after which it is given up.
        stop: may end it before.

    Raises:
        TeacherError: no answer within the limits, or one that cannot be used.
    """
    stop = stop or Stop()
    started = time.monotonic()
    deadline = started + limits.timeout
    reasons: dict[int, str] = {}
    rounds = 0
    while True:
        rounds += 1
        order = sorted(range(len(replicas)), key=lambda i: (replicas[i].resting, (i - home) % len(replicas)))
        for place, i in enumerate(order):
            left = deadline - time.monotonic()
            if left <= 0 or stop.is_set():
                break
            try:
                return replicas[i].ask(request, read, left / (len(order) - place), stop)
            except Outage as outage:
                reasons[i] = outage.reason
        left = deadline - time.monotonic()
        if left <= 0 or stop.is_set() or rounds > limits.max_retries:
            raise no_answer(replicas, reasons, rounds, time.monotonic() - started, limits)
        stop.wait(min(_FIRST_DELAY * _DELAY_FACTOR ** (rounds - 1), left / 2))


def no_answer(
    replicas: Sequence[Replica], reasons: Mapping[int, str], rounds: int, seconds: float, limits: RequestLimits
) -> TeacherError:
    """The message for a request that no replica answered; `reasons` by the number of the replica."""
    shown = [f"{replica.address} ({reasons.get(i, 'no answer in time')})" for i, replica in enumerate(replicas)]
    return TeacherError(
        f"`teacher_model_server_url` must name a server that answers, got none from {', '.join(shown)} in {rounds} "
        f"rounds and {seconds:.1f} s, with `teacher_request_timeout`={limits.timeout:g} and "
        f"`teacher_max_retries`={limits.max_retries}. Nothing was updated. Start the server (`sg-opd serve-teacher` "
        "does), correct the URL, or raise the two limits."
    )
