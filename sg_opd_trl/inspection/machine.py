"""Memory and time of a step, estimated: from counts of parameters and from what the first rollouts took."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from .report import Row

# AdamW keeps two numbers per weight, in its dtype.
_OPTIMIZER_STATES = 2
# Numbers that a layer keeps for the backward pass, per token and unit of its width (arXiv:2205.05198, Table 2: 34
# bytes of 16 bits, attention's own square left out as kernels do not keep it).
_KEPT_BY_A_LAYER = 17
# Forward and backward of a step beside a forward alone; with checkpointing one more forward.
_STEP_FORWARDS, _CHECKPOINTING_FORWARDS = 3, 4
_TIGHT = 0.8
_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that a step needs on one device without sharding, estimated.

    Attributes:
        student: weights, gradients and the optimizer's states.
        others: weights of frozen models.
        activations: of one micro-batch.
    """

    student: int
    others: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.student + self.others + self.activations


def estimated_need(student: Any, others: Iterable[Any], tokens: int, *, checkpointing: bool) -> Need:
    """From the models' parameters and the sizes in the student's configuration.

    Args:
        student: the model.
        others: teachers and references that have weights of their own here.
        tokens: of one micro-batch, padding included.
        checkpointing: whether layers are computed again in the backward pass.
    """
    trained = [each for each in student.parameters() if each.requires_grad]
    own = sum(each.numel() * each.element_size() for each in student.parameters())
    own += (1 + _OPTIMIZER_STATES) * sum(each.numel() * each.element_size() for each in trained)
    frozen = sum(each.numel() * each.element_size() for model in others for each in model.parameters())
    sizes = student.config.get_text_config()
    # Architectures without layers of one width count for their weights alone.
    if not hasattr(sizes, "num_hidden_layers") or not hasattr(sizes, "hidden_size"):
        return Need(own, frozen, 0)
    layers, width = int(sizes.num_hidden_layers), int(sizes.hidden_size)
    kept = _KEPT_BY_A_LAYER + layers if checkpointing else _KEPT_BY_A_LAYER * layers
    return Need(own, frozen, tokens * width * kept * next(student.parameters()).element_size())


def memory_of(device: torch.device) -> int:
    """Bytes that this process could have on its device: all of a GPU; of a host what is free and what it has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    there = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min(there, _container_limit() or there)


def _container_limit() -> int | None:
    """Of the control group, as containers have one; a machine without says nothing of it."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def memory_row(need: Need, there: int) -> Row:
    """Whether it fits."""
    parts = ", ".join(f"{size / _GIB:.2g}" for size in (need.student, need.others, need.activations))
    said = (
        f"About {need.total / _GIB:.2g} GiB are needed and {there / _GIB:.3g} are there (estimate: {parts} for the "
        "student with its optimizer, for frozen models, and for a micro-batch; on one device, nothing sharded)."
    )
    change = (
        "Lower per_device_train_batch_size or max_completion_length, set gradient_checkpointing, train an adapter "
        "(use_peft), or shard (accelerate_config)."
    )
    if need.total > there:
        return Row("memory", "red", said, change)
    return Row("memory", "yellow", said, change) if need.total > _TIGHT * there else Row("memory", "green", said)


def time_row(seconds: Mapping[str, float], sampled: int, rows: int, steps: int, *, checkpointing: bool) -> Row:
    """Seconds of a step, in proportion to its rows.

    Args:
        seconds: of the first rollouts, by part.
        sampled: rollouts of these.
        rows: rollouts of a step, of one process.
        steps: of the run.
        checkpointing: whether layers are computed again in the backward pass.
    """
    forwards = _CHECKPOINTING_FORWARDS if checkpointing else _STEP_FORWARDS
    step = (seconds["rollouts"] + forwards * seconds["student"]) * rows / sampled + seconds.get("anchor", 0.0)
    return Row(
        "time",
        "green",
        f"About {step:.2g} s a step, {step * steps / 60:.0f} min for {steps} steps (estimate: {sampled} rollouts took "
        f"{seconds['rollouts']:.2g} s with their teacher, in proportion to {rows}; a GPU takes less for many at once)",
    )
