"""`topk_logits`: teacher top-K local support matching."""

import torch
from torch import Tensor

from .. import core
from ..heads import support_logits
from ..scoring import TokenBatch
from ..teachers.base import SupportScores
from ..teachers.reference import Reference
from .base import Positions, Scores, SupportObjective, expect


class TopKLogits(SupportObjective):
    """Reverse KL to the teacher on its K likeliest tokens, both renormalised there (arXiv:2603.25562).

    Our generalisation: the target on these tokens is proportional to teacher^lambda * reference^(1 - lambda), with the
    lambda of the token's route.
    """

    routes_targets = True

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """The reference's log-probs of the teacher's tokens."""
        return reference.score_on_support(batch, rows, max_tokens, inputs["teacher_support_ids"])

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """The teacher's in rows that no route extrapolates."""
        logps, _, support = expect(scores, SupportScores, "score_with_reference")
        kept = rows.view(-1, 1, 1)
        return super().reference_entries(logps, rows, inputs) | {
            "reference_support_logps": torch.where(kept, support, inputs["teacher_support_logps"])
        }

    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Every token."""
        return torch.ones_like(behaviour_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Local support matching."""
        reference = positions.entry("reference_support_logps") if self.args.needs_reference else None
        target = core.extrapolated_log_probs(
            positions.entry("teacher_support_logps").unsqueeze(0),
            None if reference is None else reference.unsqueeze(0),
            positions.lambdas.unsqueeze(0),
        )
        logits = support_logits(positions.hidden_states, positions.head, positions.entry("teacher_support_ids"))
        return core.local_support_matching(logits.unsqueeze(0), target).squeeze(0)
