"""The judging child process: JSON lines in, JSON lines out, one process per judge.

It is started as a file, so that a main script without a `__main__` guard, a notebook or a process that already uses a
GPU can start it. It imports the standard library and math-verify only, neither the package nor torch.

Protocol. Argument 1 is JSON: `path` (entries appended to `sys.path`), `cpu_limit` (seconds per item), `memory_limit`
(bytes). The child answers `{"ready": true}` or `{"ready": false, "error": ...}`, then one line
`{"id", "verdict", "reason", "answer"}` per line `{"id", "gold", "answer"}`, in order, until its input ends.

An item that uses up its processor time ends the process: the default action of SIGPROF works inside long C calls too,
no `except` of a library can swallow it and no half-finished sympy state outlives it. It also ends a child whose parent
has gone. Processor time, not wall-clock time, so that a busy machine does not change verdicts.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MAX_SHOWN_CHARACTERS = 200
# No core dump of a killed child, no file written, no process started: an answer is text that strangers wrote.
_RESOURCE_LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0}

Verdict = tuple[bool | None, str, str]


def build_judge() -> Callable[[str, str], Verdict]:
    """Imports math-verify and returns the function that judges one answer.

    Answers are parsed with the settings of TRL's `accuracy_reward`: LaTeX only, units removed, the box first, no guess
    without an anchor such as "the answer is". math-verify's own time limits are off, because SIGPROF bounds the item.

    Returns:
        A function of the gold text and the answer text that returns (verdict, reason, extracted answer). The verdict
        is `None` with reason "gold" if the gold text holds no mathematical expression.

    Raises:
        ImportError: If math-verify is not installed.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # math-verify logs every answer that it cannot parse
    answer_config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )

    def judge(gold: str, answer: str) -> Verdict:
        gold_parsed = parse(gold, parsing_timeout=None)
        # A gold answer that is left as a mere string would make every differently written answer wrong.
        if all(isinstance(item, str) for item in gold_parsed):
            return None, "gold", ""
        answer_parsed = parse(
            answer, extraction_config=[answer_config], extraction_mode="first_match", parsing_timeout=None
        )
        shown = next((item for item in answer_parsed if isinstance(item, str)), "")
        return bool(verify(gold_parsed, answer_parsed, timeout_seconds=None)), "", shown[:MAX_SHOWN_CHARACTERS]

    return judge


def _reset_signals() -> None:
    # Ignored and blocked signals survive exec; an ignored SIGPROF would remove the time limit.
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Ctrl-C reaches the whole terminal group; the parent decides what becomes of the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit_resources(memory_limit: int) -> None:
    for kind, wanted in {resource.RLIMIT_AS: memory_limit, **_RESOURCE_LIMITS}.items():
        hard = resource.getrlimit(kind)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (OSError, ValueError):
            continue  # A second line of defence: some platforms refuse, and the time limits do not depend on it.


def _private_output() -> int:
    """Moves the protocol away from descriptor 1, to which parser libraries print, and returns its new descriptor."""
    output = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    return output


def _send(output: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(output, data) :]


def serve(judge: Callable[[str, str], Verdict], output: int, cpu_limit: float) -> None:
    """Judges every line of standard input until it ends.

    Args:
        judge: the function of `build_judge`.
        output: descriptor that the replies are written to.
        cpu_limit: processor seconds that one item may use.
    """
    for line in sys.stdin.buffer:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit)
        try:
            verdict, reason, shown = judge(item["gold"], item["answer"])
        except MemoryError:
            verdict, reason, shown = None, "memory", ""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(output, {"id": item["id"], "verdict": verdict, "reason": reason, "answer": shown})


def main() -> None:
    """Runs the child: sets it up, reports that it is ready, judges until the input ends."""
    settings = json.loads(sys.argv[1])
    output = _private_output()
    _reset_signals()
    sys.path.extend(entry for entry in settings["path"] if entry not in sys.path)
    try:
        judge = build_judge()
        judge("$1$", "\\boxed{1}")  # Builds parser tables, so that the first item does not pay for them.
    except ImportError as error:
        _send(output, {"ready": False, "error": str(error)})
        return
    os.dup2(1, 2)  # Parsers report every malformed answer on standard error.
    _limit_resources(settings["memory_limit"])
    try:
        _send(output, {"ready": True})
        serve(judge, output, settings["cpu_limit"])
    except BrokenPipeError:
        return  # The parent is gone.


if __name__ == "__main__":
    main()
