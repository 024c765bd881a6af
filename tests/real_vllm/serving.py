"""The built-in task with its teacher behind vLLM on this machine's CPU, and the trainers that it teaches."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

TEACHER = "builtin/arithmetic-servable-teacher"
RECIPE = ROOT / "recipes" / "arithmetic" / "sg_opd.yaml"
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` installs vLLM and runs it"),
]
_READY_SECONDS = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server in a process group of its own; `url` is where it is.

    Args:
        words: of `python -m ...`.
        log: file that it writes to.
        port: where it listens.
        variables: of its environment besides.
    """

    def __init__(self, words: list[str], log: Path, port: int, **variables: str) -> None:
        self.words, self.log, self.url = words, log, f"http://127.0.0.1:{port}"
        self.variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
        self._process: subprocess.Popen | None = None

    def start(self) -> "Server":
        """Unless it runs already; `wait` for it."""
        if self._process is not None:
            return self
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.words],
                env=os.environ | self.variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait(self) -> "Server":
        """Until it answers."""
        deadline = time.monotonic() + _READY_SECONDS
        while not self._answers():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"The server did not start. The end of its log:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return self

    def kill(self) -> None:
        """End it with all of its processes, as a machine that fails does."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        if self._process is not None:
            # It may have ended by itself, as one that did not start.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


def served_teacher(folder: str, log: Path, port: int | None = None) -> Server:
    """`sg-opd serve-teacher`, which becomes vLLM's server."""
    port = port or free_port()
    flags = ["--teacher_model_name_or_path", folder, "--teacher_model_server_url", f"http://127.0.0.1:{port}"]
    return Server(["sg_opd_trl.cli", "serve-teacher", "--config", str(RECIPE), *flags], log, port)


def recipe_trainer(folder: Path, **fields: Any) -> Any:
    """The trainer of the recipe with some fields changed; nothing is printed."""
    from sg_opd_trl.cli.parsing import build_settings, read_command_line
    from sg_opd_trl.cli.rewards import load_reward_funcs
    from sg_opd_trl.cli.train import build_trainer, load_data, resolve_names

    quiet = {"output_dir": folder, "disable_tqdm": True, "logging_steps": 1}
    flags = [word for name, value in (quiet | fields).items() for word in (f"--{name}", str(value))]
    settings = build_settings(read_command_line(["--config", str(RECIPE), *flags]))
    resolve_names(settings)
    rewards = load_reward_funcs(settings.script.reward_funcs)
    return build_trainer(settings, rewards, *load_data(settings, rewards))
