"""The parent's end of one judging child: start, exchange of JSON lines with deadlines, stop."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import VerifierError
from ..scrubbing import is_secret_name, scrubbed_text

_WORKER_FILE = Path(__file__).with_name("worker.py")
_FOLDERS = ("PWD", "OLDPWD")  # a shell's own: the folder that it is in is no password
_START_LIMIT = 120.0  # seconds: imports from a cold network disk, on a machine whose ranks all start at once
_STOP_LIMIT = 1.0  # seconds
_READ_SIZE = 1 << 16  # bytes: what a Linux pipe holds


class WorkerTimeout(Exception):
    """The item in progress used up its time; `cpu` tells processor time from wall-clock time."""

    def __init__(self, *, cpu: bool) -> None:
        super().__init__("processor time" if cpu else "wall-clock time")
        self.cpu = cpu


class WorkerDied(Exception):
    """The child ended for another reason than its time limit."""


def worker_environment() -> dict[str, str]:
    """Returns the child's environment: the parent's without secrets and without Python's own variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and not _is_secret(name, value)
    }
    # A fixed hash seed keeps sympy's traversal order, hence the verdicts, the same in every child.
    return {**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


def _is_secret(name: str, value: str) -> bool:
    # A proxy or a database may have its password, or a gateway its key, in its address.
    return name not in _FOLDERS and (is_secret_name(name) or scrubbed_text(value) != value)


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
            self._process = _start(json.dumps(settings), errors)
            self._input, self._output = _pipes(self._process)
            self._received = b""
            self._wait_until_ready(errors)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

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
        outgoing = memoryview(b"".join(requests))
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._input, selectors.EVENT_WRITE)
            for _ in requests:
                deadline = time.monotonic() + wall_limit
                while b"\n" not in self._received:
                    outgoing = self._step(selector, outgoing, deadline)
                line, _, self._received = self._received.partition(b"\n")
                yield json.loads(line)

    def _step(self, selector: selectors.BaseSelector, outgoing: memoryview, deadline: float) -> memoryview:
        """Waits for the child once, then reads and writes what is possible; returns what is left to write."""
        events = selector.select(max(0.0, deadline - time.monotonic()))
        ready = {key.fileobj for key, _ in events}
        if self._output in ready:
            chunk = os.read(self._output.fileno(), _READ_SIZE)
            if not chunk:
                self._raise_ended()
            self._received += chunk
        elif time.monotonic() >= deadline:
            self.stop(at_once=True)
            raise WorkerTimeout(cpu=False)
        if self._input in ready:
            outgoing = self._write(outgoing)
            if not outgoing:
                selector.unregister(self._input)
        return outgoing

    def _write(self, outgoing: memoryview) -> memoryview:
        try:
            return outgoing[os.write(self._input.fileno(), outgoing[:_READ_SIZE]) :]
        except BrokenPipeError:
            return outgoing[:0]  # The child is gone; reading tells why.

    def _raise_ended(self) -> None:
        self.stop()
        if self._process.returncode == -signal.SIGPROF:
            raise WorkerTimeout(cpu=True)
        raise WorkerDied(f"exit status {self._process.returncode}")

    def _wait_until_ready(self, errors: IO[bytes]) -> None:
        try:
            reply = next(self.replies([b""], _START_LIMIT))
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
        self.release()
        if at_once:
            self._process.kill()
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def release(self) -> None:
        """Closes this process's ends of the pipes and leaves the child to whoever else holds them."""
        self._input.close()
        self._output.close()


def _start(settings: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    if os.name != "posix":
        raise VerifierError(
            f"`math_reward` must run on a POSIX system, got {os.name!r}. Because the limits of its judging process "
            "need POSIX signals. Set reward_funcs to `exact_match_reward` or to your own function here."
        )
    # -P: neither the working directory nor the worker's own folder is importable. -B: it writes no files.
    command = [sys.executable, "-P", "-B", "-W", "ignore", str(_WORKER_FILE), settings]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=worker_environment(), bufsize=0
    )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise VerifierError("the judging process must have both pipes, got none. Because it speaks over them alone.")
    # The child may not read while it writes: a blocking write of a long batch would wait for one that waits for us.
    os.set_blocking(process.stdin.fileno(), False)
    return process.stdin, process.stdout
