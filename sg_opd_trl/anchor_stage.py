"""Stage 1 of TimeSep (arXiv:2606.09304, Table 3e): the anchor is the whole loss, the student writes nothing."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .core import anchored_loss
from .errors import NonFiniteError
from .scoring import TokenBatch

if TYPE_CHECKING:
    from .anchor import AnchorStep
    from .trainer import SGOPDTrainer


def anchor_only_loss(trainer: "SGOPDTrainer", model: Any, step: "AnchorStep") -> Tensor:
    """Loss of a micro-batch that holds teacher rollouts only.

    A micro-batch without any still runs one forward, on one token that counts nothing: with sharded or replicated
    weights all ranks must take part.

    Args:
        trainer: whose student is trained.
        model: the student as the training loop wraps it.
        step: anchor of the optimizer step.

    Returns:
        0-dim loss, alpha times this rank's part of the anchor.

    Raises:
        NonFiniteError: on every rank, before anything is updated.
    """
    device, padding = trainer.accelerator.device, trainer.tokenizer.pad_token_id
    rows = step.take(padding, device, trainer.width_multiple)
    batch = rows or TokenBatch.from_lists([[padding]], [[padding]], padding, device, trainer.width_multiple)
    input_ids, attention_mask = batch.joined()
    logps = trainer.policy_log_probs(model, input_ids, attention_mask, batch.completion_ids.size(1))
    if rows is None:
        batch = replace(batch, completion_mask=torch.zeros_like(batch.completion_mask))
    anchor = trainer.anchor_loss(logps, batch, step.total)
    _report(trainer, anchor.detach())
    return anchored_loss(anchor.new_zeros(()), anchor, step.alpha, trainer.accelerator.num_processes)


def _report(trainer: "SGOPDTrainer", anchor: Tensor) -> None:
    """Log the anchor's loss over all ranks, and stop all of them if it is not finite anywhere."""
    total = float(trainer.accelerator.reduce(anchor.float(), reduction="sum"))
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The anchor's loss of step {trainer.state.global_step + 1} is {total}. Nothing was updated in this step. "
            "Check the student's weights, lower `learning_rate`, or train in float32 or bfloat16."
        )
    trainer.metrics.add("train", "anchor/loss", total, float(trainer.accelerator.sync_gradients))
