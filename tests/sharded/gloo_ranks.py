"""accelerate starts neither FSDP nor DeepSpeed without a device: here a gloo rank of a CPU counts as one.

Sharding, collectives, saving and resuming are real then. NCCL, streams and the memory of a device are not.
"""

import importlib
import os

import accelerate.state as state
import torch

_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def is_sharded_launch() -> bool:
    """Whether accelerate has started this rank to split a model with FSDP or DeepSpeed."""
    return any(_is_on(name) for name in _SWITCHES)


def gloo_ranks_as_devices() -> None:
    """To be called in each rank before accelerate makes its state; a plain launch (DDP) is left as it is."""
    if not is_sharded_launch():
        return
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", state.DistributedType.MULTI_GPU)
    state.PartialState.set_device = _use_cpu
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        # It would compile a module for shared memory, which takes a minute; gloo does the same. Not by `import`: the
        # package has PyTorch itself under the name of this module of its own.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _use_cpu(self: state.PartialState) -> None:
    if self.device is None:
        self.device = torch.device("cpu")
