"""The anchor of one optimizer step: the teacher's rollouts, dealt to micro-batches."""

from dataclasses import dataclass

import torch

from ..models.batch import TokenBatch


@dataclass(frozen=True)
class TeacherRollout:
    """One rollout of the teacher: its token ids, whether the anchor uses it, the verdict (None: there is none)."""

    prompt_ids: list[int]
    completion_ids: list[int]
    kept: bool
    verdict: float | None
    cached: bool = False


@dataclass
class AnchorStep:
    """The anchor of one optimizer step on this rank.

    Attributes:
        alpha: its weight.
        total: kept teacher tokens (or rollouts, for `seq_mean`) of the step over all ranks.
        micro_batches: kept rollouts of this rank, by micro-batch; taken from the front.
        alone: whether it is the whole loss of the step (stage 1 of TimeSep).
    """

    alpha: float
    total: float
    micro_batches: list[list[TeacherRollout]]
    alone: bool = False

    def take(self, pad_token_id: int, device: torch.device, multiple: int = 1) -> TokenBatch | None:
        """The rows of the next micro-batch, or None if it has none."""
        rows = self.micro_batches.pop(0) if self.micro_batches else []
        if not rows:
            return None
        prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
        return TokenBatch.from_lists(prompts, completions, pad_token_id, device, multiple)
