"""A folder that one process holds at a time, on one machine or on several that share its disk."""

import errno
import importlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from .errors import SGOPDConfigError
from .processes import find, is_here, this_process

# Not on Windows: there the process that the file names is looked at.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

#: transformers leaves files with such a name out of what it pushes.
LOCK_FILE = "_run.lock"

_HEARTBEAT_SECONDS = 5.0
# Several heartbeats: a network disk may show another machine's with delay.
_WATCH_SECONDS = 20.0


class FolderLock:
    """Held by a process until it lets go or ends, however it ends: the system takes the lock back then.

    The file says who holds it. Where a disk has no locks, or does not share them between machines, that is what
    counts: a process of this machine is looked up, one of another is watched for a sign of life, which it gives every
    few seconds. So a job that is started again on another machine does not wait for ever for one that was killed.

    Args:
        folder: to hold; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file: int | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take it.

        Raises:
            SGOPDConfigError: another process has it; names the process and its host.
            OSError: the folder cannot be written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                shared = self._take(file)
                if not self._is_current(file):
                    # The holder before removed the file between our opening and our locking it.
                    os.close(file)
                    continue
                holder = _read(file)
                if holder and self._lives(holder, shared):
                    raise SGOPDConfigError(self._refusal(holder))
            except BaseException:
                os.close(file)
                raise
            break
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(this_process()).encode(), 0)
        self._file = file
        _HELD.add(self)
        self._ended.clear()
        threading.Thread(target=self._beat, args=(file,), daemon=True, name="run folder").start()

    def release(self) -> None:
        """Let go; the file is gone then. Without holding it nothing happens."""
        file, self._file = self._file, None
        if file is None:
            return
        self._ended.set()
        _HELD.discard(self)
        # Removed while it is held: whoever opened it meanwhile sees that it is no longer the folder's.
        if self._is_current(file):
            self.path.unlink(missing_ok=True)
        os.close(file)

    def _take(self, file: int) -> bool:
        """Lock the file; whether the disk has locks. Raises if another process of this machine holds it."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SGOPDConfigError(self._refusal(_read_soon(file))) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            return False
        return True

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False

    def _lives(self, holder: dict[str, Any], locked: bool) -> bool:
        """Whether the process that a file names, which we could lock or which has no locks, still runs."""
        if not is_here(holder):
            return self._gives_sign()
        # A lock of this machine that we got proves that the process that had it is gone.
        if locked or holder["process"] == os.getpid():
            return False
        return find(holder) is not None

    def _gives_sign(self) -> bool:
        before, end = self._last_sign(), time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(_HEARTBEAT_SECONDS / 5)
            if self._last_sign() != before:
                return True
        return False

    def _last_sign(self) -> int:
        # Opened anew: a network disk answers for an open file from its memory.
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _beat(self, file: int) -> None:
        while not self._ended.wait(_HEARTBEAT_SECONDS):
            try:
                os.utime(file)
            except OSError:
                return

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['process']} on {holder['host']}" if holder else "another process"
        return (
            f"`output_dir` must be a folder that no other run is using, got {str(self.path.parent)!r}, in which {who} "
            "is training. Two runs would leave a mixture of both. Set another folder, or wait for that run or end it."
        )

    def _forget(self) -> None:
        file, self._file = self._file, None
        self._ended.set()
        if file is not None:
            os.close(file)


_HELD: set[FolderLock] = set()


def _forget_all() -> None:
    # A forked child (a data loader's worker, a verifier's) shares the open file, and would keep the lock of a process
    # that was killed. Closing its copy leaves the parent's lock alone.
    for lock in _HELD:
        lock._forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _read(file: int) -> dict[str, Any]:
    """Who holds the lock; empty where the file does not say."""
    text = os.pread(file, 10_000, 0)
    try:
        holder = json.loads(text)
    except ValueError:  # nothing yet, or a part of it
        return {}
    return holder if isinstance(holder, dict) and holder.keys() >= {"host", "process", "started"} else {}


def _read_soon(file: int) -> dict[str, Any]:
    """The same of a holder that may only just have begun."""
    for _ in range(10):
        holder = _read(file)
        if holder:
            return holder
        time.sleep(0.05)
    return {}
