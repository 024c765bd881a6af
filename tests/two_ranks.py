"""Two gloo ranks on this machine, without a GPU and with one thread each."""

import os
import subprocess
import sys

from repository import PATIENCE, ROOT, python_path

# On a machine without a GPU this gives two ranks over gloo; `--cpu` would silently start one process.
FLAGS = [
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--main_process_port", "0"),
]


def run_module(*words: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` with the package and the tests' helpers at hand."""
    environment = os.environ | {
        "PYTHONPATH": python_path(ROOT, ROOT / "tests"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def launch(*words: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run a script on both ranks."""
    return run_module("accelerate.commands.launch", *FLAGS, *words, timeout=timeout)
