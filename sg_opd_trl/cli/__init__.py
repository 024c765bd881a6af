"""The `sg-opd` command: `train`, `check`, `evaluate`, `teacher-rollouts`, `serve-teacher`, `study`, `demo`.

Nothing heavy is imported here: `sg-opd --help` answers before torch would have been loaded. `python -m sg_opd_trl.cli`
and `accelerate launch -m sg_opd_trl.cli` are the same program.
"""

import argparse
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import SGOPDError
from ..launcher import end_with_launcher, leave_group
from .output import scrubbed_output

COMMANDS = {
    "train": "distil a student as a recipe says",
    "check": "look at all that a recipe needs, in seconds and without training: what is wrong, and what to change",
    "evaluate": "measure avg@k and pass@k of a model on a data set",
    "teacher-rollouts": "write the teacher's rollouts of a recipe before its runs, which then only read them",
    "serve-teacher": "start the vLLM server of a recipe's teacher, or show its command",
    "study": "run recipes x seeds, several at a time, and compare them in one table",
    "demo": "prepare, distil and measure a small student of the built-in task, offline on a CPU",
}
EXIT_USER_ERROR = 2  # as argparse ends
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell says it


def program() -> int:
    """`main` as all that this process does; returns its status."""
    status = main()
    # One that was interrupted may have an exchange under way, which the others never answer.
    if status != EXIT_INTERRUPTED:
        leave_group()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name, `sys.argv[1:]` by default.

    Returns:
        0 when all went well, 2 after an error of the package (shown as one message), 130 after an interruption,
        otherwise the status of the launched processes.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with scrubbed_output(words):
        return _run(words)


def _run(words: list[str]) -> int:
    # A command reads its own words: this parser only finds which command it is, so that no other one is imported.
    arguments, debug = _pop_debug(words)
    namespace, rest = _build_parser().parse_known_args(arguments)
    if namespace.command is None:
        _build_parser().print_help()
        return 0
    logging.basicConfig(level=_log_level(debug), format="%(levelname)s %(name)s: %(message)s")
    # Before anything waits for the other ranks.
    end_with_launcher()
    command = importlib.import_module(f"sg_opd_trl.cli.{namespace.command.replace('-', '_')}")
    try:
        return command.run(rest, debug=debug)
    except SGOPDError as error:
        if debug:
            raise
        _show_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        return EXIT_INTERRUPTED


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sg-opd",
        description="On-policy distillation with sign-gated extrapolation (SG-OPD).",
        epilog="Settings of one command: sg-opd COMMAND --help",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error, and more messages")
    parser.add_argument("--version", action=_Version, help="show the versions of the package and its stack, and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
    return parser


class _Version(argparse.Action):
    """As argparse's own, but the stack is looked up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        sys.stdout.write(f"sg-opd {__version__} ({_stack()})\n")
        parser.exit()


def _stack() -> str:
    """The libraries that a report of a problem should name; read from their metadata, none is imported."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _pop_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Takes out a bare `--debug` anywhere; `--debug VALUE` after a command is a field of the training arguments."""
    bare = [
        index
        for index, word in enumerate(argv)
        if word == "--debug" and (index == 0 or index + 1 == len(argv) or argv[index + 1].startswith("--"))
    ]
    return [word for index, word in enumerate(argv) if index not in bare], bool(bare)


def _log_level(debug: bool) -> int:
    """One process of each machine speaks; the others only about errors."""
    if debug:
        return logging.INFO
    return logging.WARNING if os.environ.get("LOCAL_RANK", "0") == "0" else logging.ERROR


def _show_error(error: SGOPDError) -> None:
    from rich.console import Console
    from rich.text import Text

    rank = os.environ.get("RANK")
    message = Text.assemble(("Error: " if rank is None else f"Error on rank {rank}: ", "bold red"), str(error))
    Console(stderr=True, soft_wrap=True).print(message)


__all__ = ["COMMANDS", "main"]
