"""A process that a launcher has started ends when the launcher is gone.

Launchers end their processes, but not where they are killed themselves; and torch's give each a session of its own, so
that no kill of the launcher's group reaches them either. They would train on in a folder that the next start wants, or
wait half an hour for a store that the launcher held.
"""

import json
import logging
import os
import signal
import socket
import threading
import time

import psutil

logger = logging.getLogger(__name__)

LAUNCHER = "SG_OPD_LAUNCHER"
"""Set for the processes that `sg-opd` launches: which process launches them."""

_EVERY = 1.0  # seconds

_watched = False


def describe_launcher() -> str:
    """What this process sets `LAUNCHER` to: its machine, since others may get it too, its number and its start."""
    own = psutil.Process()
    return json.dumps([socket.gethostname(), own.pid, own.create_time()])


def end_with_launcher() -> None:
    """From now on SIGTERM ends this process, as a scheduler would, once its launcher is gone.

    Where no launcher of torch, accelerate or this package started it, nothing is watched: whoever starts ranks by hand
    may leave them alone.
    """
    global _watched
    launcher = None if _watched else _launcher()
    if launcher is not None:
        _watched = True
        threading.Thread(target=_watch, args=(launcher,), daemon=True, name="launcher").start()


def _launcher() -> psutil.Process | None:
    host, number, started = json.loads(os.environ.get(LAUNCHER, "[null, null, null]"))
    ours = host == socket.gethostname()
    if not ours and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        launcher = psutil.Process(number if ours else os.getppid())
    except psutil.NoSuchProcess:
        _end(number)
        return None
    if ours and launcher.create_time() != started:
        _end(number)
    return launcher


def _watch(launcher: psutil.Process) -> None:
    while _lives(launcher):
        time.sleep(_EVERY)
    _end(launcher.pid)


def _lives(launcher: psutil.Process) -> bool:
    try:
        # One that was killed stays as a zombie until its own parent asks for it.
        return launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(number: int) -> None:
    logger.warning("The launcher (process %d) is gone, so this process ends too, as by SIGTERM.", number)
    os.kill(os.getpid(), signal.SIGTERM)
