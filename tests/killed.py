"""A fork of this process that is killed before one of its file operations."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Announced by a test's own writer, in the middle of a file.
HALF_WRITTEN = "half of a file is written"
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", HALF_WRITTEN)


def killed_before(folder: Path, operation: int, act: Callable[[], Any]) -> bool:
    """Act in a fork that gets SIGKILL before its N-th operation in a folder; whether it had so many."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS and str(folder) in str(arguments[0]):
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(count)
        try:
            act()
        except BaseException:  # noqa: BLE001  # a fork that went on would run the other tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "what was to be killed has failed"
    return os.WIFSIGNALED(status)
