"""A run on two machines: two launchers with one rank each, on addresses of their own, a teacher on a third."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from repository import PATIENCE, ROOT, python_path
from teachers.model_server import model_server
from test_restart import facts
from tiny import same_saved_student
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl.checkpoints import check_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*trl.experimental.*")]

#: Seconds in which the machine that is left has ended.
A_MINUTE = 60
MACHINES = ("127.0.0.1", "127.0.0.2")
TEACHER = "127.0.0.3"
SETTINGS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "resume_from_checkpoint": True,
    # A teacher that writes, too, before the kill and after it.
    "teacher_sampling_phase1_end_frac": 0.5,
    "teacher_sampling_phase2_end_frac": 1.0,
    "teacher_sampling_filter_correct": False,
    "gate_dead_zone": 0.0001,
}


@pytest.fixture(scope="module", autouse=True)
def addresses() -> None:
    """Linux has all of 127.0.0.0/8; elsewhere a machine has to be given them."""
    for address in (*MACHINES, TEACHER):
        try:
            socket.create_server((address, 0)).close()
        except OSError:
            pytest.skip(f"{address} is not an address of this machine")


class Hold:
    """Has the teacher's answers wait from the moment that a file is there, until they are let go."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.over = threading.Event()

    def wait(self) -> None:
        if self.file is not None and self.file.exists():
            self.over.wait(PATIENCE)


@pytest.fixture
def hold() -> Iterator[Hold]:
    hold = Hold()
    yield hold
    hold.over.set()


@pytest.fixture
def recipe(tiny, tiny_recipe: Path, hold: Hold) -> Iterator[Path]:
    """Of a run whose teacher is served from the third address."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    server = model_server(
        AutoModelForCausalLM.from_pretrained(tiny.teacher),
        tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        model=tiny.teacher,
        host=TEACHER,
    )
    answer = server.logps
    server.logps = lambda ids: (hold.wait(), answer(ids))[1]
    with server:
        lines = tiny_recipe.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.partition(":")[0] not in SETTINGS]
        more = SETTINGS | {"teacher_model_server_url": server.url}
        tiny_recipe.write_text("\n".join([*kept, *(f"{name}: {json.dumps(more[name])}" for name in more)]) + "\n")
        yield tiny_recipe


def free_port() -> str:
    with socket.create_server((MACHINES[0], 0)) as server:
        return str(server.getsockname()[1])


def torchrun(*words: str) -> list[str]:
    return ["-m", "torch.distributed.run", *words, "-m", "sg_opd_trl.cli", "train"]


def agents(port: str) -> list[list[str]]:
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{MACHINES[0]}:{port}", "--rdzv-id", "a run")
    each = ("--nnodes", "2", "--nproc-per-node", "1", *meeting)
    return [torchrun(*each, "--local-addr", address) for address in MACHINES]


@contextmanager
def started(commands: list[list[str]], *words: str, logs: Path) -> Iterator[list[psutil.Popen]]:
    """Each command with the words of the run behind it, its output in a file of its own."""
    environment = os.environ | {
        "PYTHONPATH": python_path(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    try:
        for number, command in enumerate(commands):
            with (logs / f"machine {number}.txt").open("w") as log:
                own = [sys.executable, *command, *words]
                processes.append(psutil.Popen(own, env=environment, stdout=log, stderr=subprocess.STDOUT))
        yield processes
    finally:
        for process in processes:
            kill(process)


def kill(machine: psutil.Popen) -> None:
    """The launcher and what it has started, at once."""
    if machine.is_running():
        for process in [machine, *machine.children(recursive=True)]:
            process.kill()
        machine.wait()


def run(commands: list[list[str]], *words: str, logs: Path) -> list[str]:
    """What every machine says of a run that ends well."""
    with started(commands, *words, logs=logs) as machines:
        statuses = [machine.wait(PATIENCE) for machine in machines]
    said = [(logs / f"machine {number}.txt").read_text() for number in range(len(commands))]
    assert not any(statuses), said
    return said


def logged(folder: Path) -> list[dict]:
    entries = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return [{name: entry[name] for name in entry if "time" not in name} for entry in entries if "loss" in entry]


def test_a_machine_that_dies_and_comes_back(recipe: Path, hold: Hold, tmp_path: Path) -> None:
    words = ("--config", str(recipe), "--output_dir")
    one, two = tmp_path / "one machine", tmp_path / "two machines"
    run([torchrun("--standalone", "--nproc-per-node", "2")], *words, str(one), logs=tmp_path)

    # The step after the checkpoint waits for the teacher, so that the machine dies in it.
    hold.file = two / "checkpoint-2"
    with started(agents(free_port()), *words, str(two), logs=tmp_path) as machines:
        end = time.monotonic() + PATIENCE
        while not (two / "checkpoint-2").exists() and time.monotonic() < end:
            time.sleep(0.01)
        kill(machines[1])
        hold.file = None
        hold.over.set()
        assert machines[0].wait(A_MINUTE) != 0
    said = (tmp_path / "machine 0.txt").read_text()
    assert "Another rank has gone without a word" in said, said
    assert "killed, by the system for its memory perhaps, or with its machine" in said
    assert facts(two)["state"] != "finished"
    check_checkpoint(two / "checkpoint-2")
    assert not (two / "model.safetensors").exists()

    # The same commands, on both.
    run(agents(free_port()), *words, str(two), logs=tmp_path)
    assert same_saved_student(two, one)
    assert logged(two) == logged(one)
    assert len(logged(one)) == SETTINGS["max_steps"]
    assert logged(one)[-1]["teacher/generated_tokens"] > logged(one)[1]["teacher/generated_tokens"] > 0


def test_a_machine_with_a_disk_of_its_own_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    """By accelerate's fields, which start both machines too."""
    fields = ("--accelerate_config", "cpu2", "--num_machines", "2", "--num_processes", "2")
    meeting = ("--main_process_ip", MACHINES[0], "--main_process_port", free_port())
    words = ("--config", str(tiny_recipe), "--save_strategy", "steps", *fields, *meeting)
    commands = [
        ["-m", "sg_opd_trl.cli", "train", "--machine_rank", rank, "--output_dir", str(tmp_path / rank)]
        for rank in ("0", "1")
    ]
    with started(commands, *words, logs=tmp_path) as machines:
        assert [machine.wait(PATIENCE) for machine in machines] == [2, 2]
    for number in (0, 1):
        said = (tmp_path / f"machine {number}.txt").read_text()
        assert f"Error on rank {number}: `output_dir` must be a folder that all machines of a run share" in said, said
        assert not list((tmp_path / str(number)).iterdir())
