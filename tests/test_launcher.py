"""A process that a launcher started ends when the launcher is gone, and no other one does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from repository import PATIENCE, ROOT, python_path

from sg_opd_trl.launcher import LAUNCHER, describe_launcher

#: Starts a rank in a session of its own, as torch's launcher does, says which, and waits.
START = """
import os, subprocess, sys, time
from sg_opd_trl.launcher import LAUNCHER, describe_launcher
if "described" in sys.argv:
    os.environ[LAUNCHER] = describe_launcher()
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(600)
"""
WATCHING = "import time; from sg_opd_trl.launcher import end_with_launcher; end_with_launcher(); {}time.sleep(600)"
READY = "print('ready', flush=True); "


@contextmanager
def launched(rank: str, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """A launcher and its rank."""
    cleared = {name: value for name, value in os.environ.items() if name not in (LAUNCHER, "TORCHELASTIC_RUN_ID")}
    environment = cleared | {"PYTHONPATH": python_path(ROOT)} | variables
    command = [sys.executable, "-c", START, rank, *words]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    started = psutil.Process(int(launcher.stdout.readline()))
    try:
        yield launcher, started
    finally:
        for process in (started, launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "variables"), [(("described",), {}), ((), {"TORCHELASTIC_RUN_ID": "none"})], ids=["ours", "torch's"]
)
def test_a_rank_whose_launcher_is_killed_ends(words: tuple[str, ...], variables: dict[str, str]) -> None:
    """Also one that waits for a store that its launcher held: nothing but the signal's default reaches it there."""
    with launched(WATCHING.format(READY), *words, **variables) as (launcher, rank):
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        rank.wait(PATIENCE)
        assert launcher.stderr is not None
        assert f"The launcher (process {launcher.pid}) is gone" in launcher.stderr.read()


@pytest.mark.slow
def test_a_process_that_nobody_launched_is_left_alone() -> None:
    with launched(WATCHING.format(READY)) as (launcher, rank):
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        launcher.wait()
        time.sleep(3)
        assert rank.is_running()


def ended(described: str) -> subprocess.CompletedProcess[str]:
    """A process that begins when its launcher is described so, and sleeps for three seconds."""
    code = WATCHING.format("").replace("600", "3")
    environment = os.environ | {LAUNCHER: described, "PYTHONPATH": python_path(ROOT)}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_launcher_that_was_gone_before() -> None:
    ours = json.loads(describe_launcher())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for launcher in (ours | {"process": gone.pid}, ours | {"started": ours["started"] - 5}):
        assert ended(json.dumps(launcher)).returncode == -signal.SIGTERM


@pytest.mark.slow
def test_a_clock_that_was_set_meanwhile_ends_nothing() -> None:
    """The system reckons starts from the time of its own, which moves by a second where a clock is set."""
    ours = json.loads(describe_launcher())
    assert ended(json.dumps(ours | {"started": ours["started"] + 1})).returncode == 0


@pytest.mark.slow
def test_a_launcher_on_another_machine_is_not_looked_for_on_this_one() -> None:
    launcher = {"host": socket.gethostname() + "-2", "process": 1, "started": 0.0}
    assert ended(json.dumps(launcher)).returncode == 0


@pytest.mark.parametrize(("words", "status"), [([], 0), (["train", "--config", "not there"], 2)])
def test_a_command_leaves_its_group_before_the_interpreter_ends(words: list[str], status: int, tmp_path: Path) -> None:
    """Threads of gloo that still need it abort the process otherwise, now and then."""
    program = f"""
import atexit, runpy, sys
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
atexit.register(lambda: print("left" if not dist.is_initialized() else "there"))
sys.argv[1:] = {words}
runpy.run_module("sg_opd_trl.cli", run_name="__main__")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": python_path(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (ended.returncode, ended.stdout.split()[-1]) == (status, "left"), ended.stderr
