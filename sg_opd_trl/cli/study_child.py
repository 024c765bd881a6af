"""The child process of `sg-opd study`: some commands of `sg-opd`, one after the other, in one process.

Training and evaluation share it, so that the libraries are loaded once. With `--watch` the process ends, with
everything it has started, when the pipe on its standard input breaks: a study that is killed leaves nothing running.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from ..errors import SGOPDConfigError, SGOPDError
from ..study.execution import SECRETS_VARIABLE
from . import EXIT_USER_ERROR, main

_GRACE_SECONDS = 5.0  # for accelerate's launcher to end its own processes


def run_commands(commands: Sequence[Sequence[str]]) -> int:
    """Run commands until one fails.

    Args:
        commands: arguments of `sg-opd` per command; or `["check", RECIPE]` to build a recipe's settings only; or
            `["check_evaluation", ...]` with arguments of `sg-opd evaluate`, to do all of it that needs no model.

    Returns:
        The status of the first command that failed, else 0.
    """
    secrets = _secret_flags()
    for command in commands:
        check = _CHECKS.get(command[0])
        words = [*command, *(secrets if command[0] == "train" else ())]
        status = check(command[1:]) if check is not None else main(words)
        if status:
            return status
    return 0


def _secret_flags() -> list[str]:
    """What the recipe in the job's folder does not show, as flags, which win over it; no process below has it."""
    settings = json.loads(os.environ.pop(SECRETS_VARIABLE, "{}"))
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def _check(words: Sequence[str]) -> int:
    from .parsing import build_settings, read_command_line

    try:
        build_settings(read_command_line(["--config", words[0]]))
    except SGOPDConfigError as error:
        return _refuse(str(error))
    return 0


def _check_evaluation(words: Sequence[str]) -> int:
    from . import evaluate

    try:
        evaluate.check(words)
    except (SGOPDError, ValueError) as error:
        return _refuse(f"Its `evaluate` or the split of `tune` cannot be used: {error}")
    return 0


def _refuse(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return EXIT_USER_ERROR


_CHECKS = {"check": _check, "check_evaluation": _check_evaluation}


def _end_with_parent() -> None:
    # Nobody writes into the pipe: the read returns when the study closes it or its process is gone, however it died.
    # (A signal at the parent's death exists on Linux alone.)
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGTERM)  # a launcher among us ends its own processes first
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--watch":
        threading.Thread(target=_end_with_parent, daemon=True).start()
    raise SystemExit(run_commands(json.loads(words[-1])))
