"""A step whose loss or gradient is not finite changes nothing; what made it so is kept to be looked at.

One overflow in a long run is no reason to end it, and every one is a reason to look. All ranks see the same counts and
the same gradient norm, so they skip together without asking one another.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import save
from torch import Tensor

from .errors import NonFiniteError
from .files import write_atomically
from .models.batch import TokenBatch
from .precision import uses_scaler
from .run import Run

logger = logging.getLogger(__name__)

# Older releases of torch do not have it.
_WITHOUT_NAN = getattr(torch, "float4_e2m1fn_x2", None)

FOLDER = "skipped_steps"
"""Inside a run's `output_dir`: `step-N-rank-R.safetensors`."""


class SkippedSteps:
    """The steps of a run that changed nothing.

    Args:
        run: whose steps they are.
        most: how many of them in a row a run may have; 0 ends it at the first.

    Attributes:
        total: of this process.
        in_a_row: up to now.
    """

    def __init__(self, run: Run, most: int) -> None:
        self.run, self.most = run, most
        self.total = self.in_a_row = 0
        self._error: NonFiniteError | None = None
        self._batches: list[dict[str, Tensor]] = []

    def begin(self) -> None:
        """A training begins, or goes on: what an earlier one broke off, or skipped in a row, is not of this one."""
        self._error, self._batches, self.in_a_row = None, [], 0

    @property
    def possible(self) -> bool:
        """Not where the weights have moved before anybody is asked, nor beside a scaler, which skips by itself."""
        args: Any = self.run.args
        deepspeed = self.run.accelerator.distributed_type == DistributedType.DEEPSPEED
        # These optimizers update each weight inside the backward pass.
        inside = str(getattr(args.optim, "value", args.optim)).endswith(("lomo", "layerwise"))
        return self.most > 0 and not (deepspeed or inside or uses_scaler(self.run.accelerator))

    @property
    def due(self) -> bool:
        """Whether something of the step under way is not finite."""
        return self._error is not None

    def saw(self, batch: Mapping[str, Any]) -> None:
        """Remember a micro-batch of the step under way; nothing is copied."""
        if self.possible:
            self._batches.append(_tensors(batch))

    @contextmanager
    def excused(self) -> Iterator[None]:
        """What is found not to be finite in here makes the step one that is skipped, where that is possible."""
        try:
            yield
        except NonFiniteError as error:
            if not self.possible:
                raise
            self._error = self._error or error

    def settle(self, step: int) -> None:
        """Account for the step under way, before its update.

        Args:
            step: 1-based optimizer step.

        Raises:
            NonFiniteError: it is one more than may be skipped in a row, or the student's weights themselves are not
                finite; on all ranks.
        """
        error, batches = self._error, self._batches
        self._error, self._batches = None, []
        if error is None:
            self.in_a_row = 0
            return
        if not _weights_are_finite(self.run, self.run.model, together=True):
            # It can only be so again.
            raise error
        self.total += 1
        self.in_a_row += 1
        there = self._written(step, batches, error)
        if self.in_a_row > self.most:
            raise NonFiniteError(
                f"{error} It is step {self.in_a_row} in a row of which that is so, and `max_skipped_steps` allows "
                f"{self.most}. Its batch is in {there}."
            ) from error
        logger.warning(
            "Step %d is skipped: weights and optimizer stay as they are. %s Its batch is in %s. The run ends after "
            "more than %d such steps in a row (`max_skipped_steps`).",
            step,
            error,
            there,
            self.most,
        )

    def _written(self, step: int, batches: list[dict[str, Tensor]], error: NonFiniteError) -> str:
        """Write this rank's rows aside; where they are, or why they are not."""
        args: Any = self.run.args
        rank = self.run.accelerator.process_index
        path = Path(args.output_dir) / FOLDER / f"step-{step}-rank-{rank}.safetensors"
        tensors = {
            f"micro_batch_{number}.{name}": tensor.detach().clone().contiguous().cpu()
            for number, batch in enumerate(batches)
            for name, tensor in batch.items()
        }
        try:
            write_atomically(path, save(tensors, metadata={"step": str(step), "reason": str(error)}))
        except Exception as failure:  # noqa: BLE001  # safetensors has an error of its own for a full disk
            return f"no file, as {path} could not be written ({failure})"
        return str(path)


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, TokenBatch):
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            found |= {f"{name}.{part}": tensor for part, tensor in parts.items() if isinstance(tensor, Tensor)}
    return found


def check_weights_are_finite(run: Run, model: torch.nn.Module, where: str, together: bool) -> None:
    """Refuse to write weights that are not finite.

    Args:
        run: whose student it is.
        model: the student, sharded or not.
        where: what would be written.
        together: whether all ranks are here, and one of them that has such a weight stops all.

    Raises:
        NonFiniteError: names a weight.
    """
    if not _weights_are_finite(run, model, together):
        bad = weight_that_is_not_finite(model) or "on another rank"
        raise NonFiniteError(
            f"{where} is not written: the student's weights are not finite ({bad}). Go back to an older checkpoint, "
            "lower `learning_rate`, or train in float32 or bfloat16."
        )


def weight_that_is_not_finite(model: torch.nn.Module) -> str | None:
    """The name of one, as far as this rank holds it."""
    return next((name for name, weight in model.named_parameters() if not _is_finite(weight)), None)


def _weights_are_finite(run: Run, model: torch.nn.Module, together: bool) -> bool:
    bad = torch.tensor([weight_that_is_not_finite(model) is not None], device=run.accelerator.device)
    return not int((run.accelerator.gather(bad) if together else bad).sum())


def _is_finite(weight: Tensor) -> bool:
    local = own_part(weight)
    if not local.is_floating_point() or local.dtype == _WITHOUT_NAN:
        return True
    # torch tells of none of the eight-bit ones.
    return bool(torch.isfinite(local.float() if local.dtype.itemsize == 1 else local).all())


def own_part(weight: Any) -> Tensor:
    """This rank's shard; of a weight that ZeRO-3 splits, nothing else is there outside of a forward."""
    if hasattr(weight, "to_local"):
        return weight.to_local()
    return weight.ds_tensor if hasattr(weight, "ds_tensor") else weight
