"""So many at a time, in the order in which they came."""

import threading
from collections import deque


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
