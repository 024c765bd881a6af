"""Questions that are asked in threads of their own, all at once, or ahead of the time when the answers are needed."""

import queue
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from .asking import Read, Replica, Request, RequestLimits, ask, no_answer
from .transport import Stop

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
