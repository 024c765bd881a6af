"""bfloat16 and float16, where a configuration leaves them open or asks for what cannot be had.

TRL turns `bf16` on where nobody has set it, and transformers then refuses the machines that have none. So where nobody
has set it, it is on if the machine computes in bfloat16, and otherwise off, which is said. Who asks for it gets it, or
is refused by name. With `use_cpu` it can always be had: a CPU without such instructions emulates them.

float16 is for the forward alone, of float32 weights and beside a scaler of their gradients, which no CPU has here.
"""

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers.utils import import_utils

from .errors import SGOPDConfigError

logger = logging.getLogger(__name__)

# Of each weight's values, and the share of lost updates from which they are told (our choices).
_LOOKED_AT = 1 << 16
_NOTABLE = 0.5


def accelerator_has_bf16() -> bool:
    """Whether this machine has a GPU or the like that computes in bfloat16, as transformers tells it."""
    return bool(import_utils.is_torch_bf16_gpu_available() or import_utils.is_torch_xla_available())


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions that kernels for bfloat16 use; without them it is emulated, slowly."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_float16(config: Any) -> bool:
    """Whether a run trains beside the CPU, where accelerate computes in float16."""
    return not config.use_cpu and (torch.accelerator.is_available() or import_utils.is_torch_xla_available())


def uses_scaler(accelerator: Any) -> bool:
    """Whether gradients are scaled, and a step is left out where they overflow, by accelerate's or DeepSpeed's scaler.

    Not `args.fp16`: a launch can have it too.
    """
    return accelerator.mixed_precision == "fp16"


def settle_bf16(config: Any) -> None:
    """Switch `bf16` off where nobody has set it and the machine has none, before TRL switches it on.

    Args:
        config: of any method, before the `__post_init__` of TRL's configuration; changed in place.
    """
    if config.bf16 is not None or config.fp16:
        return
    if cpu_has_bf16() if config.use_cpu else accelerator_has_bf16():
        return
    config.bf16 = False
    logger.warning(
        "`bf16` is not set and is off: TRL would switch it on, and %s in bfloat16. The run is in float32. Set bf16 to "
        "false to leave it at that%s.",
        "this CPU does not compute" if config.use_cpu else "this machine has no GPU that computes",
        ", or to true to have bfloat16 emulated" if config.use_cpu else "",
    )


def precision_problems(config: Any) -> Iterator[str]:
    """What is wrong with settings that ask for what the machine does not have, one message each."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
    if (config.fp16 or launched) and not has_float16(config):
        name, value = ("fp16", config.fp16) if config.fp16 else ("mixed_precision", "fp16")
        yield (
            f"`{name}` must not be float16 on a CPU, got {value!r}. accelerate has no float16 there and would train "
            "in float32 without a word, and without the checks that its scaler replaces. Set bf16=True, or leave "
            "both out for float32."
        )
    if config.use_cpu or accelerator_has_bf16():
        return
    for name in ("bf16", "bf16_full_eval"):
        if getattr(config, name):
            yield (
                f"`{name}` must be false on this machine, got {getattr(config, name)!r}. It has no GPU that computes "
                f"in bfloat16. Set {name}=False for float32, or use_cpu=True to have the CPU compute in bfloat16, "
                "which many emulate slowly."
            )


def trained_adapters(model: Any) -> dict[str, torch.Tensor]:
    """The values that a student on a quantized base is given with, before TRL rounds them to bfloat16."""
    if isinstance(model, str) or not is_quantized(model):
        return {}
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def train_in_float32(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> None:
    """Have adapters on a quantized base trained in float32, where TRL puts them into bfloat16.

    There an update below a 256th of a weight is lost without a word: at a learning rate of 1e-5 nearly all of LoRA's
    A stays as it began.

    Args:
        model: the student.
        given: values from before TRL's rounding, by name.
    """
    for name, each in model.named_parameters() if is_quantized(model) else ():
        if each.requires_grad and each.dtype == torch.bfloat16:
            each.data = given.get(name, each.data).to(each.device, torch.float32)


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a model's large weights are in four or eight bits, as transformers tells it."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def check_trained_dtype(model: torch.nn.Module) -> None:
    """Refuse a student with weights that are trained in float16; a frozen base may be in it.

    Raises:
        SGOPDConfigError: names a weight.
    """
    trained = (name for name, each in model.named_parameters() if each.requires_grad and each.dtype == torch.float16)
    coarse = next(trained, None)
    if coarse is not None:
        raise SGOPDConfigError(
            f"`dtype` must not be float16 where weights are trained, got {coarse} of the student in it. Gradients and "
            "updates below 6e-8 are 0 in float16, without a word, and the scaler of `fp16` takes float32 weights "
            "only. Set dtype to float32, with fp16=True if the forward is to be in float16, or to bfloat16."
        )


@torch.no_grad()
def lost_updates(model: torch.nn.Module, update: float) -> float:
    """Share of the weights trained in bfloat16 that an update of this size leaves as they are, from a part of each."""
    lost = total = 0.0
    for each in model.parameters():
        if each.requires_grad and each.dtype == torch.bfloat16 and each.numel():
            part = each.detach().flatten()[:_LOOKED_AT]
            # Up and down: beside a power of two the values of bfloat16 are closer on one side.
            still = torch.stack([(part.float() + step).to(torch.bfloat16) == part for step in (update, -update)])
            lost += each.numel() * float(still.float().mean())
            total += each.numel()
    return lost / total if total else 0.0


def tell_lost_updates(model: torch.nn.Module, args: Any, accelerator: Any) -> None:
    """Warn of a student most of whose updates round to nothing."""
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    # In mixed precision these hold the weights that they train in float32.
    if sharded and accelerator.mixed_precision != "no":
        return
    share = lost_updates(model, args.learning_rate)
    if share > _NOTABLE:
        logger.warning(
            "`dtype` is bfloat16 and `learning_rate` is %g, the size of AdamW's update of a weight: %.0f%% of the "
            "student's trained weights do not move by so little in bfloat16, and nothing of it adds up. Set dtype to "
            "float32, with bf16=True for a forward in bfloat16, or train with LoRA, whose adapters are in float32.",
            args.learning_rate,
            100 * share,
        )
