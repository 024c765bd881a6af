"""Bounded judging of mathematical answers, from any thread."""

import atexit
import hashlib
import json
import logging
import math
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..errors import VerifierError
from .process import WorkerDied, WorkerProcess, WorkerTimeout

logger = logging.getLogger(__name__)

_MAX_CRASHES = 2  # the first may be the machine's doing, such as a killer of processes; the second is the answer's


NoVerdictReason = Literal["gold", "timeout", "wall_timeout", "memory", "crash", "unsure"]
"""No gold answer, or none with a mathematical expression; processor time; wall-clock time; memory; the child died;
nothing that math-verify can tell."""


class Judgement(NamedTuple):
    """What the judge found.

    `verdict` is True (right), False (wrong) or None. `reason` says why there is no verdict, and is "" where there is
    one. `answer` is the text that was taken as the answer.
    """

    verdict: bool | None
    reason: NoVerdictReason | Literal[""] = ""
    answer: str = ""


class Judge:
    """Judges answers with math-verify in a child process that can be killed.

    The child starts with the first question, and again after it was killed. An item is given `time_limit` seconds of
    processor time, which does not depend on how busy the machine is, and `wall_limit` seconds altogether, counted from
    the moment the child begins it. An item at which the child dies for another reason is tried once more.

    Verdicts are cached, also "processor time used up", which is a property of the answer. What a busy machine may have
    caused (wall-clock limit, memory, crash) is not kept: such an item is judged anew the next time.

    Threads take turns. After a fork the new process starts a child of its own. POSIX only.

    Args:
        time_limit: processor seconds per item for parsing and comparing together. Our choice: 100 times what the
            slowest of a thousand ordinary answers needs.
        wall_limit: wall-clock seconds per item; default 2.5 times `time_limit`.
        memory_limit: address space of the child in bytes.
        cache_size: number of verdicts that are kept, the least recently used going first.

    Raises:
        VerifierError: If a limit is not a positive finite number or `wall_limit` is below `time_limit`.
    """

    def __init__(
        self,
        *,
        time_limit: float = 2.0,
        wall_limit: float | None = None,
        memory_limit: int = 4 << 30,
        cache_size: int = 1 << 16,
    ) -> None:
        self.time_limit = _positive("time_limit", time_limit)
        self.wall_limit = _positive("wall_limit", 2.5 * time_limit if wall_limit is None else wall_limit)
        self.memory_limit = int(_positive("memory_limit", memory_limit))
        self.cache_size = int(_positive("cache_size", cache_size))
        if self.wall_limit < self.time_limit:
            raise VerifierError(
                f"`wall_limit` must be at least time_limit = {time_limit}, got {wall_limit}. Because a process cannot "
                "use more processor time than passes. Set wall_limit to None for 2.5 times time_limit."
            )
        self._reset()
        _JUDGES.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._cache: OrderedDict[bytes, Judgement] = OrderedDict()

    @property
    def worker_pid(self) -> int | None:
        """Process id of the child, `None` while there is none."""
        worker = self._worker
        return None if worker is None else worker.pid

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        r"""Judges answers.

        Args:
            pairs: (gold text, answer text), as LaTeX that math-verify recognises: `$...$` or `\boxed{...}`.

        Returns:
            True, False or None (no verdict) per pair.

        Raises:
            VerifierError: If the child cannot be started.
        """
        return [judgement.verdict for judgement in self.judge(pairs)]

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """Judges answers like `verdicts`, and says why there is no verdict and what was taken as the answer."""
        keys = [_digest(pair) for pair in pairs]  # of one length: an answer may be a whole completion
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
            fresh = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
            known.update(self._ask(fresh))
            for key in keys:
                self._remember(key, known[key])
        return [known[key] for key in keys]

    def close(self) -> None:
        """Ends the child. The judge stays usable: the next question starts another."""
        # At exit a daemon thread may hold the lock for ever.
        locked = self._lock.acquire(timeout=self.wall_limit)
        try:
            self._stop_worker()
        finally:
            if locked:
                self._lock.release()

    def _remember(self, key: bytes, judgement: Judgement) -> None:
        if judgement.reason in ("wall_timeout", "memory", "crash"):
            return
        self._cache[key] = judgement
        self._cache.move_to_end(key)
        if len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)

    def _ask(self, pairs: dict[bytes, tuple[str, str]]) -> dict[bytes, Judgement]:
        done: dict[bytes, Judgement] = {}
        waiting = deque(pairs)
        crashes = 0  # of the item at the head of `waiting`
        while waiting:
            # A failure belongs to the head: the child answers in order, and the replies before it have been taken off.
            before = len(done)
            failure = self._stream(pairs, waiting, done)
            if failure is None:
                continue
            crashes = 0 if len(done) > before else crashes
            crashes += failure == "crash"
            if failure != "crash" or crashes == _MAX_CRASHES:
                logger.info("An answer was left without a verdict: %s.", failure)
                done[waiting.popleft()] = Judgement(None, failure)
                crashes = 0
        return done

    def _stream(
        self, pairs: dict[bytes, tuple[str, str]], waiting: deque[bytes], done: dict[bytes, Judgement]
    ) -> NoVerdictReason | None:
        """Judges what is waiting until all is done or the child is gone; returns why it went."""
        if self._worker is None:
            self._worker = WorkerProcess(self.time_limit, self.memory_limit)
        requests = [_encode(key, *pairs[key]) for key in waiting]
        finished = False
        try:
            for reply in self._worker.replies(requests, self.wall_limit):
                key = waiting.popleft()
                if reply["id"] != key.hex():
                    raise VerifierError(f"replies must come in order, got {reply['id']} for {key.hex()}.")
                done[key] = Judgement(reply["verdict"], reply["reason"], reply["answer"])
            finished = True
        except WorkerTimeout as error:
            return "timeout" if error.cpu else "wall_timeout"
        except WorkerDied:
            return "crash"
        finally:
            # An interrupted exchange leaves replies in the pipe that belong to no later question.
            if not finished:
                self._stop_worker()
        return None

    def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop(at_once=True)

    def _forget_parent(self) -> None:
        """In a forked process: lets go of the parent's child and of a lock that may be held for ever."""
        worker = self._worker
        self._reset()
        if worker is not None:
            worker.release()


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise VerifierError(
            f"`{name}` must be positive and finite, got {value}. Because judging must end. Set it to a number above 0."
        )
    return value


def _digest(pair: tuple[str, str]) -> bytes:
    return hashlib.blake2b(json.dumps(pair).encode(), digest_size=16).digest()


def _encode(key: bytes, gold: str, answer: str) -> bytes:
    return json.dumps({"id": key.hex(), "gold": gold, "answer": answer}).encode() + b"\n"


_JUDGES: weakref.WeakSet[Judge] = weakref.WeakSet()


def _close_all() -> None:
    for judge in list(_JUDGES):
        judge.close()


def _forget_all() -> None:
    for judge in list(_JUDGES):
        judge._forget_parent()


# Weakly held above: a judge that nobody uses any more is not kept alive until the end of the process.
atexit.register(_close_all)
if os.name == "posix":
    os.register_at_fork(after_in_child=_forget_all)
