"""Asking servers that may fail: so many requests at a time, tried again, moved to another replica, over in time."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ...errors import SGOPDConfigError, TeacherError
from .answers import Aborted
from .places import Places
from .refusals import refusal
from .settings import MAX_RETRIES, TIMEOUT, limit_problems
from .transport import Connections, Outage, Stop, status_text

logger = logging.getLogger(__name__)

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
