"""`full_logits`: reverse KL over the whole vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..heads import OutputHead, project, tiled_token_losses
from ..scoring import TokenBatch
from ..teachers.base import HiddenScores
from ..teachers.reference import Reference
from .base import Objective, Positions, Scores, expect


class FullLogits(Objective):
    """Reverse KL(student || q) over all tokens, q proportional to teacher^lambda * reference^(1 - lambda).

    Lambda 1 is on-policy distillation with the exact gradient in place of the sampled token's (GKD, arXiv:2306.13649,
    at its reverse-KL end); other lambdas are G-OPD's target (arXiv:2602.12125), picked by the token's route. Teacher
    and reference keep hidden states; their logits exist for one tile of positions at a time. Ids that one of the
    models lacks are left out of all distributions.
    """

    matches = True
    routes_targets = True

    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """The teacher's hidden states."""
        return teacher.score_hidden(batch, rows, max_tokens)

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """The reference's hidden states."""
        return reference.score_hidden(batch, rows, max_tokens)

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """The hidden states and each row's head too."""
        logps, hidden_states, heads = expect(scores, HiddenScores, "score_with_teacher")
        return {"teacher_logps": logps, "teacher_hidden_states": hidden_states, "teacher_heads": heads}

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """The hidden states too; where no route extrapolates they are not read."""
        logps, hidden_states, heads = expect(scores, HiddenScores, "score_with_reference")
        entries = {"reference_hidden_states": hidden_states, "reference_heads": heads}
        return super().reference_entries(logps, rows, inputs) | entries

    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Every token."""
        return torch.ones_like(behaviour_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Full-vocabulary reverse KL, tile by tile."""
        teacher = _Distributions(positions, "teacher", self.teacher.output_heads(), self.vocab_size)
        reference, lambdas = None, positions.lambdas
        if self.reference is not None:
            reference = _Distributions(positions, "reference", self.reference.output_heads(), self.vocab_size)

        def token_loss(logits: Tensor, tile: slice) -> Tensor:
            read = reference if bool((lambdas[tile] != 1).any()) else None
            target = core.extrapolated_log_probs(
                teacher.log_probs(tile), None if read is None else read.log_probs(tile), lambdas[None, tile]
            )
            return core.local_support_matching(logits.unsqueeze(0), target).squeeze(0)

        return tiled_token_losses(positions.hidden_states, positions.head, self.vocab_size, token_loss)


class _Distributions:
    """The distributions of frozen models at some positions, from their hidden states."""

    def __init__(self, positions: Positions, role: str, heads: Sequence[OutputHead], vocab_size: int) -> None:
        self.hidden_states = positions.entry(f"{role}_hidden_states")
        self.places = positions.entry(f"{role}_heads") if len(heads) > 1 else None
        # Here and now: the backward runs outside of autocast.
        self.heads = [head.resolved(self.hidden_states) for head in heads]
        self.vocab_size = vocab_size

    def log_probs(self, tile: slice) -> Tensor:
        """`(1, n, V)` float32."""
        if self.places is None:
            return self._of(self.heads[0], self.hidden_states[tile]).unsqueeze(0)
        places = self.places[tile]
        result = self.hidden_states.new_empty(places.size(0), self.vocab_size, dtype=torch.float32)
        for place, head in enumerate(self.heads):
            own = places == place
            result[own] = self._of(head, self.hidden_states[tile][own][:, : head.weight.size(1)])
        return result.unsqueeze(0)

    def _of(self, head: OutputHead, hidden_states: Tensor) -> Tensor:
        return project(hidden_states, head, self.vocab_size).log_softmax(dim=-1)
