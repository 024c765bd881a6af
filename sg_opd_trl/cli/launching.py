"""`sg-opd train` under accelerate's launcher."""

import argparse
import importlib.resources
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..errors import SGOPDConfigError, did_you_mean
from ..launcher import LAUNCHER, describe_launcher
from .outside import concerning
from .parsing import ACCELERATE_CONFIG, CommandLine, accelerate_defaults, pop_option
from .recipes import recipes_folder

logger = logging.getLogger(__name__)

EXPECTED_PROCESSES = "SG_OPD_EXPECTED_PROCESSES"
"""Set for launched processes: how many were asked for. accelerate starts one process for `--cpu --num_processes 2`."""

_LAUNCHERS_SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")]


def is_launched() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def wants_launch(command: CommandLine) -> bool:
    """Whether this process must hand over to accelerate's launcher.

    Raises:
        SGOPDConfigError: launcher flags inside a launched process, where they would have no effect.
    """
    if not is_launched():
        return bool(command.launch or command.launch_flags)
    if command.launch_flags:
        raise SGOPDConfigError(
            f"Launcher flags must come before `-m sg_opd_trl.cli`, got {command.launch_flags} after it. This process "
            "is already launched and they would have no effect. Move them, or start with `sg-opd train`."
        )
    if command.launch and EXPECTED_PROCESSES not in os.environ:
        logger.warning("launched from outside: the recipe's launcher keys %s are not applied", sorted(command.launch))
    return False


def launch(command: CommandLine, words_after: Sequence[str], *, debug: bool, name: str = "train") -> int:
    """Run `sg-opd train`, or another command, in the processes that accelerate starts, and wait for them.

    Args:
        command: sorted command line; its launch keys go to accelerate.
        words_after: what the processes get after the command's name.
        debug: show full tracebacks.
        name: of the command.

    Returns:
        0, or the exit status of the first process that failed, or the one that shells expect of a signal.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [*launch_words(command), "-m", "sg_opd_trl.cli", *(["--debug"] if debug else []), name, *words_after]
    parser = launch_command_parser()
    parser.exit_on_error = False  # its own way is to print its usage and leave
    try:
        arguments = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise SGOPDConfigError(f"The keys for accelerate are not valid: {error}. Correct the value.") from error
    expected = arguments.num_processes or _configured_processes(arguments.config_file)
    os.environ |= {EXPECTED_PROCESSES: str(expected or ""), LAUNCHER: describe_launcher()}
    try:
        with _own_signal_handlers():
            launch_command(arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        # The processes have ended by it too, and have said so.
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:
        return error.returncode
    finally:
        del os.environ[EXPECTED_PROCESSES], os.environ[LAUNCHER]
    return 0


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Take back what torch's launcher does to signals, which it does not: this process may go on and train."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _LAUNCHERS_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that is not Python's and cannot be given back.
            if handler is not None:
                signal.signal(number, handler)


def launch_words(command: CommandLine) -> list[str]:
    """Words for accelerate's parser: the recipe's keys first, so that flags win.

    Raises:
        SGOPDConfigError: an accelerate configuration that does not exist, or a value that is no word.
    """
    flags, config = pop_option(command.launch_flags, ACCELERATE_CONFIG)
    recipe = dict(command.launch)
    config = config or recipe.pop(ACCELERATE_CONFIG, None)
    recipe.pop(ACCELERATE_CONFIG, None)
    words = ["--config_file", str(_readable(find_accelerate_config(config)))] if config else []
    defaults = accelerate_defaults()
    for key, value in recipe.items():
        words += _launch_word(key, value, is_switch=defaults[key] is False)
    return words + flags


def find_accelerate_config(name: str) -> Path:
    """File of an accelerate configuration.

    Args:
        name: path, or name of one in `recipes/accelerate_configs/` or shipped with TRL (`zero2`, `fsdp2`, ...).

    Raises:
        SGOPDConfigError: neither.
    """
    if Path(name).is_file():
        return Path(name)
    folders = [Path(str(importlib.resources.files("trl"))) / "accelerate_configs"]
    clone = recipes_folder()
    if clone is not None:
        folders.insert(0, clone / "accelerate_configs")
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise SGOPDConfigError(
        f"`accelerate_config` must be a file or one of {known}, got {name!r}.{did_you_mean(name, known)}"
    )


def _readable(path: Path) -> Path:
    """A configuration that accelerate can read, seen before it starts anything."""
    from accelerate.commands.config import load_config_from_file

    with concerning(ACCELERATE_CONFIG, str(path)):
        load_config_from_file(str(path))
    return path


def check_world_size(num_processes: int) -> None:
    """Refuse to train on fewer processes than were asked for.

    Raises:
        SGOPDConfigError: accelerate started another number of processes, or torchrun did and each trains alone.
    """
    expected = os.environ.get(EXPECTED_PROCESSES)
    started = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
    if not expected and num_processes == 1 and int(started) > 1:
        raise SGOPDConfigError(
            f"`use_cpu` must be true for processes without an accelerator that a launcher has started, got {started} "
            "of them, each of which would train alone. Set use_cpu: true, or start them where they find accelerators."
        )
    if expected and int(expected) != num_processes:
        raise SGOPDConfigError(
            f"`num_processes` must be the number of processes that train, got {expected} while {num_processes} runs. "
            "accelerate starts a single process on a CPU unless told otherwise. Set `multi_gpu` (it also means "
            "several CPU processes)."
        )


def _launch_word(key: str, value: Any, *, is_switch: bool) -> list[str]:
    if value is None or (is_switch and value is False):
        return []
    if is_switch and value is True:
        return [f"--{key}"]
    if isinstance(value, (list, dict)):
        raise SGOPDConfigError(
            f"`{key}` must be a single value, got {value!r}. It is passed to accelerate's launcher as a flag."
        )
    return [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]


def _configured_processes(config_file: str | None) -> int | None:
    if config_file is None:
        return None
    config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
    return config.get("num_processes") if isinstance(config, dict) else None
