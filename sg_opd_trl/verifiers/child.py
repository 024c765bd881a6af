"""A child process that is asked over its pipes, with deadlines, and can be killed whatever it does."""

import os
import selectors
import signal
import subprocess
import time
import weakref
from collections.abc import Sequence
from typing import IO

from ..errors import VerifierError
from ..scrubbing import is_secret_name, scrubbed_text

START_LIMIT = 120.0
"""Seconds: imports from a cold network disk, on a machine whose ranks all start at once."""

_FOLDERS = ("PWD", "OLDPWD")  # a shell's own: the folder that it is in is no password
_STOP_LIMIT = 1.0  # seconds
_LONGEST_WAIT = 3600.0  # seconds: the system counts milliseconds, and not many of them
_READ_SIZE = 1 << 16  # bytes: what a Linux pipe holds


class ChildSilent(Exception):
    """The child did not answer in time."""


class ChildEnded(Exception):
    """The child ended without an answer."""


def environment_without_secrets() -> dict[str, str]:
    """This process's environment without what is named, or written, like a secret."""
    return {name: value for name, value in os.environ.items() if not _is_secret(name, value)}


def _is_secret(name: str, value: str) -> bool:
    # A proxy or a database may have its password, or a gateway its key, in its address.
    return name not in _FOLDERS and (is_secret_name(name) or scrubbed_text(value) != value)


class Child:
    """A running child: bytes go to its standard input and come from its standard output.

    It is killed when nobody refers to it any more, and at the end of this process. A fork of this process lets go of
    it, so that the child sees the end of the one that started it.

    Args:
        command: that starts it.
        environment: of it.
        errors: where its standard error goes; None leaves it this process's own.
        own_session: start it as the head of a session. Ctrl-C does not reach it then, and what it has started itself
            ends with it.
        kept: descriptors that it inherits.

    Attributes:
        received: what it has sent and nobody has taken off yet.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        errors: IO[bytes] | None = None,
        own_session: bool = False,
        kept: Sequence[int] = (),
    ) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            bufsize=0,
            start_new_session=own_session,
            pass_fds=kept,
        )
        self._own_session = own_session
        self._input, self._output = _pipes(self._process)
        self._outgoing = memoryview(b"")
        self.received = b""
        _CHILDREN.add(self)
        weakref.finalize(self, _end, self._process, own_session, os.getpid())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, once it is gone; minus the number of the signal that ended it."""
        return self._process.returncode

    def send(self, data: bytes) -> None:
        """Have `wait` write these bytes, behind those that are not written yet."""
        self._outgoing = memoryview(bytes(self._outgoing) + data)

    def wait(self, deadline: float) -> None:
        """Wait for the child once, then read and write what is possible.

        Args:
            deadline: of `time.monotonic`.

        Raises:
            ChildSilent: nothing has come until then. The child goes on.
            ChildEnded: the child is gone.
        """
        # Not the default, which on Linux is an object of the system that a fork would share.
        with selectors.PollSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            if self._outgoing:
                selector.register(self._input, selectors.EVENT_WRITE)
            left = min(max(0.0, deadline - time.monotonic()), _LONGEST_WAIT)
            ready = {key.fileobj for key, _ in selector.select(left)}
        if self._output in ready:
            chunk = os.read(self._output.fileno(), _READ_SIZE)
            if not chunk:
                self.stop()
                raise ChildEnded(f"exit status {self.status}")
            self.received += chunk
        elif time.monotonic() >= deadline:
            raise ChildSilent("wall-clock time")
        if self._input in ready:
            self._write()

    def _write(self) -> None:
        try:
            self._outgoing = self._outgoing[os.write(self._input.fileno(), self._outgoing[:_READ_SIZE]) :]
        except BrokenPipeError:
            self._outgoing = self._outgoing[:0]  # The child is gone; reading tells why.

    def stop(self, *, at_once: bool = False) -> None:
        """End the child: by closing its input, or by killing it, at once or if it has not ended after a second."""
        self.release()
        # Of a session all is killed, and before its head is waited for: until then its number is nobody else's. The
        # status of a head that was ending by itself is settled by now.
        if at_once or self._own_session:
            _kill(self._process, self._own_session)
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            _kill(self._process, self._own_session)
            self._process.wait()

    def release(self) -> None:
        """Close this process's ends of the pipes and leave the child to whoever else holds them."""
        self._input.close()
        self._output.close()


def require_posix(name: str, way_out: str) -> None:
    """Refuse a system without POSIX signals.

    Raises:
        VerifierError: it has none.
    """
    if os.name != "posix":
        raise VerifierError(
            f"`{name}` must run on a POSIX system, got {os.name!r}. Because the limits of its process need POSIX "
            f"signals. {way_out}"
        )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise VerifierError("the judging process must have both pipes, got none. Because it speaks over them alone.")
    # The child may not read while it writes: a blocking write of a long batch would wait for one that waits for us.
    os.set_blocking(process.stdin.fileno(), False)
    return process.stdin, process.stdout


def _kill(process: subprocess.Popen[bytes], own_session: bool) -> None:
    if process.returncode is not None:
        return
    if not own_session:
        process.kill()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # All of it has ended, and waits to be asked for its status.
    except PermissionError:
        process.kill()  # macOS says this of a group of which nobody is left but the head.


def _end(process: subprocess.Popen[bytes], own_session: bool, owner: int) -> None:
    if os.getpid() == owner and process.returncode is None:
        _kill(process, own_session)
        process.wait()


def _let_go() -> None:
    """In a forked process: another one's children are not ours."""
    for child in list(_CHILDREN):
        child.release()
    _CHILDREN.clear()


_CHILDREN: weakref.WeakSet[Child] = weakref.WeakSet()
if os.name == "posix":
    os.register_at_fork(after_in_child=_let_go)
