"""A teacher whose weights wait in host memory, and are on the device only while it scores or writes.

Nothing changes these weights, so that nothing has to come back: a use copies them to the device and drops the copy at
its end. Several teachers take turns, and the device has room for one of them.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SGOPDConfigError
from ..trl_seam import places_models_itself

logger = logging.getLogger(__name__)


class HostWeights:
    """The weights of a frozen model, in host memory between its uses.

    Args:
        model: its weights move to the host now; its buffers, which are small, to the device for good.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._uses = 0
        self.weights: list[tuple[nn.Parameter, Tensor]] = []
        for weight in model.parameters():
            weight.data = _in_host_memory(weight.data, pinned=device.type == "cuda")
            self.weights.append((weight, weight.data))
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights on the device for the block; blocks may be nested."""
        self._uses += 1
        try:
            if self._uses == 1:
                for weight, host in self.weights:
                    # A copy on a CPU too, so that a run there rehearses what one with a GPU does.
                    weight.data = torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                for weight, host in self.weights:
                    weight.data = host


def _in_host_memory(values: Tensor, *, pinned: bool) -> Tensor:
    host = values.to("cpu")
    return host.pin_memory() if pinned else host


# --- where it has no meaning -----------------------------------------------------------------------------------------
def offload_problem(model: Any) -> str | None:
    """Why the weights of a model cannot wait in host memory, as the end of a sentence; None if they can."""
    if getattr(model, "is_quantized", False):
        return "a quantized model, parts of whose weights are kept where no move reaches them"
    spread = getattr(model, "hf_device_map", None) or {}
    if len(set(map(str, spread.values()))) > 1:
        return "a model that `device_map` has spread over several places"
    return None


def check_can_offload(accelerator: Any) -> None:
    """Refuse weights that somebody else places, and say where nothing is gained.

    Raises:
        SGOPDConfigError: FSDP or DeepSpeed.
    """
    if places_models_itself(accelerator):
        raise SGOPDConfigError(
            "`teacher_offload` must be False with FSDP or DeepSpeed, got True. These place the weights of every "
            "model, a teacher's too, and move them when they need them. Leave it out; a sharded teacher takes its "
            "share of each device, and a teacher behind a server (`teacher_model_server_url`) nothing."
        )
    if accelerator.device.type == "cpu":
        logger.warning(
            "`teacher_offload` saves nothing on this machine: its device is the host. Teachers are copied for each "
            "use all the same."
        )


def check_offloaded(teachers: Mapping[str, Any], reference: Any) -> None:
    """Refuse teachers of which none has weights of its own to move, and one that is the reference too.

    Args:
        teachers: by what messages call them.
        reference: of the run, or None.

    Raises:
        SGOPDConfigError: names the teacher.
    """
    moved = {role: one for role, one in teachers.items() if getattr(one, "host_weights", None) is not None}
    if not moved:
        kinds = ", ".join(sorted({type(one).__name__ for one in teachers.values()}))
        raise SGOPDConfigError(
            f"`teacher_offload` must go with a teacher that has weights of its own in this process, got True with "
            f"{kinds}. An adapter shares the student's weights, which stay, a served teacher has none here, and what "
            "an object of another class holds is not known. Leave it out, or give the teacher's path."
        )
    own = {id(weight) for weight in reference.model.parameters()} if getattr(reference, "model", None) else set()
    for role, one in moved.items():
        if own & set(map(id, one.model.parameters())):
            raise SGOPDConfigError(
                f"`teacher_offload` must be False where the {role} is the reference too, got True with one model for "
                "both. The reference scores when the teacher's weights are away. Leave it out, or give the "
                "reference's path, which loads it once more."
            )
