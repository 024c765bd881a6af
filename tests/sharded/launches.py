"""The launches that a run may be started by, each on two gloo ranks and with the configuration that is shipped."""

import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from repository import ROOT
from two_ranks import launch, run_module

#: name -> file of recipes/accelerate_configs; None is what accelerate does without one.
LAUNCHES = {"ddp": None, "fsdp2": "fsdp", "zero2": "zero2", "zero3": "zero3"}
#: Launches that split the weights themselves: a forward is a collective operation.
SHARDED = ("fsdp2", "zero3")
#: Seconds after which a collective that not all ranks take part in ends its process.
COLLECTIVE_PATIENCE = 30

DEEPSPEED = os.environ.get("SG_OPD_DEEPSPEED", "")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not DEEPSPEED, reason="`make test-distributed` installs DeepSpeed and starts two ranks"),
]
_VARIABLES = {
    "DS_ACCELERATOR": "cpu",
    # PyTorch keeps what a rank exchanges, in order.
    "TORCH_FR_BUFFER_SIZE": "100000",
    # A rank that is to be a device has bfloat16, as these do.
    "SG_OPD_TEST_BF16": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


def launch_ranks(kind: str, *words: str, timeout: float) -> CompletedProcess[str]:
    """Run a script on two ranks by a launch of this kind."""
    extra: dict[str, Any] = {"timeout": timeout, "folders": [Path(DEEPSPEED)], **_VARIABLES}
    name = LAUNCHES[kind]
    if name is None:
        return launch(*words, **extra)
    config = str(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml")
    flags = ["--config_file", config, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    return run_module("accelerate.commands.launch", *flags, *words, **extra)
