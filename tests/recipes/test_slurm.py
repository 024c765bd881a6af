"""The SLURM script, with commands of SLURM that say what they were asked for, on two machines that are this one."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from repository import PATIENCE, ROOT

SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "scontrol $*" >> "$SAID"; fi',
    # Runs the step on both machines, and forwards a signal to them, as SLURM's does.
    "srun": """shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first; status=$?
# A signal ends a wait.
wait $first $second; exit $status""",
    # Says that it runs when whoever has started it is ready for signals, too.
    "sg-opd": """if [ -n "$SLOW" ]; then trap 'echo ended >> "$SAID"; exit 143' TERM; sleep 1; fi
echo "sg-opd $*" >> "$SAID"
if [ -n "$SLOW" ]; then for _ in $(seq 600); do sleep 0.1; done; fi
exit "${STATUS:-0}\"""",
}


@pytest.fixture
def start(tmp_path: Path):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    said.touch()
    of_slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2"}

    def start(*words: str, **variables: str) -> tuple[subprocess.Popen, Path]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | of_slurm | {"PATH": path, "SAID": str(said), "SLOW": ""} | variables
        return subprocess.Popen(["bash", str(SCRIPT), *words], env=environment), said

    return start


def test_every_machine_starts_one_launcher(start) -> None:
    job, said = start("a recipe.yaml", "--accelerate_config", "zero2", SLURM_GPUS_ON_NODE="8")
    assert job.wait(PATIENCE) == 0
    same = (
        "sg-opd train --config a recipe.yaml --resume_from_checkpoint true --num_machines 2 --num_processes 16 "
        "--main_process_ip node-a --main_process_port 23456 --accelerate_config zero2 --machine_rank"
    )
    assert sorted(said.read_text().splitlines()) == [f"{same} 0", f"{same} 1"]


def test_a_run_that_fails_is_not_put_back(start) -> None:
    job, said = start("recipe.yaml", STATUS="2")
    assert job.wait(PATIENCE) == 2
    assert "requeue" not in said.read_text()


def test_a_job_whose_time_is_over_ends_its_launchers_and_is_put_back(start) -> None:
    job, said = start("recipe.yaml", SLOW="1")
    end = time.monotonic() + PATIENCE
    while said.read_text().count("sg-opd train") < 2 and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.wait(PATIENCE)
    assert said.read_text().splitlines()[2:] == ["ended", "ended", "scontrol requeue 123456"]
