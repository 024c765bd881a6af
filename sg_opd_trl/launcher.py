"""A process that a launcher has started ends when the launcher is gone.

Launchers end their processes, but not where they are killed themselves; and torch's give each a session of its own, so
that no kill of the launcher's group reaches them either. They would train on in a folder that the next start wants, or
wait half an hour for a store that the launcher held.
"""

import json
import logging
import os
import signal
import sys
import threading
import time

import psutil

from .processes import find, is_here, this_process

logger = logging.getLogger(__name__)

LAUNCHER = "SG_OPD_LAUNCHER"
"""Set for the processes that `sg-opd` launches: which process launches them."""

_EVERY = 1.0  # seconds

_watched = False


def describe_launcher() -> str:
    """What this process sets `LAUNCHER` to; processes on other machines may get it too."""
    return json.dumps(this_process())


def end_with_launcher() -> None:
    """From now on SIGTERM ends this process, as a scheduler would, once its launcher is gone.

    Where no launcher of torch, accelerate or this package started it, nothing is watched: whoever starts ranks by hand
    may leave them alone.
    """
    global _watched
    if _watched:
        return
    told = json.loads(os.environ.get(LAUNCHER, "null"))
    if told is not None and is_here(told):
        launcher, number = find(told), told["process"]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        # Whoever is the parent now: a launcher that was killed before cannot be told from one that is the system's
        # first process, as in a container.
        number = os.getppid()
        launcher = psutil.Process(number) if psutil.pid_exists(number) else None
    else:
        return
    _watched = True
    threading.Thread(target=_watch, args=(launcher, number), daemon=True, name="launcher").start()


def leave_group() -> None:
    """Leave the processes that this one has trained with, before the interpreter ends.

    A thread of gloo may still hold a tensor of the last exchange, and needs the interpreter to give it back. Where
    that is gone the thread aborts the process, whose work is done, with "terminate called without an active
    exception". Other backends wait for the processes there, of which one may have failed; they are left alone.
    """
    distributed = sys.modules.get("torch.distributed")  # a command that only answers does not import it
    if distributed is not None and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def _watch(launcher: psutil.Process | None, number: int) -> None:
    while launcher is not None and _lives(launcher):
        time.sleep(_EVERY)
    logger.warning("The launcher (process %d) is gone, so this process ends too, as by SIGTERM.", number)
    os.kill(os.getpid(), signal.SIGTERM)


def _lives(launcher: psutil.Process) -> bool:
    try:
        # One that was killed stays as a zombie until its own parent asks for it.
        return launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
