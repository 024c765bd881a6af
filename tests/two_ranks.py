"""Two gloo ranks on this machine, without a GPU and with one thread each."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from repository import PATIENCE, ROOT, python_path

# On a machine without a GPU this gives two ranks over gloo; `--cpu` would silently start one process.
FLAGS = [
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--main_process_port", "0"),
]


def run_module(
    *words: str, timeout: float = PATIENCE, folders: Sequence[Path] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m WORDS` with the package, the tests' helpers and further folders of modules at hand."""
    environment = os.environ | {
        "PYTHONPATH": python_path(ROOT, ROOT / "tests", *folders),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def launch(*words: str, timeout: float = PATIENCE, **further: Any) -> subprocess.CompletedProcess[str]:
    """Run a script on both ranks; further arguments as for `run_module`."""
    return run_module("accelerate.commands.launch", *FLAGS, *words, timeout=timeout, **further)


COLLECTIVES = [
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "scatter"),
]


@contextmanager
def recorded_collectives() -> Iterator[list[str]]:
    """What this rank exchanges, in order: the operation, and the shapes of the tensors that it is given."""
    calls: list[str] = []
    originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def recording(name: str, original: Callable) -> Callable:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            shapes = [tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            calls.append(f"{name} {shapes}")
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(torch.distributed, name, recording(name, original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
