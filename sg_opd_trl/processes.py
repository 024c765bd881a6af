"""Which process of which machine, told so that another process can see whether it still runs."""

import socket
from typing import Any

import psutil

# Seconds. The system tells when a process began by a clock that is set now and then; numbers come back much later.
_SAME_START = 2.0


def this_process() -> dict[str, Any]:
    """This process's machine, number and start, as JSON has them."""
    own = psutil.Process()
    return {"host": socket.gethostname(), "process": own.pid, "started": own.create_time()}


def is_here(told: dict[str, Any]) -> bool:
    """Whether a process that was told of is, or was, one of this machine."""
    return bool(told["host"] == socket.gethostname())


def find(told: dict[str, Any]) -> psutil.Process | None:
    """The process of this machine that was told of; None if it is gone, whoever has its number now."""
    try:
        process = psutil.Process(told["process"])
        return process if abs(process.create_time() - told["started"]) < _SAME_START else None
    except psutil.NoSuchProcess:
        return None
