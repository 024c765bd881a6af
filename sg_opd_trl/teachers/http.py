"""Requests to the replicas of one model: so many at a time, first come first served, retried, moved, over in time.

All requests of a process run in one event loop, in a daemon thread of its own. The thread that trains waits for
answers or goes on, the loop of a notebook is left alone, and the end of a process waits for nothing. Connections are
httpx2's. Which replica is asked, how often and for how long is decided here: no HTTP library knows that several
addresses are one model.
"""

import asyncio
import functools
import itertools
import logging
import os
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

import httpx2

from ..errors import SGOPDConfigError, SGOPDError, TeacherError
from .answers import Outage, read_answer, refused, status_text
from .urls import MAX_RETRIES, TIMEOUT, Address, limit_problems

logger = logging.getLogger(__name__)

T = TypeVar("T")

THREAD_NAME = "sg-opd teacher requests"
"""Of the thread in which they run, by which a debugger tells it from others."""

_FIRST_DELAY, _DELAY_FACTOR = 0.5, 4.0
# How long a replica that failed is asked only after the others: twice as long each time that it fails after its rest.
_REST_SECONDS, _LONGEST_REST = 30.0, 960.0
# Besides every 5xx: statuses by which a server or a proxy says "not now".
_RETRIED = frozenset({408, 425, 429})
_CONNECT_TIMEOUT = 10.0
# Shorter than the 5 s after which vLLM closes an idle connection, so that none is used in the moment that it closes.
_IDLE_SECONDS = 4.0
# A peer whose machine is gone is noticed after about two minutes: first probe, time between probes, number of probes.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
# Of an answer that says why a request is refused: its beginning is enough, however long it is.
_REASON_BYTES = 10_000


class RequestLimits(NamedTuple):
    """Limits of a request.

    Attributes:
        timeout: seconds that it may take, its retries included. With several replicas, the one that it is with has an
            equal share of the time that is left before it goes to the next.
        max_retries: how often it is sent again after it has failed everywhere; the waits are 0.5, 2, 8, 32, 128 s and
            so on, or what all servers ask for in `Retry-After` if that is longer, and never more than half of the time
            that is left.
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


class Request(NamedTuple):
    """A request, and what checks its answer. Two that are equal ask for the same, down to the seed.

    Attributes:
        method: of HTTP.
        path: below the server's address.
        read: `(body, address) -> what it says`; raises an `Outage` for what another try may not answer.
        largest: bytes that the answer can have; no more are read.
        payload: JSON, or None.
    """

    method: str
    path: str
    read: Callable[[bytes, str], Any]
    largest: int
    payload: bytes | None = None


@functools.cache
def background_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process's requests, started with the first of them; `process` is `os.getpid()`."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=THREAD_NAME, daemon=True).start()
    return loop


class RequestPool:
    """Requests of one process to the replicas of one model, made from any thread.

    The methods with a leading underscore run in the event loop, one at a time: nothing needs a lock.

    Args:
        addresses: of the replicas.
        headers: of every request.
        limits: of each request.
        prefetch: name of each queue of requests that nobody waits for yet -> how many of it are made at a time.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        headers: Mapping[str, str],
        limits: RequestLimits,
        prefetch: Mapping[str, int],
    ) -> None:
        self._limits = limits
        self._replicas = [_Replica(address, headers, limits.concurrency) for address in addresses]
        self._prefetched = {name: _Prefetched(self._ask, width) for name, width in prefetch.items()}
        self._first = itertools.cycle(range(len(self._replicas)))

    def ask_one(self, replica: int, request: Request) -> Any:
        """The answer of one replica, by its number.

        Raises:
            TeacherError: no answer within the limits, or one that cannot be used.
        """
        return self._wait(self._ask(request, [self._replicas[replica]]))

    def ask_all(self, requests: Sequence[Request], queue: str) -> list[Any]:
        """The answers to all requests, in their order; the first failure ends all of them.

        Args:
            requests: dealt to the replicas in turn.
            queue: from which the answer is taken where an equal request is under way.

        Raises:
            TeacherError: as in `ask_one`.
        """
        return self._wait(self._ask_all(requests, self._prefetched[queue]))

    def prefetch(self, requests: Sequence[Request], queue: str) -> None:
        """Begin requests, each as often as it is here.

        Only an equal request gets the answer: this changes when something is asked, and never what.
        """
        self._loop.call_soon_threadsafe(self._prefetched[queue].begin, requests)

    def cancel(self, queue: str) -> None:
        """End what was prefetched and not taken; when this returns, none of it is under way."""
        self._wait(self._prefetched[queue].cancel())

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        for replica in self._replicas:
            self._wait(replica.close())

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return background_loop(os.getpid())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Who is interrupted leaves nothing behind.
            future.cancel()
            raise

    async def _ask_all(self, requests: Sequence[Request], prefetched: "_Prefetched") -> list[Any]:
        # As many as all replicas take, and no more: the time of a request begins when its turn has come.
        turns = asyncio.Semaphore(self._limits.concurrency * len(self._replicas))

        async def answer(request: Request, begun: asyncio.Task | None) -> Any:
            if begun is not None:
                # What fails although it was prefetched is asked again, with time of its own: an outage that nobody
                # has waited for ends no run.
                with suppress(SGOPDError):
                    return await begun
            async with turns:
                return await self._ask(request)

        tasks = [asyncio.create_task(answer(request, prefetched.take(request))) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, request: Request, replicas: "Sequence[_Replica] | None" = None) -> Any:
        """The answer of whichever replica gives one; of them all, another one is the first each time."""
        if replicas is None:
            first = next(self._first)
            replicas = [*self._replicas[first:], *self._replicas[:first]]
        started = time.monotonic()
        deadline = started + self._limits.timeout
        candidates, reasons = list(replicas), dict.fromkeys(replicas, "no answer in time")
        for attempt in itertools.count(1):
            try:
                return await _ask_in_turn(request, candidates, deadline, reasons)
            except Outage as outage:
                wait = max(outage.wait, _FIRST_DELAY * _DELAY_FACTOR ** (attempt - 1))
            left = deadline - time.monotonic()
            if left <= 0 or attempt > self._limits.max_retries:
                break
            await asyncio.sleep(min(wait, left / 2))
        shown = ", ".join(f"{replica.address} ({reason})" for replica, reason in reasons.items())
        raise TeacherError(
            f"`teacher_model_server_url` must name a server that answers, got none from {shown} in {attempt} rounds "
            f"and {time.monotonic() - started:.1f} s, with `teacher_request_timeout`={self._limits.timeout:g} and "
            f"`teacher_max_retries`={self._limits.max_retries}. Nothing was updated. Start the server (`sg-opd "
            "serve-teacher` does), correct the URL, or raise the two limits."
        )


async def _ask_in_turn(
    request: Request, candidates: "list[_Replica]", deadline: float, reasons: "dict[_Replica, str]"
) -> Any:
    """One try at each replica; notes why it failed, and takes one that will never do off the candidates.

    Raises:
        Outage: none answered; its `wait` is the shortest of theirs.
        TeacherError: none ever will.
    """
    waits = []
    # Those that failed a moment ago come last; the others keep their order.
    order = sorted(candidates, key=lambda replica: replica.health.resting)
    for place, replica in enumerate(order):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return await replica.ask(request, left / (len(order) - place))
        except Outage as outage:
            reasons[replica] = outage.reason
            waits.append(outage.wait)
            if outage.final is not None:
                candidates.remove(replica)
                if not candidates:
                    raise outage.final from None
    raise Outage("no replica answered", wait=min(waits, default=0.0))


class _Prefetched:
    """Requests that are made before anybody waits for their answers, so many at a time."""

    def __init__(self, ask: Callable[[Request], Awaitable[Any]], width: int) -> None:
        self._ask = ask
        self._turns = asyncio.Semaphore(width)
        # With each task, whether its turn has come.
        self._tasks: defaultdict[Request, deque[tuple[asyncio.Task, asyncio.Event]]] = defaultdict(deque)

    def begin(self, requests: Sequence[Request]) -> None:
        for request in requests:
            begun = asyncio.Event()
            task = asyncio.create_task(self._in_turn(request, begun))
            # Looks at an error that nobody may come for: asyncio would log it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._tasks[request].append((task, begun))

    def take(self, request: Request) -> asyncio.Task | None:
        """The answer to come; None if no equal request has begun."""
        equal = self._tasks.get(request)
        if equal is None:
            return None
        task, begun = equal.popleft()
        if not equal:
            del self._tasks[request]
        if begun.is_set():
            return task
        # Better made by the caller, who has all connections and not this queue's share of them.
        task.cancel()
        return None

    async def cancel(self) -> None:
        tasks = [task for equal in self._tasks.values() for task, _ in equal]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _in_turn(self, request: Request, begun: asyncio.Event) -> Any:
        async with self._turns:
            begun.set()
            return await self._ask(request)


class _Replica:
    """One server: its connections, its share of the requests, and whether it has failed."""

    def __init__(self, address: Address, headers: Mapping[str, str], concurrency: int) -> None:
        self.address = str(address)
        self.health = Health(self.address)
        self._url = self.address + address.path
        # Without compression, by which a small answer becomes a large one. As bytes: httpx2 takes text for ASCII, and
        # shows what is none, which may be a key.
        fields = {"Accept-Encoding": "identity", "Content-Type": "application/json", **headers}
        self._headers = [(name.encode(), value.strip(" ").encode("latin-1")) for name, value in fields.items()]
        self._turns = asyncio.Semaphore(concurrency)
        # One connection each: httpx2 looks at all idle connections of a transport for every request, and where there
        # are many that takes as long as the request.
        self._idle: list[httpx2.AsyncHTTPTransport] = []

    async def ask(self, request: Request, seconds: float) -> Any:
        """One try.

        Raises:
            Outage: it may go better another time, or elsewhere.
            TeacherError: it will not.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                await self._turns.acquire()
        except TimeoutError:
            # No failure of the server: others keep it busy.
            raise Outage("no connection became free in time") from None
        started = time.monotonic()
        try:
            answer = await self._answer(request, deadline)
        except Outage as outage:
            self.health.failed(outage.reason, started)
            raise
        finally:
            self._turns.release()
        self.health.answered(started)
        return answer

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    async def _answer(self, request: Request, deadline: float) -> Any:
        transport = self._idle.pop() if self._idle else _transport()
        try:
            sent = httpx2.Request(
                request.method, self._url + request.path, headers=self._headers, content=request.payload
            )
            sent.extensions["timeout"] = {"connect": _CONNECT_TIMEOUT}
            # Of the whole: httpx2's own limits are of single waits, and a server that trickles meets each of them.
            async with asyncio.timeout_at(deadline):
                response = await transport.handle_async_request(sent)
                try:
                    body = await _body(response, request.largest)
                finally:
                    await response.aclose()
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise Outage(_reason(error)) from None
        finally:
            self._idle.append(transport)
        if response.status_code >= 500 or response.status_code in _RETRIED:
            wait = _asked_wait(response.headers.get("Retry-After", ""))
            raise Outage(status_text(response.status_code), wait=wait)
        if response.status_code != 200:
            raise refused(self.address, response.status_code, body)
        return read_answer(request.read, body, self.address)


def _transport() -> httpx2.AsyncHTTPTransport:
    # No client: that follows redirects, uses proxies and .netrc, keeps cookies and logs URLs.
    return httpx2.AsyncHTTPTransport(
        verify=_tls(),
        trust_env=False,
        limits=httpx2.Limits(max_connections=None, keepalive_expiry=_IDLE_SECONDS),
        socket_options=_socket_options(),
    )


def _asked_wait(text: str) -> float:
    """Seconds that a `Retry-After` asks for, given as a number or as a date; 0 for anything else."""
    if text.isascii() and text.isdigit():
        return float(text[:9])  # 30 years are enough
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    # A date without a time zone is one of UTC, as all dates of HTTP are.
    aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, aware.timestamp() - time.time())


async def _body(response: httpx2.Response, largest: int) -> bytes:
    """The body of an answer; of one that is none, its beginning.

    Raises:
        Outage: it is larger than an answer to what was asked can be.
    """
    fine = response.status_code == 200
    most = largest if fine else _REASON_BYTES
    length = int(response.headers.get("Content-Length", 0))
    body = bytearray()
    if not fine or length <= most:
        async for piece in response.aiter_raw():
            body += piece
            length = max(length, len(body))
            if len(body) > most:
                break
    if fine and length > most:
        raise Outage(f"its answer is larger than {most / 2**20:.3g} MiB, the most for what was asked")
    return bytes(body)


class Health:
    """Until when a replica that failed is asked only after the others.

    Args:
        address: for the log.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._failed_at = self._resting_until = self._rest_seconds = 0.0

    @property
    def resting(self) -> bool:
        """Whether the others are asked first."""
        return time.monotonic() < self._resting_until

    def failed(self, reason: str, started: float) -> None:
        """A request that began at `started` (of `time.monotonic`) has failed."""
        if started >= self._resting_until:
            # What fails during a rest, or began before it, is the failure that is known already.
            self._rest_seconds = min(max(2 * self._rest_seconds, _REST_SECONDS), _LONGEST_REST)
        known, self._failed_at = self.resting, time.monotonic()
        self._resting_until = self._failed_at + self._rest_seconds
        if not known:
            logger.warning("The teacher server %s failed: %s. Requests to it are tried again.", self._address, reason)

    def answered(self, started: float) -> None:
        """A request that began at `started` has its answer."""
        # An answer to what was asked before the failure does not say that it is back.
        if started > self._failed_at:
            self._resting_until = self._rest_seconds = 0.0


# Kind of error, and how httpx2's text for it begins -> what is said of it.
_REASONS: tuple[tuple[type[BaseException], str, str], ...] = (
    (TimeoutError, "", "no answer in time"),
    (httpx2.TimeoutException, "", "no answer in time"),
    (ConnectionRefusedError, "", "the connection was refused"),
    (socket.gaierror, "", "the host name is not known"),
    (httpx2.InvalidURL, "", "the host name is not known"),
    (ssl.SSLCertVerificationError, "", "its certificate cannot be verified"),
    (ssl.SSLError, "", "no TLS connection"),
    (httpx2.RemoteProtocolError, "Server disconnected", "the connection was closed"),
    (httpx2.RemoteProtocolError, "peer closed", "the answer ended early"),
    (httpx2.RemoteProtocolError, "", "the answer is not HTTP"),
    (httpx2.ReadError, "", "the connection was closed"),
    (httpx2.WriteError, "", "the connection was closed"),
)


def _reason(error: Exception) -> str:
    """Words for a failure; the library's own may quote what the server sent."""
    causes = list(_causes(error))
    for kind, beginning, words in _REASONS:
        if any(isinstance(cause, kind) and str(cause).startswith(beginning) for cause in causes):
            return words
    return f"the network failed ({type(error).__name__})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, down to the system's own."""
    while error is not None:
        yield error
        # A group has one failure for each of the host's addresses; the first speaks for them.
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__


@functools.cache
def _tls() -> ssl.SSLContext:
    """The certificates that the system trusts, or those that SSL_CERT_FILE names."""
    return ssl.create_default_context()


def _socket_options() -> list[tuple[int, int, int]]:
    known = {getattr(socket, name): value for name, value in _KEEP_ALIVE.items() if hasattr(socket, name)}
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *((socket.IPPROTO_TCP, *option) for option in known.items())]


def _is_of_others(record: logging.LogRecord) -> bool:
    return threading.current_thread().name != THREAD_NAME


# At the level DEBUG these two loggers write down what a server sent. Other users of the library keep what they have.
for _name in ("httpcore2.connection", "httpcore2.http11"):
    logging.getLogger(_name).addFilter(_is_of_others)
