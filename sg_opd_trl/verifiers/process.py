"""The parent's end of one judging child: start, exchange of JSON lines with deadlines, stop."""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import VerifierError
from .child import START_LIMIT, Child, ChildEnded, ChildSilent, environment_without_secrets, require_posix

_WORKER_FILE = Path(__file__).with_name("worker.py")


class WorkerTimeout(Exception):
    """The item in progress used up its time; `cpu` tells processor time from wall-clock time."""

    def __init__(self, *, cpu: bool) -> None:
        super().__init__("processor time" if cpu else "wall-clock time")
        self.cpu = cpu


class WorkerDied(Exception):
    """The child ended for another reason than its time limit."""


def worker_environment() -> dict[str, str]:
    """Returns the child's environment: the parent's without secrets and without Python's own variables."""
    kept = {name: value for name, value in environment_without_secrets().items() if not name.startswith("PYTHON")}
    # A fixed hash seed keeps sympy's traversal order, hence the verdicts, the same in every child.
    return {**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


class WorkerProcess:
    """A running child.

    Args:
        cpu_limit: processor seconds per item.
        memory_limit: address space of the child in bytes.

    Raises:
        VerifierError: If the child cannot be started or math-verify cannot be imported in it.
    """

    def __init__(self, cpu_limit: float, memory_limit: int) -> None:
        settings = {
            "cpu_limit": cpu_limit,
            "memory_limit": memory_limit,
            # Relative entries are about the working directory, from which a judge must not import.
            "path": [entry for entry in sys.path if os.path.isabs(entry)],
        }
        # A file, because nobody would read a pipe: a child that fills it would wait for ever.
        with tempfile.TemporaryFile() as errors:
            self._child = _start(json.dumps(settings), errors)
            self._wait_until_ready(errors)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._child.pid

    def replies(self, requests: Sequence[bytes], wall_limit: float) -> Iterator[dict[str, Any]]:
        """Sends requests as one stream and yields the replies in order.

        The child works on one item at a time, so the arrival of a reply is the moment the next item begins.

        Args:
            requests: encoded JSON lines.
            wall_limit: seconds that one item may take.

        Yields:
            One decoded reply per request.

        Raises:
            WorkerTimeout: If the item in progress took too long. The child is gone.
            WorkerDied: If the child ended. The child is gone.
        """
        # One stream without turns: the child never waits for this process between two items.
        self._child.send(b"".join(requests))
        for _ in requests:
            self._wait_for_a_line(time.monotonic() + wall_limit)
            line, _, self._child.received = self._child.received.partition(b"\n")
            yield json.loads(line)

    def _wait_for_a_line(self, deadline: float) -> None:
        try:
            while b"\n" not in self._child.received:
                self._child.wait(deadline)
        except ChildSilent as error:
            self.stop(at_once=True)
            raise WorkerTimeout(cpu=False) from error
        except ChildEnded as error:
            if self._child.status == -signal.SIGPROF:
                raise WorkerTimeout(cpu=True) from error
            raise WorkerDied(str(error)) from error

    def _wait_until_ready(self, errors: IO[bytes]) -> None:
        try:
            reply = next(self.replies([b""], START_LIMIT))
        except (WorkerDied, WorkerTimeout) as error:
            errors.seek(0)
            reply = {"ready": False, "error": f"{error}; {errors.read().decode(errors='replace')[-500:].strip()}"}
        except BaseException:
            self.stop(at_once=True)
            raise
        if not reply["ready"]:
            self.stop()
            raise VerifierError(
                f"`math_reward` must be able to start its judging process, got: {reply['error']}. Because answers are "
                f"judged by math-verify in a child of {sys.executable}. Set up math-verify in that environment."
            )

    def stop(self, *, at_once: bool = False) -> None:
        """Ends the child: by closing its input, or by killing it, at once or if it has not ended after a second."""
        self._child.stop(at_once=at_once)

    def release(self) -> None:
        """Closes this process's ends of the pipes and leaves the child to whoever else holds them."""
        self._child.release()


def _start(settings: str, errors: IO[bytes]) -> Child:
    require_posix("math_reward", "Set reward_funcs to `exact_match_reward` or to your own function here.")
    # -P: neither the working directory nor the worker's own folder is importable. -B: it writes no files.
    command = [sys.executable, "-P", "-B", "-W", "ignore", str(_WORKER_FILE), settings]
    return Child(command, environment=worker_environment(), errors=errors)
